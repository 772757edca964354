"""Earlier rollouts in a policy's step: advantages by hand, gradients against the exact one, their memory."""

from __future__ import annotations

from dataclasses import fields, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.vec_env import DummyVecEnv

from acktr.firstorder import Adam
from acktr.sb3 import ACKTR, ActorSettings, Reuse
from acktr.sb3.reuse import Collected, Past, weighed, with_past
from acktr.sb3.rollout import Rollout, flatten_rollout, policy_loss
from tests.sb3.worlds import BOX, IMAGE, PLANE, TINY_CNN, TURNS, collected, differences, noise, small_agent, vectorised

FIELDS = ("observations", "actions", "log_probs", "advantages", "rewards", "returns", "values")


def agent_of(space: gym.Space = PLANE, **settings: object) -> ACKTR:
    return small_agent("MlpPolicy", vectorised(noise(BOX, space)), **settings)


def kept(agent: ACKTR) -> Collected:
    ends, cuts = np.asarray(agent._last_episode_starts), agent.update_state.cuts
    return Collected.copied(agent.rollout_buffer, agent._last_obs, ends, cuts)


def moved(agent: ACKTR, by: float) -> None:
    """Another policy, and another critic, a little away."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


def by_hand(agent: ACKTR, earlier: Collected) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and ratios, one transition after the other: A_t = δ_t + γ λ min(1, ρ_{t+1}) A_{t+1}."""
    rewards = earlier.cuts.rewards.numpy()
    n_steps, n_envs = rewards.shape
    finals = {
        tuple(place): final for place, final in zip(earlier.cuts.truncated.tolist(), earlier.cuts.finals, strict=True)
    }
    found, ratios = np.zeros((n_steps, n_envs)), np.zeros((n_steps, n_envs))
    with torch.no_grad():
        for env in range(n_envs):
            later = None
            for step in reversed(range(n_steps)):
                seen = earlier.observations[step, env][None].float()
                value = float(agent.policy.predict_values(seen))
                action = earlier.actions[step, env][None]
                action = action[0].long() if isinstance(agent.action_space, gym.spaces.Discrete) else action
                log_prob = float(agent.policy.get_distribution(seen).log_prob(action))
                ratios[step, env] = np.exp(log_prob - float(earlier.log_probs[step, env]))
                over = earlier.ends[env] if step == n_steps - 1 else earlier.starts[step + 1, env]
                if step == n_steps - 1:
                    next_value = float(
                        agent.policy.predict_values(torch.as_tensor(earlier.last_observations[env])[None])
                    )
                if (step, env) in finals:
                    next_value = float(agent.policy.predict_values(finals[step, env][None].float()))
                unseen = over and (step, env) not in finals
                delta = float(rewards[step, env]) + (0 if unseen else agent.gamma * next_value) - value
                if [step, env] in earlier.cuts.broken.tolist():
                    delta = 0.0
                trace = 0 if over or later is None else agent.gamma * agent.gae_lambda * min(1, ratios[step + 1, env])
                found[step, env] = delta + trace * (later or 0.0)
                later, next_value = found[step, env], value
    return found, ratios


@pytest.mark.parametrize("space", [PLANE, TURNS], ids=["box", "discrete"])
def test_advantages_are_estimated_anew(space):
    agent = collected(agent_of(space, normalize_advantage=False))
    earlier = kept(agent)
    moved(agent, 0.3)
    expected, ratios = by_hand(agent, earlier)
    assert ratios.min() < 0.8 and ratios.max() > 1.2, "the policy is another one"
    seen = weighed(agent, earlier, Reuse(largest_ratio=1.1))
    found = seen.advantages.view(expected.shape).numpy()
    assert np.allclose(found, expected * np.minimum(ratios, 1.1), atol=1e-5)
    assert not np.allclose(found, expected * ratios, atol=1e-3), "some were truncated"
    # A clip is around the present policy, whose ratio to itself is 1.
    log_ratios = np.log(ratios) + earlier.log_probs.numpy() - seen.log_probs.view(ratios.shape).numpy()
    assert np.abs(log_ratios).max() < 1e-4


def test_what_cut_episodes_are_worth_is_said_anew():
    env = vectorised(lambda: TimeLimit(noise(BOX, PLANE)(), 3))
    agent = collected(small_agent("MlpPolicy", env, normalize_advantage=False))
    earlier = kept(agent)
    assert len(earlier.cuts.truncated) >= 6
    (step, index) = place = earlier.cuts.truncated[1].tolist()
    others = torch.arange(len(earlier.cuts.truncated)) != 1
    cuts = replace(  # as if one of them had broken off
        earlier.cuts,
        truncated=earlier.cuts.truncated[others],
        finals=earlier.cuts.finals[others],
        broken=torch.tensor([place]),
    )
    earlier = replace(earlier, cuts=cuts)
    moved(agent, 0.3)
    expected, ratios = by_hand(agent, earlier)
    found = weighed(agent, earlier, Reuse(largest_ratio=float("inf"))).advantages.view(expected.shape).numpy()
    assert found[step, index] == 0
    assert np.allclose(found, expected * ratios, atol=1e-5)
    of_the_time = replace(cuts, rewards=torch.tensor(agent.rollout_buffer.rewards), truncated=cuts.truncated[:0])
    stale = weighed(agent, replace(earlier, cuts=of_the_time), Reuse(largest_ratio=float("inf"))).advantages
    assert not np.allclose(stale.view(expected.shape).numpy(), expected * ratios, atol=0.01), (
        "the critic is another one"
    )


def test_of_the_present_policy_nothing_changes():
    agent = collected(agent_of())
    present = flatten_rollout(agent.rollout_buffer, agent.device, agent.normalize_advantage)
    seen = weighed(agent, kept(agent), Reuse())
    # One runs environment by environment, the other step by step.
    order = torch.arange(len(present)).view(2, -1).T.flatten()
    for field in fields(Rollout):
        assert torch.allclose(getattr(seen, field.name), getattr(present, field.name)[order], atol=1e-5), field.name


class Arms(gym.Env):
    """A bandit: three arms that pay 1, −2 and 0.5, one pull an episode."""

    observation_space, action_space = BOX, TURNS
    pays = torch.tensor([1.0, -2.0, 0.5])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), float(self.pays[int(action)]), True, False, {}


def logits_gradient(agent: ACKTR, rollout: Rollout) -> torch.Tensor:
    """Of the objective, by the logits of the one state there is."""
    logits = agent.acting_network(rollout.observations[:1])[0].detach().requires_grad_()
    outputs = (logits.expand(len(rollout), 3),)
    (found,) = torch.autograd.grad(-policy_loss(agent.action_likelihood, outputs, rollout, 0.2, 0.0), [logits])
    return found[0]


def test_the_past_s_gradient_is_the_present_policy_s():
    n_steps = 20_000
    agent = small_agent("MlpPolicy", DummyVecEnv([Arms] * 2), n_steps=n_steps, normalize_advantage=False)
    collected(agent)
    earlier = kept(agent)
    moved(agent, 0.4)
    seen = weighed(agent, earlier, Reuse(largest_ratio=float("inf")))
    logits = agent.acting_network(seen.observations[:1])[0].detach().requires_grad_()
    (exact,) = torch.autograd.grad((logits.softmax(1) @ Arms.pays).sum(), [logits])
    # 40,000 pulls that pay up to 2, with ratios up to 3: a standard error of about 2 · 3 / 200.
    assert torch.allclose(logits_gradient(agent, seen), exact[0], atol=0.05)
    value = float(agent.values_of(seen.observations[:1]).detach())
    unweighted = replace(seen, advantages=Arms.pays[seen.actions] - value)
    assert not torch.allclose(logits_gradient(agent, unweighted), exact[0], atol=0.1)


def test_so_many_are_kept_and_no_more_and_the_present_is_every_so_manieth():
    agent, lengths = agent_of(), []
    for _ in range(4):
        collected(agent)
        rollout = flatten_rollout(agent.rollout_buffer, agent.device, standardise=True)
        joined = with_past(agent, rollout, Reuse(2))
        lengths.append(len(joined) // len(rollout))
        assert torch.equal(joined.actions[:: lengths[-1]], rollout.actions)
    assert lengths == [1, 2, 3, 3]
    past, again = agent.update_state.past, Past()
    assert len(past.rollouts) == 2
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
    agent = agent_of(space, actor=settings)
    agent.learn(5 * 32)
    assert lengths == [32, 64, 96, 96, 96]
    assert all(torch.isfinite(parameter).all() for parameter in agent.policy.parameters())


def test_a_step_goes_another_way_for_it():
    def stepped(reuse):
        agent = agent_of(actor=ActorSettings(reuse=reuse))
        agent.learn(2 * 32)
        return agent.policy.state_dict()

    assert differences(stepped(Reuse(1)), stepped(None))
    assert differences(stepped(Reuse(1)), stepped(Reuse(2))) == [], "there was one rollout before"


def test_an_agent_goes_on_with_its_past(tmp_path):
    agent = agent_of(actor=ActorSettings(reuse=Reuse(2)))
    agent.learn(3 * 32)
    agent.save(tmp_path / "agent")
    forgetful = ACKTR.load(tmp_path / "agent", vectorised(noise(BOX, PLANE)))
    forgetful.update_state.past = Past()
    found = []
    for other in (agent, ACKTR.load(tmp_path / "agent", vectorised(noise(BOX, PLANE))), forgetful):
        rng = np.random.default_rng(0)
        collected(other)
        for name in FIELDS:
            shape = getattr(other.rollout_buffer, name).shape
            setattr(other.rollout_buffer, name, rng.standard_normal(shape).astype(np.float32))
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
        agent_of(actor=ActorSettings(reuse=Reuse(), exploration_kl=0.01))
