from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from agents import configfiles, loading
from agents.errors import UsageError
from agents.evaluation import evaluate, quota


class Metronome(VecEnv):
    """Environment i has episodes of `lengths[i]` steps and raw return 100·i + the episode's number."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(len(lengths), spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
        self.lengths = lengths
        self.seeds: list[int | None] = []

    def reset(self) -> np.ndarray:
        self.time = [0] * self.num_envs
        self.number = [0] * self.num_envs
        self.seeds.append(self._seeds[0])
        return np.zeros((self.num_envs, 1), np.float32)

    def step_async(self, actions: np.ndarray) -> None:
        pass

    def step_wait(self) -> Any:
        dones, infos = np.zeros(self.num_envs, bool), [{} for _ in range(self.num_envs)]
        for i, length in enumerate(self.lengths):
            self.time[i] += 1
            if self.time[i] == length:
                infos[i] = {"episode": {"r": 100.0 * i + self.number[i], "l": length, "t": 0.0}}
                self.time[i], dones[i] = 0, True
                self.number[i] += 1
        return np.zeros((self.num_envs, 1), np.float32), np.full(self.num_envs, -7.0), dones, infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        pass

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return []

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


class Sleeper:
    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        torch.rand(1)
        return np.zeros(len(observation), int), None


def test_short_episodes_are_not_favoured() -> None:
    scores = evaluate(Sleeper(), Metronome([1, 10]), 4, seed=3)
    assert scores.returns == (0.0, 1.0, 100.0, 101.0)
    assert scores.lengths == (1, 1, 10, 10)
    assert scores.steps == 22
    assert scores.mean == pytest.approx(50.5)
    # The first four to finish would all have come from the fast environment.
    assert set(scores.lengths) != {1}


@pytest.mark.parametrize(("episodes", "n_envs", "expected"), [(5, 2, [2, 3]), (1, 3, [0, 0, 1]), (6, 3, [2, 2, 2])])
def test_episodes_are_shared_out(episodes: int, n_envs: int, expected: list[int]) -> None:
    shares = quota(episodes, n_envs)
    assert shares.sum() == episodes
    assert sorted(shares) == expected


def test_an_episode_without_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.evaluation.LONGEST", 50)
    assert evaluate(Sleeper(), Metronome([50, 3]), 4, seed=3).lengths == (50, 50, 3, 3)  # together they may take longer
    with pytest.raises(UsageError, match=r"not ended after 50 steps.*time-limit"):
        evaluate(Sleeper(), Metronome([10**9, 3]), 4, seed=3)


def test_seeds_are_fixed_and_training_is_left_alone() -> None:
    env = Metronome([2])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    evaluate(Sleeper(), env, 1, seed=11)
    assert torch.rand(1) == expected
    assert env.seeds == [11]


@pytest.mark.parametrize(
    ("backend", "episodes", "expected"), [("native", 100, 50), ("native", 3, 3), ("gymnasium", 100, 8)]
)
def test_an_evaluation_has_many_environments_where_they_cost_little(backend: str, episodes: int, expected: int) -> None:
    config = configfiles.shipped("InvertedPendulum-v5")
    config = replace(config, env=replace(config.env, options=replace(config.env.options, backend=backend)))
    with closing(loading.evaluation_envs(episodes, 0)(config)) as venv:
        assert venv.num_envs == expected
