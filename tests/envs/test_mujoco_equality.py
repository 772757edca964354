"""Native MuJoCo worlds are gymnasium's: same seeds and actions, same numbers to the last bit."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from envs import EnvOptions, make
from envs.mujoco import TASKS
from envs.mujoco.task import State

STEPS = {"Ant-v5": 300, "Humanoid-v5": 200, "HumanoidStandup-v5": 150, "Pusher-v5": 300, "Reacher-v5": 800}
# Episodes cut short, so that every world restarts several times whether it terminates or not.
TIME_LIMITS = {"Reacher-v5": 50, "Pusher-v5": 50, "HumanoidStandup-v5": 40}
MORTAL = {"Hopper-v5", "Walker2d-v5", "InvertedPendulum-v5", "InvertedDoublePendulum-v5", "Ant-v5", "Humanoid-v5"}

OTHER_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "HalfCheetah-v5": [
        {"forward_reward_weight": 0.3, "ctrl_cost_weight": 0.7, "reset_noise_scale": 0.3, "frame_skip": 3},
        {"exclude_current_positions_from_observation": False},
    ],
    "Swimmer-v5": [
        {"forward_reward_weight": 0.3, "ctrl_cost_weight": 0.7, "reset_noise_scale": 0.3, "frame_skip": 3},
        {"exclude_current_positions_from_observation": False},
    ],
    "Hopper-v5": [
        {"forward_reward_weight": 0.3, "ctrl_cost_weight": 0.7, "healthy_reward": 0.3, "reset_noise_scale": 0.05},
        {"terminate_when_unhealthy": False, "exclude_current_positions_from_observation": False, "frame_skip": 2},
        {"healthy_state_range": [-3.0, 3.0], "healthy_z_range": [0.5, 1.5], "healthy_angle_range": [-0.5, 0.1]},
    ],
    "Walker2d-v5": [
        {"forward_reward_weight": 0.3, "ctrl_cost_weight": 0.7, "healthy_reward": 0.3, "reset_noise_scale": 0.05},
        {"terminate_when_unhealthy": False, "exclude_current_positions_from_observation": False, "frame_skip": 2},
        {"healthy_z_range": [0.9, 1.3], "healthy_angle_range": [-0.5, 0.1], "xml_file": "walker2d.xml"},
    ],
    "Reacher-v5": [{"reward_dist_weight": 0.3, "reward_control_weight": 0.7, "frame_skip": 3}],
    "Pusher-v5": [
        {"reward_near_weight": 0.3, "reward_dist_weight": 0.7, "reward_control_weight": 0.2, "frame_skip": 3}
    ],
    "InvertedPendulum-v5": [{"reset_noise_scale": 0.1, "frame_skip": 3}],
    "InvertedDoublePendulum-v5": [{"healthy_reward": 0.3, "reset_noise_scale": 0.2, "frame_skip": 3}],
    "Ant-v5": [
        {"forward_reward_weight": 0.3, "ctrl_cost_weight": 0.7, "healthy_reward": 0.3, "contact_cost_weight": 0.1},
        {"terminate_when_unhealthy": False, "exclude_current_positions_from_observation": False, "frame_skip": 2},
        {"healthy_z_range": [0.4, 0.9], "main_body": 4, "include_cfrc_ext_in_observation": False},
        {"main_body": "torso", "contact_force_range": [-0.2, 0.3], "reset_noise_scale": 0.3},
    ],
    "Humanoid-v5": [
        {"forward_reward_weight": 0.3, "ctrl_cost_weight": 0.7, "healthy_reward": 0.3, "contact_cost_weight": 1e-3},
        {"terminate_when_unhealthy": False, "exclude_current_positions_from_observation": False, "frame_skip": 2},
        {"healthy_z_range": [1.2, 1.45], "contact_cost_range": [0.2, 0.5], "include_cinert_in_observation": False},
        {"include_cvel_in_observation": False, "include_qfrc_actuator_in_observation": False},
        {"include_cfrc_ext_in_observation": False, "reset_noise_scale": 0.05},
    ],
    "HumanoidStandup-v5": [
        {"uph_cost_weight": 0.3, "ctrl_cost_weight": 0.7, "impact_cost_weight": 1e-3, "frame_skip": 2},
        {"impact_cost_range": [0.2, 0.5], "exclude_current_positions_from_observation": False},
        {"include_cinert_in_observation": False, "include_cvel_in_observation": False, "reset_noise_scale": 0.05},
        {"include_qfrc_actuator_in_observation": False, "include_cfrc_ext_in_observation": False},
    ],
}


def play(venv: Any, steps: int, dtype: Any = np.float32, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    low, high = venv.action_space.low, venv.action_space.high
    return [venv.step(rng.uniform(low, high, (venv.num_envs, *low.shape)).astype(dtype)) for _ in range(steps)]


def assert_same_infos(mine: dict[str, Any], theirs: dict[str, Any], ended: bool) -> None:
    assert bool(mine) == ended
    if ended:
        assert mine["TimeLimit.truncated"] is bool(theirs["TimeLimit.truncated"])
        np.testing.assert_array_equal(mine["terminal_observation"], theirs["terminal_observation"])
        assert (mine["episode"]["r"], mine["episode"]["l"]) == (theirs["episode"]["r"], theirs["episode"]["l"])


def assert_same_worlds(
    env_id: str,
    kwargs: dict[str, Any],
    steps: int,
    *,
    time_limit: int | None = None,
    dtype: Any = np.float32,
    n: int = 3,
) -> tuple[int, int]:
    """Play both backends; return how many episodes terminated and how many were truncated."""
    ours, theirs = (
        make(env_id, n, seed=5, options=EnvOptions(env_kwargs=kwargs, time_limit=time_limit, backend=backend))
        for backend in ("native", "gymnasium")
    )
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    assert ours.metadata["render_fps"] == theirs.metadata["render_fps"]
    first = ours.reset()
    assert first.dtype == np.float64
    np.testing.assert_array_equal(first, theirs.reset())
    terminations = truncations = 0
    for mine, other in zip(play(ours, steps, dtype), play(theirs, steps, dtype), strict=True):
        for a, b in zip(mine[:3], other[:3], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        for index, ended in enumerate(mine[2]):
            assert_same_infos(mine[3][index], other[3][index], bool(ended))
            if ended:
                truncations += mine[3][index]["TimeLimit.truncated"]
                terminations += not mine[3][index]["TimeLimit.truncated"]
    return terminations, truncations


@pytest.mark.parametrize("env_id", TASKS)
def test_trajectories_equal_gymnasium(env_id: str) -> None:
    terminations, truncations = assert_same_worlds(
        env_id, {}, STEPS.get(env_id, 1100), time_limit=TIME_LIMITS.get(env_id)
    )
    assert (terminations > 2) == (env_id in MORTAL)
    assert truncations > 2 or env_id in MORTAL


@pytest.mark.parametrize(("env_id", "time_limit"), [("Hopper-v5", 14), ("InvertedDoublePendulum-v5", 6)])
def test_both_ends_in_one_run(env_id: str, time_limit: int) -> None:
    """A limit near the usual end; where both come at once the episode is terminated, not truncated."""
    terminations, truncations = assert_same_worlds(env_id, {}, 150, time_limit=time_limit)
    assert terminations > 0
    assert truncations > 0


@pytest.mark.parametrize(
    ("env_id", "kwargs"), [(env_id, kwargs) for env_id, choices in OTHER_OPTIONS.items() for kwargs in choices]
)
def test_constructor_options_equal_gymnasium(env_id: str, kwargs: dict[str, Any]) -> None:
    assert_same_worlds(env_id, kwargs, 60, time_limit=25, n=2)


@pytest.mark.parametrize("env_id", TASKS)
def test_every_option_is_gymnasiums_with_its_default_and_is_compared(env_id: str) -> None:
    theirs = inspect.signature(gym.envs.registration.load_env_creator(gym.spec(env_id).entry_point)).parameters
    ours = {option.name: option.default for option in fields(TASKS[env_id])}
    assert ours == {name: theirs[name].default for name in theirs if name not in {"default_camera_config", "kwargs"}}
    assert set(ours) - {"xml_file"} <= {name for kwargs in OTHER_OPTIONS[env_id] for name in kwargs}


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Reacher-v5", "Ant-v5"])
def test_the_precision_of_actions_is_kept(env_id: str) -> None:
    assert_same_worlds(env_id, {}, 20, dtype=np.float64)


@pytest.mark.parametrize("n", [1, 17])
def test_the_number_of_worlds_changes_no_number(n: int) -> None:
    for env_id in ("Reacher-v5", "Humanoid-v5", "InvertedDoublePendulum-v5"):
        assert_same_worlds(env_id, {}, 25, n=n)


@pytest.mark.parametrize("env_id", TASKS)
def test_rewards_equal_gymnasium_before_they_are_rounded(env_id: str) -> None:
    """The task's functions on the state of gymnasium's own simulation, in float64, also out of the action range."""
    task, world = TASKS[env_id](), gym.make(env_id)
    world.reset(seed=1)
    data, rng = world.unwrapped.data, np.random.default_rng(0)

    def state() -> State:
        return {name: np.array(getattr(data, name))[None] for name in task.reads}  # type: ignore[return-value]

    for _ in range(60):
        before = task.position(state())
        action = (3 * rng.uniform(world.action_space.low, world.action_space.high)).astype(np.float32)
        observation, reward, terminated, _, _ = world.step(action)
        after = state()
        healthy = task.healthy(after)
        assert task.reward(before, after, action[None], healthy)[0] == reward
        assert bool(task.terminated(healthy)[0]) == terminated
        np.testing.assert_array_equal(task.observation(after)[0], observation)
        if terminated:
            world.reset()


def test_the_comparison_notices_one_bit() -> None:
    """The negative control: a cost rounded in another precision, or a sum in another order, does not pass."""
    actions = np.random.default_rng(0).uniform(-1, 1, (1000, 6))
    task = TASKS["HalfCheetah-v5"]()
    rounded = task.control_cost(actions.astype(np.float32))  # type: ignore[attr-defined]
    assert not np.array_equal(rounded, task.control_cost(actions.astype(np.float32).astype(np.float64)))  # type: ignore[attr-defined]
    # The orders are written out: whether numpy's own sum and BLAS's differ depends on the processor.
    x, y, z = np.square(np.random.default_rng(0).normal(size=(3, 10_000)))
    assert not np.array_equal(np.sqrt((x + y) + z), np.sqrt(x + (y + z)))
