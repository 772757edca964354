"""The toy worlds keep their promises: the stated best is attained, and nothing beats it."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_checker import check_env

from envs import EnvOptions, make, register_toys
from envs.toy import BanditEnv, ConstantEnv, CorridorEnv, NaNEnv, ReachEnv


@pytest.mark.parametrize("world", [BanditEnv, ReachEnv, ConstantEnv, CorridorEnv])
def test_they_are_proper_gymnasium_worlds(world: type[gym.Env]) -> None:
    check_env(world())


def test_registering_twice_is_harmless() -> None:
    register_toys()
    assert {"toy/Bandit-v0", "toy/Reach-v0", "toy/Constant-v0", "toy/Corridor-v0", "toy/NaN-v0"} <= set(gym.registry)


def test_bandit_pays_the_best_arm_alone() -> None:
    world = BanditEnv(n_contexts=4)
    seen = set()
    for seed in range(40):
        observation, _ = world.reset(seed=seed)
        rewards = [world.step(np.int64(arm))[1] for arm in range(4)]
        assert rewards[world.optimal_action(observation)] == world.optimal_return == sum(rewards)
        seen.add(int(observation.argmax()))
    assert seen == {0, 1, 2, 3}


def test_bandit_through_make_gives_1_to_the_optimum_and_a_quarter_to_chance() -> None:
    venv = make("toy/Bandit-v0", 8, seed=0)
    observations, rng, best, chance = venv.reset(), np.random.default_rng(0), [], []
    for step in range(400):
        optimal = (observations.argmax(axis=1) + 1) % 4
        observations, rewards, dones, _ = venv.step(optimal if step % 2 else rng.integers(0, 4, 8))
        (best if step % 2 else chance).append(rewards)
        assert dones.all()
    assert np.all(np.array(best) == BanditEnv.optimal_return)
    assert np.mean(chance) == pytest.approx(0.25, abs=0.04)  # four standard errors


def test_reach_is_best_at_half_the_observation() -> None:
    world, rng = ReachEnv(dim=3), np.random.default_rng(0)
    observation, _ = world.reset(seed=1)
    mean = world.optimal_action(observation)
    assert world.step(mean)[1] == world.optimal_return
    noise = rng.normal(0, 0.1, (4000, 3)).astype(np.float32)
    losses = [world.step(mean + row)[1] for row in noise]
    assert max(losses) < 0
    assert np.mean(losses) == pytest.approx(-3 * 0.1**2, rel=0.1)


def test_constant_is_truncated_and_worth_the_geometric_series() -> None:
    venv = make("toy/Constant-v0", 2, seed=0)
    venv.reset()
    steps = [venv.step(np.zeros(2, dtype=np.int64)) for _ in range(20)]
    assert all((rewards == 1).all() for _, rewards, _, _ in steps)
    assert [bool(dones.all()) for _, _, dones, _ in steps] == [False] * 19 + [True]
    assert all(info["TimeLimit.truncated"] for info in steps[-1][3])
    gamma, value = 0.9, ConstantEnv.optimal_value(0.9)
    series = sum(gamma**k for k in range(20))
    assert series + gamma**20 * value == pytest.approx(value)  # with the bootstrap
    assert series < value - 1  # without it


@pytest.mark.parametrize("length", [2, 6])
def test_corridor_pays_at_its_end_alone(length: int) -> None:
    world = CorridorEnv(length)
    world.reset()
    rewards, terminated = [], False
    while not terminated:
        observation, reward, terminated, truncated, _ = world.step(np.int64(1))
        rewards.append(reward)
        assert not truncated
    assert rewards == [0.0] * (length - 2) + [world.optimal_return]
    assert observation.argmax() == length - 1
    for cell in range(length - 1):
        discounted = sum(0.9**k * reward for k, reward in enumerate(rewards[cell:]))
        assert world.optimal_value(cell, 0.9) == pytest.approx(discounted)


def test_corridor_walks_left_to_the_wall_until_the_limit() -> None:
    venv = make("toy/Corridor-v0", 1, seed=0, options=EnvOptions(time_limit=5))
    venv.reset()
    for _ in range(5):
        _, _, dones, infos = venv.step(np.zeros(1, dtype=np.int64))
    assert dones[0]
    assert infos[0]["TimeLimit.truncated"] is True
    assert infos[0]["terminal_observation"].argmax() == 0
    assert infos[0]["episode"]["r"] == 0


def test_nan_world_refuses_other_faults() -> None:
    with pytest.raises(ValueError, match="'action'"):
        NaNEnv("action")  # type: ignore[arg-type]
