"""What environments show and a policy's noise, held within what can be learned from."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from acktr.sb3.state import normaliser_state, restore_normaliser

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR

WIDEST_LOG_STD = 20.0
"""Log standard deviations stay between this and its negative: beyond, a float32 holds no density."""
BROKEN_POLICY = (
    "the policy's outputs are not finite although the observations are: its parameters are broken; "
    "go on from an earlier save"
)


_log = logging.getLogger("acktr.noise")


class Watch:
    """Looks at what environments show that do not look themselves; those of the workbench say `keeps_finite`.

    Args:
        agent: who learns.
        env: its environment.
    """

    def __init__(self, agent: ACKTR, env: VecEnv) -> None:
        self._agent, self._env = agent, env
        self.needed = not getattr(env, "keeps_finite", False)
        """Whether anything has to be looked at."""
        normaliser = agent.update_state.normaliser
        state = normaliser_state(normaliser) if self.needed and normaliser is not None else None
        self._before = deepcopy(state)

    def loses(self, actions: NDArray[Any], observations: Any, rewards: NDArray[Any]) -> bool:
        """Look at one step.

        Where it is not finite the rollout is lost, all environments are reset, and a normaliser has the statistics
        from before.

        Args:
            actions: what the policy did, knowing sound observations.
            observations: what the environments show.
            rewards: what they gave.

        Returns:
            Whether the rollout has to begin again.

        Raises:
            FloatingPointError: if the policy itself is broken, or this rollout is one too many.
        """
        if not self.needed:
            return False
        shown = observations.values() if isinstance(observations, dict) else [observations]
        sound = {"observations": all(map(finite, shown)), "rewards": finite(rewards)}
        broken = [name for name, is_sound in sound.items() if not is_sound]
        if not broken:
            return False
        if not finite(actions):
            raise FloatingPointError(BROKEN_POLICY)
        self._agent.faults.lose(f"the rollout's {' and '.join(broken)} are not finite")
        normaliser = self._agent.update_state.normaliser
        if normaliser is not None and self._before is not None:
            restore_normaliser(normaliser, self._before)
        self._agent._last_obs = self._env.reset()  # type: ignore[assignment]
        self._agent._last_episode_starts = np.ones(self._env.num_envs, dtype=bool)
        return True

    def is_broken(self, info: dict[str, Any]) -> bool:
        """Whether the outcome of an episode's last step is unknown: nothing may be read from it.

        Args:
            info: the step's.

        Returns:
            Whether the environment broke off, or its final observation is not finite.
        """
        final = info.get("terminal_observation")
        if info.get("broken_off") or final is None or not self.needed:
            return bool(info.get("broken_off"))
        parts = final.values() if isinstance(final, dict) else [final]
        if all(finite(np.asarray(part)) for part in parts):
            return False
        self._agent.faults.note("final_observation", "the last observation of an episode is not finite")
        return True


def finite(values: NDArray[Any]) -> bool:
    """Look for NaN and infinity.

    Args:
        values: any shape and type.

    Returns:
        Whether there is none.
    """
    # Both show in a sum of squares, which one call takes; so does a square too large for the type.
    return values.dtype.kind != "f" or bool(np.isfinite(np.vdot(values, values))) or bool(np.isfinite(values).all())


def try_out_noise(agent: ACKTR) -> None:
    """Let a new agent find out how much noise its environment forgives, if its settings say so; the steps count.

    Args:
        agent: before its first rollout.
    """
    env = agent.env
    assert env is not None
    generator, total = agent.update_state.generator, agent._total_timesteps
    trial = agent.actor.noise.try_out(agent.policy, env, total, generator, agent.ranks)
    if trial.steps == 0:
        return
    agent.num_timesteps += trial.steps
    agent.update_state.noise_shift = trial.shift
    agent.actor.noise.keep(agent.policy, 1.0, trial.shift)
    agent._last_obs = env.reset()  # type: ignore[assignment]
    agent._last_episode_starts = np.ones(env.num_envs, dtype=bool)
    if trial.shift:
        std = float(agent.policy.log_std.detach().exp().mean())
        _log.warning("the first noise ends episodes that rest survives: its standard deviation is now %.2g", std)


def hold_noise(agent: ACKTR) -> None:
    """Keep the noise of Box actions within bounds.

    Args:
        agent: whose policy.
    """
    log_std = getattr(agent.policy, "log_std", None)
    if log_std is None:
        return
    widest = float(log_std.detach().abs().max())
    if not widest <= WIDEST_LOG_STD:
        what = f"a log standard deviation of {widest:g} is held within ±{WIDEST_LOG_STD:g}"
        agent.faults.note("log_std", what, alike=True)
        with torch.no_grad():
            log_std.clamp_(-WIDEST_LOG_STD, WIDEST_LOG_STD)
