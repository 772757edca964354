"""MuJoCo tasks as a Stable-Baselines3 vector environment whose every step is a few array operations."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from envs.errors import WorldError
from envs.faults import Fault, broken_off
from envs.mujoco.generators import generator, pack, unpack
from envs.mujoco.pictures import Pictures
from envs.mujoco.simulation import simulations
from envs.mujoco.task import Floats, State, Task
from envs.mujoco.views import View
from envs.native import NativeVecEnv


class MujocoVecEnv(NativeVecEnv):
    """``n_envs`` copies of one MuJoCo task, stepped together.

    For the same seeds and actions, states, rewards, ends and random starts are those of gymnasium's environment to the
    last bit. What the agent sees of the states is the view's: gymnasium's observations (float64, shape (n_envs,
    observation)), or images. A step's infos are empty except where an episode ended:

    * ``terminal_observation``: what the agent would have seen next;
    * ``TimeLimit.truncated``: the time limit alone cut the episode (bootstrap from the terminal observation);
    * ``episode``: ``r`` the raw score, ``l`` the steps, ``t`` the seconds since this object was made.

    Args:
        task: What to simulate, and how to judge it.
        n_envs: Number of copies, at least 1.
        view: What the agent sees.
        time_limit: Steps after which an episode is truncated, at least 1; None for no limit.
        threads: Simulation threads, at least 1. One is best for light models and few copies.
        render_mode: ``"rgb_array"`` for pictures through ``render()`` and ``get_images()``, None for none.
        picture_options: Camera and canvas, as gymnasium's constructors name them.

    Raises:
        WorldError: If an argument is outside its range.
    """

    _worlds = "native MuJoCo worlds"
    _chosen_in = "env_kwargs"
    _method_remedy = "backend 'gymnasium' for it"

    def __init__(
        self,
        task: Task,
        n_envs: int,
        *,
        view: View,
        time_limit: int | None,
        threads: int = 1,
        render_mode: str | None = None,
        picture_options: Mapping[str, Any] | None = None,
    ) -> None:
        if render_mode not in {None, "rgb_array"}:
            raise WorldError(f"render_mode must be 'rgb_array' or None for native MuJoCo worlds, got {render_mode!r}")
        if threads < 1:
            raise WorldError(f"threads must be at least 1, got {threads}")
        self.task = task
        self._view = view
        self.render_mode = render_mode  # the base class asks for it
        self._simulations = simulations(task, n_envs, threads)
        self._pictures = Pictures(task.model, picture_options or {}) if render_mode else None
        observations = view.first(self._simulations.state)
        super().__init__(n_envs, view.space(observations), _action_space(task))
        self.metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": int(np.round(1.0 / task.dt))}
        self._time_limit = np.inf if time_limit is None else time_limit
        self._generators = [generator(None) for _ in range(n_envs)]
        self._observations: NDArray[Any] = observations
        self._positions = np.zeros(n_envs)
        self._returns = np.zeros(n_envs)
        self._lengths = np.zeros(n_envs, dtype=np.int64)
        self._actions: NDArray[Any] = np.zeros((n_envs, task.model.nu), dtype=np.float32)
        self._born = time.time()

    def reset(self) -> NDArray[Any]:
        """Start an episode in every environment, with the seeds of the last ``seed`` call if it is new.

        Returns:
            Observations, shape (n_envs, *observation).
        """
        for index, seed in enumerate(self._seeds):
            if seed is not None:
                self._generators[index] = generator(seed)
        self._reset_seeds()
        self._reset_options()
        self._observations = self._restart(range(self.num_envs))
        return self._observations.copy()

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions of the next step.

        Args:
            actions: Actuator commands, shape (n_envs, nu). They are not clipped, which is the caller's.

        Raises:
            WorldError: If their shape is wrong.
        """
        # Their precision is kept: gymnasium's costs of effort are computed in it.
        self._actions = np.ascontiguousarray(actions)
        expected = (self.num_envs, self.task.model.nu)
        if self._actions.shape != expected:
            raise WorldError(f"actions must have shape {expected}, got {self._actions.shape}")

    def step_wait(self) -> VecEnvStepReturn:
        """Simulate, judge, and restart what ended.

        Returns:
            Observations (of the next episode where one ended), rewards (float32, shape (n_envs,)), ends (bool, shape
            (n_envs,)), and one info per environment.
        """
        before, task, state = self._positions, self.task, self._simulations.state
        failed = self._simulations.step(self._actions)
        healthy = task.healthy(state)
        rewards = task.reward(before, state, self._actions, healthy)
        terminated = task.terminated(healthy)
        self._positions = task.position(state)
        self._observations = self._view.next(self._observations, state)
        self._returns += rewards
        self._lengths += 1
        truncated = self._lengths >= self._time_limit
        ended = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if np.count_nonzero(ended):
            self._finish(np.flatnonzero(ended), terminated, infos)
        if failed:
            self._break_off(failed, ended, infos)
        return self._observations.copy(), rewards.astype(np.float32), ended, infos

    def _finish(self, ended: NDArray[np.intp], terminated: NDArray[np.bool_], infos: list[dict[str, Any]]) -> None:
        """Report the episodes of the environments ``ended``, and start new ones there."""
        seconds = round(time.time() - self._born, 6)
        for index in ended:
            infos[index] = {
                "terminal_observation": self._observations[index].copy(),
                "TimeLimit.truncated": not terminated[index],
                "episode": {"r": round(float(self._returns[index]), 6), "l": int(self._lengths[index]), "t": seconds},
            }
        self._observations[ended] = self._restart(ended.tolist())

    def _break_off(self, failed: dict[int, str], ended: NDArray[np.bool_], infos: list[dict[str, Any]]) -> None:
        """Discard the episodes of the environments that MuJoCo cannot go on with, and start new ones there."""
        for index, what in failed.items():
            self.restart(index)
            infos[index], ended[index] = broken_off([("raised", f"environment {index}: {what}")]), True

    def restart(self, index: int) -> tuple[NDArray[Any], list[Fault]]:
        """Begin another episode in one environment.

        Args:
            index: Which.

        Returns:
            Its first observation, and no fault.
        """
        self._observations[[index]] = self._restart([index])
        return self._observations[index].copy(), []

    def _restart(self, indices: Sequence[int]) -> NDArray[Any]:
        """Begin new episodes in some environments.

        Returns:
            What these show first, shape (n_indices, *observation).
        """
        starts = {index: self.task.start(self._generators[index]) for index in indices}
        self._simulations.restart(starts)
        fresh = list(indices)
        state = _rows(self._simulations.state, fresh)
        self._positions[fresh] = self.task.position(state)
        self._returns[fresh] = 0.0
        self._lengths[fresh] = 0
        return self._view.first(state)

    @property
    def observations(self) -> NDArray[Any]:
        """A copy of what the last reset, step or ``load_state_dict`` showed, shape (n_envs, *observation)."""
        return self._observations.copy()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Write down all that the future depends on, between two steps.

        Returns:
            Arrays with one row per environment, no views: MuJoCo's ``simulation`` states, the ``generators`` of
            starts (uint64), ``positions`` along x, ``returns`` and ``lengths`` of the episodes so far, and the last
            ``observations``.
        """
        return {
            "simulation": self._simulations.save(),
            "generators": pack(self._generators),
            "positions": self._positions.copy(),
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "observations": self._observations.copy(),
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where ``state_dict`` was taken, bit for bit, instead of a reset.

        Args:
            state: What ``state_dict`` returned, for the same task and number of environments.

        Raises:
            WorldError: If it is of another task, number of environments or version of MuJoCo.
        """
        own = self.state_dict()
        for name, values in own.items():
            if name not in state or state[name].shape != values.shape:
                shape = state[name].shape if name in state else "none"
                raise WorldError(f"this state is of other worlds: {name} must have shape {values.shape}, got {shape}")
        self._simulations.load(state["simulation"])
        self._generators = unpack(state["generators"])
        self._positions = state["positions"].copy()
        self._returns = state["returns"].copy()
        self._lengths = state["lengths"].copy()
        self._observations = state["observations"].copy()
        # Seeds that were to begin the first episodes have no episode to begin.
        self._reset_seeds()
        self._reset_options()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Draw every environment as it is now; after an end that is the start of the next episode.

        Returns:
            One RGB picture per environment, uint8, shape (height, width, 3).

        Raises:
            WorldError: If the environment was made without pictures.
        """
        if self._pictures is None:
            raise WorldError("this MuJoCo environment has no pictures; make it with render_mode='rgb_array'")
        return [self._draw(self._pictures, index) for index in range(self.num_envs)]

    def _draw(self, pictures: Pictures, index: int) -> np.ndarray:
        return pictures.draw(lambda data: self._simulations.copy_into(index, data))

    def close(self) -> None:
        """Stop the threads and free what draws; a second call does nothing."""
        self._simulations.close()
        self._view.close()
        if self._pictures is not None:
            self._pictures.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Read an attribute; the environments share all of theirs.

        Args:
            attr_name: An attribute of this object (e.g. ``render_mode``) or of its task (e.g. ``dt``).
            indices: Environments to ask; None for all.

        Returns:
            The value, once per environment asked.
        """
        value = getattr(self if hasattr(self, attr_name) else self.task, attr_name)
        return [value for _ in self._get_indices(indices)]


def _rows(state: State, indices: Any) -> State:
    """Select environments.

    Returns:
        A copy of their rows.
    """
    return cast(State, {name: values[indices] for name, values in cast(dict[str, Floats], state).items()})


def _action_space(task: Task) -> gym.spaces.Box:
    low, high = task.model.actuator_ctrlrange.astype(np.float32).T
    return gym.spaces.Box(low, high, dtype=np.float32)
