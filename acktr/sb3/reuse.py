"""Earlier rollouts in the policy's gradient: less noise in it, from data that are there already.

A natural gradient from one rollout is noisy. Generalised PPO (Queeney, Paschalidis & Cassandras 2021, theorem 1 and
section 5) lets the rollouts of the last policies take part in each update; so does this. What an action of an earlier
policy μ says of the present one π counts by its importance ratio π(a|s)/μ(a|s), truncated (Ionides 2008), since after a
few steps some ratios would outweigh all others. Its advantage is estimated anew, with the present critic, along traces
that are cut where π would hardly have gone on as μ did: Retrace (Munos et al. 2016, equations 3 and 4), with values of
states for its expectations over actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from acktr.sb3.cuts import Cuts
from acktr.sb3.returns import advantages, continuing
from acktr.sb3.rollout import Rollout, standardised, time_major, to_device

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR


@dataclass(frozen=True)
class Reuse:
    """How much of the past takes part."""

    rollouts: int = 1
    """Earlier rollouts beside the present one, ≥ 1."""
    largest_ratio: float = 1.0
    """Where ratios are truncated, ≥ 1: 1, as in the traces, counts no transition for more than it was, ∞ truncates
    nothing."""

    def __post_init__(self) -> None:
        if not self.rollouts >= 1:
            raise ValueError(f"reuse.rollouts must be at least 1, got {self.rollouts}; None reuses nothing")
        if not self.largest_ratio >= 1:
            raise ValueError(f"reuse.largest_ratio must be at least 1, got {self.largest_ratio}")


@dataclass(frozen=True)
class Collected:
    """A rollout as it was collected, in time: [steps, environments, ...]."""

    observations: Any
    """Tensor or dictionary of tensors, as the networks saw them."""
    actions: Tensor
    """As drawn."""
    log_probs: Tensor
    """Of the actions under the policy that drew them."""
    starts: Tensor
    """1 where an episode begins."""
    last_observations: Any
    """Those after the last step, [environments, ...]."""
    ends: Tensor
    """1 where the last step ended an episode, [environments]."""
    cuts: Cuts
    """The rewards, and what the critic has a say in of them."""

    @classmethod
    def copied(cls, buffer: RolloutBuffer, last_observations: Any, ends: NDArray[Any], cuts: Cuts) -> Collected:
        """Copy a buffer that is full.

        Args:
            buffer: with log-probabilities.
            last_observations: after the last step, [environments, ...].
            ends: whether the last step ended an episode, [environments].
            cuts: with the rewards, which in the buffer hold what the critic of the time has added.

        Returns:
            The rollout, on the CPU.
        """
        observations, actions, log_probs, starts, last = (
            _copied(arrays)
            for arrays in (
                buffer.observations,
                buffer.actions,
                buffer.log_probs,
                buffer.episode_starts,
                last_observations,
            )
        )
        return cls(observations, actions, log_probs, starts, last, _copied(ends.astype(np.float32)), cuts)

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Collected:
        """Build it from its tensors.

        Args:
            state: by the names of the fields, those of the cuts among them.

        Returns:
            The rollout.
        """
        state = to_device(state, torch.device("cpu"))
        cuts = Cuts(**{field.name: state.pop(field.name) for field in fields(Cuts)})
        return cls(**state, cuts=cuts)

    def state_dict(self) -> dict[str, Any]:
        """All tensors by name."""
        mine = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "cuts"}
        return mine | {field.name: getattr(self.cuts, field.name) for field in fields(Cuts)}


class Past:
    """The rollouts that are kept, the newest first."""

    def __init__(self) -> None:
        self.rollouts: list[Collected] = []

    def keep(self, rollout: Collected, count: int) -> None:
        """Remember a rollout, and forget the oldest.

        Args:
            rollout: the newest.
            count: how many stay.
        """
        self.rollouts = [rollout, *self.rollouts][:count]

    def state_dict(self) -> list[dict[str, Any]]:
        """The rollouts' tensors."""
        return [rollout.state_dict() for rollout in self.rollouts]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Restore the rollouts.

        Args:
            state: what `state_dict` returned; rollouts of older files, which do not tell where episodes were cut, are
                forgotten.
        """
        self.rollouts = [Collected.restored(tensors) for tensors in state if "finals" in tensors]


def with_past(agent: ACKTR, rollout: Rollout, reuse: Reuse) -> Rollout:
    """Join an agent's rollout and the ones before it to one that its policy might have collected, and keep it.

    Args:
        agent: before its policy's step.
        rollout: the present one, N transitions.
        reuse: how much of the past takes part.

    Returns:
        M · N transitions of M ≤ 1 + `reuse.rollouts` rollouts. Every M-th row is of the present one, from the first on,
        so that the curvature, which a chain takes from every k-th row, is of the states that the policy is in now
        wherever M divides k.
    """
    past, shape = agent.update_state.past, agent.rollout_buffer.rewards.shape
    # An agent may have been loaded for another number of environments, or of steps.
    fitting = [earlier for earlier in past.rollouts if earlier.cuts.rewards.shape == shape]
    parts = [rollout, *(weighed(agent, earlier, reuse) for earlier in fitting[: reuse.rollouts])]
    ends, cuts = np.asarray(agent._last_episode_starts), agent.update_state.cuts
    if cuts is not None:  # a buffer that was filled by someone else cannot be seen with other eyes
        past.keep(Collected.copied(agent.rollout_buffer, agent._last_obs, ends, cuts), reuse.rollouts)
    return Rollout(*(_joined([getattr(part, field.name) for part in parts]) for field in fields(Rollout)))


@torch.no_grad()
def weighed(agent: ACKTR, earlier: Collected, reuse: Reuse) -> Rollout:
    """See an earlier rollout with the eyes of the present policy and critic.

    Actions' probabilities are the present policy's, so that a clip of later steps on the same rollout is around the
    policy that they begin from, as in generalised PPO's equation 9.

    Args:
        agent: whose policy and critic.
        earlier: T steps of E environments.
        reuse: where ratios are truncated.

    Returns:
        T · E transitions; their advantages are multiplied by the truncated ratios.
    """
    observations = time_major(earlier.observations, agent.device)
    actions = time_major(earlier.actions, agent.device)
    if isinstance(agent.action_space, spaces.Discrete):
        actions = actions.squeeze(-1).long()
    outputs = agent.policy_part(agent.actor_optimizer.outputs(observations))
    log_probs = agent.action_likelihood.log_prob(outputs, (actions,))
    ratios = (log_probs - time_major(earlier.log_probs, agent.device)).exp()
    shape = earlier.cuts.rewards.shape
    values = agent.values_of(observations).view(shape).cpu().numpy()
    last = agent.values_of(to_device(earlier.last_observations, agent.device)).cpu().numpy()
    goes_on = continuing(earlier.starts.numpy(), earlier.ends.numpy())
    decay = agent.gamma * agent.gae_lambda * goes_on
    decay[:-1] *= ratios.clamp(max=1.0).view(shape).cpu().numpy()[1:]
    found = advantages(earlier.cuts.worth(agent, values), values, last, goes_on, agent.gamma, decay)
    returns, flat = found + values, torch.as_tensor(found, device=agent.device).flatten()
    if agent.normalize_advantage:
        least = 0.0 if agent.actor.scale is None else agent.update_state.spread.least
        flat = standardised(flat, agent.ranks, least)
    seen = Rollout(
        observations,
        actions,
        log_probs,
        flat * ratios.clamp(max=reuse.largest_ratio),
        time_major(returns, agent.device),
        time_major(values, agent.device),
    )
    return seen.seen_by(agent.acting_network)


def _copied(arrays: Any) -> Any:
    if isinstance(arrays, dict):
        return {key: _copied(value) for key, value in arrays.items()}
    return torch.as_tensor(np.array(arrays))


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    joined: Tensor = torch.stack(parts, 1).flatten(0, 1)
    return joined
