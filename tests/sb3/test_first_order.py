"""Adam in the place of the natural gradient: the same step as torch's own, and the same care around it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from acktr.firstorder import Adam, FirstOrder
from acktr.likelihood import ScalarGaussian
from acktr.passes import MAX_SKIPS
from acktr.sb3 import ACKTR, ActorSettings, CriticSettings
from acktr.sb3.rollout import flatten_rollout
from tests.sb3.worlds import (
    BOX,
    IMAGE,
    PLANE,
    TINY_CNN,
    TURNS,
    Nothing,
    collected,
    differences,
    noise,
    normalised,
    quiet,
    small_agent,
    vectorised,
)

ADAM = Adam(learning_rate=0.01, max_grad_norm=1e-3)  # short enough to clip in every step


def first_order(env, policy: str = "MlpPolicy", rate: float = 0.01, **kwargs) -> ACKTR:
    adam = Adam(rate, max_grad_norm=1e-3)
    actor = ActorSettings(curvature=adam, n_epochs=kwargs.pop("n_epochs", 1))
    critic = CriticSettings(curvature=adam, n_epochs=1, n_minibatches=1)
    return small_agent(policy, env, actor=actor, critic=critic, **kwargs)


def expected_step(agent: ACKTR) -> dict[str, torch.Tensor]:
    """One step of PPO's two objectives at ratio 1, by autograd and torch's Adam, on copies of the two networks."""
    rollout = flatten_rollout(agent.rollout_buffer, torch.device("cpu"), standardise=True)
    policy = deepcopy(agent.policy)
    _, log_probs, _ = policy.evaluate_actions(rollout.observations, rollout.actions)
    values = policy.predict_values(rollout.observations).flatten()
    losses = (-(log_probs * rollout.advantages).mean(), 0.5 * (values - rollout.returns).square().mean())
    for loss in losses:
        leaves = [p for p in policy.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        mine = [(p, g) for p, g in zip(leaves, found, strict=True) if g is not None]
        for parameter, gradient in mine:
            parameter.grad = gradient
        nn.utils.clip_grad_norm_([p for p, _ in mine], ADAM.max_grad_norm)
        torch.optim.Adam([p for p, _ in mine], lr=ADAM.learning_rate, eps=ADAM.epsilon).step()
    return policy.state_dict()


@pytest.mark.parametrize("actions", [TURNS, PLANE], ids=["discrete", "box"])
@pytest.mark.parametrize("rate", [0.01, 0.02])
def test_a_step_is_that_of_torchs_adam(actions, rate):
    agent = collected(first_order(vectorised(noise(BOX, actions)), rate=rate))
    expected = expected_step(agent)
    agent.train()
    # Adam divides by the gradient's size, so rounding shows where a gradient is as small as epsilon.
    close = [torch.allclose(t, expected[n], rtol=1e-3, atol=1e-5) for n, t in agent.policy.state_dict().items()]
    assert all(close) == (rate == ADAM.learning_rate), "the other rate is the control"


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_a_loaded_agent_continues_bit_for_bit(policy, tmp_path):
    images = {"policy_kwargs": TINY_CNN} if policy == "CnnPolicy" else {}

    def make_env():
        return normalised(noise(IMAGE if images else BOX, TURNS), norm_obs=not images)

    agent = quiet(first_order(make_env(), policy, **images))
    agent.learn(3 * 32)
    agent.save(tmp_path / "agent")
    loaded = quiet(ACKTR.load(tmp_path / "agent", make_env(), device="cpu"))
    assert differences(agent.get_parameters(), loaded.get_parameters()) == []
    loaded.rollout_buffer = deepcopy(agent.rollout_buffer)
    before = deepcopy(agent.policy.state_dict())
    agent.train()
    loaded.train()
    assert differences(agent.policy.state_dict(), loaded.policy.state_dict()) == []
    assert differences(before, agent.policy.state_dict()), "nothing was trained, so nothing was compared"


def test_the_learning_rate_of_acktr_leaves_adams_alone():
    agent = first_order(vectorised(noise()), learning_rate=lambda progress: 7.0 * progress)
    agent.learn(2 * 32, callback=Nothing())
    assert {o.param_groups[0]["lr"] for o in agent._optimizers()} == {0.01}


def test_gradients_that_are_not_finite_are_skipped_and_counted():
    network = nn.Linear(3, 1)
    optimizer = FirstOrder(network, ScalarGaussian(), Adam())
    before = network.weight.detach().clone()
    for skips in range(1, MAX_SKIPS):
        network.weight.grad = torch.full((1, 3), torch.nan)
        optimizer.descend()
        assert (optimizer.skipped, optimizer.report.scale) == (skips, 0.0)
    assert torch.equal(network.weight, before)
    network.weight.grad = torch.full((1, 3), torch.nan)
    with pytest.raises(FloatingPointError, match="10 times in a row"):
        optimizer.descend()
    network.weight.grad = torch.ones(1, 3)
    optimizer.descend()
    assert optimizer.report.scale == Adam().learning_rate
    assert (network.weight < before).all()


@pytest.mark.parametrize("name", ["learning_rate", "epsilon", "max_grad_norm"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        Adam(**{name: value})
