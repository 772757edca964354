"""Values that develop over training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stable_baselines3.common.buffers import RolloutBuffer

    from acktr.sb3.acktr import ACKTR

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


def functions(**schedules: Schedule) -> dict[str, Callable[[float], float]]:
    """Those that are no constants.

    Args:
        schedules: by the names of the agent's attributes.

    Returns:
        Functions of the remaining progress, by name.
    """
    return {name: schedule for name, schedule in schedules.items() if callable(schedule)}


def look_ahead(agent: ACKTR, buffer: RolloutBuffer) -> None:
    """Give the next rollout the discount γ and GAE's λ of its time.

    Args:
        agent: whose `gamma` and `gae_lambda` are set where they are scheduled, and logged.
        buffer: the rollout's; set as the agent.
    """
    for name, schedule in agent.discounting.items():
        value = schedule(max(agent._current_progress_remaining, 0.0))
        setattr(agent, name, value)
        setattr(buffer, name, value)
        agent.logger.record(f"rollout/{name}", value)
