"""Worlds stepped one after the other in this process, without copies that nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.patch_gym import _patch_env

from envs.errors import WorldError
from envs.faults import MAX_FAULTS, Fault, broken_off, told
from envs.single import load_single, save_single

_NEW_SEED = 1_000_003
"""Between the seeds of an environment and of the one built in its place."""


class InProcessVecEnv(DummyVecEnv):
    """Stable-Baselines3's DummyVecEnv without its deep copy of every step's infos, and for worlds that fail.

    The copy was a quarter of a MuJoCo run's time. A world hands out a new info dictionary at every step, and each
    is copied one level deep here, so nothing written into it reaches the world.

    A world that raises is reset; if that fails too, it is built anew. Its info says so (`envs.faults`); a `FiniteGuard`
    outside makes a truncated episode of it.

    Args:
        env_fns: Build the worlds.
        max_faults: Failures of a restart in a row that end the run.
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env[Any, Any]]], max_faults: int = MAX_FAULTS) -> None:
        super().__init__(env_fns)
        self._builders, self._max_faults = list(env_fns), max_faults
        self._built = [0] * len(env_fns)
        self._first_seeds: list[int | None] = [None] * len(env_fns)
        self.reset_faults: dict[int, list[Fault]] = {}
        """What broke in the last reset, by environment."""

    def seed(self, seed: int | None = None) -> Any:
        """Seed the worlds at their next reset.

        Args:
            seed: Of the first; the others count up from it. None for a random one.

        Returns:
            The seeds.
        """
        seeds = super().seed(seed)
        self._first_seeds = list(self._seeds)
        return seeds

    def reset(self) -> VecEnvObs:
        """Begin an episode in every world.

        Returns:
            The first observations, [n_envs, ...].
        """
        self.reset_faults = {}
        for index, world in enumerate(self.envs):
            options = {"options": self._options[index]} if self._options[index] else {}
            try:
                observation, self.reset_infos[index] = world.reset(seed=self._seeds[index], **options)
            except Exception as error:
                observation, faults = self._revived(index, [("raised", told(error))])
                self.reset_faults[index] = faults
            self._save_obs(index, observation)
        self._reset_seeds()
        self._reset_options()
        return self._obs_from_buf()

    def step_wait(self) -> VecEnvStepReturn:
        """Step every world with the actions given to ``step_async``.

        Returns:
            Observations (of the next episode where one ended), rewards [n_envs], ends [n_envs], infos.
        """
        for index, world in enumerate(self.envs):
            try:
                observation, self.buf_rews[index], terminated, truncated, info = world.step(self.actions[index])
            except Exception as error:
                observation, faults = self._restarted(index, [("raised", told(error))])
                self.buf_rews[index], self.buf_dones[index], info = 0.0, True, broken_off(faults)
            else:
                info = {**info, "TimeLimit.truncated": truncated and not terminated}
                self.buf_dones[index] = terminated or truncated
                if self.buf_dones[index]:
                    info["terminal_observation"] = observation
                    observation, faults = self._restarted(index, [])
                    if faults:
                        info["faults"] = faults
            self.buf_infos[index] = info
            self._save_obs(index, observation)
        return self._obs_from_buf(), np.copy(self.buf_rews), np.copy(self.buf_dones), list(self.buf_infos)

    def state_dict(self) -> dict[str, Any]:
        """Write down where every world stands, between two steps.

        Returns:
            The ``worlds``' states, as ``envs.single`` has them, and what seeds those ``built`` in their place.
        """
        seeds = {"built": list(self._built), "first_seeds": list(self._first_seeds)}
        return {"worlds": [save_single(world) for world in self.envs], **seeds}

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
        self._built, self._first_seeds = list(state["built"]), list(state["first_seeds"])
        # Seeds that were to begin the first episodes have no episode to begin.
        self._reset_seeds()
        self._reset_options()

    def restart(self, index: int) -> tuple[Any, list[Fault]]:
        """Begin another episode in one world, which may be a new one.

        Args:
            index: Which.

        Returns:
            Its first observation, and what broke on the way to it.
        """
        return self._restarted(index, [])

    def _restarted(self, index: int, faults: list[Fault]) -> tuple[Any, list[Fault]]:
        try:
            observation, self.reset_infos[index] = self.envs[index].reset()
        except Exception as error:
            return self._revived(index, [*faults, ("raised", told(error))])
        return observation, faults

    def _revived(self, index: int, faults: list[Fault]) -> tuple[Any, list[Fault]]:
        """Build a world anew until one begins an episode; what it is, the broken one may no longer know.

        Returns:
            Its first observation, and the faults so far.

        Raises:
            WorldError: If none does.
        """
        while len(faults) <= self._max_faults:
            self._built[index] += 1
            with suppress(Exception):
                self.envs[index].close()
            try:
                self.envs[index] = _patch_env(self._builders[index]())
                observation, self.reset_infos[index] = self.envs[index].reset(seed=self._next_seed(index))
                return observation, faults
            except Exception as error:
                faults = [*faults, ("raised", told(error))]
        raise WorldError(
            f"environment {index} could not be restarted in {len(faults)} tries: {faults[-1][1]}; mend its reset"
        )

    def _next_seed(self, index: int) -> int | None:
        first = self._first_seeds[index]
        return None if first is None else (first + self._built[index] * _NEW_SEED) % 2**31
