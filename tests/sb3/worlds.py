"""Small worlds with known answers, and ways to look into an agent while it trains."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from torch import Tensor, nn

from acktr.sb3 import ACKTR, ActorSettings, CriticSettings

BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
PLANE = spaces.Box(-1.0, 1.0, (2,), np.float32)
TURNS = spaces.Discrete(3)
IMAGE = spaces.Box(0, 255, (1, 12, 12), np.uint8)
NAMED = spaces.Dict({"here": BOX, "there": PLANE})

QUICK_CRITIC = CriticSettings(n_epochs=2, n_minibatches=2)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Noise(gym.Env):
    """Random observations of any space; the reward depends on the action; ends after `length` steps."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, length: int = 12) -> None:
        self.observation_space, self.action_space, self.length = observation_space, action_space, length
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        reward = float(np.square(action).mean())
        over = self.steps >= self.length
        return self.observation_space.sample(), reward, over, False, {}


class Ones(gym.Env):
    """Reward 1 for ever, cut after `length` steps: by truncation, or by termination."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int, ends: str) -> None:
        self.length, self.ends, self.steps = length, ends, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        over = self.steps >= self.length
        return np.ones(1, np.float32), 1.0, over and self.ends == "terminated", over and self.ends == "truncated", {}


class Poisoned(Noise):
    """`Noise` whose reward or observation becomes `value` at one step of every episode; a time limit ends it."""

    def __init__(self, action_space: spaces.Space, where: str, value: float, at: int = 7) -> None:
        super().__init__(BOX, action_space)
        self.where, self.value, self.at = where, value, at

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        observation, reward, terminated, _, info = super().step(action)
        if self.steps == self.at and self.where == "reward":
            reward = self.value
        if self.steps == self.at and self.where == "observation":
            observation = np.full_like(observation, self.value)
        return observation, reward, False, terminated, info


class TinyCNN(BaseFeaturesExtractor):
    """Two convolutions and a linear layer for 12 × 12 images."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=8)
        channels = observation_space.shape[0]
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 4, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 8),
            nn.ReLU(),
        )

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations)


TINY_CNN = {"features_extractor_class": TinyCNN}


def vectorised(make: Any, n_envs: int = 2) -> DummyVecEnv:
    """Environments side by side, with their episodes recorded."""
    return VecMonitor(DummyVecEnv([make] * n_envs))


def normalised(make: Any, n_envs: int = 2, **kwargs: Any) -> VecNormalize:
    return VecNormalize(vectorised(make, n_envs), **kwargs)


def noise(observation_space: spaces.Space = BOX, action_space: spaces.Space = TURNS) -> Any:
    return lambda: Noise(observation_space, action_space)


def small_agent(policy: str, env: Any, **kwargs: Any) -> ACKTR:
    """An agent whose updates take milliseconds."""
    settings = {"n_steps": 16, "critic": QUICK_CRITIC, "seed": 0, "device": "cpu", "actor": ActorSettings()}
    return ACKTR(policy, env, **(settings | kwargs))


def quiet(agent: ACKTR) -> ACKTR:
    """Let `train` be called without `learn`."""
    agent.set_logger(Logger(folder=None, output_formats=[]))
    return agent


class Nothing(BaseCallback):
    """A callback that lets everything pass."""

    def _on_step(self) -> bool:
        return True


def collected(agent: ACKTR) -> ACKTR:
    """Fill the agent's rollout buffer once, without training."""
    _, callback = agent._setup_learn(agent.n_steps * agent.n_envs, Nothing())
    assert agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
    return quiet(agent)


def observed_steps(optimizer: Any) -> list[tuple[float, Any]]:
    """Radius and report of every step the optimizer takes from now on."""
    seen: list[tuple[float, Any]] = []
    step = optimizer.descend

    def observed(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        seen.append((optimizer.param_groups[0]["radius"], optimizer.report))
        return out

    optimizer.descend = observed
    return seen


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Where two nested states are not equal to the last bit."""
    if isinstance(left, dict):
        keys = sorted({*left, *right}, key=str)
        if set(left) != set(right):
            return [f"{path}: keys {keys}"]
        return [d for key in keys for d in differences(left[key], right[key], f"{path}/{key}")]
    if isinstance(left, list | tuple):
        if len(left) != len(right):
            return [f"{path}: length"]
        return [d for n, (a, b) in enumerate(zip(left, right, strict=True)) for d in differences(a, b, f"{path}/{n}")]
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [path]
    return [path] if isinstance(left, Tensor) or isinstance(right, Tensor) or left != right else []
