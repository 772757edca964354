"""MuJoCo worlds from pixels: the same worlds as from states, and frames that show them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from envs import EnvOptions, FiniteGuard, PixelOptions, WorldError, make
from envs.mujoco import TASKS, MujocoVecEnv
from envs.mujoco.offscreen import Offscreen
from envs.mujoco.views import grey

SMALL = PixelOptions(size=40)


def pixels(env_id: str, n_envs: int = 3, seed: int | None = 5, options: PixelOptions = SMALL, **others: Any) -> Any:
    """The environment without its guard."""
    guarded = make(
        f"pixels/{env_id}", n_envs, seed=seed, options=EnvOptions(backend="native", pixels=options, **others)
    )
    assert isinstance(guarded, FiniteGuard)
    assert isinstance(guarded.venv, MujocoVecEnv)
    return guarded.venv


def states(env_id: str, n_envs: int = 3, seed: int | None = 5, **options: Any) -> Any:
    return make(env_id, n_envs, seed=seed, options=EnvOptions(backend="native", **options)).venv  # type: ignore[attr-defined]


def actions(venv: Any, steps: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    low, high = venv.action_space.low, venv.action_space.high
    return [rng.uniform(low, high, (venv.num_envs, *low.shape)).astype(np.float32) for _ in range(steps)]


def outcomes(venv: Any, steps: int) -> list[Any]:
    """Rewards, ends and scores of random play, as plain numbers."""
    venv.reset()
    played = [venv.step(action)[1:] for action in actions(venv, steps)]
    scores = [[(info["episode"]["r"], info["TimeLimit.truncated"]) for info in step[2] if info] for step in played]
    return [(rewards.tobytes(), ends.tolist(), score) for (rewards, ends, _), score in zip(played, scores, strict=True)]


# ------------------------------------------------------------------------------------------------ the same world


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Reacher-v5", "InvertedPendulum-v5", "Ant-v5"])
def test_rewards_and_ends_are_those_of_the_world_from_states(env_id: str) -> None:
    expected = outcomes(states(env_id, time_limit=20), 45)
    assert outcomes(pixels(env_id, time_limit=20), 45) == expected
    assert sum(len(scores) for *_, scores in expected) >= 6
    assert outcomes(pixels(env_id, seed=6, time_limit=20), 45) != expected


@pytest.mark.parametrize("env_id", TASKS)
def test_every_task_can_be_seen(env_id: str) -> None:
    venv = pixels(env_id, 1)
    first = venv.reset()
    assert first.dtype == np.uint8
    assert first.max() > 100
    for action in actions(venv, 5):
        observations, *_ = venv.step(action)
    assert not np.array_equal(first, observations)
    venv.close()


def test_a_restored_world_shows_the_same_stacks() -> None:
    first, second = pixels("Hopper-v5", time_limit=25), pixels("Hopper-v5", seed=77, time_limit=25)
    first.reset()
    second.reset()
    for action in actions(first, 9):
        first.step(action)
    assert not np.array_equal(first.observations, second.observations)
    second.load_state_dict(first.state_dict())
    for action in actions(first, 30, seed=1):
        np.testing.assert_array_equal(first.step(action)[0], second.step(action)[0])


# ------------------------------------------------------------------------------------------------ stacks


def test_the_first_frame_fills_the_stack_and_later_ones_push_it_out() -> None:
    venv = pixels("InvertedPendulum-v5", 2)
    seen = venv.reset()
    assert seen.shape == (2, 4, 40, 40)
    assert (seen == seen[:, -1:]).all()
    push = np.full((2, 1), 0.5, np.float32)
    for _ in range(3):
        later, *_ = venv.step(push)
        np.testing.assert_array_equal(later[:, :-1], seen[:, 1:])
        seen = later
    assert (seen[0, 1:] != seen[0, :-1]).any(axis=(1, 2)).all()


@pytest.mark.parametrize("limit", [3, None])
def test_an_end_shows_the_last_frame_and_then_a_fresh_stack(limit: int | None) -> None:
    venv = pixels("InvertedPendulum-v5", 2, time_limit=limit)
    before, dones, infos = venv.reset(), np.zeros(2, bool), [{}]
    push = np.array([[0.5], [0.0]], np.float32)
    for _ in range(50):
        now, _, dones, infos = venv.step(push)
        if dones[0]:
            break
        before = now
    final = infos[0]["terminal_observation"]
    assert infos[0]["TimeLimit.truncated"] is (limit is not None)
    np.testing.assert_array_equal(final[:-1], before[0, 1:])
    assert not np.array_equal(final[-1], before[0, -1])
    assert (now[0] == now[0, -1]).all()
    assert not np.array_equal(now[0, -1], final[-1])
    if limit is None:
        assert "terminal_observation" not in infos[1]  # the other one goes on, with its own past
        np.testing.assert_array_equal(now[1, :-1], before[1, 1:])


def test_what_is_handed_out_is_the_callers_own() -> None:
    venv, untouched = pixels("Hopper-v5"), pixels("Hopper-v5")
    venv.reset()[:] = 7
    untouched.reset()
    for action in actions(venv, 25):
        seen, _, _, infos = venv.step(action)
        expected, _, _, others = untouched.step(action)
        np.testing.assert_array_equal(seen, expected)
        seen[:] = 7
        for info, other in zip(infos, others, strict=True):
            if info:
                np.testing.assert_array_equal(info["terminal_observation"], other["terminal_observation"])
                info["terminal_observation"][:] = 7


# ------------------------------------------------------------------------------------------------ frames


def canvas(env_id: str, **options: Any) -> tuple[Offscreen, np.ndarray]:
    task = TASKS[env_id]()
    return Offscreen(task.model, PixelOptions(**{"size": 40} | options)), task.init_qpos


def test_what_is_drawn_before_or_beside_changes_no_pixel() -> None:
    drawn, home = canvas("Walker2d-v5")
    poses = home + np.random.default_rng(0).uniform(-0.3, 0.3, (5, len(home)))
    together = drawn.draw(poses)
    assert together.shape == (5, 40, 40, 3)
    for pose, picture in zip(poses, together, strict=True):
        np.testing.assert_array_equal(drawn.draw(pose[None])[0], picture)
        assert sum(np.array_equal(picture, other) for other in together) == 1


def test_a_world_that_is_forgotten_takes_nothing_from_another() -> None:
    forgotten, home = canvas("Hopper-v5")
    kept, _ = canvas("Hopper-v5")
    before = kept.draw(home[None])
    del forgotten
    gc.collect()
    np.testing.assert_array_equal(kept.draw(home[None]), before)
    shown = states("Hopper-v5", 1, render_mode="rgb_array")
    shown.reset()
    shown.get_images()
    kept.draw(home[None])
    shown.close()
    del shown
    gc.collect()
    np.testing.assert_array_equal(kept.draw(home[None]), before)


def test_a_picture_stands_upright() -> None:
    """A pole above the cart, and a cart to the right when it is there."""
    view = {"follow": False, "target": (0.0, 0.0, 0.0), "distance": 2.0, "elevation": 0.0}
    drawn, home = canvas("InvertedPendulum-v5", **view)
    middle, right = grey(drawn.draw(np.stack([home, home + np.array([0.5, 0.0])])))[:, 0].astype(float)
    assert middle[:18].sum() > 10 * middle[24:].sum()
    assert right[:, 25:].sum() > 2 * right[:, :15].sum()


def test_small_parts_are_visible() -> None:
    view = {"size": 84, "follow": False, "target": (0.0, 0.0, 0.01), "distance": 0.56, "elevation": -90.0}
    drawn, home = canvas("Reacher-v5", **view)
    moved = home + np.array([0, 0, 0.05, 0.05])  # the target alone
    one, other = grey(drawn.draw(np.stack([home, moved])))[:, 0].astype(int)
    assert (np.abs(one - other) > 60).sum() >= 10


def test_the_camera_follows_if_told_to() -> None:
    for follow, seen in ((True, True), (False, False)):
        drawn, home = canvas("Hopper-v5", follow=follow, target=(0.0, 0.0, 0.85), distance=2.6)
        far = home.copy()
        far[0] += 100.0
        assert (grey(drawn.draw(far[None])).max() > 180) == seen


def test_movement_of_the_whole_body_shows_on_the_ground() -> None:
    drawn, home = canvas("Hopper-v5", size=84, target=(0.0, 0.0, 0.85), distance=2.6)
    far = home.copy()
    far[0] += 0.1
    one, other = grey(drawn.draw(np.stack([home, far])))[:, 0].astype(int)
    assert (one[:25] == other[:25]).all()  # the body itself is followed
    assert (np.abs(one[60:] - other[60:]) > 15).sum() > 50


def test_smooth_edges_show_less_than_a_pixel() -> None:
    """A lean too small for hard edges; smooth ones have more than a few brightnesses, too."""
    rough, home = canvas("InvertedPendulum-v5", follow=False, distance=2.0)
    smooth, _ = canvas("InvertedPendulum-v5", follow=False, distance=2.0, samples=4)
    lean = np.stack([home, home + np.array([0.0, 0.004])])
    changed = [int((pair[0] != pair[1]).sum()) for pair in (grey(rough.draw(lean)), grey(smooth.draw(lean)))]
    assert changed[1] > changed[0]


def test_colours_and_their_grey() -> None:
    coloured = pixels("Reacher-v5", 2, options=PixelOptions(size=40, colour=True, frame_stack=3))
    plain = pixels("Reacher-v5", 2, options=PixelOptions(size=40, frame_stack=1))
    seen, dull = coloured.reset(), plain.reset()
    assert (seen.shape, dull.shape) == ((2, 9, 40, 40), (2, 1, 40, 40))
    np.testing.assert_array_equal(grey(seen[:, -3:].transpose(0, 2, 3, 1)), dull)
    assert (seen[:, -3] != seen[:, -1]).any()
    first = seen[:, 3:]
    assert (coloured.step(np.zeros((2, 2), np.float32))[0][:, :6] == first).all()
    white = np.full((1, 1, 1, 3), 255, np.uint8)
    assert grey(white).tolist() == [[[[255]]]]
    weights = [int(grey(white * np.eye(3, dtype=np.uint8)[channel]).item()) for channel in range(3)]
    assert weights == [76, 149, 28]


def test_pictures_for_people_and_frames_for_the_agent_do_not_mix() -> None:
    shown = pixels("Hopper-v5", 2, render_mode="rgb_array", env_kwargs={"width": 64, "height": 48})
    plain, world = (
        pixels("Hopper-v5", 2),
        states("Hopper-v5", 2, render_mode="rgb_array", env_kwargs={"width": 64, "height": 48}),
    )
    for venv in (shown, plain, world):
        venv.reset()
    for action in actions(shown, 4):
        np.testing.assert_array_equal(shown.step(action)[0], plain.step(action)[0])
        world.step(action)
        np.testing.assert_array_equal(shown.get_images(), world.get_images())


def test_a_closed_world_says_so() -> None:
    venv = pixels("Hopper-v5", 1)
    venv.close()
    venv.close()
    with pytest.raises(WorldError, match="closed; make a new one"):
        venv.reset()


# ------------------------------------------------------------------------------------------------ what is said


@pytest.mark.parametrize(
    ("env_id", "backend", "words"),
    [
        ("pixels/CartPole-v1", "native", "pixels/ is for MuJoCo tasks, not for CartPole-v1; use CartPole-v1 as it is"),
        ("pixels/ALE/Pong-v5", "gymnasium", "pixels/ is for MuJoCo tasks, not for ALE/Pong-v5"),
        ("pixels/Hopper-v5", "gymnasium", "backend 'gymnasium' has no pixels/Hopper-v5; use backend 'native'"),
        ("pixels/Hoper-v5", "native", "unknown environment 'pixels/Hoper-v5'; did you mean 'pixels/Hopper-v5'"),
        ("pixel/Hopper-v5", "native", "did you mean 'pixels/Hopper-v5'"),
        ("pixels/Hopper-v4", "native", "'Hopper-v4' is superseded; use 'Hopper-v5'"),
    ],
)
def test_what_cannot_be_seen(env_id: str, backend: Any, words: str) -> None:
    with pytest.raises(WorldError, match=words) as caught:
        make(env_id, 1, seed=0, options=EnvOptions(backend=backend))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "pixels.size must be at least 1, got 0"),
        ({"frame_stack": 0}, "pixels.frame_stack must be at least 1, got 0"),
        ({"samples": -1}, "pixels.samples must be at least 0, got -1"),
        ({"distance": 0.0}, "pixels.distance must be a positive number of metres, got 0.0"),
        ({"elevation": float("nan")}, "pixels.elevation must be finite, got nan"),
        ({"target": (0.0, float("inf"), 0.0)}, "pixels.target must be finite"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorldError, match=words):
        PixelOptions(**options)


def in_a_process_of_its_own(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"} | variables
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)


def test_a_software_renderer_is_told_of_once() -> None:
    done = in_a_process_of_its_own("""
import envs
from envs.drawing import is_software, renderer_name
options = envs.EnvOptions(backend="native")
worlds = [envs.make("pixels/Reacher-v5", 1, seed=0, options=options) for _ in range(2)]
print(int(is_software(renderer_name())))
""")
    assert done.stderr.count("pixels are drawn on the processor") == int(done.stdout)
    assert done.stderr.count("\n") == int(done.stdout), done.stderr


def test_a_missing_renderer_is_told_in_one_line() -> None:
    done = in_a_process_of_its_own(
        """
import envs
try:
    envs.make("pixels/Reacher-v5", 1, seed=0, options=envs.EnvOptions(backend="native"))
except envs.WorldError as error:
    print(error)
""",
        MUJOCO_GL="disable",
    )
    assert done.stdout == "pixels need a renderer, and MUJOCO_GL is 'disable'; set it to 'egl' or 'osmesa'\n"
