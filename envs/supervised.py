"""Environments in processes of their own, which are replaced when they die or hang."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from time import monotonic
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import CloudpickleWrapper, SubprocVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.subproc_vec_env import _stack_obs, _worker

from envs.errors import WorldError
from envs.faults import MAX_FAULTS, Fault, broken_off, told

Builder = Callable[[], gym.Env[Any, Any]]

_NEW_SEED = 1_000_003
"""Between the seeds of an environment and of the one started in its place."""
_PATIENCE = 5.0
"""Seconds that a process has to end by itself when all is over."""


class SupervisedVecEnv(SubprocVecEnv):
    """Stable-Baselines3's SubprocVecEnv, whose workers may raise, die or hang.

    There a dead worker ends the training with an EOFError, and one that hangs waits for ever. Here it is killed if
    need be, and another is started in its place; the others do not notice. The step's info says so (`envs.faults`).
    Put a `FiniteGuard` directly around it, which makes a truncated episode of the broken one, looks at the numbers,
    and ends the run after too many faults in a row:

        env = FiniteGuard(SupervisedVecEnv([build] * 8, timeout=60.0))

    Args:
        env_fns: Build the environments, in their processes; called again for each that has to be replaced.
        start_method: How processes start; None as Stable-Baselines3 has it.
        timeout: Seconds a step or reset may take before its worker counts as hung; None waits for ever.
        max_faults: Failures of a restart in a row that end the run.

    Raises:
        WorldError: If a number is out of range, or the first worker dies before it has told its spaces.
    """

    def __init__(
        self,
        env_fns: list[Builder],
        start_method: str | None = None,
        *,
        timeout: float | None = None,
        max_faults: int = MAX_FAULTS,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise WorldError(f"timeout must be a positive number of seconds, or None to wait for ever, got {timeout}")
        if max_faults < 1:
            raise WorldError(f"max_faults must be at least 1, got {max_faults}")
        usual = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(start_method or usual)
        self._builders = [_telling(build) for build in env_fns]
        self._timeout, self._max_faults = timeout, max_faults
        self._started = [0] * len(env_fns)
        self._due: list[float | None] = [None] * len(env_fns)
        self._first_seeds: list[int | None] = [None] * len(env_fns)
        self.reset_faults: dict[int, list[Fault]] = {}
        """What broke in the last reset, by environment."""
        try:
            super().__init__(list(self._builders), start_method)
        except (EOFError, OSError) as error:
            raise WorldError("environment 0 died before it told its spaces; its own message stands above") from error
        self.remotes, self.processes = list(self.remotes), list(self.processes)

    def seed(self, seed: int | None = None) -> Any:
        """Seed the environments at their next reset.

        Args:
            seed: Of the first; the others count up from it. None for a random one.

        Returns:
            The seeds.
        """
        seeds = super().seed(seed)
        self._first_seeds = list(self._seeds)
        return seeds

    def reset(self) -> VecEnvObs:
        """Begin an episode in every environment.

        Returns:
            The first observations, [n_envs, ...].
        """
        self.reset_faults = {}
        for index in range(self.num_envs):
            self._send(index, ("reset", (self._seeds[index], self._options[index])))
        observations = []
        for index in range(self.num_envs):
            answer, fault = self._receive(index)
            if fault is not None:
                answer, self.reset_faults[index] = self._revived(index, [fault])
            observation, self.reset_infos[index] = answer
            observations.append(observation)
        self._reset_seeds()
        self._reset_options()
        return _stack_obs(observations, self.observation_space)

    def step_async(self, actions: np.ndarray) -> None:
        """Send the actions of the next step.

        Args:
            actions: One per environment.
        """
        for index, action in enumerate(actions):
            self._send(index, ("step", action))
        self.waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for every environment that lives.

        Returns:
            Observations (of the next episode where one ended), rewards [n_envs], ends [n_envs], infos.
        """
        results = [self._stepped(index) for index in range(self.num_envs)]
        self.waiting = False
        observations, rewards, dones, infos, resets = zip(*results, strict=True)
        self.reset_infos = list(resets)
        stacked = _stack_obs(list(observations), self.observation_space)
        return stacked, np.stack(rewards).astype(np.float32), np.stack(dones), list(infos)

    def restart(self, index: int) -> tuple[Any, list[Fault]]:
        """Begin another episode in one environment, which may be a new one.

        Args:
            index: Which.

        Returns:
            Its first observation, and what broke on the way to it.
        """
        self._send(index, ("reset", (None, {})))
        answer, fault = self._receive(index)
        faults: list[Fault] = []
        if fault is not None:
            answer, faults = self._revived(index, [fault])
        observation, self.reset_infos[index] = answer
        return observation, faults

    def close(self) -> None:
        """End the processes, by force where one does not answer; a second call does nothing."""
        if self.closed:
            return
        for remote in self.remotes:
            with suppress(OSError):
                remote.send(("close", None))
        for process, remote in zip(self.processes, self.remotes, strict=True):
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
            remote.close()
        self.closed = True

    def _get_target_remotes(self, indices: VecEnvIndices) -> list[Any]:
        lines = [_Line(self, index) for index in self._get_indices(indices)]
        for place, line in enumerate(lines):
            line.others = lines[place + 1 :]
        return lines

    def _stepped(self, index: int) -> tuple[Any, float, bool, dict[str, Any], Any]:
        answer, fault = self._receive(index)
        if fault is None:
            return answer  # type: ignore[no-any-return]
        (observation, reset_info), faults = self._revived(index, [fault])
        return observation, 0.0, True, broken_off(faults), reset_info

    def _send(self, index: int, message: tuple[str, Any]) -> None:
        self._due[index] = None if self._timeout is None else monotonic() + self._timeout
        with suppress(OSError):  # a worker that is dead shows when its answer is due
            self.remotes[index].send(message)

    def _receive(self, index: int) -> tuple[Any, Fault | None]:
        """A worker's answer, or what happened to it."""
        remote, process = self.remotes[index], self.processes[index]
        # The process beside its pipe: one that was forked later may hold the pipe's other end open.
        due = self._due[index]
        ready = wait([remote, process.sentinel], None if due is None else max(0.0, due - monotonic()))
        if remote in ready:
            with suppress(EOFError, OSError):
                return remote.recv(), None
        if not ready:
            return None, ("hung", f"environment {index} did not answer within {self._timeout:g} s")
        process.join(_PATIENCE)
        return None, ("died", f"the process of environment {index} died with exit code {process.exitcode}")

    def _revived(self, index: int, faults: list[Fault]) -> tuple[Any, list[Fault]]:
        """Start a worker in the place of a broken one, until one begins an episode.

        Returns:
            What it answered to the reset, and the faults so far.

        Raises:
            WorldError: If none does.
        """
        while len(faults) <= self._max_faults:
            self._replace(index)
            first = self._first_seeds[index]
            seed = None if first is None else (first + self._started[index] * _NEW_SEED) % 2**31
            self._send(index, ("reset", (seed, {})))
            answer, fault = self._receive(index)
            if fault is None:
                return answer, faults
            faults = [*faults, fault]
        raise WorldError(
            f"environment {index} could not be restarted in {len(faults)} tries: {faults[-1][1]}; mend its reset"
        )

    def _replace(self, index: int) -> None:
        self.processes[index].kill()
        self.processes[index].join()
        self.remotes[index].close()
        self._started[index] += 1
        remote, work_remote = self._context.Pipe()
        arguments = (work_remote, remote, CloudpickleWrapper(self._builders[index]))
        process = self._context.Process(target=_worker, args=arguments, daemon=True)
        process.start()
        work_remote.close()
        self.remotes[index], self.processes[index] = remote, process


class _Line:
    """A worker's pipe, as Stable-Baselines3's `get_attr` and its like use it: a question to all, then their answers.

    Args:
        venv: Whose worker.
        index: Which.
    """

    def __init__(self, venv: SupervisedVecEnv, index: int) -> None:
        self._venv, self._index = venv, index
        self.others: list[_Line] = []
        """Those who are to answer after this one."""

    def send(self, message: tuple[str, Any]) -> None:
        self._venv._send(self._index, message)

    def recv(self) -> Any:
        answer, fault = self._venv._receive(self._index)
        if fault is not None:
            for other in self.others:  # an answer that nobody took would be the next question's
                self._venv._receive(other._index)
            raise WorldError(f"{fault[1]}; reset the environments, which starts another in its place")
        return answer


class _Telling(gym.Wrapper[Any, Any, Any, Any]):
    """Says that a step raised in place of dying of it; the worker then resets the environment.

    Args:
        env: The environment.
    """

    _seen: Any = None

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self._seen, info = self.env.reset(**kwargs)
        return self._seen, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            self._seen, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            return self._seen, 0.0, False, True, broken_off([("raised", told(error))])
        return self._seen, reward, terminated, truncated, info


def _telling(build: Builder) -> Builder:
    return lambda: _Telling(build())
