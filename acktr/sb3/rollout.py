"""A finished rollout as flat tensors, and the terms of the objectives on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Generator, Tensor

from acktr.likelihood import Outputs, PolicyLikelihood
from acktr.sb3.networks import prepare
from acktr.tree import take_rows


@dataclass(frozen=True)
class Rollout:
    """N = environments × steps transitions, time running fastest within each environment."""

    observations: Any
    """Tensor or dictionary of tensors, [N, ...]."""
    actions: Tensor
    """As drawn, before any clipping to the action space: [N] or [N, D]."""
    log_probs: Tensor
    """Of the actions under the policy that drew them, [N]."""
    advantages: Tensor
    """GAE, [N]; standardised if asked."""
    returns: Tensor
    """The critic's targets, GAE plus the old values, [N]."""
    values: Tensor
    """The critic's predictions when the actions were taken, [N]."""

    def __len__(self) -> int:
        return len(self.returns)

    def seen_by(self, policy: ActorCriticPolicy) -> Rollout:
        """The same rollout with observations prepared once for all passes through the policy's networks.

        Args:
            policy: whose networks.

        Returns:
            A rollout of floating observations.
        """
        return replace(self, observations=prepare(policy, self.observations))

    def rows(self, rows: Tensor | slice) -> Rollout:
        """A part of the rollout.

        Args:
            rows: indices, shape [M]; a slice of them makes no copy.

        Returns:
            A rollout of M transitions.
        """
        return Rollout(*(take_rows(getattr(self, name), rows) for name in self.__dataclass_fields__))

    def shuffled(self, generator: Generator) -> Rollout:
        """The same transitions in random order.

        Args:
            generator: source of the order.

        Returns:
            A rollout as long as this.
        """
        return self.rows(torch.randperm(len(self), generator=generator).to(self.returns.device))

    def minibatches(self, n_epochs: int, n_minibatches: int, generator: Generator) -> Iterator[Rollout]:
        """Shuffled parts, each transition once per epoch; the rollout itself if there is one part.

        Args:
            n_epochs: passes over the rollout.
            n_minibatches: parts per pass.
            generator: source of the shuffles.

        Yields:
            Parts of as equal size as can be.
        """
        for rows in self.orders(n_epochs, n_minibatches, generator):
            yield self.rows(rows)

    def orders(self, n_epochs: int, n_minibatches: int, generator: Generator) -> Iterator[Tensor | slice]:
        """The rows of `minibatches`, for who reads some of the fields only.

        Args:
            n_epochs: passes over the rollout.
            n_minibatches: parts per pass.
            generator: source of the shuffles.

        Yields:
            Indices; a slice of everything if there is one part.
        """
        for _ in range(n_epochs):
            if n_minibatches == 1:
                yield slice(None)
            else:
                yield from torch.randperm(len(self), generator=generator).to(self.returns.device).chunk(n_minibatches)


def time_major(arrays: Any, device: torch.device) -> Any:
    """A buffer's array [steps, environments, ...], or a dictionary of them, as tensors [steps · environments, ...].

    Args:
        arrays: of an SB3 buffer.
        device: where they are wanted.

    Returns:
        The same nest of tensors; float64 becomes float32, which is what networks take.
    """
    if isinstance(arrays, dict):
        return {key: time_major(value, device) for key, value in arrays.items()}
    tensor = torch.as_tensor(arrays, device=device)
    return (tensor.float() if tensor.dtype == torch.float64 else tensor).flatten(0, 1)


def flatten_rollout(buffer: RolloutBuffer, device: torch.device, standardise: bool) -> Rollout:
    """Read a full SB3 buffer once, without its per-minibatch copies.

    Args:
        buffer: full, with advantages computed.
        device: where the update runs.
        standardise: whether advantages get mean 0 and variance 1 over the whole rollout.

    Returns:
        The rollout.
    """
    actions, advantages = _environment_major(buffer.actions, device), _environment_major(buffer.advantages, device)
    if standardise:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return Rollout(
        observations=_environment_major(buffer.observations, device),
        actions=actions.squeeze(-1).long() if not buffer.action_dim or _discrete(buffer) else actions,
        log_probs=_environment_major(buffer.log_probs, device),
        advantages=advantages,
        returns=_environment_major(buffer.returns, device),
        values=_environment_major(buffer.values, device),
    )


def _environment_major(arrays: Any, device: torch.device) -> Any:
    if isinstance(arrays, dict):
        return {key: _environment_major(value, device) for key, value in arrays.items()}
    return time_major(arrays.swapaxes(0, 1), device)


def _discrete(buffer: RolloutBuffer) -> bool:
    return hasattr(buffer.action_space, "n")


def check_finite(**arrays: Any) -> None:
    """Refuse a rollout that would poison the networks.

    Args:
        arrays: what was collected, by name; dictionaries of arrays too.

    Raises:
        FloatingPointError: if anything is NaN or infinite.
    """
    parts = {name: value.values() if isinstance(value, dict) else [value] for name, value in arrays.items()}
    broken = [name for name, values in parts.items() if not all(np.isfinite(value).all() for value in values)]
    if broken:
        raise FloatingPointError(
            f"the rollout's {' and '.join(broken)} are not finite; nothing was learned from it: "
            "stable_baselines3's VecCheckNan around the environment tells where the first NaN or Inf comes from"
        )


def policy_loss(
    likelihood: PolicyLikelihood, outputs: Outputs, batch: Rollout, clip_range: float, ent_coef: float
) -> Tensor:
    """−E[min(r A, clip(r, 1 ± ε) A)] − c_H E[H], r = π(a)/π_old(a) (Schulman et al. 2017, equation 7).

    At a rollout's first step r = 1 and the gradient is the policy gradient −E[A ∇log π].

    Args:
        likelihood: of the actions.
        outputs: the actor's, on the batch's observations.
        batch: part of a rollout.
        clip_range: ε > 0.
        ent_coef: c_H ≥ 0.

    Returns:
        Scalar.
    """
    ratio = (likelihood.log_prob(outputs, (batch.actions,)) - batch.log_probs).exp()
    gain = torch.minimum(ratio * batch.advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * batch.advantages)
    return -gain.mean() - ent_coef * likelihood.entropy(outputs).mean()
