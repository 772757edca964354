"""What happens beside the learning: records, display, evaluations, checkpoints, stopping."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from agents import checkpoint, rundir
from agents.config import RunConfig
from agents.disk import Disk
from agents.display import Display
from agents.evaluation import Evaluation, evaluate
from agents.ranks import ranks_of

LAST = 100
"""Episodes in the mean training return."""


class Interrupted(Exception):  # ruff: ignore[error-suffix-on-exception-name] - not an error
    """Training stopped on request, with its state on disk.

    Args:
        path: The checkpoint.
        timesteps: Environment steps it holds.
    """

    def __init__(self, path: Path, timesteps: int) -> None:
        super().__init__(f"stopped after {timesteps:,} steps")
        self.path = path
        self.timesteps = timesteps


class Clock:
    """Seconds of training, over every part of an interrupted run.

    Args:
        before: Seconds of the former parts.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        """Read the clock.

        Returns:
            Seconds of training so far.
        """
        return time.monotonic() - self._start

    @contextmanager
    def paused(self) -> Generator[None]:
        """Stop the clock for a while.

        Yields:
            Nothing.
        """
        since = time.monotonic()
        try:
            yield
        finally:
            self._start += time.monotonic() - since


class EpisodeRecorder(BaseCallback):
    """Writes a row for every training episode, with its raw score.

    Args:
        directory: The run.
        clock: Its clock.
        timesteps: Where the run stands; rows of later steps are from a part that is done again.
        disk: Counts what cannot be written.
    """

    def __init__(self, directory: rundir.RunDirectory, clock: Clock, timesteps: int, disk: Disk) -> None:
        super().__init__()
        self._disk = disk
        self._table = rundir.Table(directory.episodes, lambda row: int(row["timesteps"]) <= timesteps)
        self._clock = clock
        rows = rundir.read_rows(directory.episodes)[-LAST:] if directory.episodes.exists() else []
        self.last = deque((float(row["return"]) for row in rows), maxlen=LAST)

    @property
    def mean_return(self) -> float | None:
        """Mean raw return of the last episodes, None before the first has ended."""
        return sum(self.last) / len(self.last) if self.last else None

    def flush(self) -> None:
        """Write the waiting rows, if the disk takes them."""
        self._disk.takes(self._table.path.name, self._table.flush)

    def sync(self) -> None:
        """Write the waiting rows, and wait until they would survive a power failure."""
        self._table.sync()

    def _on_step(self) -> bool:
        for info in filter(None, self.locals["infos"]):
            self._note(info.get("episode"), self.num_timesteps)
        return True

    def _note(self, episode: Mapping[str, Any] | None, timesteps: int) -> None:
        if episode is None:
            return
        self.last.append(float(episode["r"]))
        self._table.append({
            "timesteps": timesteps,
            "return": float(episode["r"]),
            "length": int(episode["l"]),
            "seconds": round(self._clock.seconds(), 3),
        })

    def _on_rollout_start(self) -> None:
        self.flush()


class EveryonesRecorder(EpisodeRecorder):
    """The same for several processes, which tell each other of their episodes at a rollout's end."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        for timesteps, info in self.locals["meeting"].episodes:
            self._note(info.get("episode"), timesteps)


class Scribe(BaseCallback):
    """Writes the log after every few rollouts, counted from the run's beginning whoever resumed it.

    Args:
        interval: Rollouts between two rows, at least 1.
        n_envs: Environments of all processes.
    """

    def __init__(self, interval: int, n_envs: int) -> None:
        super().__init__()
        self._interval, self._n_envs = interval, n_envs

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        agent = cast(OnPolicyAlgorithm, self.model)
        rollouts = agent.num_timesteps // (agent.n_steps * self._n_envs)
        if rollouts % self._interval == 0:
            agent.dump_logs(rollouts)


class Shower(BaseCallback):
    """Keeps the display up to date.

    Args:
        display: Where to show.
        recorder: Who knows the score.
    """

    def __init__(self, display: Display, recorder: EpisodeRecorder) -> None:
        super().__init__()
        self._display = display
        self._recorder = recorder

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._display.update(self.num_timesteps, self._recorder.mean_return)


class Evaluator(BaseCallback):
    """Plays test episodes between two updates whenever a period has passed.

    Args:
        directory: The run.
        config: Its configuration.
        make_env: Makes the environments, with the training's statistics, when they are first needed.
        clock: The run's clock.
        timesteps: Where the run stands; evaluations of later steps are from a part that is done again.
        disk: Counts what cannot be written.
    """

    def __init__(
        self,
        directory: rundir.RunDirectory,
        config: RunConfig,
        make_env: Callable[[], VecEnv],
        clock: Clock,
        timesteps: int,
        disk: Disk,
    ) -> None:
        super().__init__()
        self._disk = disk
        self._path = directory.evaluations
        self._config = config
        self._make_env = make_env
        self._clock = clock
        self._env: VecEnv | None = None
        self._due = _Period(config.evaluation.period, timesteps)
        rows = rundir.read_json(self._path) if self._path.exists() else []
        self._rows = [row for row in rows if row["timesteps"] <= timesteps] if isinstance(rows, list) else []

    def run(self) -> Evaluation:
        """Evaluate now and record it.

        Returns:
            The scores.
        """
        self._env = self._env or self._make_env()
        config = self._config
        scores = evaluate(self.model, self._env, config.evaluation.episodes, seed=evaluation_seed(config.seed))
        now = {"timesteps": self.model.num_timesteps, "seconds": round(self._clock.seconds(), 3)}
        self._rows = [row for row in self._rows if row["timesteps"] != now["timesteps"]]
        self._rows.append({**now, **scores.summary()})
        self._disk.takes(self._path.name, lambda: rundir.write_json(self._path, self._rows))
        return scores

    def close(self) -> None:
        """Close the environments."""
        if self._env is not None:
            self._env.close()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._due(self.num_timesteps):
            with self._clock.paused():
                scores = self.run()
            self.logger.record("eval/mean_reward", scores.mean)
            self.logger.record("eval/mean_ep_length", scores.steps / len(scores.lengths))


class Saver(BaseCallback):
    """Writes checkpoints between two updates, and stops there on request.

    Args:
        agent: Who learns.
        directory: The run.
        config: Its configuration.
        clock: The run's clock.
        timesteps: Where the run stands.
        stop: Says whether to stop.
        sync: Brings the tables to the disk, so that no checkpoint promises rows that a power failure takes.
        disk: Counts what cannot be written.
    """

    def __init__(
        self,
        agent: OnPolicyAlgorithm,
        directory: rundir.RunDirectory,
        config: RunConfig,
        clock: Clock,
        timesteps: int,
        stop: Callable[[], bool],
        sync: Callable[[], None],
        disk: Disk,
    ) -> None:
        super().__init__()
        self._agent = agent
        self._directory = directory
        self._keep = config.checkpoint.keep
        self._clock = clock
        self._due = _Period(config.checkpoint.period, timesteps)
        self._stop = stop
        self._sync = sync
        self._disk = disk
        self._ranks = ranks_of(agent)
        self._owed = False

    def save(self) -> Path:
        """Write a checkpoint now.

        Returns:
            The file.
        """
        path = checkpoint.checkpoint_path(self._directory, self._agent.num_timesteps)
        content = checkpoint.content(self._agent, self._clock.seconds())
        self._sync()
        checkpoint.write(path, content)
        self._disk.takes("the list of checkpoints", lambda: checkpoint.prune(self._directory, self._keep))
        return path

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        due = self._due(self.num_timesteps) or self._owed
        if self._ranks.any(self._stop()):
            raise Interrupted(self.save(), self.num_timesteps)
        if self._ranks.any(due):
            # What the disk did not take is tried again after the next update.
            self._owed = not self._disk.saves(self.save)


class Attendant(Saver):
    """Has its part in the checkpoints that the first of several processes writes, and stops when all do."""

    def save(self) -> Path:
        """Give what the checkpoint wants of this process.

        Returns:
            The file that the first process writes.
        """
        checkpoint.content(self._agent, self._clock.seconds())
        return checkpoint.checkpoint_path(self._directory, self._agent.num_timesteps)


class _Period:
    """Says at which updates a number of steps has passed again."""

    def __init__(self, period: int, timesteps: int) -> None:
        self._period = period
        self._count = timesteps // period if period else 0

    def __call__(self, timesteps: int) -> bool:
        if not self._period:
            return False
        before, self._count = self._count, timesteps // self._period
        return self._count > before


def evaluation_seed(seed: int) -> int:
    """Derive the seed of test episodes, away from those of the training environments.

    Args:
        seed: The run's seed.

    Returns:
        The seed.
    """
    return (seed + 1_000_003) % 2**31
