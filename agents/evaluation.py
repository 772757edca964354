"""How good an agent is: raw scores of whole episodes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from agents.errors import UsageError

LONGEST = 100_000
"""Steps after which an episode counts as endless: four times Atari's longest."""


class Predictor(Protocol):
    """Whatever chooses actions the way Stable-Baselines3's agents and policies do."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Choose actions.

        Args:
            observation: Observations, one per environment.
            state: Recurrent state of the last call.
            episode_start: Which environments begin an episode.
            deterministic: Take the most likely action in place of a sample.
        """


@dataclass(frozen=True)
class Evaluation:
    """Scores of a number of episodes."""

    returns: tuple[float, ...]
    """Raw return of each episode."""
    lengths: tuple[int, ...]
    """Steps of each episode."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the return over the episodes."""
        return float(np.std(self.returns))

    @property
    def steps(self) -> int:
        """Steps of all episodes."""
        return sum(self.lengths)

    def summary(self) -> dict[str, Any]:
        """Put the evaluation in plain types.

        Returns:
            Mean, standard deviation, episodes, steps and every single score.
        """
        return {
            "mean_return": self.mean,
            "std_return": self.std,
            "episodes": len(self.returns),
            "steps": self.steps,
            "returns": list(self.returns),
            "lengths": list(self.lengths),
        }


def evaluate(agent: Predictor, env: VecEnv, episodes: int, *, seed: int, deterministic: bool = True) -> Evaluation:
    """Play whole episodes.

    The episodes are shared out over the environments beforehand: taking the first N to finish anywhere would
    favour short ones. The generators of a training run are left as they were.

    Args:
        agent: Who acts.
        env: Environments whose ``infos[i]["episode"]`` holds raw scores, with fixed normalisation.
        episodes: How many episodes, at least 1.
        seed: Seed of the environments and of sampled actions.
        deterministic: Take the most likely action in place of a sample.

    Returns:
        The scores, ordered by environment.

    Raises:
        UsageError: If an episode does not end.
    """
    quotas, ages = quota(episodes, env.num_envs), np.zeros(env.num_envs, dtype=np.int64)
    scores: list[list[tuple[float, int]]] = [[] for _ in quotas]
    state, starts = None, np.ones(env.num_envs, dtype=bool)
    with seeded(seed):
        env.seed(seed)
        observation = env.reset()
        while any(len(done) < due for done, due in zip(scores, quotas, strict=True)):
            action, state = agent.predict(observation, state, starts, deterministic)
            observation, _, starts, infos = env.step(action)
            _collect(infos, scores, quotas)
            ages = np.where(starts, 0, ages + 1)
            if ages.max() >= LONGEST:
                raise UsageError(
                    f"an episode of the evaluation has not ended after {LONGEST:,} steps; give episodes an end with "
                    "--env.options.time-limit when you train"
                )
    flat = [score for done in scores for score in done]
    return Evaluation(tuple(r for r, _ in flat), tuple(n for _, n in flat))


def quota(episodes: int, n_envs: int) -> NDArray[np.int64]:
    """Share episodes out over environments.

    Args:
        episodes: How many in all.
        n_envs: Over how many environments.

    Returns:
        Episodes of each environment, which sum to ``episodes`` and differ by at most 1.
    """
    return (episodes + np.arange(n_envs)[::-1]) // n_envs


@contextmanager
def seeded(seed: int) -> Generator[None, None, None]:
    """Seed torch for a while, and leave its generators as they were.

    Args:
        seed: The seed.

    Yields:
        Nothing.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _collect(infos: list[dict[str, Any]], scores: list[list[tuple[float, int]]], quotas: NDArray[np.int64]) -> None:
    for info, done, due in zip(infos, scores, quotas, strict=True):
        episode = info.get("episode")
        if episode is not None and len(done) < due:
            done.append((float(episode["r"]), int(episode["l"])))
