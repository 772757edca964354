"""A saved stack of worlds goes on, to the last bit, where it was left."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

import envs
from envs import EnvOptions, RunningNormaliser, UnsavedError, WorldError, load_stack, save_stack
from envs.options import PixelOptions
from envs.single import load_single, save_single
from envs.state import lively, plain

NATIVE = EnvOptions(backend="native", time_limit=30)
SMALL = EnvOptions(backend="native", time_limit=30, pixels=PixelOptions(size=16, frame_stack=2))
SHORT = EnvOptions(time_limit=30)
WORLDS = {
    **{
        name: (f"{name}-v{version}", SHORT)
        for name, version in {
            "CartPole": 1,
            "Acrobot": 1,
            "MountainCar": 0,
            "MountainCarContinuous": 0,
            "Pendulum": 1,
        }.items()
    },
    **{
        f"{name}, gymnasium": (f"{name}-v5", SHORT)
        for name in ("HalfCheetah", "Ant", "Humanoid", "Reacher", "InvertedDoublePendulum")
    },
    **{f"{name}, native": (f"{name}-v5", NATIVE) for name in ("HalfCheetah", "Ant", "Humanoid", "Pusher")},
    "pixels": ("pixels/InvertedPendulum-v5", SMALL),
    **{f"toy {name}": (f"toy/{name}-v0", EnvOptions()) for name in ("Bandit", "Reach", "Constant", "Corridor")},
}


def stack(env_id: str, options: EnvOptions, seed: int) -> Any:
    raw = envs.make(env_id, 2, seed=seed, options=options)
    images = len(raw.observation_space.shape) == 3
    return RunningNormaliser(raw, norm_obs=not images)


def play(venv: Any, actions: list[Any]) -> list[Any]:
    seen = []
    for action in actions:
        observations, rewards, dones, infos = venv.step(action)
        ends = [(info["episode"]["r"], info["episode"]["l"]) for info in infos if "episode" in info]
        last = [info["terminal_observation"] for info in infos if "terminal_observation" in info]
        seen.append((observations, rewards, dones, *last, ends))
    return seen


def same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return np.array_equal(one, other) and getattr(one, "dtype", None) == getattr(other, "dtype", None)


def copied(source: Any, target: Any) -> None:
    """The statistics, which are the policy's and not the worlds'."""
    for name in ("obs_rms", "ret_rms"):
        if hasattr(source, name):
            for part in ("mean", "var", "count"):
                setattr(getattr(target, name), part, getattr(getattr(source, name), part))


@pytest.mark.parametrize("world", WORLDS)
def test_worlds_go_on_where_they_were_saved(world: str) -> None:
    env_id, options = WORLDS[world]
    venv, twin, stranger = (stack(env_id, options, seed) for seed in (1, 2, 3))
    actions = [np.array([venv.action_space.sample() for _ in range(2)]) for _ in range(90)]
    venv.reset()
    play(venv, actions[:45])
    state = save_stack(venv)
    load_stack(twin, state)
    stranger.reset()
    for other in (twin, stranger):
        copied(venv, other)
    there = play(venv, actions[45:])
    assert same(there, play(twin, actions[45:]))
    # What was saved has not moved on with the worlds, and other worlds do go another way.
    load_stack(twin, state)
    again = play(twin, actions[45:])
    assert [(step[2].tolist(), step[-1]) for step in again] == [(step[2].tolist(), step[-1]) for step in there]
    if world != "toy Constant":
        assert not same(there, play(stranger, actions[45:]))
    for each in (venv, twin, stranger):
        each.close()


@pytest.mark.parametrize("lost", ["generator", "layers"])
def test_every_part_of_a_single_world_is_needed(lost: str) -> None:
    def ends(env: Any) -> list[Any]:
        seen = []
        for _ in range(60):
            observation, *_, terminated, truncated, info = env.step(0)
            seen.append((observation, info.get("episode", {}).get("r")))
            if terminated or truncated:
                seen.append(env.reset()[0])
        return seen

    one, other = (envs.make("CartPole-v1", 1, seed=seed, options=SHORT).venv.envs[0] for seed in (1, 2))
    for env, seed in ((one, 1), (other, 2)):
        env.reset(seed=seed)
        env.step(1)
    state = save_single(one)
    own = save_single(other)
    load_single(other, state | {lost: own[lost]})
    assert not same(ends(one), ends(other))


class Counting(gym.Env[Any, Any]):
    """A user's world with a state of its own."""

    observation_space = gym.spaces.Box(0, 1e6, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    count = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return np.full(1, self.count, np.float32), 1.0, False, False, {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


class Forgetful(Counting):
    state_dict = None  # type: ignore[assignment]


def test_a_world_may_bring_its_own_state() -> None:
    one, other = Counting(), Counting()
    for _ in range(3):
        one.step(0)
    load_single(other, save_single(one))
    assert other.step(0)[0] == one.step(0)[0]


def test_what_cannot_be_saved_is_named() -> None:
    from envs.inprocess import InProcessVecEnv

    with pytest.raises(UnsavedError, match="Forgetful cannot be saved"):
        save_stack(InProcessVecEnv([Forgetful]))
    with pytest.raises(UnsavedError, match="DummyVecEnv cannot be saved"):
        save_stack(DummyVecEnv([Counting]))
    # A wrapper passes its world's methods on, which are not its own.
    with pytest.raises(UnsavedError, match="VecFrameStack cannot be saved"):
        save_stack(VecFrameStack(InProcessVecEnv([Counting]), 2))
    with pytest.raises(UnsavedError, match=r"holds a set"):
        plain({1}, "CartPoleEnv")


def test_atari_cannot_be_saved() -> None:
    games = envs.make("ALE/Pong-v5", 1, seed=0)
    with pytest.raises(UnsavedError, match="AtariVecEnv cannot be saved"):
        save_stack(games)
    games.close()


def test_states_of_other_worlds_are_refused() -> None:
    poles, more = (envs.make("CartPole-v1", n, seed=0) for n in (2, 3))
    cars = envs.make("MountainCar-v0", 2, seed=0)
    cheetahs, ants = (envs.make(f"{name}-v5", 2, seed=0) for name in ("HalfCheetah", "Ant"))
    native = envs.make("HalfCheetah-v5", 2, seed=0, options=NATIVE)
    for venv in (poles, cheetahs):
        venv.reset()
    state = save_stack(poles)
    for other, words in ((more, "of 2 worlds"), (cars, "CartPoleEnv"), (native, "MujocoVecEnv")):
        with pytest.raises(WorldError, match=words):
            load_stack(other, state)
    with pytest.raises(WorldError, match="HalfCheetahEnv"):
        load_stack(ants, save_stack(cheetahs))
    with pytest.raises(WorldError, match="2 environments"):
        load_stack(RunningNormaliser(more), [{"layer": "RunningNormaliser", "state": {"returns": np.zeros(2)}}, *state])


def test_scalars_keep_their_type() -> None:
    for value in (np.float32(0.1), np.float64(0.1), 0.1, 3, True, None, "x", (1, np.int8(2)), [np.bool_(True)]):
        again = lively(plain(value, "it"))
        assert again == value
        assert type(again) is type(value)
    assert type(lively(plain((np.float32(1),), "it"))[0]) is np.float32
