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


def nearing(first: float | None, last: float, share: float) -> Any:
    """Turn a discount and its first value into what Stable-Baselines3 calls a schedule.

    Args:
        first: The value at the start; None for `last`.
        last: The value after a share of training.
        share: That share.

    Returns:
        The value itself if it is constant, else a function of the remaining progress.
    """
    return last if first is None else NearingHorizon(first, last, share)


class NearingHorizon:
    """A discount whose horizon 1 / (1 − γ) moves from a first to a last one, by equal factors in equal times.

    Args:
        first: The discount at the start of training, in [0, 1].
        last: The discount after that share of training, in [0, 1].
        share: How much of training the way takes, in (0, 1].
    """

    def __init__(self, first: float, last: float, share: float) -> None:
        self.first, self.last, self.share = first, last, share

    def __call__(self, remaining: float) -> float:
        """Evaluate the schedule.

        Args:
            remaining: Remaining progress, 1 at the start and 0 at the end.

        Returns:
            The discount.
        """
        left = max(0.0, 1 - (1 - remaining) / self.share)
        return float(1 - (1 - self.first) ** left * (1 - self.last) ** (1 - left))

    def __repr__(self) -> str:
        return f"NearingHorizon({self.first}, {self.last}, {self.share})"


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
