"""ACKTR learns what it must: the optimum of a bandit, a pole, a reach."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from acktr.sb3 import ACKTR

pytestmark = pytest.mark.slow
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


class Contexts(gym.Env):
    """One step: the context says which of four arms pays 1; the others pay at most a half."""

    observation_space = spaces.Box(0.0, 1.0, (4,), np.float32)
    action_space = spaces.Discrete(4)
    pays = np.array([[1.0, 0.5, 0.2, 0.0], [0.1, 0.3, 1.0, 0.5], [0.5, 1.0, 0.0, 0.4], [0.0, 0.4, 0.5, 1.0]])
    context = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.context = int(self.np_random.integers(4))
        return np.eye(4, dtype=np.float32)[self.context], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation = np.eye(4, dtype=np.float32)[self.context]
        return observation, float(self.pays[self.context, action]), True, False, {}


class Reach(gym.Env):
    """A point in the plane goes at most 0.2 a step towards a target; the reward is minus the distance that is left."""

    observation_space = spaces.Box(-2.0, 2.0, (4,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    length = 20

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place, self.target = self.np_random.uniform(-1, 1, (2, 2))
        self.steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        self.place = np.clip(self.place + 0.2 * np.clip(action, -1, 1), -1, 1)
        left = float(np.abs(self.target - self.place).sum())
        return self._observation(), -left, False, self.steps >= self.length, {}

    def _observation(self) -> np.ndarray:
        return np.concatenate([self.place, self.target - self.place]).astype(np.float32)

    def optimum(self) -> float:
        """Each axis goes straight at full speed: the sum of what is left after each step."""
        gap, total = np.abs(self.target - self.place), 0.0
        for _ in range(self.length):
            gap = np.maximum(gap - 0.2, 0)
            total -= float(gap.sum())
        return total


def envs(make, n_envs: int, seed: int):
    env = VecMonitor(DummyVecEnv([make] * n_envs))
    env.seed(seed)
    return env


@SEEDS
def test_a_contextual_bandit_is_solved(seed):
    agent = ACKTR("MlpPolicy", envs(Contexts, 8, seed), n_steps=32, seed=seed, device="cpu").learn(10_240)
    env, rewards = Contexts(), []
    for number in range(200):
        observation, _ = env.reset(seed=1000 + number)
        action, _ = agent.predict(observation, deterministic=True)
        rewards.append(env.step(int(action))[1])
    assert np.mean(rewards) >= 0.95, "the best arm always pays 1"
    drawn = evaluate_policy(agent, envs(Contexts, 1, 7), n_eval_episodes=300, deterministic=False)[0]
    assert drawn >= 0.9


@SEEDS
def test_a_pole_is_balanced(seed):
    agent = ACKTR("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), seed=seed, device="cpu").learn(60_000)
    mean, _ = evaluate_policy(agent, make_vec_env("CartPole-v1", 1, seed=99), n_eval_episodes=20)
    assert mean >= 475


@SEEDS
def test_a_point_reaches_its_target(seed):
    agent = ACKTR("MlpPolicy", envs(Reach, 8, seed), n_steps=128, seed=seed, device="cpu").learn(40_960)
    env, found, best, idle = Reach(), 0.0, 0.0, 0.0
    for number in range(50):
        observation, _ = env.reset(seed=1000 + number)
        best += env.optimum()
        idle -= float(np.abs(env.target - env.place).sum()) * env.length
        over = False
        while not over:
            action, _ = agent.predict(observation, deterministic=True)
            observation, reward, _, over, _ = env.step(action)
            found += reward
    assert (found - idle) / (best - idle) >= 0.9, "share of the way from doing nothing to the optimum"
