"""Where a rollout's episodes were cut, and what that is worth to a critic.

A truncated episode goes on unseen: what its last observation is worth belongs to its last reward. Of a step at which an
environment broke off nothing is known: what the policy did there is worth what it was thought to be, which is no
advantage, and nothing new for the critic. Both are said by a critic, and a later one has to say them anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acktr.sb3.rollout import to_device

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR
    from acktr.sb3.watch import Watch


@dataclass(frozen=True)
class Cuts:
    """Rewards, and the episodes that were cut: K truncated ones and B that broke off. On the CPU."""

    rewards: Tensor
    """As the environments gave them, [steps, environments]."""
    truncated: Tensor
    """Step and environment of their last transitions, [K, 2]."""
    finals: Any
    """What they showed last, [K, ...]: a tensor, or a dictionary of such."""
    broken: Tensor
    """Step and environment, [B, 2]."""

    def worth(self, agent: ACKTR, values: NDArray[Any]) -> NDArray[Any]:
        """Add to the rewards what the cuts are worth to the present critic.

        Args:
            agent: whose critic and whose discount.
            values: of the present critic, [steps, environments].

        Returns:
            Shape [steps, environments].
        """
        rewards: NDArray[Any] = self.rewards.numpy().copy()
        if len(self.truncated):
            worth: Tensor = agent.values_of(to_device(self.finals, agent.device))
            steps, envs = self.truncated.numpy().T
            rewards[steps, envs] += agent.gamma * worth.cpu().numpy()
        steps, envs = self.broken.numpy().T
        rewards[steps, envs] = values[steps, envs]
        return rewards


@dataclass
class CutList:
    """The cuts of a rollout that is being collected."""

    truncated: list[tuple[int, int]] = field(default_factory=list)
    finals: list[Any] = field(default_factory=list)
    broken: list[tuple[int, int]] = field(default_factory=list)

    def note(self, step: int, dones: NDArray[np.bool_], infos: list[dict[str, Any]], watch: Watch) -> None:
        """Look at the episodes that a step has ended.

        Args:
            step: which one.
            dones: whose episodes ended.
            infos: one per environment.
            watch: knows a broken one.
        """
        for index in np.flatnonzero(dones).tolist():
            if watch.is_broken(infos[index]):
                self.broken.append((step, index))
            elif infos[index].get("TimeLimit.truncated") and infos[index].get("terminal_observation") is not None:
                self.truncated.append((step, index))
                self.finals.append(infos[index]["terminal_observation"])

    def whole(self, rewards: NDArray[Any], like: Any) -> Cuts:
        """Close the list.

        Args:
            rewards: as the environments gave them, [steps, environments]; copied.
            like: any batch of observations, for the shape of none at all.

        Returns:
            The cuts.
        """
        finals = _stacked(self.finals, like)
        return Cuts(torch.tensor(rewards), _places(self.truncated), finals, _places(self.broken))


def _places(pairs: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def _stacked(finals: list[Any], like: Any) -> Any:
    if isinstance(like, dict):
        return {key: _stacked([final[key] for final in finals], like[key]) for key in like}
    return torch.as_tensor(np.stack(finals) if finals else np.asarray(like)[:0])
