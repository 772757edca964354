"""The one door to every world: what comes out, and what is said when nothing can."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecNormalize

from envs import AtariOptions, AtariVecEnv, EnvOptions, FiniteGuard, WorldError, make
from envs.make import _choose_headless_renderer


def rollout(
    venv: Any, steps: int, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]]:
    rng = np.random.default_rng(seed)
    venv.reset()
    low, high = venv.action_space.low, venv.action_space.high
    return [venv.step(rng.uniform(low, high, (venv.num_envs, *low.shape)).astype(np.float32)) for _ in range(steps)]


@pytest.mark.parametrize(
    ("env_id", "n_observations", "n_actions"),
    [("HalfCheetah-v5", 17, 6), ("Hopper-v5", 11, 3), ("Walker2d-v5", 17, 6), ("Ant-v5", 105, 8), ("Swimmer-v5", 8, 2)],
)
def test_mujoco_worlds(env_id: str, n_observations: int, n_actions: int) -> None:
    venv = make(env_id, 2, seed=0)
    assert isinstance(venv, FiniteGuard)
    assert venv.observation_space.shape == (n_observations,)
    assert venv.action_space.shape == (n_actions,)
    assert len(rollout(venv, 20)) == 20
    venv.close()


def test_steps_are_those_of_gymnasium() -> None:
    """Same seed, same actions, same numbers; the episode's score is the plain sum of its rewards."""
    oracle = gym.make("Hopper-v5")
    venv = make("Hopper-v5", 1, seed=3)
    expected, _ = oracle.reset(seed=3)
    np.testing.assert_array_equal(venv.reset()[0], expected)
    rng, score, ends = np.random.default_rng(0), 0.0, 0
    for _ in range(200):
        action = rng.uniform(-1, 1, (1, 3)).astype(np.float32)
        observations, rewards, dones, infos = venv.step(action)
        expected, reward, terminated, truncated, _ = oracle.step(action[0])
        score += float(reward)
        assert rewards[0] == np.float32(reward)
        assert dones[0] == (terminated or truncated)
        if terminated:
            np.testing.assert_array_equal(infos[0]["terminal_observation"], expected)
            assert infos[0]["TimeLimit.truncated"] is False
            assert infos[0]["episode"]["r"] == pytest.approx(score, abs=1e-5)
            expected, score, ends = oracle.reset()[0], 0.0, ends + 1
        np.testing.assert_array_equal(observations[0], expected)
    assert ends >= 2


def test_half_cheetah_is_truncated_at_1000_steps() -> None:
    steps = rollout(make("HalfCheetah-v5", 2, seed=0), 1000)
    assert not any(dones.any() for _, _, dones, _ in steps[:-1])
    observations, _, dones, infos = steps[-1]
    assert dones.all()
    for index in range(2):
        assert infos[index]["TimeLimit.truncated"] is True
        assert infos[index]["episode"]["l"] == 1000
        assert not np.array_equal(infos[index]["terminal_observation"], observations[index])


def test_time_limit_and_constructor_options() -> None:
    options = EnvOptions(time_limit=7, env_kwargs={"ctrl_cost_weight": 50.0})
    steps = rollout(make("HalfCheetah-v5", 1, seed=0, options=options), 7)
    assert [bool(dones[0]) for _, _, dones, _ in steps] == [False] * 6 + [True]
    assert steps[-1][3][0]["TimeLimit.truncated"] is True
    costly, cheap = steps[0][1][0], rollout(make("HalfCheetah-v5", 1, seed=0), 1)[0][1][0]
    assert costly < cheap - 10


def test_scores_stay_raw_under_normalisation() -> None:
    plain = rollout(make("Hopper-v5", 2, seed=0), 120)
    wrapped = rollout(VecNormalize(make("Hopper-v5", 2, seed=0)), 120)
    scores = [
        [info["episode"]["r"] for *_, infos in steps for info in infos if "episode" in info]
        for steps in (plain, wrapped)
    ]
    assert scores[0] == scores[1] != []
    assert not np.array_equal(plain[5][1], wrapped[5][1])  # the learner's rewards did change


def test_seeds() -> None:
    first, again, other, random = (make("Hopper-v5", 2, seed=seed).reset() for seed in (1, 1, 2, None))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[1], other[0])  # copies count up from the seed
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, random)


def test_atari_ids_are_native() -> None:
    options = EnvOptions(atari=AtariOptions(frame_stack=2, threads=1))
    venv = make("ALE/MsPacman-v5", 3, seed=0, options=options)
    assert isinstance(venv.unwrapped, AtariVecEnv)
    observations = venv.reset()
    assert observations.shape == (3, 2, 84, 84)
    assert venv.get_attr("render_mode") == [None] * 3
    np.testing.assert_array_equal(observations, make("ALE/MsPacman-v5", 3, seed=0, options=options).reset())


def test_evaluation_options_show_whole_games_and_true_rewards() -> None:
    options = EnvOptions(time_limit=9, atari=AtariOptions(sticky_actions=0.25)).for_evaluation(render_mode="rgb_array")
    assert options.atari == AtariOptions(sticky_actions=0.25, episodic_life=False, clip_rewards=False)
    assert (options.time_limit, options.render_mode) == (9, "rgb_array")


def test_the_frame_rate_of_a_video_survives_the_guard() -> None:
    pictures = EnvOptions(render_mode="rgb_array", atari=AtariOptions(frame_skip=4, threads=1))
    venv = make("HalfCheetah-v5", 1, seed=0, options=pictures)
    assert (venv.render_mode, venv.metadata["render_fps"]) == ("rgb_array", 20)
    atari = make("ALE/Pong-v5", 1, seed=0, options=pictures)
    assert (atari.render_mode, atari.metadata["render_fps"]) == ("rgb_array", 15)
    atari.reset()
    picture = atari.render()
    assert picture is not None
    assert picture.shape == (210, 160, 3)
    assert picture.std() > 0
    assert make("HalfCheetah-v5", 1, seed=0).render_mode is None


def without_a_display(script: str, **variables: str) -> str:
    """Last line that a script prints in a process of its own: a process loads its renderer once."""
    hidden = {"MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY", "PYOPENGL_PLATFORM"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | variables
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-c", "import os, sys, envs\n" + script]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return finished.stdout.strip().splitlines()[-1]


def test_mujoco_draws_without_a_display_even_after_training_began() -> None:
    script = """
envs.make("HalfCheetah-v5", 1, seed=0).reset()
before = os.environ.get("MUJOCO_GL")
venv = envs.make("HalfCheetah-v5", 1, seed=0, options=envs.EnvOptions(render_mode="rgb_array"))
venv.reset()
print(before, os.environ["MUJOCO_GL"], venv.render().shape)
"""
    assert without_a_display(script) == "None egl (480, 480, 3)"


def test_a_renderer_that_does_not_load_is_the_users_to_change() -> None:
    script = """
try:
    envs.make("HalfCheetah-v5", 1, seed=0)
except envs.WorldError as error:
    print(error)
"""
    message = without_a_display(script, MUJOCO_GL="nonsense")
    assert message.startswith("package 'mujoco' does not load: ")
    assert message.endswith("MUJOCO_GL is 'nonsense', try 'egl', 'osmesa' or 'glfw'")


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [({}, "egl"), ({"MUJOCO_GL": "osmesa"}, "osmesa"), ({"DISPLAY": ":0"}, None), ({"WAYLAND_DISPLAY": "w"}, None)],
)
def test_the_renderer_a_user_chose_is_kept(
    variables: dict[str, str], chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")  # so that whatever happens to it is undone
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _choose_headless_renderer()
    assert os.environ.get("MUJOCO_GL") == chosen


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("HalfCheeta-v5", "unknown environment 'HalfCheeta-v5'; did you mean 'HalfCheetah-v5'"),
        ("halfcheetah-v5", "did you mean 'HalfCheetah-v5'"),
        ("HalfCheetah", "did you mean 'HalfCheetah-v5'"),
        ("ALE/Brekout-v5", "did you mean 'ALE/Breakout-v5'"),
        ("Pong-v5", "did you mean 'ALE/Pong-v5'"),
        ("toy/Reech-v0", "did you mean 'toy/Reach-v0'"),
        ("qqqqqq", "unknown environment 'qqqqqq'; for one of your own .* registers it: MODULE:qqqqqq$"),
        ("json:qqqqqq", "unknown environment 'json:qqqqqq'; importing 'json' registers no such id$"),
        ("BreakoutNoFrameskip-v4", "legacy Atari id; use 'ALE/Breakout-v5'"),
        ("PongDeterministic-v4", "use 'ALE/Pong-v5'"),
        ("SpaceInvaders-v0", "use 'ALE/SpaceInvaders-v5'"),
        ("HalfCheetah-v2", "'HalfCheetah-v2' is superseded; use 'HalfCheetah-v5'"),
        ("Hopper-v3", "use 'Hopper-v5'"),
        ("Walker2d-v4", "use 'Walker2d-v5'"),
        ("no_such_module:X-v0", "cannot import 'no_such_module' of environment 'no_such_module:X-v0'"),
    ],
)
def test_ids_that_name_nothing_current(env_id: str, words: str) -> None:
    with pytest.raises(WorldError, match=words) as caught:
        make(env_id, 1, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("env_id", "n_envs", "seed", "options", "words"),
    [
        ("Hopper-v5", 0, 0, {}, "n_envs must be at least 1, got 0"),
        ("Hopper-v5", 1, -5, {}, "seed must be at least 0, or None for a random one, got -5"),
        ("Hopper-v5", 1, 0, {"env_kwargs": {"frame_skp": 2}}, "no option 'frame_skp'; did you mean 'frame_skip'"),
        ("Hopper-v5", 1, 0, {"env_kwargs": {"ctrl_cost": 2}}, "'ctrl_cost'; did you mean 'ctrl_cost_weight'"),
        ("toy/NaN-v0", 1, 0, {"env_kwargs": {"afte": 2}}, "toy/NaN-v0 has no option 'afte'; did you mean 'after'"),
        ("Hopper-v5", 1, 0, {"env_kwargs": {"max_episode_steps": 2}}, "'max_episode_steps'; set time_limit instead"),
        ("ALE/Pong-v5", 1, 0, {"env_kwargs": {"mode": 2}}, r"\['mode'\] are not for Atari; .* AtariOptions"),
        ("ALE/Pong-v5", 1, 0, {"time_limit": 2}, r"time_limit \(2\) is not for Atari; set atari.max_episode_frames"),
    ],
)
def test_options_that_do_not_fit(env_id: str, n_envs: int, seed: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorldError, match=words) as caught:
        make(env_id, n_envs, seed=seed, options=EnvOptions(**options))
    assert "\n" not in str(caught.value)


def test_a_time_limit_is_positive() -> None:
    with pytest.raises(WorldError, match=r"time_limit must be at least 1 step.*got 0"):
        EnvOptions(time_limit=0)


@pytest.mark.parametrize(
    ("env_id", "module", "extra"),
    [("ALE/Pong-v5", "ale_py", "atari"), ("Hopper-v5", "mujoco", "mujoco"), ("Hopper-v5", "imageio", "mujoco")],
)
def test_a_missing_package_names_its_extra(
    env_id: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(env_id, 1, seed=0).close()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(WorldError, match=rf"package '{module}' is missing .*pip install 'acktr\[{extra}\]'"):
        make(env_id, 1, seed=0)


def test_an_unknown_id_is_reported_without_the_atari_extra_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(WorldError, match="unknown environment 'Hoper-v5'; did you mean 'Hopper-v5'"):
        make("Hoper-v5", 1, seed=0)


def test_importing_envs_loads_no_optional_package() -> None:
    script = "print([name for name in ('ale_py', 'mujoco', 'imageio') if name in sys.modules])"
    assert without_a_display(script) == "[]"
