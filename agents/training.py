"""A training run from beginning to end."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch.utils.tensorboard import SummaryWriter

from agents import build, checkpoint, display, faults, rundir
from agents.callbacks import Clock, EpisodeRecorder, Evaluator, Interrupted, Saver, Shower, evaluation_seed
from agents.config import RunConfig
from agents.evaluation import Evaluation
from agents.interruption import Stopper
from agents.loading import evaluation_envs, set_threads


@dataclass(frozen=True)
class Result:
    """What came out of a run."""

    timesteps: int
    """Environment steps."""
    seconds: float
    """Training time, evaluations during training included."""
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
) -> Result:
    """Train an agent, evaluate it, and leave everything in the run's directory.

    Args:
        config: The run.
        open_directory: Makes or opens the directory. It is called when environments and agent stand, so a
            configuration that cannot work leaves nothing behind.
        stopper: Says when to stop early; ``callbacks.Interrupted`` is raised then, after a checkpoint.
        start: Where to go on from; None begins anew.

    Returns:
        The result.
    """
    set_threads(config)
    env = build.make_training_env(config, _environment_seed(config.seed, start))
    try:
        agent = build.make_agent(config, env)
        if start is not None:
            checkpoint.restore(agent, start)
        return _Run(config, open_directory(), stopper, agent, start).train()
    finally:
        env.close()


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
        self.first = start.timesteps if start else 0
        self.clock = Clock(start.progress["seconds"] if start else 0.0)
        self.recorder = EpisodeRecorder(directory, self.clock, self.first)
        self.evaluator = Evaluator(directory, config, self._evaluation_env, self.clock, self.first)
        self.evaluator.init_callback(agent)
        self.saver = Saver(agent, directory, config, self.clock, self.first, stopper)

    def train(self) -> Result:
        """Train, save, evaluate.

        Returns:
            The result.

        Raises:
            Interrupted: If a signal came too late to stop before the last update.
        """
        began = self.clock.seconds()
        try:
            self._learn()
            seconds = self.clock.seconds()
            self.recorder.flush()
            newest = self._save()
            if self.stopper.wanted:
                raise Interrupted(newest, self.agent.num_timesteps)
            # From here on all is saved, so a signal may end the program at once.
            self.stopper.immediate = True
            scores = self.evaluator.run()
        finally:
            self.evaluator.close()
        steps = self.agent.num_timesteps
        speed = (steps - self.first) / max(seconds - began, 1e-9)
        result = Result(steps, seconds, speed, self.recorder.mean_return, scores)
        rundir.write_json(self.directory.result, self._summary(result))
        return result

    def _learn(self) -> None:
        remaining = self.config.total_timesteps - self.first
        if remaining <= 0:
            return
        shown = display.for_stdout(self.config.total_timesteps, self.first)
        logger = _logger(self.directory, self.first)
        self.agent.set_logger(logger)
        try:
            # Evaluate before saving: a checkpoint then never promises an evaluation that was not made.
            callbacks = [self.recorder, *faults.logs(self.agent), Shower(shown, self.recorder)]
            callbacks += [self.evaluator, self.saver]
            interval = _LOG_INTERVALS[self.config.algorithm]
            self.agent.learn(remaining, callbacks, log_interval=interval, reset_num_timesteps=self.first == 0)
        except faults.FINAL as fault:
            raise faults.ended(fault, self.agent, self.saver.save) from fault
        finally:
            self.recorder.flush()
            shown.close()
            logger.close()

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
    """Writes the logger's values to ``progress.csv``, which survives an interruption."""

    def __init__(self, path: Path, timesteps: int) -> None:
        self._table = rundir.Table(path, lambda row: int(row[_STEPS]) <= timesteps)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        del key_excluded  # it names values to hide from other outputs
        numbers = {k: v for k, v in key_values.items() if isinstance(v, (int, float, np.number))}
        self._table.append({_STEPS: step, **{k: v for k, v in sorted(numbers.items()) if k != _STEPS}})
        self._table.flush()

    def close(self) -> None:
        self._table.flush()


# Updates between two rows of measurements; A2C makes one every few steps.
_LOG_INTERVALS = {"acktr": 1, "ppo": 1, "a2c": 20, "trpo": 1}
_STEPS = "time/total_timesteps"


def _logger(directory: rundir.RunDirectory, timesteps: int) -> Logger:
    events = TensorBoardOutputFormat(str(directory.tensorboard))
    if timesteps:
        # Events of steps that will be taken again must not show twice.
        events.writer.close()
        events.writer = SummaryWriter(str(directory.tensorboard), purge_step=timesteps + 1)
    return Logger(str(directory.path), [_TableWriter(directory.progress, timesteps), events])


def _environment_seed(seed: int, start: checkpoint.Checkpoint | None) -> int:
    if start is None:
        return seed
    # A resumed run must not meet its first episodes again.
    state = np.random.SeedSequence([seed, start.timesteps]).generate_state(1)
    return int(state[0] % 2**30)


def _pickled(normaliser: VecNormalize) -> Callable[[Any], None]:
    return lambda stream: pickle.dump(normaliser, stream)
