"""Off-policy peers: how many steps and seconds SAC and TD3 take to a mean return.

    PYTHONPATH=. python docs/results/offpolicy.py sac HalfCheetah-v5 4500 > sac-HalfCheetah-v5.csv

Stable-Baselines3's SAC or TD3 learns one of our environments with the settings that rl-baselines3-zoo has for it (the
library's own, and 10,000 steps before the first update; TD3 with noise of 0.1 on its actions) until the mean of the
last 100 training episodes reaches a return, or a million steps are over. A row for each episode: environment steps,
return, seconds on the clock, seconds of processor time.
"""

from __future__ import annotations

import csv
import sys
import time
from collections import deque

import numpy as np
import torch
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

import envs

STEPS, EPISODES, WARM_UP, NOISE = 1_000_000, 100, 10_000, 0.1


class Recorder(BaseCallback):
    """Writes a row for each episode; stops at the goal.

    Args:
        goal: Mean return of the last episodes that ends the run.
    """

    def __init__(self, goal: float) -> None:
        super().__init__()
        self._goal = goal
        self._last: deque[float] = deque(maxlen=EPISODES)
        self._table = csv.writer(sys.stdout)
        self._start = time.perf_counter()
        self._table.writerow(["timesteps", "return", "seconds", "cpu_seconds"])

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self._last.append(float(info["episode"]["r"]))
                seconds = time.perf_counter() - self._start, time.process_time()
                self._table.writerow([self.num_timesteps, self._last[-1], *(round(s, 2) for s in seconds)])
                sys.stdout.flush()
        return len(self._last) < EPISODES or sum(self._last) / EPISODES < self._goal


def make(name: str, env: VecEnv) -> OffPolicyAlgorithm:
    """Make an agent.

    Args:
        name: ``sac`` or ``td3``.
        env: What it learns.

    Returns:
        The agent, untrained.
    """
    if name == "sac":
        return SAC("MlpPolicy", env, learning_starts=WARM_UP, seed=0, device="cpu")
    size = env.action_space.shape
    noise = NormalActionNoise(np.zeros(size), NOISE * np.ones(size))
    return TD3("MlpPolicy", env, learning_starts=WARM_UP, action_noise=noise, seed=0, device="cpu")


def main() -> None:
    """Train until the goal is reached."""
    name, env_id, goal = sys.argv[1], sys.argv[2], float(sys.argv[3])
    torch.set_num_threads(1)
    env = envs.make(env_id, 1, seed=0, options=envs.EnvOptions(backend="native"))
    make(name, env).learn(STEPS, Recorder(goal))


if __name__ == "__main__":
    main()
