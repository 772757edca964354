"""Values that develop over training."""

from __future__ import annotations

from typing import Any

from agents.config import Decay


def schedule(value: float, decay: Decay) -> Any:
    """Turn a value and its decay into what Stable-Baselines3 calls a schedule.

    Args:
        value: The value at the start.
        decay: How it develops.

    Returns:
        The value itself if it is constant, else a function of the remaining progress.
    """
    if decay == "constant":
        return value
    return LinearDecay(value)


class LinearDecay:
    """A value that falls linearly to 0, as a class so that it pickles with Stable-Baselines3's ``save``.

    Args:
        start: The value at the start of training.
    """

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, remaining: float) -> float:
        """Evaluate the schedule.

        Args:
            remaining: Remaining progress, 1 at the start and 0 at the end.

        Returns:
            The value.
        """
        return self.start * remaining

    def __repr__(self) -> str:
        return f"LinearDecay({self.start})"
