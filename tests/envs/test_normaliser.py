"""The normaliser is Stable-Baselines3's to the last bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from envs import EnvOptions, RunningNormaliser, make

STEPS = 300


class Walk(gym.Env[Any, Any]):
    """A random walk of any space, scaled unevenly, with deaths and time limits."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, space: gym.Space[Any], number: int) -> None:
        self.observation_space, self._rng = space, np.random.default_rng(number)

    def _look(self) -> Any:
        if isinstance(self.observation_space, gym.spaces.Dict):
            return {key: self._draw(part) for key, part in self.observation_space.spaces.items()}
        return self._draw(self.observation_space)

    def _draw(self, space: gym.Space[Any]) -> Any:
        values = self._rng.normal(3.0, 10.0 ** self._rng.integers(-3, 2), space.shape)
        return (np.abs(values) % 250 if space.dtype.kind == "u" else values).astype(space.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._look(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chance = self._rng.random()
        return self._look(), float(self._rng.normal(0, 30)), chance < 0.05, 0.05 <= chance < 0.1, {}


def box(dtype: Any, shape: tuple[int, ...] = (17,)) -> gym.spaces.Box:
    return gym.spaces.Box(0, 255, shape, dtype) if dtype is np.uint8 else gym.spaces.Box(-np.inf, np.inf, shape, dtype)


SPACES = {
    "float64": box(np.float64),
    "float32": box(np.float32),
    "float16": box(np.float16),
    "bytes": box(np.uint8),
    "matrices": box(np.float64, (3, 5)),
    "numbers": box(np.float32, ()),
    "dictionaries": gym.spaces.Dict({"a": box(np.float64), "b": box(np.float32, (2, 2))}),
}


def walks(kind: type[VecNormalize], space: gym.Space[Any], n_envs: int = 5, **kwargs: Any) -> VecNormalize:
    return kind(DummyVecEnv([lambda i=i: Walk(space, i) for i in range(n_envs)]), **kwargs)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    left, right = np.asarray(left), np.asarray(right)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def statistics(env: VecNormalize) -> dict[str, Any]:
    kept: dict[str, Any] = {"returns": env.returns, "ret_rms": vars(env.ret_rms)}
    if env.norm_obs:
        keyed = env.obs_rms if isinstance(env.obs_rms, dict) else {"": env.obs_rms}
        kept["obs_rms"] = {key: vars(value) for key, value in keyed.items()}
    return kept


def assert_equal_runs(left: VecNormalize, right: VecNormalize, steps: int) -> int:
    """Step both and compare all they say; the number of episodes that ended."""
    assert same(left.reset(), right.reset())
    ends = 0
    for _ in range(steps):
        actions = np.array([left.action_space.sample() for _ in range(left.num_envs)])
        (o, r, d, infos), (o2, r2, d2, infos2) = left.step(actions), right.step(actions)
        assert same(o, o2) and same(r, r2) and same(d, d2)
        for info, info2 in zip(infos, infos2, strict=True):
            assert info.keys() == info2.keys()
            if "terminal_observation" in info:
                ends += 1
                assert same(info["terminal_observation"], info2["terminal_observation"])
        assert same(left.get_original_obs(), right.get_original_obs())
        assert same(left.get_original_reward(), right.get_original_reward())
    assert same(statistics(left), statistics(right))
    return ends


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"norm_obs": False}, {"norm_reward": False}, {"clip_obs": 1.0, "clip_reward": 0.5, "gamma": 0.9}],
    ids=["all", "rewards", "observations", "clipped"],
)
def test_every_number_is_stable_baselines3s(name, settings):
    ours, theirs = (walks(kind, SPACES[name], **settings) for kind in (RunningNormaliser, VecNormalize))
    assert assert_equal_runs(ours, theirs, STEPS) > 20


@pytest.mark.parametrize("n_envs", [1, 2, 9, 64])
def test_any_number_of_environments(n_envs):
    ours, theirs = (walks(kind, SPACES["float64"], n_envs) for kind in (RunningNormaliser, VecNormalize))
    assert_equal_runs(ours, theirs, 100)


def test_some_keys_only():
    ours, theirs = (
        walks(kind, SPACES["dictionaries"], norm_obs_keys=["b"]) for kind in (RunningNormaliser, VecNormalize)
    )
    assert_equal_runs(ours, theirs, 100)


def test_frozen_statistics_stay():
    ours, theirs = (walks(kind, SPACES["float64"]) for kind in (RunningNormaliser, VecNormalize))
    assert_equal_runs(ours, theirs, 50)
    ours.training = theirs.training = False
    before = copy.deepcopy(vars(ours.obs_rms))
    assert_equal_runs(ours, theirs, 50)
    assert same(vars(ours.obs_rms), before)


def test_on_a_task():
    ours, theirs = (
        kind(make("Hopper-v5", 3, seed=1, options=EnvOptions(time_limit=40)), gamma=0.99)
        for kind in (RunningNormaliser, VecNormalize)
    )
    ours.action_space.seed(0)
    assert assert_equal_runs(ours, theirs, STEPS) > 5


def test_a_pickle_is_stable_baselines3s_own_and_goes_on_the_same(tmp_path):
    ours = walks(RunningNormaliser, SPACES["float64"])
    assert_equal_runs(ours, walks(VecNormalize, SPACES["float64"]), 50)
    ours.save(str(tmp_path / "normaliser.pkl"))
    assert b"RunningNormaliser" not in (tmp_path / "normaliser.pkl").read_bytes()
    loaded = VecNormalize.load(str(tmp_path / "normaliser.pkl"), walks(VecNormalize, SPACES["float64"]).venv)
    assert type(loaded) is VecNormalize
    assert same(vars(loaded.obs_rms), vars(ours.obs_rms)) and same(vars(loaded.ret_rms), vars(ours.ret_rms))
    assert loaded.clip_obs == ours.clip_obs
    assert type(pickle.loads(pickle.dumps(ours))) is VecNormalize


def test_what_was_seen_is_not_written_into():
    env = walks(RunningNormaliser, SPACES["float64"])
    env.reset()
    for _ in range(5):
        observations, rewards, _, _ = env.step(np.zeros(5, dtype=np.int64))
        originals = env.get_original_obs(), env.get_original_reward()
        observations[:], rewards[:] = np.nan, np.nan
        assert same(env.get_original_obs(), originals[0]) and same(env.get_original_reward(), originals[1])
        assert np.isfinite(env.obs_rms.mean).all()
