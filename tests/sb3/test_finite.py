"""NaN and Inf from the world never reach the networks, and end training at last with a word about where they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from acktr.sb3.rollout import check_finite
from tests.sb3.worlds import (
    BOX,
    PLANE,
    TURNS,
    Poisoned,
    collected,
    differences,
    noise,
    normalised,
    small_agent,
    vectorised,
)


@pytest.mark.parametrize("wrap", [vectorised, normalised])
@pytest.mark.parametrize("action_space", [TURNS, PLANE], ids=["discrete", "box"])
@pytest.mark.parametrize("where", ["reward", "observation"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_world_is_reported_and_the_networks_stay(wrap, action_space, where, value):
    agent = small_agent("MlpPolicy", wrap(lambda: Poisoned(action_space, where, value, 7)))
    before = {name: tensor.clone() for name, tensor in agent.get_parameters()["policy"].items()}
    with pytest.raises(FloatingPointError, match=r"10 rollouts in a row; .* VecCheckNan") as error:
        agent.learn(1024)
    assert "\n" not in str(error.value)
    assert agent.faults.counts == {"rollout": 10}
    assert differences(before, agent.get_parameters()["policy"]) == []


@pytest.mark.parametrize("wrap", [vectorised, normalised])
@pytest.mark.parametrize("action_space", [TURNS, PLANE], ids=["discrete", "box"])
def test_nothing_is_read_from_a_final_observation_that_is_not_finite(wrap, action_space):
    agent = small_agent("MlpPolicy", wrap(lambda: Poisoned(action_space, "observation", float("nan"), 12)))
    agent.learn(128)
    assert agent.faults.counts == {"final_observation": 10}  # two environments, episodes of 12 steps, 64 each
    assert agent._n_updates == 4
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


def test_the_message_names_what_is_broken():
    fine, broken = np.zeros(3), np.array([0.0, np.nan, 1.0])
    with pytest.raises(FloatingPointError, match="the rollout's rewards and returns are not finite"):
        check_finite(observations={"image": np.zeros(3, np.uint8), "speed": fine}, rewards=broken, returns=broken)
    with pytest.raises(FloatingPointError, match="the rollout's observations are not finite"):
        check_finite(observations={"image": np.zeros(3, np.uint8), "speed": broken}, rewards=fine, returns=fine)
    check_finite(observations={"image": np.zeros(3, np.uint8), "speed": fine}, rewards=fine, returns=fine)


def test_a_healthy_world_passes():
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE))).learn(64)
    assert agent._n_updates == 2
    assert agent.actor_optimizer.skipped == 0


def test_other_mistakes_of_a_world_are_not_disguised():
    class Wrong(Poisoned):
        def step(self, action):
            raise ValueError("the arm is stuck")

    with pytest.raises(ValueError, match="the arm is stuck"):
        small_agent("MlpPolicy", vectorised(lambda: Wrong(TURNS, "reward", 0.0))).learn(64)


@pytest.mark.parametrize("space", [PLANE, TURNS])
def test_broken_networks_are_not_blamed_on_the_world(space):
    agent = collected(small_agent("MlpPolicy", vectorised(noise(BOX, space))))
    with torch.no_grad():
        agent.policy.action_net.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="its parameters are broken"):
        agent.learn(64)
