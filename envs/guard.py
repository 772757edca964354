"""Breaks off an episode at the first number that is not finite, before it reaches a statistic or a network."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from envs.errors import WorldError
from envs.faults import MAX_FAULTS, Fault, broken_off, told

_REMEDY = "bound its actions or forces, or end the episode before it breaks"

Infos = list[dict[str, Any]]


class FiniteGuard(VecEnvWrapper):
    """Discards the episode of an environment that breaks, and lets the others play on.

    An environment breaks when an observation, a final observation or a reward is NaN or infinite, or when the worlds
    inside say that one of them failed (`envs.faults`). It is restarted within the step. For the learner its episode
    is then truncated after the last sound observation, which is also its final one: no number of the step it broke in
    is seen by anyone, reward 0 stands in its place, and the score of the partial episode is recorded nowhere.

    One NaN in a running mean, a curvature factor or a weight poisons all that follows, and the first symptom shows
    long after its cause; so the guard stands innermost, inside any normaliser or monitor. The check costs one pass
    over the step's floats (integer observations are free).

    Args:
        venv: The vector environment to watch. It restarts one environment by ``restart(index)``, as those of ``make``
            and `SupervisedVecEnv` do, or by the environment's own ``reset``, as Stable-Baselines3's do.
        max_faults: Faults in a row of one environment, with no whole episode between them, that end the run; 1 ends
            it at the first.

    Raises:
        WorldError: From ``reset`` and ``step``, after so many faults, naming the environment and the last of them.
    """

    keeps_finite = True
    """Says to whoever learns that nothing it is shown has to be looked at again."""

    def __init__(self, venv: VecEnv, max_faults: int = MAX_FAULTS) -> None:
        if max_faults < 1:
            raise WorldError(f"max_faults must be at least 1, got {max_faults}")
        super().__init__(venv)
        # The base class forgets the frame rate, which whoever writes a video needs.
        self.metadata = venv.metadata
        self._max_faults = max_faults
        self._in_a_row = [0] * venv.num_envs
        self._step = 0
        self._seen: Any = None
        self._untold: list[tuple[int, list[Fault]]] = []

    def reset(self) -> VecEnvObs:
        """Reset every environment.

        Returns:
            The first observations, shape (n_envs, *observation) each.
        """
        self._step = 0
        observations = self.venv.reset()
        for index, faults in getattr(self.venv, "reset_faults", {}).items():
            self._tell_later(index, faults)
        for index in sorted(self._bad_rows(observations)):
            self._begin(index, observations)
        self._seen = observations
        return observations

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step and look at everything a learner will read.

        Returns:
            Observations, rewards of shape (n_envs,), ends of shape (n_envs,), and one info per environment.
        """
        observations, rewards, dones, infos = self.venv.step_wait()
        self._step += 1
        sound = _all_finite(rewards) and all(_all_finite(values) for _, values in _parts(observations))
        if self._untold or not sound or np.count_nonzero(dones):
            rewards, dones, infos = self._mended(observations, rewards, dones, list(infos))
        self._seen = observations
        return observations, rewards, dones, infos

    def state_dict(self) -> dict[str, Any]:
        """Write down what was counted and shown.

        Returns:
            The ``step`` since the reset, the faults ``in_a_row`` of each environment, those still ``untold``, and the
            observations ``seen`` last.
        """
        seen = None if self._seen is None else _copied(self._seen)
        return {"step": self._step, "in_a_row": list(self._in_a_row), "untold": list(self._untold), "seen": seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Args:
            state: What it returned.
        """
        self._step, self._in_a_row = int(state["step"]), list(state["in_a_row"])
        self._untold, self._seen = list(state["untold"]), state["seen"]

    def _mended(
        self, observations: VecEnvObs, rewards: NDArray[Any], dones: NDArray[Any], infos: Infos
    ) -> tuple[NDArray[Any], NDArray[Any], Infos]:
        """The step without what broke in it; rows of the observations are replaced in place."""
        faults = self._ended_badly(dones, infos)
        bad = self._bad_rows(observations)
        for index in map(int, np.flatnonzero(~np.isfinite(rewards))):
            faults.setdefault(index, [("reward", self._bad("reward", rewards, index))])
        for index in bad:
            if not dones[index]:
                faults.setdefault(index, [bad[index]])
        ended, rewards, dones = dones, rewards.copy(), dones.copy()
        for index, found in sorted(faults.items()):
            self._count(index, found)
            infos[index] = broken_off(found) | self._cut(index)
            rewards[index], dones[index] = 0, True
            if not ended[index]:
                self._restart(index, observations)
        for index in sorted(set(bad) - {each for each in faults if not ended[each]}):
            self._begin(index, observations)
        return rewards, dones, self._told(infos)

    def _ended_badly(self, dones: NDArray[Any], infos: Infos) -> dict[int, list[Fault]]:
        """What broke in environments that have begun another episode already; a sound end forgives faults before it."""
        faults = {}
        for index in map(int, np.flatnonzero(dones)):
            found: list[Fault] = list(infos[index].get("faults", ()))
            if not infos[index].get("broken_off"):
                self._in_a_row[index] = 0
                self._count(index, found)  # of the reset that followed
                found = self._bad_final(index, infos[index].get("terminal_observation"))
            if found:
                faults[index] = found
        return faults

    def _bad_final(self, index: int, final: Any) -> list[Fault]:
        for name, values in [] if final is None else _parts(final):
            if not _all_finite(values):
                return [("final_observation", self._bad(f"final {name}", values[None], 0, index))]
        return []

    def _cut(self, index: int) -> dict[str, Any]:
        """How a truncated episode ends: with the last observation that was shown, where that is known."""
        if self._seen is None:
            return {"TimeLimit.truncated": False}
        return {"TimeLimit.truncated": True, "terminal_observation": _row(self._seen, index)}

    def _begin(self, index: int, observations: VecEnvObs) -> None:
        """Restart an environment whose first observation is broken, until one is sound."""
        while (found := self._bad_rows(observations)).get(index):
            self._tell_later(index, [found[index]])
            self._restart(index, observations, again=False)

    def _restart(self, index: int, observations: VecEnvObs, *, again: bool = True) -> None:
        first, faults = self._reset_one(index)
        self._tell_later(index, faults)
        _put(observations, index, first)
        if again:
            self._begin(index, observations)

    def _reset_one(self, index: int) -> tuple[Any, list[Fault]]:
        restart = getattr(self.venv, "restart", None)
        if restart is not None:
            first, faults = restart(index)
            return first, faults
        try:
            ((first, _),) = self.venv.env_method("reset", indices=[index])
        except Exception as error:
            raise WorldError(f"environment {index} broke and cannot be restarted: {told(error)}") from error
        return first, []

    def _tell_later(self, index: int, faults: list[Fault]) -> None:
        """Count faults that belong to no step, and put them into the infos of the next."""
        if faults:
            self._count(index, faults)
            self._untold.append((index, faults))

    def _told(self, infos: Infos) -> Infos:
        for index, faults in self._untold:
            infos[index] = {**infos[index], "faults": [*infos[index].get("faults", ()), *faults]}
        self._untold = []
        return infos

    def _count(self, index: int, faults: list[Fault]) -> None:
        self._in_a_row[index] += len(faults)
        if faults and self._in_a_row[index] >= self._max_faults:
            times = "" if self._max_faults == 1 else f" {self._in_a_row[index]} times with no whole episode between"
            raise WorldError(f"environment {index} broke{times}: {faults[-1][1]}; {_REMEDY}")

    def _bad_rows(self, observations: VecEnvObs) -> dict[int, Fault]:
        """The environments that show something that is not finite, and the first of it."""
        bad: dict[int, Fault] = {}
        for name, values in _parts(observations):
            if not _all_finite(values):
                for index in map(int, np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))):
                    bad.setdefault(index, ("observation", self._bad(name, values, index)))
        return bad

    def _bad(self, name: str, values: NDArray[Any], row: int, index: int | None = None) -> str:
        """Say which number of a row is not finite, ``index`` being its environment where the row is another."""
        place = tuple(int(axis) for axis in np.argwhere(~np.isfinite(values[row]))[0]) if values.ndim > 1 else ()
        number, entry = values[row, *place], f"{name}{list(place) or ''}"
        return f"{entry} of environment {row if index is None else index} is {number} at step {self._step}"


def _all_finite(values: NDArray[Any]) -> bool:
    # NaN and infinity show in the sum of squares, which one call takes; so does a square too large for the type.
    return values.dtype.kind != "f" or isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def _copied(observations: Any) -> Any:
    if isinstance(observations, dict):
        return {key: values.copy() for key, values in observations.items()}
    if isinstance(observations, tuple):
        return tuple(values.copy() for values in observations)
    return observations.copy()


def _row(observations: Any, index: int) -> Any:
    if isinstance(observations, dict):
        return {key: values[index].copy() for key, values in observations.items()}
    if isinstance(observations, tuple):
        return tuple(values[index].copy() for values in observations)
    return observations[index].copy()


def _put(observations: Any, index: int, row: Any) -> None:
    keys = observations.keys() if isinstance(observations, dict) else range(len(observations))
    if isinstance(observations, dict | tuple):
        for key in keys:
            observations[key][index] = row[key]
    else:
        observations[index] = row


def _parts(observations: Any) -> list[tuple[str, NDArray[Any]]]:
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
