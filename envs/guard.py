"""Stops a run at the first number that is not finite, before it reaches a statistic or a network."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from envs.errors import WorldError

_REMEDY = "the world diverged: bound its actions or forces, or end the episode before it does"


class FiniteGuard(VecEnvWrapper):
    """Raises when an observation, a final observation or a reward is NaN or infinite.

    One NaN in a running mean, a curvature factor or a weight poisons all that follows, and the first symptom
    shows long after its cause; the check costs one pass over the step's floats (integer observations are free).

    Args:
        venv: The vector environment to watch.

    Raises:
        WorldError: From ``reset`` and ``step``, naming the environment, the step since the reset and the number.
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        # The base class forgets the frame rate, which whoever writes a video needs.
        self.metadata = venv.metadata
        self._step = 0

    def reset(self) -> VecEnvObs:
        """Reset every environment.

        Returns:
            The first observations, shape (n_envs, *observation) each.
        """
        self._step = 0
        observations = self.venv.reset()
        self._check_observations(observations)
        return observations

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step and look at everything a learner will read.

        Returns:
            Observations, rewards of shape (n_envs,), ends of shape (n_envs,), and one info per environment.
        """
        observations, rewards, dones, infos = self.venv.step_wait()
        self._step += 1
        self._check("reward", rewards)
        self._check_observations(observations)
        if np.count_nonzero(dones):
            self._check_final_observations(dones, infos)
        return observations, rewards, dones, infos

    def state_dict(self) -> dict[str, Any]:
        """Write down what the messages count.

        Returns:
            The ``step`` since the reset.
        """
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where ``state_dict`` was taken.

        Args:
            state: What it returned.
        """
        self._step = int(state["step"])

    def _check_observations(self, observations: VecEnvObs) -> None:
        for name, values in _parts(observations):
            self._check(name, values)

    def _check_final_observations(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        for index in np.flatnonzero(dones):
            final = infos[index].get("terminal_observation")
            if final is None:
                continue
            for name, values in _parts(final):
                self._check(f"final {name}", np.asarray(values)[None], first=int(index))

    def _check(self, name: str, values: np.ndarray, first: int = 0) -> None:
        """Raise for the first row of ``values`` (shape (rows, ...)) that is not finite; row 0 is environment ``first``.

        Raises:
            WorldError: If there is such a row.
        """
        # NaN and infinity show in the sum of squares, which one call takes; so does a square too large for the type.
        if values.dtype.kind != "f" or isfinite(np.vdot(values, values)) or np.isfinite(values).all():
            return
        position = tuple(int(axis) for axis in np.argwhere(~np.isfinite(values))[0])
        entry = f"{name}{list(position[1:]) or ''}"
        raise WorldError(
            f"{entry} of environment {first + position[0]} is {values[position]} at step {self._step}; {_REMEDY}"
        )


def _parts(observations: Any) -> list[tuple[str, np.ndarray]]:
    """Name the arrays of an observation.

    Args:
        observations: An array, or a dict or tuple of arrays.

    Returns:
        Pairs of a name for error messages and the array.
    """
    if isinstance(observations, dict):
        return [(f"observation {key!r}", np.asarray(values)) for key, values in observations.items()]
    if isinstance(observations, tuple):
        return [(f"observation {index}", np.asarray(values)) for index, values in enumerate(observations)]
    return [("observation", np.asarray(observations))]
