"""Values that develop over training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from stable_baselines3.common.base_class import BaseAlgorithm

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


class Discounting(BaseAlgorithm):
    """An algorithm whose discount γ and whose λ of GAE may be functions of the remaining progress.

    `gamma` and `gae_lambda` are numbers at any time, those of the present rollout.
    """

    gamma_schedule: Callable[[float], float] | None = None
    """What sets `gamma` at each rollout's start; None where it is constant."""
    gae_lambda_schedule: Callable[[float], float] | None = None
    """What sets `gae_lambda`, likewise."""

    @property
    def discounting(self) -> dict[str, Callable[[float], float]]:
        """Those of the two that are no constants, by name."""
        each = {"gamma": self.gamma_schedule, "gae_lambda": self.gae_lambda_schedule}
        return {name: schedule for name, schedule in each.items() if schedule is not None}

    @classmethod
    def load(cls, *arguments: Any, **options: Any) -> Self:
        """Load an agent as Stable-Baselines3 does; what is given here counts more than what the file holds.

        Args:
            arguments: the path and what else `BaseAlgorithm.load` takes.
            options: likewise, and arguments of the constructor, `gamma` and `gae_lambda` as numbers or functions.

        Returns:
            The agent.
        """
        return super().load(*arguments, **{**options, **_settled(options)})


def _settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """A discount or λ, where one is given, as the number that it is at first and the schedule that it has."""
    settled: dict[str, Any] = {}
    for name in ("gamma", "gae_lambda"):
        if name in options:
            settled[name], settled[f"{name}_schedule"] = at(options[name], 1.0), moving(options[name])
    return settled


def moving(schedule: Schedule) -> Callable[[float], float] | None:
    """Tell a function from a constant.

    Args:
        schedule: a constant or a function.

    Returns:
        The function; None for a constant.
    """
    return schedule if callable(schedule) else None


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
