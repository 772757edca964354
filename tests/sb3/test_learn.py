"""`learn`, again and again, and the schedules that go with it."""

from __future__ import annotations

import warnings

import pytest
import torch
from stable_baselines3.common.utils import get_parameters_by_name

from acktr.sb3 import ACKTR, ActorSettings, CriticSettings
from tests.sb3.worlds import (
    BOX,
    IMAGE,
    PLANE,
    QUICK_CRITIC,
    TINY_CNN,
    TURNS,
    Nothing,
    collected,
    differences,
    noise,
    observed_steps,
    small_agent,
    vectorised,
)


class Schedules(Nothing):
    """Notes what the optimizers hold at the start of each rollout, and how much is left."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float, float]] = []

    def _on_rollout_start(self) -> None:
        group = self.model.actor_optimizer.param_groups[0]
        self.seen.append((self.model._current_progress_remaining, group["lr"], group["radius"]))


def scheduled(**kwargs) -> ACKTR:
    actor = ActorSettings(radius=lambda progress: 0.01 + 0.02 * progress)
    return small_agent("MlpPolicy", vectorised(noise()), learning_rate=lambda p: 0.5 + p, actor=actor, **kwargs)


def test_schedules_reach_the_optimizer_at_every_update():
    agent, notes = scheduled(), Schedules()
    agent.learn(4 * 32, callback=notes)
    left = [0.75, 0.5, 0.25]
    assert notes.seen[1:] == [pytest.approx((p, 0.5 + p, 0.01 + 0.02 * p)) for p in left]
    assert agent.actor_optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    assert agent.critic_optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    assert agent.actor_optimizer.param_groups[0]["radius"] == pytest.approx(0.01)


def test_a_learning_rate_of_zero_moves_nothing():
    """η_max is the learning rate: the schedule is no dead option."""
    agent = collected(small_agent("MlpPolicy", vectorised(noise()), learning_rate=lambda p: 0.0 if p < 1 else 1.0))
    agent._current_progress_remaining = 0.5
    before = {name: tensor.clone() for name, tensor in agent.policy.state_dict().items()}
    agent.train()
    assert differences(before, agent.policy.state_dict()) == []
    agent._current_progress_remaining = 1.0
    agent.train()
    assert differences(before, agent.policy.state_dict())


def test_schedules_may_end_at_zero():
    nothing_left = {
        "actor": ActorSettings(radius=lambda p: 0.02 * p),
        "critic": CriticSettings(radius=lambda p: p / 10),
    }
    agent = small_agent("MlpPolicy", vectorised(noise()), learning_rate=lambda p: p, **nothing_left).learn(96)
    assert agent._current_progress_remaining == 0
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


def test_schedules_stay_at_zero_where_the_last_rollout_overshoots():
    """100 steps are no multiple of a rollout: the last update comes at a remaining progress below zero."""
    agent = small_agent(
        "MlpPolicy",
        vectorised(noise()),
        learning_rate=lambda p: p,
        actor=ActorSettings(radius=lambda p: 0.01 * p),
        critic=CriticSettings(radius=lambda p: 0.1 * p, n_epochs=1),
    )
    agent.learn(100)
    assert agent.num_timesteps > 100
    for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
        assert optimizer.param_groups[0]["lr"] == 0
    assert agent.actor_optimizer.param_groups[0]["radius"] == 0


def test_the_critics_radius_follows_its_schedule():
    critic = CriticSettings(radius=lambda p: 0.2 * p, n_epochs=1, n_minibatches=1)
    agent = collected(small_agent("MlpPolicy", vectorised(noise()), critic=critic))
    residual = (agent.rollout_buffer.returns - agent.rollout_buffer.values) ** 2
    agent._current_progress_remaining = 0.3
    agent.train()
    expected = 0.06 * 0.5 * residual.mean()
    assert agent.critic_optimizer.param_groups[0]["radius"] == pytest.approx(expected, rel=1e-3)


def test_learning_again_from_the_start():
    agent, notes = scheduled(), Schedules()
    agent.learn(64)
    updates = agent._n_updates
    agent.learn(64, callback=notes)
    assert agent.num_timesteps == 64
    assert agent._n_updates == updates + 2
    assert notes.seen[1][0] == pytest.approx(0.5)


def test_learning_on_counts_on():
    agent, notes = scheduled(), Schedules()
    agent.learn(64)
    agent.learn(192, reset_num_timesteps=False, callback=notes)
    assert agent.num_timesteps == 256
    assert [seen[0] for seen in notes.seen[1:]] == pytest.approx([
        1 - steps / 256 for steps in (96, 128, 160, 192, 224)
    ])


def test_two_calls_are_one():
    """Stopping between rollouts changes nothing: curvature, generators and the running episodes go on."""

    def agent():
        return small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)))

    torch.manual_seed(1)
    whole = agent().learn(128)
    torch.manual_seed(1)
    parts = agent()
    parts.learn(64)
    parts.learn(64, reset_num_timesteps=False)
    assert differences(whole.get_parameters(), parts.get_parameters()) == []
    assert differences(whole.get_parameters(), agent().get_parameters())


def test_the_seed_decides_everything():
    def weights(seed):
        agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), seed=seed).learn(96)
        return get_parameters_by_name(agent.policy, ["net"])

    assert differences(weights(3), weights(3)) == []
    assert differences(weights(3), weights(4))


def test_every_policy_parameter_is_trained():
    for policy, space, kwargs in (("MlpPolicy", BOX, {}), ("CnnPolicy", IMAGE, {"policy_kwargs": TINY_CNN})):
        agent = small_agent(policy, vectorised(noise(space, PLANE)), **kwargs)
        before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
        agent.learn(96)
        still = [name for name, p in agent.policy.named_parameters() if torch.equal(p, before[name])]
        assert still == []
        assert all(p.requires_grad for p in agent.policy.parameters())


def test_the_number_of_steps_is_that_of_the_settings():
    actor = ActorSettings(n_epochs=2, n_minibatches=3)
    agent = collected(small_agent("MlpPolicy", vectorised(noise()), actor=actor, critic=QUICK_CRITIC))
    policy, value = observed_steps(agent.actor_optimizer), observed_steps(agent.critic_optimizer)
    agent.train()
    assert (len(policy), len(value)) == (6, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_steps", 0),
        ("gamma", 1.1),
        ("gae_lambda", -0.1),
        ("ent_coef", -1.0),
        ("vf_coef", 0.0),
        ("gamma", float("nan")),
    ],
)
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*{value}"):
        small_agent("MlpPolicy", vectorised(noise()), **{name: value})


def test_one_transition_has_no_variance():
    with pytest.raises(ValueError, match="n_steps"):
        small_agent("MlpPolicy", vectorised(noise(), 1), n_steps=1)
    small_agent("MlpPolicy", vectorised(noise(), 1), n_steps=1, normalize_advantage=False).learn(3)
    small_agent("MlpPolicy", vectorised(noise(BOX, TURNS), 2), n_steps=1).learn(6)


@pytest.mark.parametrize("who", ["actor", "critic"])
def test_no_part_of_a_rollout_is_named(who):
    settings = (
        {"actor": ActorSettings(n_minibatches=0)} if who == "actor" else {"critic": CriticSettings(n_minibatches=0)}
    )
    with pytest.raises(ValueError, match=rf"{who}\.n_minibatches must be at least 1, got 0"):
        small_agent("MlpPolicy", vectorised(noise()), **settings)


@pytest.mark.parametrize(
    ("rate", "warned"), [(3e-4, True), (lambda left: 1e-3 * left, True), (0.1, False), (0.0, False)]
)
def test_a_learning_rate_of_another_algorithm_is_told(rate, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), learning_rate=rate)
    told = [str(each.message) for each in caught if "learning_rate" in str(each.message)]
    assert len(told) == warned
    assert all("leave it at 1, and tune ActorSettings(radius" in line for line in told)
