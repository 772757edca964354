"""The rollout: acting, and nothing else, at every step; values, log-probabilities and returns once at its end.

Stable-Baselines3's own loop runs the critic, builds distributions and copies rows at every step. A step here is one
pass through the actor and one through the environments; what only the update reads is computed on the whole rollout
in one batch. The buffer is Stable-Baselines3's, and callbacks see its names in their locals (all but `values` and
`log_probs`, which do not exist yet).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from acktr.likelihood import Outputs, PolicyLikelihood
from acktr.sb3.rollout import check_finite, time_major

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR

Observations = Any
"""An array [n_envs, ...], or a dictionary of such."""


@dataclass
class Trace:
    """What the steps leave behind for the end of the rollout."""

    outputs: list[Outputs] = field(default_factory=list)
    """The network's outputs, per step, [n_envs, ...]."""
    cuts: list[tuple[int, int, Observations]] = field(default_factory=list)
    """Step, environment and last observation of every truncated episode."""


def collect(agent: ACKTR, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_steps: int) -> bool:
    """Fill the buffer with `n_steps` steps of every environment.

    Args:
        agent: whose policy acts.
        env: stepped.
        callback: called as Stable-Baselines3 does.
        rollout_buffer: reset and filled, returns and advantages included.
        n_steps: the buffer's size.

    Returns:
        Whether the buffer is full; False if the callback stopped it.
    """
    agent.policy.set_training_mode(False)
    rollout_buffer.reset()
    callback.on_rollout_start()
    trace = Trace()
    for step in range(n_steps):
        obs_tensor = obs_as_tensor(agent._last_obs, agent.device)  # type: ignore[arg-type]
        actions, outputs = _act(agent, obs_tensor)
        clipped_actions = _clipped(actions, agent.action_space)
        new_obs, rewards, dones, infos = env.step(clipped_actions)
        agent.num_timesteps += env.num_envs
        callback.update_locals(locals())
        if not callback.on_step():
            return False
        agent._update_info_buffer(infos, dones)
        _store(rollout_buffer, step, agent._last_obs, actions, rewards, agent._last_episode_starts)
        trace.outputs.append(outputs)
        _note_cuts(trace, step, dones, infos)
        agent._last_obs, agent._last_episode_starts = new_obs, dones  # type: ignore[assignment]
    _finish(agent, rollout_buffer, trace)
    callback.update_locals(locals())
    callback.on_rollout_end()
    return True


@torch.no_grad()
def _act(agent: ACKTR, observations: Any) -> tuple[NDArray[Any], Outputs]:
    outputs = agent.acting_network(observations)
    try:
        (actions,) = agent.action_likelihood.sample(agent.policy_part(outputs))
    except RuntimeError as error:  # no class can be drawn from NaN
        raise _blame(agent) from error
    return actions.cpu().numpy().reshape(-1, *agent.action_space.shape), outputs  # type: ignore[misc]


def _clipped(actions: NDArray[Any], space: spaces.Space[Any]) -> NDArray[Any]:
    # A Gaussian has no bounds, the environment has. The buffer keeps the action that was drawn.
    return np.clip(actions, space.low, space.high) if isinstance(space, spaces.Box) else actions


def _store(
    buffer: RolloutBuffer,
    step: int,
    observations: Observations,
    actions: NDArray[Any],
    rewards: NDArray[Any],
    starts: NDArray[Any] | None,
) -> None:
    shelves: Any = buffer.observations
    if isinstance(shelves, dict):
        for key, shelf in shelves.items():
            shelf[step] = observations[key].reshape(shelf.shape[1:])
    else:
        shelves[step] = observations.reshape(shelves.shape[1:])
    buffer.actions[step] = actions.reshape(buffer.actions.shape[1:])
    buffer.rewards[step] = rewards
    buffer.episode_starts[step] = starts
    buffer.pos = step + 1
    buffer.full = buffer.pos == buffer.buffer_size


def _note_cuts(trace: Trace, step: int, dones: NDArray[np.bool_], infos: list[dict[str, Any]]) -> None:
    for index in np.flatnonzero(dones):
        if infos[index].get("TimeLimit.truncated") and infos[index].get("terminal_observation") is not None:
            trace.cuts.append((step, int(index), infos[index]["terminal_observation"]))


@torch.no_grad()
def _finish(agent: ACKTR, buffer: RolloutBuffer, trace: Trace) -> None:
    """Log-probabilities, values, bootstraps of truncated episodes, returns and advantages."""
    shape = buffer.rewards.shape
    outputs: Outputs = tuple(torch.stack(steps).flatten(0, 1) for steps in zip(*trace.outputs, strict=True))
    likelihood: PolicyLikelihood = agent.action_likelihood
    actions = time_major(buffer.actions, agent.device)
    if isinstance(agent.action_space, spaces.Discrete):
        actions = actions.squeeze(-1)
    buffer.log_probs[:] = likelihood.log_prob(agent.policy_part(outputs), (actions,)).view(shape).cpu().numpy()
    if not np.isfinite(buffer.log_probs).all():
        raise _blame(agent, buffer)
    values = agent.values_of(time_major(buffer.observations, agent.device), outputs)
    buffer.values[:] = values.view(shape).cpu().numpy()
    _bootstrap(agent, buffer, trace)
    last = agent.values_of(obs_as_tensor(agent._last_obs, agent.device))  # type: ignore[arg-type]
    buffer.compute_returns_and_advantage(last_values=last, dones=np.asarray(agent._last_episode_starts))


def _blame(agent: ACKTR, buffer: RolloutBuffer | None = None) -> FloatingPointError:
    """Whose fault it is that an action's probability is not finite: the world's (raised at once) or the policy's."""
    check_finite(observations=agent._last_obs if buffer is None else buffer.observations)
    return FloatingPointError(
        "the policy's outputs are not finite although the observations are: its parameters are broken; "
        "go on from an earlier save"
    )


def _bootstrap(agent: ACKTR, buffer: RolloutBuffer, trace: Trace) -> None:
    """A truncated episode goes on unseen: what its last observation is worth belongs to its last reward."""
    if not trace.cuts:
        return
    steps, indices, observations = zip(*trace.cuts, strict=True)
    first = observations[0]
    if isinstance(first, dict):
        stacked: Any = {key: np.stack([o[key] for o in observations]) for key in first}
    else:
        stacked = np.stack(observations)
    values: Tensor = agent.values_of(obs_as_tensor(stacked, agent.device))
    buffer.rewards[list(steps), list(indices)] += agent.gamma * values.cpu().numpy()
