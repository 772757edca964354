"""Values that develop over training."""

from __future__ import annotations

from typing import Any

from agents.stepconfig import Decay


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
    return LinearDecay(value) if decay == "linear" else LinearDecay(value, 0.2)


class LinearDecay:
    """A value that falls linearly to 0, as a class so that it pickles with Stable-Baselines3's ``save``.

    Args:
        start: The value at the start of training.
        part: The last part of training, in which it falls; 1 for all of it.
    """

    def __init__(self, start: float, part: float = 1.0) -> None:
        self.start, self.part = start, part

    def __call__(self, remaining: float) -> float:
        """Evaluate the schedule.

        Args:
            remaining: Remaining progress, 1 at the start and 0 at the end.

        Returns:
            The value.
        """
        return self.start * min(1.0, remaining / self.part)

    def __repr__(self) -> str:
        return f"LinearDecay({self.start}, {self.part})"
