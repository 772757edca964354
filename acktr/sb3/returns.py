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
    goes_on = continuing(buffer.episode_starts, ends.astype(np.float32))
    last, decay = last_values.cpu().numpy().reshape(-1), buffer.gamma * buffer.gae_lambda * goes_on
    found = advantages(buffer.rewards, buffer.values, last, goes_on, buffer.gamma, decay)
    buffer.advantages, buffer.returns = found, found + buffer.values


def continuing(starts: NDArray[Any], ends: NDArray[Any]) -> NDArray[Any]:
    """Where an episode goes on after a step.

    Args:
        starts: 1 where an episode begins, [steps, environments].
        ends: 1 where the last step ended one, [environments].

    Returns:
        1 or 0, [steps, environments].
    """
    return 1.0 - np.concatenate((starts[1:], ends[None]))


def advantages(
    rewards: NDArray[Any],
    values: NDArray[Any],
    last_values: NDArray[Any],
    goes_on: NDArray[Any],
    gamma: float,
    decay: NDArray[Any],
) -> NDArray[Any]:
    """Sum up discounted temporal differences: A_t = δ_t + d_t A_{t+1}, δ_t = r_t + γ V(s_{t+1}) − V(s_t).

    Args:
        rewards: [steps, environments].
        values: V(s_t), [steps, environments].
        last_values: of the observations after the last step, [environments].
        goes_on: whether s_{t+1} belongs to the same episode, [steps, environments].
        gamma: γ.
        decay: d_t, γλ where the episode goes on (GAE), or less, [steps, environments].

    Returns:
        A_t, [steps, environments].
    """
    found: NDArray[Any] = rewards + gamma * np.concatenate((values[1:], last_values[None])) * goes_on - values
    later: Any = np.zeros_like(found[0])
    for advantage, part in zip(found[::-1], decay[::-1], strict=True):
        advantage += part * later
        later = advantage
    return found
