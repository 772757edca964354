"""NaN and Inf from the world end training with a word about where they came from, and never reach the networks."""

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
@pytest.mark.parametrize(("value", "at"), [(float("nan"), 7), (float("inf"), 7), (float("nan"), 12)])
def test_a_poisoned_world_is_reported_and_the_networks_stay(wrap, action_space, where, value, at):
    agent = small_agent("MlpPolicy", wrap(lambda: Poisoned(action_space, where, value, at)))
    before = {name: tensor.clone() for name, tensor in agent.get_parameters()["policy"].items()}
    with pytest.raises(FloatingPointError, match="VecCheckNan") as error:
        agent.learn(128)
    assert "\n" not in str(error.value)
    assert differences(before, agent.get_parameters()["policy"]) == []


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
