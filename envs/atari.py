"""Atari games on the emulator's own C++ threads, as a Stable-Baselines3 vector environment.

Three ends have to be told apart: the loss of a life (the learner's episode ends if it asks for that, the game goes
on), the end of the game, and the frame limit (the game is cut, its value is not zero). The emulator's vector
environment restarts finished games within the step, clips rewards, and loses the score if told to clip, so it runs
unclipped here, and scores, clipping and ends are computed from its raw output.

Departures from the protocol of the first deep-RL papers, all of the native environment: FIRE precedes the no-ops,
which number 0 to ``noop_max - 1`` rather than 1 to ``noop_max``; FIRE is not pressed again after a lost life; the
first observation is padded with black screens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from envs.atari_screen import ScreenTwin
from envs.errors import WorldError
from envs.native import NativeVecEnv
from envs.options import AtariOptions

FRAMES_PER_SECOND = 60
_SEED_RANGE = 2**31  # the emulator takes a C int and reads negative ones as "no seed"


class AtariVecEnv(NativeVecEnv):
    """``n_envs`` copies of one Atari game, stepped together.

    Observations are stacks of grey screens, uint8 in [0, 255], shape (n_envs, frame_stack, screen_size, screen_size),
    oldest screen first: an image space with its channels first, which ``CnnPolicy`` takes as it is. A step's infos
    are empty except where the learner's episode ended:

    * ``terminal_observation``: what the agent would have seen next;
    * ``TimeLimit.truncated``: the frame limit cut the game (bootstrap from the terminal observation);
    * ``episode``: only where the *game* ended, ``r`` its raw score over all lives, ``l`` its agent steps, ``t`` the
      seconds since this object was made.

    Args:
        game: The ROM's name in snake case, e.g. ``"space_invaders"``.
        n_envs: Number of games, at least 1.
        options: The protocol; None for the published one.
        render_mode: ``"rgb_array"`` for pictures through ``render()`` and ``get_images()``, at the price of playing
            every game twice; None for no pictures.

    Raises:
        WorldError: If ``render_mode`` is neither.
    """

    _worlds = "Atari games"
    _chosen_in = "AtariOptions"
    _method_remedy = "the vector environment's own methods"

    def __init__(
        self, game: str, n_envs: int, options: AtariOptions | None = None, *, render_mode: str | None = None
    ) -> None:
        if render_mode not in {None, "rgb_array"}:
            raise WorldError(f"render_mode must be 'rgb_array' or None for Atari, got {render_mode!r}")
        self.options = options or AtariOptions()
        self.render_mode = render_mode  # the base class asks for it
        self._native: Any = _native_env(game, n_envs, self.options)
        self._n_actions = int(self._native.single_action_space.n)
        super().__init__(n_envs, self._native.single_observation_space, gym.spaces.Discrete(self._n_actions))
        self.metadata: dict[str, Any] = {**self.metadata, "render_fps": FRAMES_PER_SECOND / self.options.frame_skip}
        self._twins = _twins(game, n_envs, self.options) if render_mode else []
        self._actions = np.zeros(n_envs, dtype=np.int64)
        self._raw_scores = np.zeros(n_envs)
        self._lengths = np.zeros(n_envs, dtype=np.int64)
        self._first_frames = np.zeros(n_envs, dtype=np.int64)
        self._born = time.time()
        self._seeded = self._waiting = self._closed = False

    def reset(self) -> np.ndarray:
        """Start a new game in every environment, with the seeds of the last ``seed`` call if it is new.

        Returns:
            Observations, uint8, shape (n_envs, frame_stack, screen_size, screen_size).
        """
        if self._waiting:
            self._receive()
        if not self._seeded and self._seeds[0] is None:
            self.seed()
        seeds = (
            None
            if self._seeds[0] is None
            else np.array([seed % _SEED_RANGE for seed in self._seeds if seed is not None])
        )
        observations, native_info = self._open_native().reset(seed=seeds)
        for index, twin in enumerate(self._twins):
            twin.reset(None if seeds is None else int(seeds[index]), int(native_info["episode_frame_number"][index]))
        self._seeded = True
        self._reset_seeds()
        self._reset_options()
        self._first_frames = _first_frames(native_info)
        self._raw_scores[:] = 0.0
        self._lengths[:] = 0
        return np.asarray(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Hand the actions to the emulator threads.

        Args:
            actions: Action indices, integers of shape (n_envs,).

        Raises:
            WorldError: If their number is wrong or one is out of range, on which the native environment would hang.
        """
        actions = np.asarray(actions).astype(np.int64, copy=True)
        if actions.shape != (self.num_envs,):
            raise WorldError(f"actions must have shape ({self.num_envs},), one per environment, got {actions.shape}")
        if actions.min() < 0 or actions.max() >= self._n_actions:
            raise WorldError(f"actions must lie in 0 … {self._n_actions - 1}, got {actions.tolist()}")
        self._actions = actions
        self._open_native().send(actions)
        self._waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step handed out by ``step_async``.

        Returns:
            Observations (see ``reset``), the learner's rewards (float32, shape (n_envs,)), ends of the learner's
            episodes (bool, shape (n_envs,)), and one info per environment.
        """
        observations, raw_rewards, terminated, truncated, native_info = self._receive()
        self._raw_scores += raw_rewards
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = terminated | truncated
        if ended.any():
            game_over = self._games_over(native_info)
            for index in np.flatnonzero(ended):
                # Rows of final_obs whose game goes on hold stale memory; their own observation is what comes next.
                final = native_info["final_obs"] if game_over[index] else observations
                infos[index]["terminal_observation"] = final[index].copy()
                infos[index]["TimeLimit.truncated"] = bool(truncated[index] and not terminated[index])
            self._record_scores(game_over, infos)
        rewards = np.sign(raw_rewards) if self.options.clip_rewards else raw_rewards
        return observations, rewards.astype(np.float32), ended, infos

    def _receive(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        observations, rewards, terminated, truncated, native_info = self._open_native().recv()
        self._waiting = False
        for index, twin in enumerate(self._twins):
            twin.step(
                int(self._actions[index]),
                frame=int(native_info["frame_number"][index]),
                episode_frame=int(native_info["episode_frame_number"][index]),
                lives=int(native_info["lives"][index]),
            )
        return observations, rewards, terminated, truncated, native_info

    def _games_over(self, native_info: dict[str, np.ndarray]) -> np.ndarray:
        """Tell which games restarted in this step, and remember when the new ones began.

        Returns:
            Bool, shape (n_envs,).
        """
        first_frames = _first_frames(native_info)
        game_over = np.asarray(first_frames != self._first_frames)
        self._first_frames = first_frames
        return game_over

    def _record_scores(self, game_over: np.ndarray, infos: list[dict[str, Any]]) -> None:
        seconds = round(time.time() - self._born, 6)
        for index in np.flatnonzero(game_over):
            score, length = float(self._raw_scores[index]), int(self._lengths[index])
            infos[index]["episode"] = {"r": score, "l": length, "t": seconds}
        self._raw_scores[game_over] = 0.0
        self._lengths[game_over] = 0

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Show every game as it is now; a game that ended in the last step shows the start of the next one.

        Returns:
            One RGB screen per environment, uint8, shape (height, width, 3).

        Raises:
            WorldError: If the environment was made without pictures.
        """
        if not self._twins:
            raise WorldError("this Atari environment has no pictures; make it with render_mode='rgb_array'")
        return [twin.picture() for twin in self._twins]

    def close(self) -> None:
        """Stop the emulator threads; a second call does nothing."""
        self._native = None
        self._twins = []
        self._closed = True

    def _open_native(self) -> Any:
        if self._closed:
            raise WorldError("this Atari environment is closed; make a new one")
        return self._native

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Read an attribute; the games share all of theirs.

        Args:
            attr_name: An attribute of this object, e.g. ``render_mode``.
            indices: Environments to ask; None for all.

        Returns:
            The value, once per environment asked.
        """
        value = getattr(self, attr_name)
        return [value for _ in self._get_indices(indices)]


def _native_env(game: str, n_envs: int, options: AtariOptions) -> Any:
    from ale_py.vector_env import AtariVectorEnv

    return AtariVectorEnv(
        game,
        n_envs,
        num_threads=options.threads or 0,
        max_num_frames_per_episode=options.max_episode_frames,
        repeat_action_probability=options.sticky_actions,
        full_action_space=options.full_action_space,
        autoreset_mode="SameStep",
        img_height=options.screen_size,
        img_width=options.screen_size,
        stack_num=options.frame_stack,
        frameskip=options.frame_skip,
        noop_max=options.noop_max,
        # Its "episodic_life" restarts the whole game; only life_loss_info lets the game go on.
        episodic_life=False,
        life_loss_info=options.episodic_life,
        reward_clipping=False,
        use_fire_reset=options.fire_reset,
    )


def _twins(game: str, n_envs: int, options: AtariOptions) -> list[ScreenTwin]:
    from ale_py import roms

    return [ScreenTwin(Path(str(roms.get_rom_path(game))), options) for _ in range(n_envs)]


def _first_frames(native_info: dict[str, np.ndarray]) -> np.ndarray:
    """Date the start of each present game: the date changes if and only if a game restarted.

    The emulator's total counter never goes back, so this works however short the games are, where comparing
    episode clocks before and after does not.

    Returns:
        The total frame counter at the start of the game, shape (n_envs,).
    """
    return np.asarray(native_info["frame_number"] - native_info["episode_frame_number"])
