"""The guard discards the episode with a bad number in it, says where it is, and is silent otherwise."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from envs import EnvOptions, FiniteGuard, WorldError, make
from envs.inprocess import InProcessVecEnv
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
    steps, message = steps_survived(make("toy/NaN-v0", 2, seed=0, options=options, max_faults=1))
    assert steps == after
    assert f" broke: {what}" in message
    assert f"environment 0 is nan at step {after + 1}; " in message


def test_sound_worlds_pass_and_the_fault_is_real() -> None:
    assert steps_survived(make("toy/Constant-v0", 2, seed=0)) == (30, "")
    assert steps_survived(DummyVecEnv([NaNEnv])) == (30, "")  # without the guard nobody notices


def test_it_names_the_environment() -> None:
    venv = FiniteGuard(DummyVecEnv([ConstantEnv, lambda: NaNEnv("reward", 2), ConstantEnv]), 1)
    steps, message = steps_survived(venv)
    assert steps == 2
    assert message.startswith("environment 1 broke: reward of environment 1 is nan at step 3")


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
    steps, message = steps_survived(FiniteGuard(DummyVecEnv([lambda: Faulty(INFINITE, BOX, ZEROS)]), 1))
    assert steps == 0
    assert message.startswith("environment 0 broke: observation[1, 0] of environment 0 is -inf at step 1")


def test_final_observations_which_a_reset_hides() -> None:
    worlds = [lambda: Faulty(ZEROS, BOX, ZEROS), lambda: Faulty(INFINITE, BOX, ZEROS, ends=True)]
    steps, message = steps_survived(FiniteGuard(DummyVecEnv(worlds), 1))
    assert steps == 0
    assert message.startswith("environment 1 broke: final observation[1, 0] of environment 1 is -inf at step 1")


def test_dict_observations_and_integers() -> None:
    space = gym.spaces.Dict({"pixels": gym.spaces.Box(0, 255, (2,), np.uint8), "speed": BOX})
    sound = {"pixels": np.zeros(2, np.uint8), "speed": ZEROS}
    broken = {**sound, "speed": INFINITE}
    assert steps_survived(FiniteGuard(DummyVecEnv([lambda: Faulty(sound, space, sound)]))) == (30, "")
    _, message = steps_survived(FiniteGuard(DummyVecEnv([lambda: Faulty(broken, space, sound)]), 1))
    assert message.startswith("environment 0 broke: observation 'speed'[1, 0] of environment 0 is -inf")


def test_first_observations() -> None:
    venv = FiniteGuard(DummyVecEnv([lambda: Faulty(ZEROS, BOX, INFINITE)]))
    with pytest.raises(WorldError, match=r"10 times with no whole episode between: .* at step 0"):
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
    _, message = steps_survived(FiniteGuard(DummyVecEnv([lambda: Faulty(broken, space, sound)]), 1))
    assert message.startswith("environment 0 broke: observation[1, 1] of environment 0 is nan at step 1")


class Once(ConstantEnv):
    """The constant world for six steps, whose observation, reward, or both are broken once in its life."""

    def __init__(self, what: str, at: int) -> None:
        super().__init__()
        self._what, self._at, self._lived, self._steps = what, at, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._steps = 0
        return super().reset(seed=seed)

    def step(self, action: np.int64) -> Any:
        observation, reward, *_ = super().step(action)
        self._lived, self._steps = self._lived + 1, self._steps + 1
        if self._lived == self._at and "observation" in self._what:
            observation = np.full_like(observation, np.inf)
        if self._lived == self._at and "reward" in self._what:
            reward = np.nan
        return observation, reward, self._steps == 6, False, {}


@pytest.mark.parametrize("restart", [DummyVecEnv, InProcessVecEnv])
@pytest.mark.parametrize(("what", "at", "kind"), [
    ("observation", 3, "observation"),
    ("reward", 3, "reward"),
    ("observation and reward", 4, "reward"),
    ("observation", 6, "final_observation"),
    ("reward", 6, "reward"),
])  # fmt: skip
def test_one_fault_cuts_one_episode_and_the_others_go_on(restart: Any, what: str, at: int, kind: str) -> None:
    venv = FiniteGuard(restart([lambda: Monitor(ConstantEnv6()), lambda: Monitor(Once(what, at))]))
    venv.reset()
    scores: dict[int, list[float]] = {0: [], 1: []}
    for step in range(1, 19):
        observations, rewards, dones, infos = venv.step(np.zeros(2, np.int64))
        assert np.isfinite(observations).all() and np.isfinite(rewards).all()
        assert dones[0] == (step % 6 == 0)
        if step == at:
            assert (rewards.tolist(), bool(dones[1])) == ([1.0, 0.0], True)
            ((found, text),) = infos[1]["faults"]
            assert found == kind and text.endswith(f"at step {at}")
            assert infos[1]["broken_off"] and infos[1]["TimeLimit.truncated"] and "episode" not in infos[1]
            assert infos[1]["terminal_observation"].tolist() == [1.0]  # the one before
        else:
            assert not any("faults" in info for info in infos)
        for index, info in enumerate(infos):
            scores[index] += [info["episode"]["r"]] if "episode" in info else []
    assert scores[0] == [6.0] * 3
    assert scores[1] == [6.0] * 2  # of whole episodes alone


class ConstantEnv6(Once):
    """Never broken."""

    def __init__(self) -> None:
        super().__init__("", 0)


def test_a_whole_episode_forgives_the_faults_before_it() -> None:
    guard = FiniteGuard(InProcessVecEnv([lambda: Recurring(8)]), 2)
    guard.reset()
    for _ in range(40):  # every eighth step breaks, every episode has six
        guard.step(np.zeros(1, np.int64))
    guard = FiniteGuard(InProcessVecEnv([lambda: Recurring(5)]), 2)
    guard.reset()
    with pytest.raises(WorldError, match="broke 2 times with no whole episode between"):
        for _ in range(40):
            guard.step(np.zeros(1, np.int64))


class Recurring(Once):
    """Breaks at every n-th step of its life."""

    def __init__(self, period: int) -> None:
        super().__init__("reward", 0)
        self._period = period

    def step(self, action: np.int64) -> Any:
        self._at = self._lived + 1 if (self._lived + 1) % self._period == 0 else 0
        return super().step(action)


SPACES = st.sampled_from([np.float32, np.float64]).flatmap(
    lambda dtype: st.lists(st.integers(1, 3), min_size=0, max_size=3).map(
        lambda shape: gym.spaces.Box(-1.0, 1.0, tuple(shape) or (1,), dtype)
    )
)
NESTED = SPACES | st.dictionaries(st.sampled_from("abc"), SPACES, min_size=1, max_size=3).map(gym.spaces.Dict)


@settings(max_examples=60, deadline=None)
@given(space=NESTED, n_envs=st.integers(1, 4), data=st.data())
def test_whatever_the_space_nothing_broken_comes_through(space: gym.Space[Any], n_envs: int, data: Any) -> None:
    """A number at any place of any environment's observation, at any step, is found there and nowhere else."""
    at, victim = data.draw(st.integers(1, 5)), data.draw(st.integers(0, n_envs - 1))
    value = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    key = data.draw(st.sampled_from(sorted(space.spaces))) if isinstance(space, gym.spaces.Dict) else None
    part = space if key is None else space.spaces[key]  # type: ignore[attr-defined]
    entry = tuple(data.draw(st.integers(0, size - 1)) for size in part.shape)

    def world(index: int) -> gym.Env[Any, Any]:
        return AnySpace(space, at if index == victim else 0, key, entry, value)

    guard = FiniteGuard(InProcessVecEnv([lambda index=index: world(index) for index in range(n_envs)]))
    guard.reset()
    for step in range(1, 7):
        observations, _, dones, infos = guard.step(np.zeros(n_envs, np.int64))
        shown = observations.values() if isinstance(observations, dict) else [observations]
        assert all(np.isfinite(values).all() for values in shown)
        assert [index for index, info in enumerate(infos) if "faults" in info] == ([victim] if step == at else [])
        assert dones.any() == (step == at)


class AnySpace(gym.Env[Any, np.int64]):
    """Samples of a space, one entry of one of them replaced."""

    def __init__(self, space: gym.Space[Any], at: int, key: str | None, entry: tuple[int, ...], value: float) -> None:
        self.observation_space, self.action_space = space, gym.spaces.Discrete(2)
        self._at, self._key, self._entry, self._value, self._lived = at, key, entry, value, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}

    def step(self, action: np.int64) -> Any:
        observation, self._lived = self.observation_space.sample(), self._lived + 1
        if self._lived == self._at:
            (observation if self._key is None else observation[self._key])[self._entry] = self._value
        return observation, 0.0, False, False, {}
