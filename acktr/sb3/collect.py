"""The rollout: acting, and nothing else, at every step; values, log-probabilities and returns once at its end.

Stable-Baselines3's own loop runs the critic, builds distributions and copies rows at every step. A step here is one
pass through the actor and one through the environments; what only the update reads is computed on the whole rollout
in one batch. The buffer is Stable-Baselines3's, and callbacks see its names in their locals (all but
`obs_tensor`, `values`, `log_probs`, `idx` and `done`, which no step needs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from acktr.likelihood import Outputs, PolicyLikelihood
from acktr.sb3.acting import RolloutActor
from acktr.sb3.cuts import CutList, Cuts
from acktr.sb3.meeting import Meeting, meeting_of
from acktr.sb3.returns import estimate
from acktr.sb3.rollout import check_finite, time_major
from acktr.sb3.schedules import look_ahead
from acktr.sb3.watch import BROKEN_POLICY, Watch

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR

Observations = Any
"""An array [n_envs, ...], or a dictionary of such."""


def collect(
    agent: ACKTR, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
) -> bool:
    """Fill the buffer with `n_rollout_steps` steps of every environment.

    Args:
        agent: whose policy acts.
        env: stepped.
        callback: called as Stable-Baselines3 does.
        rollout_buffer: reset and filled, returns and advantages included.
        n_rollout_steps: the buffer's size.

    Returns:
        Whether the buffer is full; False if the callback stopped it.
    """
    agent.policy.set_training_mode(False)
    look_ahead(agent, rollout_buffer)
    rollout_buffer.reset()
    callback.on_rollout_start()
    if agent.exploration is not None:
        agent.exploration.draw()
    meeting = meeting_of(agent, env)
    if not meeting.after(lambda: _fill(agent, env, callback, rollout_buffer, n_rollout_steps, meeting)):
        return False
    agent.faults.record(agent.logger.record)
    callback.update_locals(locals())
    callback.on_rollout_end()
    return True


def _fill(
    agent: ACKTR,
    env: VecEnv,
    callback: BaseCallback,
    rollout_buffer: RolloutBuffer,
    n_rollout_steps: int,
    meeting: Meeting,
) -> bool:
    """Fill the buffer with this process's part, which waits for no other.

    Returns:
        Whether it is full; False if the callback stopped it.
    """
    actor, cuts, watch = RolloutActor(agent, n_rollout_steps, env.num_envs), CutList(), Watch(agent, env)
    clip, n_steps = _clipper(agent.action_space), 0
    while n_steps < n_rollout_steps:
        actions = actor.act(n_steps, agent._last_obs)
        clipped_actions = clip(actions)
        new_obs, rewards, dones, infos = env.step(clipped_actions)
        agent.num_timesteps += meeting.envs
        if watch.loses(actions, new_obs, rewards):
            rollout_buffer.reset()
            actor, cuts, n_steps = RolloutActor(agent, n_rollout_steps, env.num_envs), CutList(), 0
            continue
        callback.update_locals(locals())
        if not callback.on_step():
            return False
        if any(infos):  # native worlds have nothing to say at most steps
            meeting.hear(infos, dones)
            agent.faults.take(infos)
            cuts.note(n_steps, dones, infos, watch)
        _store(rollout_buffer, n_steps, agent._last_obs, actions, rewards, agent._last_episode_starts)
        agent._last_obs, agent._last_episode_starts = new_obs, dones  # type: ignore[assignment]
        n_steps += 1
    _finish(agent, rollout_buffer, actor.outputs(), cuts.whole(rollout_buffer.rewards, agent._last_obs))
    return True


def _clipper(space: spaces.Space[Any]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    # A Gaussian has no bounds, the environment has. The buffer keeps the action that was drawn.
    if not isinstance(space, spaces.Box):
        return lambda actions: actions
    low, high = space.low, space.high
    return lambda actions: np.minimum(np.maximum(actions, low), high)  # np.clip's result in a third of its time


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


@torch.no_grad()
def _finish(agent: ACKTR, buffer: RolloutBuffer, outputs: Outputs, cuts: Cuts) -> None:
    """Log-probabilities, values, bootstraps of truncated episodes, returns and advantages."""
    shape = buffer.rewards.shape
    likelihood: PolicyLikelihood = agent.action_likelihood
    actions = time_major(buffer.actions, agent.device)
    if isinstance(agent.action_space, spaces.Discrete):
        actions = actions.squeeze(-1)
    buffer.log_probs[:] = likelihood.log_prob(agent.policy_part(outputs), (actions,)).view(shape).cpu().numpy()
    if not np.isfinite(buffer.log_probs).all():
        raise _blame(buffer)
    values = agent.values_of(time_major(buffer.observations, agent.device), outputs)
    buffer.values[:] = values.view(shape).cpu().numpy()
    agent.update_state.cuts = cuts
    buffer.rewards[:] = cuts.worth(agent, buffer.values)
    last = agent.values_of(obs_as_tensor(agent._last_obs, agent.device))  # type: ignore[arg-type]
    estimate(buffer, last, np.asarray(agent._last_episode_starts))


def _blame(buffer: RolloutBuffer) -> FloatingPointError:
    """Whose fault it is that an action's probability is not finite: the world's (raised at once) or the policy's."""
    check_finite(observations=buffer.observations)
    return FloatingPointError(BROKEN_POLICY)
