"""The guard speaks at the first bad number, says where it is, and is silent otherwise."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from envs import EnvOptions, FiniteGuard, WorldError, make
from envs.toy import ConstantEnv, NaNEnv


def steps_survived(venv: VecEnv, limit: int = 30) -> tuple[int, str]:
    """Steps until the guard spoke, and what it said."""
    venv.reset()
    for step in range(limit):
        try:
            venv.step(np.zeros(venv.num_envs, dtype=np.int64))
        except WorldError as error:
            return step, str(error)
    return limit, ""


@pytest.mark.parametrize("what", ["observation", "reward"])
@pytest.mark.parametrize("after", [0, 5])
def test_make_guards_every_world(what: str, after: int) -> None:
    options = EnvOptions(env_kwargs={"what": what, "after": after})
    steps, message = steps_survived(make("toy/NaN-v0", 2, seed=0, options=options))
    assert steps == after
    assert message.startswith(what)
    assert f"environment 0 is nan at step {after + 1}; " in message


def test_sound_worlds_pass_and_the_fault_is_real() -> None:
    assert steps_survived(make("toy/Constant-v0", 2, seed=0)) == (30, "")
    assert steps_survived(DummyVecEnv([NaNEnv])) == (30, "")  # without the guard nobody notices


def test_it_names_the_environment() -> None:
    venv = FiniteGuard(DummyVecEnv([ConstantEnv, lambda: NaNEnv("reward", 2), ConstantEnv]))
    steps, message = steps_survived(venv)
    assert steps == 2
    assert message.startswith("reward of environment 1 is nan at step 3")


class Faulty(gym.Env[Any, np.int64]):
    """Returns a given observation at the first step, which ends the episode if asked; sound at resets unless told."""

    def __init__(self, observation: Any, space: gym.Space[Any], sound: Any, ends: bool = False) -> None:
        self.observation_space, self.action_space = space, gym.spaces.Discrete(2)
        self._observation, self._sound, self._ends = observation, sound, ends

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._sound, {}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._observation, 0.0, self._ends, False, {}


BOX = gym.spaces.Box(-np.inf, np.inf, (2, 2), np.float64)
ZEROS = np.zeros((2, 2))
INFINITE = np.array([[0.0, 0.0], [-np.inf, 0.0]])


def test_infinities_inside_an_observation() -> None:
    steps, message = steps_survived(FiniteGuard(DummyVecEnv([lambda: Faulty(INFINITE, BOX, ZEROS)])))
    assert steps == 0
    assert message.startswith("observation[1, 0] of environment 0 is -inf at step 1")


def test_final_observations_which_a_reset_hides() -> None:
    worlds = [lambda: Faulty(ZEROS, BOX, ZEROS), lambda: Faulty(INFINITE, BOX, ZEROS, ends=True)]
    steps, message = steps_survived(FiniteGuard(DummyVecEnv(worlds)))
    assert steps == 0
    assert message.startswith("final observation[1, 0] of environment 1 is -inf at step 1")


def test_dict_observations_and_integers() -> None:
    space = gym.spaces.Dict({"pixels": gym.spaces.Box(0, 255, (2,), np.uint8), "speed": BOX})
    sound = {"pixels": np.zeros(2, np.uint8), "speed": ZEROS}
    broken = {**sound, "speed": INFINITE}
    assert steps_survived(FiniteGuard(DummyVecEnv([lambda: Faulty(sound, space, sound)]))) == (30, "")
    _, message = steps_survived(FiniteGuard(DummyVecEnv([lambda: Faulty(broken, space, sound)])))
    assert message.startswith("observation 'speed'[1, 0] of environment 0 is -inf")


def test_first_observations() -> None:
    venv = FiniteGuard(DummyVecEnv([lambda: Faulty(ZEROS, BOX, INFINITE)]))
    with pytest.raises(WorldError, match="at step 0"):
        venv.reset()


@pytest.mark.parametrize(("dtype", "largest"), [(np.float64, 1e308), (np.float32, 3e38), (np.float16, 6e4)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.filterwarnings("error")
def test_the_largest_numbers_are_numbers(dtype: type, largest: float, sign: int) -> None:
    space = gym.spaces.Box(-np.inf, np.inf, (2, 2), dtype)
    sound = np.full((2, 2), sign * largest, dtype)
    assert steps_survived(FiniteGuard(DummyVecEnv([lambda: Faulty(sound, space, sound)]))) == (30, "")
    broken = sound.copy()
    broken[1, 1] = np.nan
    _, message = steps_survived(FiniteGuard(DummyVecEnv([lambda: Faulty(broken, space, sound)])))
    assert message.startswith("observation[1, 1] of environment 0 is nan at step 1")
