"""A training run from beginning to end."""

from __future__ import annotations

import gc
import io
import logging
import pickle
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from agents import build, checkpoint, display, faults, partner, rundir, worlds
from agents.callbacks import (
    Clock,
    EpisodeRecorder,
    Evaluator,
    EveryonesRecorder,
    Interrupted,
    Saver,
    Scribe,
    Shower,
    evaluation_seed,
)
from agents.config import RunConfig
from agents.disk import Disk, Events
from agents.evaluation import Evaluation
from agents.interruption import Stopper
from agents.loading import evaluation_envs, set_threads
from agents.ranks import Company, alike, ranks_of

_log = logging.getLogger(__name__)

ALONE = Company()
"""A process by itself."""


@dataclass(frozen=True)
class Result:
    """What came out of a run."""

    timesteps: int
    """Environment steps."""
    seconds: float
    """Training time, without that of evaluations."""
    steps_per_second: float
    """Mean speed of this part of the run."""
    training_return: float | None
    """Mean raw return of the last 100 training episodes; None if none has ended."""
    evaluation: Evaluation
    """The final evaluation."""


def train(
    config: RunConfig,
    open_directory: Callable[[], rundir.RunDirectory],
    stopper: Stopper,
    start: checkpoint.Checkpoint | None = None,
    tell: Callable[[str], None] = _log.warning,
    company: Company = ALONE,
) -> Result | None:
    """Train an agent, evaluate it, and leave everything in the run's directory.

    Args:
        config: The run.
        open_directory: Makes or opens the directory. It is called when environments and agent stand, so a
            configuration that cannot work leaves nothing behind.
        stopper: Says when to stop early; ``callbacks.Interrupted`` is raised then, after a checkpoint.
        start: Where to go on from; None begins anew.
        tell: Where to say what a resumed run cannot repeat.
        company: The processes that learn together; the first of them evaluates and writes.

    Returns:
        The result; None in all processes but the first.
    """
    set_threads(config)
    ranks = company.ranks
    env = alike(company, lambda: build.make_training_env(config, config.seed, ranks))
    try:
        agent = alike(company, lambda: build.make_agent(config, env, ranks))
        if start is not None:
            alike(company, lambda: _resume(agent, start, tell if ranks.rank == 0 else _ignore))
        directory = open_directory()
        with _settled():
            if ranks.rank:
                partner.learn(config, directory, stopper, agent, start)
                return None
            return _Run(config, directory, stopper, agent, start).train()
    finally:
        env.close()


@contextmanager
def _settled() -> Generator[None]:
    """Spare Python's collector what has been made so far: a look at all of it takes as long as half a rollout.

    Yields:
        Nothing.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _ignore(_: str) -> None:
    """Say nothing: the first process says it."""


def _resume(agent: OnPolicyAlgorithm, start: checkpoint.Checkpoint, tell: Callable[[str], None]) -> None:
    again = checkpoint.restore(agent, start)
    # Stands in until the run's own is made, which a run that is done already never does.
    logger = Logger(None, [])
    worlds.restore_log(logger, start.log)
    agent.set_logger(logger)
    if again is not None:
        tell(f"the environments' episodes begin again, so this run will differ from one never stopped: {again}")


class _Run:
    """The parts of a run that is under way."""

    def __init__(
        self,
        config: RunConfig,
        directory: rundir.RunDirectory,
        stopper: Stopper,
        agent: OnPolicyAlgorithm,
        start: checkpoint.Checkpoint | None,
    ) -> None:
        self.config, self.directory, self.stopper, self.agent = config, directory, stopper, agent
        self.start, self.first = start, start.timesteps if start else 0
        self.clock = Clock(start.progress["seconds"] if start else 0.0)
        self.fault_log = faults.log_of(agent)
        self.disk = Disk(config.max_faults, self.fault_log.counts.note)
        self.ranks = ranks_of(agent)
        recorder = EpisodeRecorder if self.ranks.size == 1 else EveryonesRecorder
        self.recorder = recorder(directory, self.clock, self.first, self.disk)
        self.evaluator = Evaluator(directory, config, self._evaluation_env, self.clock, self.first, self.disk)
        self.evaluator.init_callback(agent)
        self.tables = _TableWriter(directory, self.first, self.disk)
        self.saver = Saver(agent, directory, config, self.clock, self.first, stopper, self._sync, self.disk)

    def train(self) -> Result:
        """Train, save, evaluate.

        Returns:
            The result.
        """
        try:
            return self._written()
        finally:
            self.evaluator.close()

    def _written(self) -> Result:
        try:
            return self._train()
        except OSError as fault:
            raise faults.unwritten(fault, self.agent.num_timesteps) from fault

    def _train(self) -> Result:
        began = self.clock.seconds()
        self._learn()
        seconds = self.clock.seconds()
        self._finish()
        scores = self.evaluator.run()
        steps = self.agent.num_timesteps
        speed = (steps - self.first) / max(seconds - began, 1e-9)
        result = Result(steps, seconds, speed, self.recorder.mean_return, scores)
        rundir.write_json(self.directory.result, self._summary(result))
        return result

    def _finish(self) -> None:
        newest = self._save()
        if self.ranks.any(self.stopper.wanted):  # a signal came too late to stop before the last update
            raise Interrupted(newest, self.agent.num_timesteps)
        # From here on all is saved, so a signal may end the program at once.
        self.stopper.immediate = True

    def _learn(self) -> None:
        remaining = self.config.total_timesteps - self.first
        if remaining <= 0:
            return
        shown = display.for_stdout(self.config.total_timesteps, self.first)
        logger = Logger(str(self.directory.path), [self.tables, Events(self.directory, self.first, self.disk)])
        if self.start is not None:
            worlds.restore_log(logger, self.start.log)
        self.agent.set_logger(logger)
        try:
            # Evaluate before saving: a checkpoint then never promises an evaluation that was not made.
            callbacks = [self.recorder, *self.fault_log.callbacks]
            callbacks += [Scribe(_LOG_INTERVALS[self.config.algorithm], self.config.env.n_envs)]
            callbacks += [Shower(shown, self.recorder), self.evaluator, self.saver]
            # The library's own log counts rollouts from where a part of the run began.
            self.agent.learn(remaining, callbacks, log_interval=sys.maxsize, reset_num_timesteps=self.start is None)
        except faults.FINAL as fault:
            raise faults.ended(fault, self.agent, self.fault_log, self.saver.save) from fault
        finally:
            self.recorder.flush()
            shown.close()
            logger.close()

    def _sync(self) -> None:
        self.recorder.sync()
        self.tables.sync()

    def _save(self) -> Path:
        newest = self.saver.save()
        model = self.directory.model
        checkpoint.save(self.directory.final, self.agent, self.clock.seconds())
        rundir.write_whole(model / "sb3.zip", lambda stream: self.agent.save(cast(io.BufferedIOBase, stream)))
        normaliser = self.agent.get_vec_normalize_env()
        if normaliser is not None:
            rundir.write_whole(model / "vecnormalize.pkl", _pickled(normaliser))
        return newest

    def _evaluation_env(self) -> VecEnv:
        make = evaluation_envs(self.config.evaluation.episodes, evaluation_seed(self.config.seed))
        return build.frozen(make(self.config), self.config, self.agent.get_vec_normalize_env())

    def _summary(self, result: Result) -> dict[str, Any]:
        return {
            "env_id": self.config.env_id,
            "algorithm": self.config.algorithm,
            "label": self.config.label,
            "seed": self.config.seed,
            "timesteps": result.timesteps,
            "seconds": round(result.seconds, 3),
            "steps_per_second": round(result.steps_per_second, 1),
            "training_return_last_100": result.training_return,
            "evaluation": result.evaluation.summary(),
        }


class _TableWriter(KVWriter):
    """Writes the logger's values to ``progress.csv`` and what clocks say to ``timing.csv``; both survive a kill."""

    def __init__(self, directory: rundir.RunDirectory, timesteps: int, disk: Disk) -> None:
        self._disk = disk

        def done(row: Mapping[str, str]) -> bool:
            return int(row[_STEPS]) <= timesteps

        self._progress, self._timing = (rundir.Table(path, done) for path in (directory.progress, directory.timing))

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        del key_excluded  # it names values to hide from other outputs
        numbers = {
            k: v for k, v in sorted(key_values.items()) if isinstance(v, (int, float, np.number)) and k != _STEPS
        }
        for table, of_clocks in ((self._progress, False), (self._timing, True)):
            table.append({_STEPS: step} | {k: v for k, v in numbers.items() if (k in _CLOCKS) == of_clocks})
        self.close()

    def sync(self) -> None:
        """Wait until the rows would survive a power failure."""
        self._progress.sync()
        self._timing.sync()

    def close(self) -> None:
        for table in (self._progress, self._timing):
            self._disk.takes(table.path.name, table.flush)


# Updates between two rows of measurements; A2C makes one every few steps.
_LOG_INTERVALS = {"acktr": 1, "ppo": 1, "a2c": 20, "trpo": 1}
_STEPS = "time/total_timesteps"
_CLOCKS = {"time/fps", "time/time_elapsed"}


def _pickled(normaliser: VecNormalize) -> Callable[[Any], None]:
    return lambda stream: pickle.dump(normaliser, stream)
