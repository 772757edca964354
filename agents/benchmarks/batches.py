"""How much a learner learns from at a time, read off the agent that was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agents.benchmarks import parts


@dataclass(frozen=True)
class Passes:
    """How a network goes through a rollout."""

    epochs: int
    """Passes over the whole of it."""
    minibatch: int
    """Transitions per gradient step."""

    def __str__(self) -> str:
        return f"{self.epochs} {'epoch' if self.epochs == 1 else 'epochs'} in minibatches of {self.minibatch}"


@dataclass(frozen=True)
class Batch:
    """The transitions of one update and what is done with them."""

    n_envs: int
    """Environments side by side."""
    n_steps: int
    """Steps of each per rollout."""
    passes: Mapping[str, Passes]
    """By the network that steps; ``joint`` steps once for actor and critic, on one trunk or on two networks."""

    def __str__(self) -> str:
        rollout = f"{self.n_envs} × {self.n_steps} = {self.n_envs * self.n_steps} transitions"
        return "; ".join([rollout, *(f"{name} {passes}" for name, passes in self.passes.items())])


def batch_of(algorithm: str, agent: Any) -> Batch:
    """Read off an agent how it learns.

    Args:
        algorithm: ``acktr``, ``a2c``, ``ppo`` or ``trpo``.
        agent: The agent.

    Returns:
        Its rollout, minibatches and epochs.
    """
    size = agent.n_envs * agent.n_steps
    whole = Passes(1, size)
    if algorithm == "acktr":
        settings = {part: parts.settings_of(agent, part) for part in parts.networks_of(agent)}
        passes = {part: Passes(s.n_epochs, math.ceil(size / s.n_minibatches)) for part, s in settings.items()}
    elif algorithm == "ppo":
        passes = {"joint": Passes(agent.n_epochs, agent.batch_size)}
    elif algorithm == "trpo":
        passes = {"actor": whole, "critic": Passes(agent.n_critic_updates, agent.batch_size)}
    else:
        passes = {"joint": whole}
    return Batch(agent.n_envs, agent.n_steps, passes)
