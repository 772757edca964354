"""The in-process vector environment against Stable-Baselines3's own."""

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from envs.inprocess import InProcessVecEnv


def _worlds():
    return [lambda: Monitor(gym.make("Hopper-v5", max_episode_steps=40)) for _ in range(3)]


def _play(venv, steps=150):
    venv.seed(3)
    rng = np.random.default_rng(0)
    record = [venv.reset()]
    for _ in range(steps):
        record.append(venv.step(rng.uniform(-1, 1, (3, 3))))
    return record


def test_steps_equal_stable_baselines():
    ours, theirs = _play(InProcessVecEnv(_worlds())), _play(DummyVecEnv(_worlds()))
    assert np.array_equal(ours[0], theirs[0])
    ends = truncations = 0
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        for a, b in zip(mine[:3], other[:3], strict=True):
            assert np.array_equal(a, b)
        for a, b in zip(mine[3], other[3], strict=True):
            assert a.keys() == b.keys()
            assert a["TimeLimit.truncated"] == b["TimeLimit.truncated"]
            ends += "episode" in a
            truncations += a["TimeLimit.truncated"]
            if "episode" in a:
                assert a["episode"]["r"] == b["episode"]["r"]
                assert np.array_equal(a["terminal_observation"], b["terminal_observation"])
    assert ends > truncations > 0  # both kinds of end were compared


def test_infos_are_the_callers_own():
    venv = InProcessVecEnv(_worlds())
    venv.reset()
    infos = venv.step(np.zeros((3, 3)))[3]
    infos[0]["mine"] = 1
    assert "mine" not in venv.step(np.zeros((3, 3)))[3][0]
