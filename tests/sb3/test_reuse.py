"""Earlier rollouts in a policy's step: their weights by hand, their gradient against the exact one, their memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from acktr.firstorder import Adam
from acktr.likelihood import Categorical
from acktr.sb3 import ACKTR, ActorSettings, Reuse
from acktr.sb3.reuse import Past, with_past
from acktr.sb3.rollout import Rollout, policy_loss
from tests.sb3.worlds import BOX, IMAGE, PLANE, TINY_CNN, TURNS, collected, differences, noise, small_agent, vectorised

NOW = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64)
BEFORE = torch.tensor([-0.2, 0.5, 0.1], dtype=torch.float64)
FIELDS = ("observations", "actions", "log_probs", "advantages", "returns", "values")
VALUES = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
"""Of the actions of a bandit with three arms."""
UNTRUNCATED = Reuse(largest_ratio=float("inf"))


class Bandit(nn.Module):
    """The same logits whatever is observed."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.logits.expand(len(observations), 3),)


def drawn(logits: torch.Tensor, pulls: int = 1000) -> Rollout:
    """As many pulls of each arm as its probability says, up to a pull: an expectation rather than a sample."""
    counts = (logits.softmax(0) * pulls).round().long()
    actions = torch.repeat_interleave(torch.arange(3), counts)
    log_probs, nothing = logits.log_softmax(0)[actions], torch.zeros(len(actions), dtype=torch.float64)
    return Rollout(nothing[:, None], actions, log_probs, VALUES[actions], nothing, nothing)


def gradient(rollout: Rollout, bandit: Bandit) -> torch.Tensor:
    (found,) = torch.autograd.grad(
        -policy_loss(Categorical(), bandit(rollout.observations), rollout, 0.2, 0.0), [bandit.logits]
    )
    return found


def exact_gradient() -> torch.Tensor:
    logits = NOW.clone().requires_grad_()
    (found,) = torch.autograd.grad(logits.softmax(0) @ VALUES, [logits])
    return found


def test_the_past_s_gradient_is_the_present_policy_s() -> None:
    bandit, pulls = Bandit(NOW), 10**6
    joined = with_past(drawn(NOW, pulls), [drawn(BEFORE, pulls)], bandit, Categorical(), UNTRUNCATED)
    # Whole pulls are off by half of one in a million, times values of 2 and ratios of 3.
    assert torch.allclose(gradient(joined, bandit), exact_gradient(), atol=1e-5)
    past_alone = joined.rows(slice(len(joined) // 2, None))
    assert torch.allclose(gradient(past_alone, bandit), exact_gradient(), atol=1e-5)
    unweighted = replace(past_alone, advantages=VALUES[past_alone.actions])
    assert not torch.allclose(gradient(unweighted, bandit), exact_gradient(), atol=0.05)


def test_ratios_are_truncated_and_the_present_comes_first() -> None:
    bandit, present, earlier = Bandit(NOW), drawn(NOW, 10), drawn(BEFORE, 10)
    ratios = NOW.softmax(0) / BEFORE.softmax(0)
    assert ratios.min() < 1 < 1.3 < ratios.max(), "some are cut, some are not"
    joined = with_past(present, [earlier], bandit, Categorical(), Reuse(1, largest_ratio=1.3))
    assert torch.equal(joined.actions, torch.cat((present.actions, earlier.actions)))
    expected = torch.cat((present.advantages, (VALUES * ratios.clamp(max=1.3))[earlier.actions]))
    assert torch.allclose(joined.advantages, expected)
    # A clip is around the present policy, whose ratio to itself is 1.
    assert torch.allclose(joined.log_probs, NOW.log_softmax(0)[joined.actions])


def test_so_many_are_kept_and_no_more() -> None:
    past, bandit = Past(), Bandit(NOW)
    lengths = [len(past.joined(drawn(NOW, 10 + n), bandit, Categorical(), Reuse(2))) for n in range(4)]
    kept = [len(drawn(NOW, 10 + n)) for n in range(4)]
    assert lengths == [kept[0], sum(kept[:2]), sum(kept[:3]), sum(kept[1:4])]
    assert [len(rollout) for rollout in past.rollouts] == [kept[3], kept[2]]
    again = Past()
    again.load_state_dict(past.state_dict())
    assert differences(again.state_dict(), past.state_dict()) == []


@pytest.mark.parametrize("space", [PLANE, TURNS], ids=["box", "discrete"])
@pytest.mark.parametrize("curvature", [None, Adam(1e-3)], ids=["natural", "adam"])
def test_a_step_sees_the_rollouts_before_it(space, curvature, monkeypatch):
    from acktr.sb3 import acktr as module

    real, lengths = module.actor_steps, []

    def steps(actor, optimizer, rollout, *rest):
        lengths.append(len(rollout))
        return real(actor, optimizer, rollout, *rest)

    monkeypatch.setattr(module, "actor_steps", steps)
    settings = ActorSettings(reuse=Reuse(2)) if curvature is None else ActorSettings(curvature, reuse=Reuse(2))
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, space)), actor=settings)
    agent.learn(5 * 32)
    assert lengths == [32, 64, 96, 96, 96]
    assert all(torch.isfinite(parameter).all() for parameter in agent.policy.parameters())


def test_a_step_goes_another_way_for_it():
    def stepped(reuse):
        agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), actor=ActorSettings(reuse=reuse))
        agent.learn(2 * 32)
        return agent.policy.state_dict()

    assert differences(stepped(Reuse(1)), stepped(None))
    assert differences(stepped(Reuse(1)), stepped(Reuse(2))) == [], "there was one rollout before"


def test_an_agent_goes_on_with_its_past(tmp_path):
    actor = ActorSettings(reuse=Reuse(2))
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), actor=actor)
    agent.learn(3 * 32)
    agent.save(tmp_path / "agent")
    forgetful = ACKTR.load(tmp_path / "agent", vectorised(noise(BOX, PLANE)))
    forgetful.update_state.past = Past()
    found = []
    for other in (agent, ACKTR.load(tmp_path / "agent", vectorised(noise(BOX, PLANE))), forgetful):
        rng = np.random.default_rng(0)
        collected(other)
        buffer = other.rollout_buffer
        for name in FIELDS:
            setattr(buffer, name, rng.standard_normal(getattr(buffer, name).shape).astype(np.float32))
        other.train()
        found.append({name: tensor.clone() for name, tensor in other.policy.state_dict().items()})
    assert differences(found[0], found[1]) == []
    assert differences(found[0], found[2])


@pytest.mark.parametrize(
    ("policy", "world", "settings", "words"),
    [
        ("CnnPolicy", noise(IMAGE, TURNS), {"policy_kwargs": TINY_CNN}, "not for a shared trunk"),
        ("MlpPolicy", noise(BOX, PLANE), {"joint_step": True}, "not for a shared trunk or joint_step"),
    ],
)
def test_trunks_that_are_shared_are_refused(policy, world, settings, words):
    with pytest.raises(ValueError, match=words):
        small_agent(policy, vectorised(world), actor=ActorSettings(reuse=Reuse()), **settings)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"reuse\.rollouts must be at least 1, got 0; None reuses nothing"):
        Reuse(0)
    with pytest.raises(ValueError, match=r"reuse\.largest_ratio must be at least 1, got 0\.5"):
        Reuse(1, 0.5)
    with pytest.raises(ValueError, match="set exploration_kl 0, or reuse None"):
        small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), actor=ActorSettings(reuse=Reuse(), exploration_kl=0.01))
