"""The policy's objective against autograd, and the passes over a rollout."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Generator

from acktr.likelihood import Categorical
from acktr.sb3 import ActorSettings, CriticSettings
from acktr.sb3.networks import ActorNetwork, action_likelihood
from acktr.sb3.rollout import Rollout, flatten_rollout, policy_loss
from tests.sb3.worlds import BOX, PLANE, TURNS, collected, noise, observed_steps, small_agent, vectorised

CPU = torch.device("cpu")
SPACES = pytest.mark.parametrize("action_space", [TURNS, PLANE], ids=["discrete", "box"])


def setting(action_space):
    agent = collected(small_agent("MlpPolicy", vectorised(noise(BOX, action_space))))
    return agent, flatten_rollout(agent.rollout_buffer, CPU, standardise=True)


def gradient(agent, loss):
    parameters = [p for p in agent.policy.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat([
        torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)
    ])


@SPACES
def test_at_ratio_one_the_gradient_is_the_policy_gradient(action_space):
    agent, rollout = setting(action_space)
    outputs = ActorNetwork(agent.policy)(rollout.observations)
    ours = gradient(agent, policy_loss(action_likelihood(agent.policy), outputs, rollout, 0.2, 0.0))
    _, log_probs, _ = agent.policy.evaluate_actions(rollout.observations, rollout.actions)
    expected = gradient(agent, -(rollout.advantages * log_probs).mean())
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    other = gradient(agent, -(rollout.advantages.roll(1) * log_probs.exp()).mean())
    assert not torch.allclose(ours, other, rtol=1e-2, atol=1e-4)


@SPACES
def test_the_entropy_bonus_is_sb3s_entropy(action_space):
    agent, rollout = setting(action_space)
    outputs = ActorNetwork(agent.policy)(rollout.observations)
    likelihood = action_likelihood(agent.policy)
    with_bonus = policy_loss(likelihood, outputs, rollout, 0.2, 0.3)
    without = policy_loss(likelihood, outputs, rollout, 0.2, 0.0)
    _, _, entropy = agent.policy.evaluate_actions(rollout.observations, rollout.actions)
    torch.testing.assert_close(without - with_bonus, 0.3 * entropy.mean())
    torch.testing.assert_close(
        gradient(agent, without - with_bonus), gradient(agent, 0.3 * entropy.mean()), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "pulls"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_the_clip_holds_what_has_gone_far_enough(ratio, advantage, pulls):
    logits = torch.tensor([[0.3, -0.2]], requires_grad=True)
    old = logits.log_softmax(-1)[:, 0].detach() - torch.tensor(ratio).log()
    one = torch.tensor([advantage])
    batch = Rollout(torch.zeros(1, 1), torch.tensor([0]), old, one, one, one)
    loss = policy_loss(Categorical(), (logits,), batch, 0.2, 0.0)
    bounded = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert float(loss.detach()) == pytest.approx(-bounded, rel=1e-5)
    (grad,) = torch.autograd.grad(loss, logits)
    assert bool(grad.abs().sum() > 0) == pulls


def numbered(size):
    rows = torch.arange(size, dtype=torch.float32)
    return Rollout(rows[:, None], rows.long(), rows, rows, rows, rows)


@pytest.mark.parametrize(("size", "parts"), [(12, 4), (10, 3), (7, 1), (3, 8)])
def test_an_epoch_visits_each_transition_once(size, parts):
    batches = list(numbered(size).minibatches(3, parts, Generator().manual_seed(0)))
    per_epoch = len(batches) // 3
    assert per_epoch == min(parts, size) or (size, parts) == (10, 3)
    for epoch in range(3):
        mine = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        visited = torch.cat([batch.returns for batch in mine])
        assert sorted(visited.tolist()) == list(range(size))
        for batch in mine:
            assert torch.equal(batch.returns, batch.observations[:, 0])
            assert torch.equal(batch.returns.long(), batch.actions)


def test_epochs_are_shuffled_anew():
    batches = [b.returns.tolist() for b in numbered(12).minibatches(2, 1 + 1, Generator().manual_seed(0))]
    assert batches[:2] != batches[2:]
    again = [b.returns.tolist() for b in numbered(12).minibatches(2, 2, Generator().manual_seed(0))]
    assert batches == again


@pytest.mark.parametrize(("limit", "expected"), [(1e-9, 1), (None, 12), (1e9, 12)])
def test_a_rollout_stops_once_the_policy_is_far_from_its_behaviour(limit, expected):
    actor = ActorSettings(n_epochs=3, n_minibatches=4, max_rollout_kl=limit)
    agent = collected(small_agent("MlpPolicy", vectorised(noise()), actor=actor))
    steps = observed_steps(agent.actor_optimizer)
    agent.train()
    assert len(steps) == expected


@SPACES
def test_the_rollouts_distance_stays_near_its_limit(action_space):
    limit, radius = 0.01, 0.003
    actor = ActorSettings(n_epochs=10, n_minibatches=2, max_rollout_kl=limit, radius=radius)
    agent = collected(small_agent("MlpPolicy", vectorised(noise(BOX, action_space)), actor=actor))
    rollout = flatten_rollout(agent.rollout_buffer, CPU, standardise=True)
    before = deepcopy(agent.policy).get_distribution(rollout.observations).distribution
    steps = observed_steps(agent.actor_optimizer)
    agent.train()
    after = agent.policy.get_distribution(rollout.observations).distribution
    divergence = torch.distributions.kl_divergence(before, after).detach()
    distance = divergence.reshape(len(rollout), -1).sum(-1).mean().item()
    assert limit < distance < 4 * limit
    assert 1 < len(steps) < 20


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_value_ends_as_the_mean_over_its_last_steps(share):
    critic = CriticSettings(n_epochs=3, n_minibatches=2, averaged=share)
    agent = collected(small_agent("MlpPolicy", vectorised(noise()), critic=critic))
    optimizer, led = agent.critic_optimizer, []
    step = optimizer.descend

    def watched(*args):
        step(*args)
        led.append([p.clone() for p in optimizer.parameters.values()])

    optimizer.descend = watched
    agent.train()
    assert len(led) == 6
    last = led[-max(1, round(share * 6)) :]
    for now, *each in zip(optimizer.parameters.values(), *last, strict=True):
        torch.testing.assert_close(now.detach(), torch.stack(each).mean(0))
    at_the_end = all(map(torch.equal, optimizer.parameters.values(), led[-1]))
    assert at_the_end == (share == 0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_mean_is_over_a_share_of_the_steps(share):
    with pytest.raises(ValueError, match="averaged must be between 0 and 1"):
        small_agent("MlpPolicy", vectorised(noise()), critic=CriticSettings(averaged=share))
