"""The standard deviation of continuous actions: held above a floor, or on a schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from acktr.sb3 import ACKTR, ActorSettings, LearnedNoise, ScheduledNoise
from tests.sb3.worlds import BOX, IMAGE, PLANE, TINY_CNN, TURNS, Noise, noise, small_agent, vectorised


class Small(Noise):
    """`Noise` that pays for small actions in place of large ones."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, -reward, *rest


FLOORS = {"none": 0.0, "constant": 0.8, "falling": lambda progress: 0.8 + progress}


@pytest.mark.parametrize("floor", FLOORS)
def test_the_noise_stays_above_its_floor(floor):
    actor = ActorSettings(radius=0.5, noise=LearnedNoise(FLOORS[floor]))
    agent = small_agent("MlpPolicy", vectorised(lambda: Small(BOX, PLANE)), actor=actor, n_steps=64)
    agent.learn(20 * 128)
    fell_through = (agent.policy.log_std.exp() < 0.999 * 0.8 / 2).any()
    assert fell_through == (floor == "none"), "without a floor it falls through, which is the control"


class Watch(BaseCallback):
    """Notes the standard deviation that each rollout acts with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.seen.append(self.model.policy.log_std.detach().clone())


WORLDS = {"chain": ("MlpPolicy", BOX), "convolutions": ("CnnPolicy", IMAGE)}


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("scheduled", [True, False], ids=["scheduled", "learned"])
def test_a_schedule_is_what_every_rollout_acts_with(kind, scheduled):
    policy, observed = WORLDS[kind]
    settings = ActorSettings(noise=ScheduledNoise(-2.0) if scheduled else LearnedNoise(), combination=None)
    own = TINY_CNN if policy == "CnnPolicy" else {"net_arch": [8]}
    agent = small_agent(
        policy,
        vectorised(noise(observed, PLANE)),
        actor=settings,
        n_steps=16,
        policy_kwargs={"log_std_init": -0.5, **own},
    )
    before, watch = [p.detach().clone() for p in agent.policy.action_net.parameters()], Watch()
    agent.learn(10 * 32, callback=watch)
    expected = torch.linspace(-0.5, -2.0, 11)[:10]
    followed = np.allclose(torch.stack(watch.seen)[:, 0], expected, atol=1e-6)
    assert followed == scheduled, "a learned noise goes its own way, which is the control"
    assert ("policy.log_std" in agent.actor_optimizer.parameters) != scheduled
    assert any(not torch.equal(now, was) for now, was in zip(agent.policy.action_net.parameters(), before, strict=True))


def test_the_whole_radius_is_the_means():
    kls = {}
    for name, own in {"learned": LearnedNoise(), "scheduled": ScheduledNoise(-0.5)}.items():
        actor = ActorSettings(radius=0.05, noise=own)
        agent = small_agent(
            "MlpPolicy", vectorised(noise(BOX, PLANE)), actor=actor, policy_kwargs={"log_std_init": -0.5}
        )
        observations = torch.randn(64, 3)
        with torch.no_grad():
            old = agent._actor_network(observations)
        agent.learn(agent.n_steps * agent.n_envs)
        with torch.no_grad():
            moved = ((agent._actor_network(observations)[0] - old[0]) / old[1].exp()).square().sum(1)
        kls[name] = float(0.5 * moved.mean()), float((agent.policy.log_std.detach() - old[1][0]).abs().max())
    assert kls["scheduled"][0] > kls["learned"][0]
    assert kls["scheduled"][1] == 0 < kls["learned"][1]


def test_a_loaded_agent_goes_on_along_its_schedule(tmp_path):
    env = vectorised(noise(BOX, PLANE))
    agent = small_agent("MlpPolicy", env, actor=ActorSettings(noise=ScheduledNoise(-2.0)), n_steps=16)
    agent.learn(5 * 32)
    agent.save(tmp_path / "agent")
    again = ACKTR.load(tmp_path / "agent", env=env)
    assert torch.equal(again.policy.log_std, agent.policy.log_std)
    assert not again.policy.log_std.requires_grad
    assert again.actor.noise == ScheduledNoise(-2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LearnedNoise(0.1), "a least noise .* is for Box actions, got Discrete"),
        (ScheduledNoise(-1.0), "scheduled noise .* is for Box actions, got Discrete"),
    ],
)
def test_a_noise_that_is_not_there_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_agent("MlpPolicy", vectorised(noise(BOX, TURNS)), actor=ActorSettings(noise=settings))


@pytest.mark.parametrize("last", [float("nan"), float("inf")])
def test_a_last_noise_that_is_no_number_is_refused(last):
    with pytest.raises(ValueError, match=f"must be finite, got {last}; None learns the noise"):
        ScheduledNoise(last)
