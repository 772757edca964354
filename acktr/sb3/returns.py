"""Generalised advantage estimates of a whole rollout (Schulman et al. 2016)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from torch import Tensor


def estimate(buffer: RolloutBuffer, last_values: Tensor, ends: NDArray[Any]) -> None:
    """Fill in a buffer's advantages and returns.

    The numbers are those of Stable-Baselines3's `compute_returns_and_advantage` to the last bit. There every step in
    time computes all terms; here only the recursion runs step by step. A buffer of another class is asked itself.

    Args:
        buffer: with rewards, values and starts of episodes, [steps, environments].
        last_values: of the observations after the last step, [environments].
        ends: whether the last step ended an episode, [environments].
    """
    if type(buffer) not in {RolloutBuffer, DictRolloutBuffer}:
        buffer.compute_returns_and_advantage(last_values=last_values, dones=ends)
        return
    goes_on = 1.0 - np.concatenate((buffer.episode_starts[1:], ends[None].astype(np.float32)))
    next_values = np.concatenate((buffer.values[1:], last_values.cpu().numpy().reshape(1, -1)))
    advantages = buffer.rewards + buffer.gamma * next_values * goes_on - buffer.values
    later: Any = np.zeros_like(advantages[0])
    for advantage, decay in zip(advantages[::-1], (buffer.gamma * buffer.gae_lambda * goes_on)[::-1], strict=True):
        advantage += decay * later
        later = advantage
    buffer.advantages, buffer.returns = advantages, advantages + buffer.values
