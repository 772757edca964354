"""Transitions of earlier rollouts in the policy's gradient: less noise, from data that are there already.

A natural gradient from one rollout is noisy, and steps have to be short for it. Generalised PPO (Queeney, Paschalidis &
Cassandras 2021, theorem 1 and section 5) lets the last policies' rollouts take part in each update; so does this. What
an action of an earlier policy μ says of the present one π counts by its importance ratio π(a|s)/μ(a|s), truncated
(Ionides 2008), since after a few steps some ratios would outweigh all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from acktr.likelihood import PolicyLikelihood
from acktr.sb3.rollout import Rollout


@dataclass(frozen=True)
class Reuse:
    """How much of the past takes part."""

    rollouts: int = 2
    """Earlier rollouts beside the present one, ≥ 1."""
    largest_ratio: float = 2.0
    """Where ratios are truncated, ≥ 1: 1 counts no transition for more than it was, ∞ truncates nothing."""

    def __post_init__(self) -> None:
        if not self.rollouts >= 1:
            raise ValueError(f"reuse.rollouts must be at least 1, got {self.rollouts}; None reuses nothing")
        if not self.largest_ratio >= 1:
            raise ValueError(f"reuse.largest_ratio must be at least 1, got {self.largest_ratio}")


class Past:
    """The rollouts that are kept, the newest first."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def joined(self, rollout: Rollout, actor: nn.Module, likelihood: PolicyLikelihood, reuse: Reuse) -> Rollout:
        """Join a rollout and those before it, as `with_past`, and keep it for the next.

        Args:
            rollout: the present one, as it was collected, N transitions.
            actor: observations to the parameters of the action distribution, at present.
            likelihood: of the actions.
            reuse: how much of the past takes part.

        Returns:
            Up to (1 + `reuse.rollouts`) · N transitions.
        """
        past, self.rollouts = self.rollouts[: reuse.rollouts], [rollout, *self.rollouts][: reuse.rollouts]
        return with_past(rollout, past, actor, likelihood, reuse)

    def state_dict(self) -> list[dict[str, Any]]:
        """The rollouts' tensors."""
        return [{field.name: getattr(rollout, field.name) for field in fields(Rollout)} for rollout in self.rollouts]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Restore the rollouts.

        Args:
            state: what `state_dict` returned.
        """
        self.rollouts = [Rollout(**tensors) for tensors in state]


@torch.no_grad()
def with_past(
    rollout: Rollout, past: Sequence[Rollout], actor: nn.Module, likelihood: PolicyLikelihood, reuse: Reuse
) -> Rollout:
    """Join a rollout and earlier ones to one that the present policy might have collected.

    An earlier transition's advantage is the one that was estimated then, for the policy that went on from there, times
    its truncated ratio. Its action's probability becomes the present policy's, so that a clip of later steps on the
    same rollout is around the policy that they begin from, as in generalised PPO's equation 9.

    Args:
        rollout: the present one, N transitions, which come first.
        past: earlier ones, as they were collected.
        actor: observations to the parameters of the action distribution, at present.
        likelihood: of the actions.
        reuse: where ratios are truncated.

    Returns:
        (1 + number of earlier rollouts) · N transitions.
    """
    parts = [rollout]
    for earlier in past:
        earlier = earlier.to(rollout.returns.device)
        log_probs = likelihood.log_prob(actor(earlier.observations), (earlier.actions,))
        ratios = (log_probs - earlier.log_probs).exp().clamp(max=reuse.largest_ratio)
        parts.append(replace(earlier, log_probs=log_probs, advantages=ratios * earlier.advantages))
    return Rollout(*(_joined([getattr(part, field.name) for part in parts]) for field in fields(Rollout)))


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    joined: Tensor = torch.cat(parts)
    return joined
