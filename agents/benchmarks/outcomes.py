"""What the runs of a campaign have left behind, and what a random policy would have scored."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from agents import configfiles, curves, evaluation, loading, rundir
from agents.benchmarks.stages import EVALUATION_SEED, KINDS, Run, evaluation_path, is_evaluated
from agents.callbacks import LAST
from agents.config import RunConfig
from agents.errors import UsageError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Track:
    """What a run's agent was worth as it learned."""

    steps: Array
    """Environment steps, [looks]."""
    means: Array
    """Mean returns, [looks]."""
    seconds: Array
    """Seconds of training on the run's own clock, [looks]."""
    episodes: Array
    """How many episodes each mean is taken over, [looks]."""

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Outcome:
    """A run that was trained to its end."""

    env_id: str
    """The environment."""
    algorithm: str
    """Who learnt."""
    seed: int
    """The run's seed."""
    scores: Mapping[str, float]
    """Mean returns by measure (``standings.MEASURES``), those that are there."""
    learned: Track
    """The last 100 training episodes, fewer at the beginning, at evenly spaced times."""
    evaluated: Track
    """Evaluations without noise, under way and at the end."""
    steps_per_second: float
    """Training speed."""


def read(run: Run) -> Outcome | None:
    """Read what a run left.

    Args:
        run: The run.

    Returns:
        The outcome; None if it has not been trained to its end.

    Raises:
        UsageError: If a file is damaged.
    """
    if not run.trained:
        return None
    directory, config = run.directory, run.config
    try:
        result: Any = rundir.read_json(directory.result)
        rows = rundir.read_rows(directory.episodes)
        episodes = (np.array([float(row[name]) for row in rows]) for name in ("timesteps", "return", "seconds"))
        scores = {"training": result["training_return_last_100"], **_evaluations(run)}
        there = {name: float(score) for name, score in scores.items() if score is not None}
        speed = float(result["steps_per_second"])
        who = config.env_id, config.algorithm, config.seed
        return Outcome(*who, there, learning(*episodes), _track(directory.evaluations), speed)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{directory.path} is damaged ({error}); remove it to train the run again") from None


def learning(ends: Array, returns: Array, seconds: Array) -> Track:
    """Smooth training episodes.

    Args:
        ends: When each ended, in environment steps, [episodes].
        returns: Their raw returns, [episodes].
        seconds: When they ended, in seconds of training, [episodes].

    Returns:
        The mean of the last ones at evenly spaced times; empty if there is none.
    """
    if not len(ends):
        return Track(ends, returns, seconds, ends)
    steps, means = curves.smooth(ends, returns)
    finished = np.searchsorted(ends, steps, side="right")
    return Track(steps, means, seconds[finished - 1], np.minimum(finished, LAST).astype(np.float64))


def curve(outcome: Outcome) -> curves.Curve | None:
    """See a run's training as a curve.

    Args:
        outcome: The run.

    Returns:
        Its curve; None if no episode has ended.
    """
    learned = outcome.learned
    if not len(learned):
        return None
    return curves.Curve(outcome.env_id, outcome.algorithm, outcome.seed, learned.steps, learned.means)


def plain(outcome: Outcome) -> dict[str, Any]:
    """Put a run's outcome in plain types.

    Args:
        outcome: The run.

    Returns:
        All but the tracks.
    """
    return {
        "env_id": outcome.env_id,
        "algorithm": outcome.algorithm,
        "seed": outcome.seed,
        "scores": dict(outcome.scores),
        "steps_per_second": outcome.steps_per_second,
        "seconds_of_training": float(outcome.learned.seconds[-1]) if len(outcome.learned) else None,
    }


def origins(run: Run) -> list[Any]:
    """Find out where a run came from.

    Args:
        run: The run.

    Returns:
        One entry for each of its parts; none of a run that has not come to its end.
    """
    return configfiles.provenance(run.directory.config) if run.trained else []


def random_score(config: RunConfig, episodes: int, path: Path) -> float:
    """Play with uniformly random actions.

    Args:
        config: Says which environment, and how it is built.
        episodes: How many episodes, on the same seeds as the evaluations of the agents.
        path: Where the scores are kept, so that they are played once.

    Returns:
        The mean return.
    """
    if path.exists():
        stored = rundir.read_json(path)
        if isinstance(stored, dict) and stored.get("episodes") == episodes:
            return float(stored["mean_return"])
    with closing(loading.evaluation_envs(episodes, EVALUATION_SEED)(config)) as env:
        scores = evaluation.evaluate(_Dice(env), env, episodes, seed=EVALUATION_SEED)
    rundir.write_json(path, {"env_id": config.env_id, "seed": EVALUATION_SEED, **scores.summary()})
    return scores.mean


def _track(path: Path) -> Track:
    rows: Any = rundir.read_json(path) if path.exists() else []
    names = ("timesteps", "mean_return", "seconds", "episodes")
    return Track(*(np.array([float(row[name]) for row in rows]) for name in names))


def _evaluations(run: Run) -> dict[str, float]:
    done = [kind for kind in KINDS if is_evaluated(run, kind)]
    read: dict[str, Any] = {kind: rundir.read_json(evaluation_path(run.directory, kind)) for kind in done}
    return {kind: content["mean_return"] for kind, content in read.items()}


class _Dice:
    """Draws actions from the action space, whatever it sees."""

    def __init__(self, env: VecEnv) -> None:
        self._env = env
        env.action_space.seed(EVALUATION_SEED)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Draw an action for each environment."""
        return np.array([self._env.action_space.sample() for _ in range(self._env.num_envs)]), state
