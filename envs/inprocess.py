"""Worlds stepped one after the other in this process, without copies that nobody reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from envs.errors import WorldError
from envs.single import load_single, save_single


class InProcessVecEnv(DummyVecEnv):
    """Stable-Baselines3's DummyVecEnv without its deep copy of every step's infos.

    The copy was a quarter of a MuJoCo run's time. A world hands out a new info dictionary at every step, and each
    is copied one level deep here, so nothing written into it reaches the world.
    """

    def step_wait(self) -> VecEnvStepReturn:
        """Step every world with the actions given to ``step_async``.

        Returns:
            Observations (of the next episode where one ended), rewards [n_envs], ends [n_envs], infos.
        """
        for index, world in enumerate(self.envs):
            observation, self.buf_rews[index], terminated, truncated, info = world.step(self.actions[index])
            info = {**info, "TimeLimit.truncated": truncated and not terminated}
            self.buf_dones[index] = terminated or truncated
            if self.buf_dones[index]:
                info["terminal_observation"] = observation
                observation, self.reset_infos[index] = world.reset()
            self.buf_infos[index] = info
            self._save_obs(index, observation)
        return self._obs_from_buf(), np.copy(self.buf_rews), np.copy(self.buf_dones), list(self.buf_infos)

    def state_dict(self) -> dict[str, Any]:
        """Write down where every world stands, between two steps.

        Returns:
            The ``worlds``' states, as ``envs.single`` has them.
        """
        return {"worlds": [save_single(world) for world in self.envs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, instead of a reset.

        Args:
            state: What it returned, for as many worlds of the same kind.

        Raises:
            WorldError: If it is of other worlds.
        """
        if len(state["worlds"]) != self.num_envs:
            raise WorldError(f"this state is of {len(state['worlds'])} worlds, these are {self.num_envs}")
        for world, single in zip(self.envs, state["worlds"], strict=True):
            load_single(world, single)
        # Seeds that were to begin the first episodes have no episode to begin.
        self._reset_seeds()
        self._reset_options()
