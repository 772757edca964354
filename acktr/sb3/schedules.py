"""Values that develop over training."""

from __future__ import annotations

from collections.abc import Callable

Schedule = float | Callable[[float], float]
"""A constant, or a function of the remaining progress (1 at the start of training, 0 at its end)."""


def at(schedule: Schedule, progress_remaining: float) -> float:
    """A schedule's value now.

    Args:
        schedule: a constant or a function.
        progress_remaining: 1 at the start of training, 0 at its end.

    Returns:
        The value.
    """
    return schedule(progress_remaining) if callable(schedule) else float(schedule)
