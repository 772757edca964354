"""Many simulations of one model, stepped together.

Two engines with one interface. Both are exact, and at eight environments on one thread as fast as a bare loop over
MuJoCo's own step; which is used depends on what a task reads:

* ``BatchSimulations``, on MuJoCo's batch: fastest with many environments and with threads.
* ``DataSimulations``, a list of MuJoCo's data: the only one that can compute contact forces (``cfrc_ext``), which the
  batch leaves out of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, cast

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.errors import WorldError
from envs.mujoco.task import Floats, Start, State, Task

_EVERYTHING = int(mujoco.mjtState.mjSTATE_INTEGRATION)
"""All that the next state depends on: positions, velocities, commands, time, and the solver's warm start."""


_RESETS = [int(getattr(mujoco.mjtWarning, f"mjWARN_BAD{name}")) for name in ("QPOS", "QVEL", "QACC")]
"""Warnings that go with a reset of the simulation."""


class Simulations(Protocol):
    """``n_envs`` simulations of a task's model."""

    state: State
    """What the task reads, refreshed in place by ``step`` and ``restart``."""

    def step(self, actions: NDArray[Any]) -> dict[int, str]:
        """Advance every simulation by one agent step.

        Args:
            actions: Actuator commands, shape (n_envs, nu).

        Returns:
            What MuJoCo said of those it could not advance, by environment.
        """

    def restart(self, starts: dict[int, Start]) -> None:
        """Put some simulations into new episodes.

        Args:
            starts: Positions and velocities, by environment.
        """

    def save(self) -> Floats:
        """Copy all that the future depends on.

        Returns:
            Shape (n_envs, numbers).
        """

    def load(self, rows: Floats) -> None:
        """Take up what ``save`` gave; ``state`` follows at the next step.

        Args:
            rows: Shape (n_envs, numbers).
        """

    def copy_into(self, index: int, data: Any) -> None:
        """Copy one simulation, to draw it.

        Args:
            index: The environment.
            data: MuJoCo's data of the same model, which is overwritten.
        """

    def close(self) -> None:
        """Stop the threads."""


def simulations(task: Task, n_envs: int, threads: int) -> Simulations:
    """Open the engine a task needs.

    Args:
        task: The task.
        n_envs: Number of simulations, at least 1.
        threads: Threads that share the simulations, at least 1; 1 is best for light models, whose step takes about
            as long as handing it to a thread.

    Returns:
        The simulations, at the model's own positions.
    """
    if "cfrc_ext" in task.reads:
        return DataSimulations(task, n_envs, threads)
    return BatchSimulations(task, n_envs, threads)


class BatchSimulations:
    """Simulations on MuJoCo's batch, which keeps each one's state in a row of one array.

    Args:
        task: The task.
        n_envs: Number of simulations.
        threads: MuJoCo's threads.

    Raises:
        WorldError: If MuJoCo is too old to have a batch.
    """

    def __init__(self, task: Task, n_envs: int, threads: int) -> None:
        try:
            from mujoco.batch import Batch, SimulationError
        except ImportError as error:
            raise WorldError(
                f"the native backend needs MuJoCo 4 (this is {mujoco.__version__}); use backend 'gymnasium'"
            ) from error
        self._failure: type[Exception] = SimulationError
        self._batch: Any = Batch(task.model, n_envs, threads)
        self._blank = self._batch.state[0].copy()  # a simulation is its row, so this is what a reset would leave
        self._n_steps = task.frame_skip
        self._ctrl, self._qpos, self._qvel = (self._batch.bind(name) for name in ("ctrl", "qpos", "qvel"))
        self.state = cast(State, {name: self._batch.bind(name) for name in task.reads})

    def step(self, actions: NDArray[Any]) -> dict[int, str]:
        """Advance every simulation by one agent step.

        Args:
            actions: Actuator commands, shape (n_envs, nu).

        Returns:
            What MuJoCo said of those it could not advance, by environment.
        """
        self._ctrl[:] = actions
        failed: dict[int, str] = {}
        try:
            self._batch.step(nstep=self._n_steps)
        except self._failure as error:
            ids = error.ids  # type: ignore[attr-defined]
            failed = {int(index): " ".join(self._batch.error(index).split()) for index in ids}
        # One that diverges is set back to the model's own positions without a word but this counter.
        if np.count_nonzero(self._batch.warning):
            resets = self._batch.warning[:, _RESETS, 1].any(1)
            failed |= {int(index): "MuJoCo found its state unstable, and reset it" for index in np.flatnonzero(resets)}
            self._batch.warning[:] = 0
        return failed

    def restart(self, starts: dict[int, Start]) -> None:
        """Put some simulations into new episodes.

        Args:
            starts: Positions and velocities, by environment.
        """
        for index, (qpos, qvel) in starts.items():
            self._batch.state[index] = self._blank
            self._qpos[index], self._qvel[index] = qpos, qvel
        with _telling(self._failure):
            self._batch.forward(np.fromiter(starts, dtype=np.int32))

    def save(self) -> Floats:
        """Copy all that the future depends on.

        Returns:
            Shape (n_envs, numbers).
        """
        return np.array(self._batch.state)

    def load(self, rows: Floats) -> None:
        """Take up what ``save`` gave; ``state`` follows at the next step.

        Args:
            rows: Shape (n_envs, numbers).
        """
        self._batch.state[:] = rows

    def copy_into(self, index: int, data: Any) -> None:
        """Copy one simulation, to draw it.

        Args:
            index: The environment.
            data: MuJoCo's data of the same model, which is overwritten.
        """
        self._batch.get_data(index, data)

    def close(self) -> None:
        """Do nothing: the batch stops its threads when it is forgotten."""


class DataSimulations:
    """Simulations as a list of MuJoCo's data, with contact forces computed after every agent step.

    Args:
        task: The task.
        n_envs: Number of simulations.
        threads: Python threads; MuJoCo's step lets them run side by side.
    """

    def __init__(self, task: Task, n_envs: int, threads: int) -> None:
        self._model, self._n_steps = task.model, task.frame_skip
        self._data = [mujoco.MjData(self._model) for _ in range(n_envs)]
        self._ctrl = [data.ctrl for data in self._data]
        self._n_numbers = mujoco.mj_stateSize(self._model, _EVERYTHING)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._shares = [range(first, n_envs, threads) for first in range(min(threads, n_envs))]
        state, self._gather = _mirror(self._data, task.reads)
        self.state = cast(State, state)

    def step(self, actions: NDArray[Any]) -> dict[int, str]:
        """Advance every simulation by one agent step.

        Args:
            actions: Actuator commands, shape (n_envs, nu).

        Returns:
            What MuJoCo said of those it could not advance, by environment.
        """
        for ctrl, action in zip(self._ctrl, actions, strict=True):
            ctrl[:] = action
        self._failed: dict[int, str] = {}
        # Reading the results out raises what went wrong in a thread.
        list((self._pool.map if self._pool else map)(self._advance, self._shares))
        self._gather()
        return self._failed

    def _advance(self, share: range) -> None:
        for index in share:
            data = self._data[index]
            try:
                mujoco.mj_step(self._model, data, self._n_steps)
                mujoco.mj_rnePostConstraint(self._model, data)
            except mujoco.FatalError as error:
                self._failed[index] = " ".join(str(error).split())
            if np.count_nonzero(data.warning.number):
                if data.warning.number[_RESETS].any():
                    self._failed[index] = "MuJoCo found its state unstable, and reset it"
                data.warning.number[:] = 0

    def restart(self, starts: dict[int, Start]) -> None:
        """Put some simulations into new episodes.

        Args:
            starts: Positions and velocities, by environment.
        """
        for index, (qpos, qvel) in starts.items():
            data = self._data[index]
            mujoco.mj_resetData(self._model, data)
            data.qpos[:], data.qvel[:] = qpos, qvel
            with _telling(mujoco.FatalError):
                mujoco.mj_forward(self._model, data)
        self._gather()

    def save(self) -> Floats:
        """Copy all that the future depends on.

        Returns:
            Shape (n_envs, numbers).
        """
        rows = np.empty((len(self._data), self._n_numbers))
        for data, row in zip(self._data, rows, strict=True):
            mujoco.mj_getState(self._model, data, row, _EVERYTHING)
        return rows

    def load(self, rows: Floats) -> None:
        """Take up what ``save`` gave; ``state`` follows at the next step.

        Args:
            rows: Shape (n_envs, numbers).
        """
        for data, row in zip(self._data, rows, strict=True):
            mujoco.mj_setState(self._model, data, np.ascontiguousarray(row), _EVERYTHING)

    def copy_into(self, index: int, data: Any) -> None:
        """Copy one simulation, to draw it.

        Args:
            index: The environment.
            data: MuJoCo's data of the same model, which is overwritten.
        """
        row = np.empty(self._n_numbers)
        mujoco.mj_getState(self._model, self._data[index], row, _EVERYTHING)
        mujoco.mj_setState(self._model, data, row, _EVERYTHING)

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _mirror(data: list[Any], names: tuple[str, ...]) -> tuple[dict[str, Floats], Callable[[], None]]:
    """Set up arrays that hold what each simulation holds on its own.

    Args:
        data: The simulations.
        names: MuJoCo's names of the arrays.

    Returns:
        The arrays by name, each of shape (n_envs, ...), and a function that refreshes them.
    """
    state: dict[str, Floats] = {}
    jobs: list[tuple[list[Floats], Floats]] = []
    for name in names:
        views = [getattr(one, name) for one in data]
        state[name] = np.zeros((len(data), *views[0].shape))
        jobs.append((views, state[name].reshape(-1, *views[0].shape[1:])))

    def gather() -> None:
        for views, flat in jobs:
            np.concatenate(views, out=flat)

    return state, gather


@contextmanager
def _telling(failure: type[Exception]) -> Generator[None]:
    """Tell MuJoCo's failures in one line.

    Args:
        failure: The error that MuJoCo raises.

    Yields:
        Nothing, once.

    Raises:
        WorldError: If MuJoCo raises it.
    """
    try:
        yield
    except failure as error:
        raise WorldError(f"MuJoCo cannot go on: {' '.join(str(error).split())}") from error
