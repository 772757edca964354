"""Steps stay within their regions, measured from outside with SB3's own policies and torch's own divergences."""

from __future__ import annotations

from copy import deepcopy

import gymnasium as gym
import pytest
import torch
from stable_baselines3.common.utils import obs_as_tensor

from acktr.combination import WholeDirection
from acktr.curvature import ExactCG
from acktr.damping import GreedyDamping, LevenbergMarquardt
from acktr.sb3 import ActorSettings, CriticSettings
from acktr.step import Backtracking
from acktr.trust_region import BlockMetric
from tests.sb3.worlds import (
    BOX,
    IMAGE,
    PLANE,
    TINY_CNN,
    TURNS,
    noise,
    normalised,
    observed_steps,
    small_agent,
    vectorised,
)

SLACK = 1.5
ONE_STEP = CriticSettings(n_epochs=1, n_minibatches=1)
WORLDS = {
    "cartpole": ("MlpPolicy", lambda: vectorised(lambda: gym.make("CartPole-v1"), 4), {}),
    "pendulum": ("MlpPolicy", lambda: normalised(lambda: gym.make("Pendulum-v1"), 4), {}),
    "cartpole, together": ("MlpPolicy", lambda: vectorised(lambda: gym.make("CartPole-v1"), 4), {"joint_step": True}),
    "images, discrete": ("CnnPolicy", lambda: vectorised(noise(IMAGE, TURNS)), {"policy_kwargs": TINY_CNN}),
    "images, box": ("CnnPolicy", lambda: vectorised(noise(IMAGE, PLANE)), {"policy_kwargs": TINY_CNN}),
}


def watched(world, updates=6, **kwargs):
    """An agent after a short training, with (KL, mean squared value change, mean squared residual) of each update."""
    policy, make, settings = WORLDS[world]
    agent = small_agent(policy, make(), **({"n_steps": 32, "critic": ONE_STEP} | settings | kwargs))
    train, measured = agent.train, []

    def watch():
        before = deepcopy(agent.policy)
        train()
        measured.append(distances(before, agent.policy, agent.rollout_buffer))

    agent.train = watch
    agent.learn(updates * agent.n_steps * agent.n_envs)
    return agent, measured


@torch.no_grad()
def distances(before, after, buffer):
    observations = obs_as_tensor(buffer.swap_and_flatten(buffer.observations), before.device)
    old, new = (policy.get_distribution(observations).distribution for policy in (before, after))
    divergence = torch.distributions.kl_divergence(old, new)
    kl = divergence.sum(-1) if divergence.ndim > 1 else divergence
    change = before.predict_values(observations) - after.predict_values(observations)
    residual = torch.as_tensor(buffer.returns - buffer.values)
    return kl.mean().item(), change.square().mean().item(), residual.square().mean().item()


@pytest.mark.parametrize("radius", [0.02, 0.002])
@pytest.mark.parametrize("world", WORLDS)
def test_the_policy_stays_within_its_radius(world, radius):
    agent, measured = watched(world, actor=ActorSettings(radius=radius))
    radius *= 2 if agent.action_space == PLANE else 1  # the others act in one dimension
    steps = [kl for kl, _, _ in measured]
    assert len(steps) == 6
    assert max(steps) <= SLACK * radius
    assert max(steps) > 0.1 * radius, "steps that do not move prove nothing"


@pytest.mark.parametrize("world", ["cartpole", "pendulum", "images, box"])
def test_the_reported_divergence_is_the_true_one(world):
    """Also where the noise is a parameter: what was kept from before the step must not change with it."""
    policy, make, settings = WORLDS[world]
    agent = small_agent(policy, make(), n_steps=32, critic=ONE_STEP, **settings)
    steps, train, true = observed_steps(agent.actor_optimizer), agent.train, []

    def watch():
        before = deepcopy(agent.policy)
        train()
        kl, change, residual = distances(before, agent.policy, agent.rollout_buffer)
        share = change / (agent.critic.radius * residual)
        true.append(max(kl, agent.actor.radius * share) if "images" in world else kl)

    agent.train = watch
    agent.learn(4 * 32 * agent.n_envs)
    assert [report.kl_measured for _, report in steps] == pytest.approx(true, rel=1e-3)


def test_without_measuring_the_blocks_metric_goes_too_far():
    blind = ActorSettings(radius=0.02, combination=None, metric=BlockMetric(), corrections=0)
    _, measured = watched("cartpole", actor=blind)
    assert max(kl for kl, _, _ in measured) > SLACK * 0.02


@pytest.mark.parametrize("world", ["cartpole", "pendulum"])
def test_the_value_stays_within_its_share_of_the_residual(world):
    agent, measured = watched(world)
    for _, change, residual in measured:
        assert 0 < change <= SLACK * agent.critic.radius * residual


@pytest.mark.parametrize("world", ["images, discrete", "images, box", "cartpole, together"])
def test_a_joint_step_bounds_the_value_too(world):
    """Whichever of the two radii is met first ends the step."""
    tight = CriticSettings(radius=1e-3)
    agent, measured = watched(world, critic=tight)
    shares = [change / (tight.radius * residual) for _, change, residual in measured]
    assert 0.1 < max(shares) <= SLACK
    assert all(kl < agent.actor.radius / 2 for kl, _, _ in measured), "the value's radius was not the one that held"
    _, loose = watched(world, critic=CriticSettings(radius=100.0))
    assert max(change / (tight.radius * residual) for _, change, residual in loose) > 2 * SLACK


def test_every_step_of_many_stays_within_its_own_radius():
    actor = ActorSettings(radius=0.01, n_epochs=2, n_minibatches=2)
    critic = CriticSettings(n_epochs=3, n_minibatches=2)
    agent = small_agent("MlpPolicy", vectorised(lambda: gym.make("CartPole-v1"), 4), actor=actor, critic=critic)
    policy, value = observed_steps(agent.actor_optimizer), observed_steps(agent.critic_optimizer)
    agent.learn(5 * 64)
    assert (len(policy), len(value)) == (20, 30)
    for radius, report in (*policy, *value):
        assert 0 < report.kl_measured <= SLACK * radius
        assert 0 < report.scale <= 1
    assert {radius for radius, _ in policy} == {0.01}


@pytest.mark.parametrize("world", ["cartpole", "pendulum"])
def test_trpo_s_steps_lower_the_loss_within_the_radius_or_are_not_taken(world):
    actor = ActorSettings(curvature=ExactCG(), combination=None, line_search=Backtracking(), n_epochs=2)
    policy, make, settings = WORLDS[world]
    agent = small_agent(policy, make(), **({"n_steps": 32, "critic": ONE_STEP} | settings), actor=actor)
    steps, descend, losses = observed_steps(agent.actor_optimizer), agent.actor_optimizer.descend, []

    def watched(loss):
        outputs = agent.actor_optimizer.outputs(*agent.actor_optimizer._capture.last.args)
        before = float(loss(outputs))
        descend(loss)
        losses.append((before, float(loss(agent.actor_optimizer.outputs(*agent.actor_optimizer._capture.last.args)))))

    agent.actor_optimizer.descend = watched
    agent.learn(6 * 32 * agent.n_envs)
    assert len(steps) == len(losses) == 12
    for (radius, report), (before, after) in zip(steps, losses, strict=True):
        assert report.kl_measured <= radius
        assert after < before if report.scale else after == before
    assert sum(report.scale > 0 for _, report in steps) > 6


@pytest.mark.parametrize("world", ["cartpole", "images, discrete"])
def test_levenberg_and_marquardt_s_damping_moves_in_both_roles(world):
    settings = {"damping": LevenbergMarquardt(1.0, period=1)}
    actor = ActorSettings(**settings, curvature_damping=GreedyDamping(period=2), combination=WholeDirection(True))
    agent, measured = watched(world, actor=actor, critic=CriticSettings(n_epochs=1, n_minibatches=1, **settings))
    for optimizer in agent._optimizers():
        assert optimizer.param_groups[0]["damping"] != pytest.approx(1.0)
    assert "curvature_damping" in agent.actor_optimizer.param_groups[0]
    assert all(kl <= SLACK * agent.actor.radius * agent._action_dimensions for kl, _, _ in measured)


def test_the_exact_prediction_is_near_the_measurement():
    agent = small_agent("MlpPolicy", vectorised(lambda: gym.make("CartPole-v1"), 4), n_steps=64)
    steps = observed_steps(agent.actor_optimizer)
    agent.learn(6 * 256)
    for _, report in steps:
        assert 0.6 < report.kl_measured / report.kl_predicted < 1.6


@pytest.mark.parametrize(("actions", "dimensions"), [(TURNS, 1), (PLANE, 2)], ids=["discrete", "box"])
def test_the_radius_is_per_dimension_of_the_action(actions, dimensions):
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, actions)), actor=ActorSettings(radius=0.01))
    agent.learn(agent.n_steps * agent.n_envs)
    assert agent.actor_optimizer.param_groups[0]["radius"] == pytest.approx(0.01 * dimensions)
