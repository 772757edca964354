"""The native MuJoCo vector environment: seeds, states, options, pictures, and what it says when it cannot."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize

from envs import EnvOptions, FiniteGuard, WorldError, make
from envs.mujoco import TASKS, MujocoVecEnv
from envs.mujoco.generators import generator, pack, unpack

ENGINES = ["Hopper-v5", "Ant-v5"]  # one task on each of the two engines


def native(env_id: str, n_envs: int = 3, seed: int | None = 5, **options: Any) -> Any:
    """The environment without its guard."""
    guarded = make(env_id, n_envs, seed=seed, options=EnvOptions(backend="native", **options))
    assert isinstance(guarded, FiniteGuard)
    assert isinstance(guarded.venv, MujocoVecEnv)
    return guarded.venv


def play(venv: Any, steps: int, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    shape = (venv.num_envs, *venv.action_space.shape)
    return [venv.step(rng.uniform(-1, 1, shape).astype(np.float32)) for _ in range(steps)]


def assert_same_play(first: list[Any], second: list[Any]) -> None:
    for mine, other in zip(first, second, strict=True):
        for a, b in zip(mine[:3], other[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(mine[3], other[3], strict=True):
            assert a.keys() == b.keys()
            if a:
                assert (a["episode"]["r"], a["episode"]["l"]) == (b["episode"]["r"], b["episode"]["l"])


# ------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("env_id", [*ENGINES, "Humanoid-v5", "Reacher-v5"])
def test_a_restored_world_goes_on_bit_for_bit(env_id: str, tmp_path: Path) -> None:
    first, second = native(env_id, time_limit=25), native(env_id, seed=77, time_limit=25)
    first.reset()
    play(first, 37)
    np.savez(tmp_path / "worlds.npz", **first.state_dict())
    second.reset()
    play(second, 3)
    second.load_state_dict(np.load(tmp_path / "worlds.npz"))
    np.testing.assert_array_equal(first.observations, second.observations)
    steps = play(first, 60, seed=1)
    assert_same_play(steps, play(second, 60, seed=1))
    assert sum(int(step[2].sum()) for step in steps) > 3  # starts were drawn after the restoration


@pytest.mark.parametrize("env_id", ENGINES)
@pytest.mark.parametrize("left_out", ["simulation", "generators", "positions", "returns", "lengths"])
def test_every_part_of_the_state_is_needed(env_id: str, left_out: str) -> None:
    first, second = native(env_id, time_limit=25), native(env_id, seed=77, time_limit=25)
    first.reset()
    second.reset()
    play(first, 7)
    play(second, 2)
    second.load_state_dict({**first.state_dict(), left_out: second.state_dict()[left_out]})
    with pytest.raises(AssertionError):
        assert_same_play(play(first, 60, seed=1), play(second, 60, seed=1))


def test_a_state_is_a_copy() -> None:
    venv = native("Hopper-v5")
    venv.reset()
    state = venv.state_dict()
    kept = {name: values.copy() for name, values in state.items()}
    play(venv, 5)
    venv.load_state_dict(state)
    play(venv, 5)
    for name, values in kept.items():
        np.testing.assert_array_equal(state[name], values)


@pytest.mark.parametrize(
    "change", [lambda state: state.pop("lengths"), lambda state: state.update(returns=np.zeros(2))]
)
def test_a_state_of_other_worlds_is_refused(change: Any) -> None:
    venv = native("Hopper-v5")
    state = venv.state_dict()
    change(state)
    with pytest.raises(WorldError, match=r"this state is of other worlds: (lengths|returns) must have shape \(3,\)"):
        venv.load_state_dict(state)


def test_generators_survive_packing() -> None:
    originals = [generator(3), generator(None)]
    originals[0].integers(5, dtype=np.uint32)  # leaves half a draw behind
    restored = unpack(pack(originals))
    for one, other in zip(originals, restored, strict=True):
        assert one.bit_generator.state == other.bit_generator.state
        assert one.integers(2**31, dtype=np.uint32) == other.integers(2**31, dtype=np.uint32)
    assert generator(3).uniform() == gym.utils.seeding.np_random(3)[0].uniform()


# ------------------------------------------------------------------------------------------------ seeds and steps


def test_seeds() -> None:
    first, again, other, random = (native("Hopper-v5", 2, seed=seed).reset() for seed in (1, 1, 2, None))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[1], other[0])
    assert not np.array_equal(first, random)
    venv = native("Hopper-v5", 2, seed=1)
    venv.reset()
    assert not np.array_equal(venv.reset(), first)  # a seed counts for one reset
    venv.seed(1)
    np.testing.assert_array_equal(venv.reset(), first)
    samples = [native("Hopper-v5", 1, seed=4).action_space.sample() for _ in range(2)]
    np.testing.assert_array_equal(*samples)


def test_a_reset_begins_new_episodes() -> None:
    venv = native("HalfCheetah-v5", 2, time_limit=10)
    venv.reset()
    play(venv, 6)
    venv.reset()
    steps = play(venv, 10)
    assert [bool(step[2].any()) for step in steps] == [False] * 9 + [True]
    score = np.float64(0)
    for step in steps:
        score += step[1][0]
    assert steps[-1][3][0]["episode"]["r"] == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("env_id", ENGINES)
def test_threads_change_no_number(env_id: str) -> None:
    one, three = native(env_id, 5), native(env_id, 5, threads=3)
    np.testing.assert_array_equal(one.reset(), three.reset())
    assert_same_play(play(one, 40), play(three, 40))
    three.close()
    three.close()


def test_what_is_handed_out_is_the_callers_own() -> None:
    venv, untouched = native("Hopper-v5"), native("Hopper-v5")
    venv.reset()[:] = np.nan
    untouched.reset()
    for _ in range(30):
        observations, rewards, dones, infos = venv.step(np.ones((3, 3), np.float32))
        expected = untouched.step(np.ones((3, 3), np.float32))
        for mine, other in zip((observations, rewards, dones), expected[:3], strict=True):
            np.testing.assert_array_equal(mine, other)
        observations[:], rewards[:], dones[:] = np.nan, np.nan, True
        assert [info.keys() for info in infos] == [info.keys() for info in expected[3]]
        for info in infos:
            info["mine"] = 1


def test_the_order_in_memory_changes_no_number() -> None:
    first, second = native("HalfCheetah-v5"), native("HalfCheetah-v5")
    first.reset()
    second.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 6)).astype(np.float32)
    np.testing.assert_array_equal(first.step(actions)[1], second.step(np.asfortranarray(actions))[1])


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5"])
def test_a_world_that_breaks_is_gymnasiums_too(env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Huge and undefined actions: MuJoCo restarts a simulation on its own, in both."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    ours, theirs = native(env_id, 2), make(env_id, 2, seed=5).venv  # type: ignore[attr-defined]
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    rng = np.random.default_rng(0)
    for step in range(30):
        actions = rng.uniform(-1, 1, (2, *ours.action_space.shape)).astype(np.float32)
        actions[0] *= 1e6 if step > 10 else 1
        actions[1] *= np.nan if step == 20 else 1
        for mine, other in zip(ours.step(actions)[:3], theirs.step(actions)[:3], strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(("env_id", "memory"), [("HalfCheetah-v5", "4K"), ("Ant-v5", "16K")])
def test_mujocos_own_failure_is_one_line(env_id: str, memory: str, tmp_path: Path) -> None:
    assets = Path(gym.__file__).parent / "envs/mujoco/assets"
    text = re.sub(r"<size[^>]*/>", "", (assets / TASKS[env_id]().xml_file).read_text())
    text = re.sub(r"(<mujoco[^>]*>)", rf'\1<size memory="{memory}"/>', text, count=1)
    (tmp_path / "tiny.xml").write_text(text)
    # One that cannot begin is an error at once, one that cannot go on when it broke too often.
    with pytest.raises(WorldError, match=r"(MuJoCo cannot go on|broke): .*out of memory") as caught:
        venv = FiniteGuard(native(env_id, env_kwargs={"xml_file": str(tmp_path / "tiny.xml")}), max_faults=1)
        venv.reset()
        play(venv, 100)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ the rest of the API


def test_scores_reach_evaluation_and_survive_normalisation() -> None:
    venv = native("Hopper-v5", 2, time_limit=30)
    assert venv.env_is_wrapped(Monitor) == [True, True]
    assert venv.env_is_wrapped(gym.wrappers.TimeLimit) == [False, False]
    policy = ActorCriticPolicy(venv.observation_space, venv.action_space, lambda _: 0.0)
    normalised = VecNormalize(native("Hopper-v5", 2, time_limit=30), norm_obs=False)
    raw, scaled = (evaluate_policy(policy, worlds, 3, return_episode_rewards=True) for worlds in (venv, normalised))
    assert raw == scaled


def test_attributes_and_methods() -> None:
    venv = native("Hopper-v5", env_kwargs={"healthy_reward": 2.0})
    assert venv.get_attr("render_mode") == [None] * 3
    assert venv.get_attr("healthy_reward", indices=[0, 2]) == [2.0, 2.0]
    assert venv.get_attr("dt", 0) == [0.008]
    assert venv.metadata["render_fps"] == 125
    with pytest.raises(AttributeError, match="nonsense"):
        venv.get_attr("nonsense")
    with pytest.raises(WorldError, match=r"cannot set 'healthy_reward' of native MuJoCo worlds to 3; .* env_kwargs"):
        venv.set_attr("healthy_reward", 3)
    with pytest.raises(WorldError, match="no method 'set_state'; use backend 'gymnasium' for it"):
        venv.env_method("set_state", 1)
    with pytest.raises(WorldError, match=r"actions must have shape \(3, 3\), got \(3,\)"):
        venv.step(np.zeros(3))


def test_pictures_are_gymnasiums() -> None:
    options: dict[str, Any] = {"render_mode": "rgb_array", "env_kwargs": {"width": 64, "height": 48}}
    for env_id in ENGINES:
        ours = native(env_id, 2, **options)
        theirs = make(env_id, 1, seed=5, options=EnvOptions(**options))
        first = ours.reset()
        np.testing.assert_array_equal(first[:1], theirs.reset())
        images = ours.get_images()
        assert (images[0].shape, images[0].dtype, ours.render_mode) == ((48, 64, 3), np.uint8, "rgb_array")
        np.testing.assert_array_equal(images[0], theirs.render())
        assert not np.array_equal(images[0], images[1])
        state = ours.state_dict()
        assert ours.render().shape == (96, 64, 3)
        np.testing.assert_array_equal(ours.state_dict()["simulation"], state["simulation"])
        play(ours, 5)
        assert not np.array_equal(images[0], ours.get_images()[0])
        ours.close()
    with pytest.raises(WorldError, match="no pictures; make it with render_mode='rgb_array'"):
        native("Hopper-v5").get_images()


@pytest.mark.parametrize(
    ("env_id", "options", "words"),
    [
        ("toy/Reach-v0", {}, "backend 'native' is for MuJoCo tasks, not for toy/Reach-v0; use backend 'gymnasium'"),
        ("ALE/Pong-v5", {}, "backend 'native' is for MuJoCo tasks, not for ALE/Pong-v5"),
        ("Hopper-v5", {"render_mode": "human"}, "render_mode must be 'rgb_array' or None .* got 'human'"),
        (
            "Hopper-v5",
            {"env_kwargs": {"frame_skp": 2}},
            "Hopper-v5 has no option 'frame_skp'; did you mean 'frame_skip'",
        ),
        ("Hopper-v5", {"env_kwargs": {"widht": 2}}, "no option 'widht'; did you mean 'width'"),
        ("Hopper-v5", {"env_kwargs": {"max_episode_steps": 2}}, "'max_episode_steps'; set time_limit instead"),
        ("Hopper-v5", {"env_kwargs": {"frame_skip": 0}}, "frame_skip must be at least 1, got 0"),
        ("Hopper-v5", {"env_kwargs": {"frame_skip": 1.5}}, "frame_skip must be a whole number, got 1.5"),
        ("Hopper-v5", {"env_kwargs": {"healthy_reward": "1"}}, "healthy_reward must be a number, got '1'"),
        ("Hopper-v5", {"env_kwargs": {"healthy_z_range": 1.0}}, "healthy_z_range must be two numbers, got 1.0"),
        ("Hopper-v5", {"env_kwargs": {"terminate_when_unhealthy": 1}}, "must be true or false, got 1"),
        ("Hopper-v5", {"env_kwargs": {"xml_file": 3}}, "xml_file must be a string, got 3"),
        ("Hopper-v5", {"env_kwargs": {"xml_file": "no.xml"}}, "cannot load the MuJoCo model 'no.xml': .* not exist"),
        ("Hopper-v5", {"env_kwargs": {"xml_file": __file__}}, "cannot load the MuJoCo model .*: XML"),
        ("Ant-v5", {"env_kwargs": {"main_body": "nose"}}, "the model 'ant.xml' has no body 'nose'"),
        ("Ant-v5", {"env_kwargs": {"main_body": 99}}, "the model 'ant.xml' has no body 99"),
        ("Ant-v5", {"env_kwargs": {"main_body": 1.0}}, "main_body must be a whole number or a string, got 1.0"),
    ],
)
def test_what_is_refused(env_id: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorldError, match=words) as caught:
        native(env_id, **options).reset()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "jax"}, "backend must be 'gymnasium' or 'native', got 'jax'"),
        ({"threads": 0, "backend": "native"}, "threads must be at least 1, got 0"),
        ({"threads": 2}, r"threads \(2\) are for backend 'native'; Atari has atari.threads"),
    ],
)
def test_options_that_fit_no_world(options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorldError, match=words):
        EnvOptions(**options)


def test_an_old_mujoco_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco.batch", None)
    with pytest.raises(WorldError, match=r"needs MuJoCo 4 .*; use backend 'gymnasium'"):
        native("Hopper-v5")
    native("Ant-v5").reset()  # does not use the batch
