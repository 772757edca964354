"""What an agent keeps and what it lets go of when it gets another environment, other numbers, or learns again."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from acktr.curvature import FactoredKFAC
from acktr.damping import LevenbergMarquardt
from acktr.sb3 import ACKTR, ActorSettings, CriticSettings, Reuse, ScheduledNoise
from tests.sb3.worlds import (
    BOX,
    IMAGE,
    NAMED,
    PLANE,
    TINY_CNN,
    TURNS,
    noise,
    normalised,
    small_agent,
    vectorised,
)

REUSING = ActorSettings(reuse=Reuse(2))


@pytest.mark.parametrize("changed", [{"n_steps": 8}, {"env": 3}], ids=["steps", "environments"])
def test_rollouts_of_another_shape_are_left_aside(changed, tmp_path):
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), actor=REUSING).learn(4 * 32)
    agent.save(tmp_path / "agent")
    env = vectorised(noise(BOX, PLANE), n_envs=changed.get("env", 2))
    again = ACKTR.load(tmp_path / "agent", env=env, **{key: n for key, n in changed.items() if key != "env"})
    assert len(again.update_state.past.rollouts) == 2
    again.learn(2 * again.n_steps * again.n_envs)
    shapes = {rollout.cuts.rewards.shape for rollout in again.update_state.past.rollouts}
    assert again.rollout_buffer.rewards.shape in shapes
    assert again._n_updates == 4 + 2


def test_another_environment_makes_rollouts_forgotten_and_a_resumed_one_does_not(tmp_path):
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), actor=REUSING).learn(4 * 32)
    agent.save(tmp_path / "agent")
    agent.set_env(vectorised(noise(BOX, PLANE)))
    assert agent.update_state.past.rollouts == []
    again = ACKTR.load(tmp_path / "agent")
    again.set_env(vectorised(noise(BOX, PLANE)))
    assert len(again.update_state.past.rollouts) == 2


def test_statistics_follow_the_policy_from_one_normaliser_to_the_next(tmp_path):
    first, second = normalised(noise(BOX, PLANE)), normalised(noise(BOX, PLANE))
    agent = small_agent("MlpPolicy", first).learn(4 * 32)
    agent.set_env(second)
    assert second.obs_rms.count == first.obs_rms.count > 100
    assert np.array_equal(second.obs_rms.mean, first.obs_rms.mean)
    with pytest.warns(UserWarning, match="VecNormalize"):
        agent.set_env(vectorised(noise(BOX, PLANE)))
    agent.save(tmp_path / "agent")
    third = normalised(noise(BOX, PLANE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ACKTR.load(tmp_path / "agent", env=third)
    assert third.obs_rms.count == first.obs_rms.count
    with pytest.warns(UserWarning, match="this environment has none"):
        ACKTR.load(tmp_path / "agent", env=vectorised(noise(BOX, PLANE)))


def test_a_normaliser_that_leaves_a_part_alone_is_told_which(tmp_path):
    agent = small_agent("MultiInputPolicy", VecNormalize(vectorised(noise(NAMED, PLANE)))).learn(32)
    agent.save(tmp_path / "agent")
    fewer = VecNormalize(vectorised(noise(NAMED, PLANE)), norm_obs_keys=["here"])
    with pytest.raises(ValueError, match=r"observations 'there' were normalised .* add 'there' to its norm_obs_keys"):
        ACKTR.load(tmp_path / "agent", env=fewer)
    ACKTR.load(tmp_path / "agent", env=VecNormalize(vectorised(noise(NAMED, PLANE))))


def test_settings_that_do_not_fit_a_file_are_told(tmp_path):
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE))).learn(32)
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"of an agent with other settings: curvature state is of .*policy\.log_std"):
        ACKTR.load(tmp_path / "agent", actor=ActorSettings(noise=ScheduledNoise(-2.0)))


def test_settings_given_to_load_count_more_than_those_of_the_file(tmp_path):
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE))).learn(32)
    agent.save(tmp_path / "agent")
    actor, critic = ActorSettings(damping=5.0, momentum=0.5), CriticSettings(damping=3.0)
    again = ACKTR.load(tmp_path / "agent", env=vectorised(noise(BOX, PLANE)), actor=actor, critic=critic)
    assert [again.actor_optimizer.param_groups[0][name] for name in ("damping", "momentum")] == [5.0, 0.5]
    assert again.critic_optimizer.param_groups[0]["damping"] == pytest.approx(3.0)
    with pytest.raises(ValueError, match="the state of a EKFAC, and the optimizer has a FactoredKFAC"):
        ACKTR.load(tmp_path / "agent", actor=ActorSettings(curvature=FactoredKFAC()))
    adapting = ActorSettings(damping=LevenbergMarquardt(start=0.7, period=1))
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), actor=adapting).learn(64)
    agent.actor_optimizer.param_groups[0]["damping"] = 0.3  # as far as it has come
    agent.save(tmp_path / "adapted")
    assert ACKTR.load(tmp_path / "adapted").actor_optimizer.param_groups[0]["damping"] == pytest.approx(0.3)


@pytest.mark.parametrize("who", ["actor", "critic"])
def test_settings_of_another_kind_are_named(who):
    with pytest.raises(TypeError, match=rf"{who} must be {who.capitalize()}Settings"):
        small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), **{who: {"radius": 0.1}})


class LogStds(BaseCallback):
    """The noise that every rollout begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.seen.append(round(float(self.model.policy.log_std[0]), 6))  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("reset", [True, False])
def test_a_second_call_begins_where_its_schedule_does(reset):
    actor = ActorSettings(noise=ScheduledNoise(-2.0))
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), actor=actor).learn(4 * 32)
    watch = LogStds()
    agent.learn(4 * 32, callback=watch, reset_num_timesteps=reset)
    # By the share of all steps that is still to come: anew from 0, or after 4 of 8 rollouts.
    assert watch.seen == ([0.0, -0.5, -1.0, -1.5] if reset else [-1.0, -1.25, -1.5, -1.75])


def test_a_schedule_may_begin_without_exploration():
    later = ActorSettings(exploration_kl=lambda progress: 0.1 * (1 - progress))
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), actor=later)
    assert agent.exploration is not None
    agent.learn(4 * 32)
    assert agent.exploration.target > 0
    with pytest.raises(ValueError, match="exploration_kl"):
        small_agent(
            "MlpPolicy",
            vectorised(noise(BOX, PLANE)),
            actor=ActorSettings(exploration_kl=lambda progress: 0.1 * (1 - progress), reuse=Reuse(1)),
        )


class Softened(BaseFeaturesExtractor):
    """Layers that act otherwise in training than in evaluation."""

    def __init__(self, observation_space: spaces.Box, kind: str) -> None:
        super().__init__(observation_space, features_dim=8)
        between: dict[str, nn.Module] = {"dropout": nn.Dropout(0.5), "norm": nn.BatchNorm1d(8)}
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), between[kind])

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations)


@pytest.mark.parametrize("kind", ["dropout", "norm"])
def test_a_policy_that_does_not_move_measures_no_distance(kind):
    extractor = {"features_extractor_class": Softened, "features_extractor_kwargs": {"kind": kind}}
    agent = small_agent(
        "MlpPolicy",
        vectorised(noise(BOX, PLANE)),
        learning_rate=0.0,
        policy_kwargs={**extractor, "share_features_extractor": False},
    )
    agent.learn(32)
    assert not agent.actor_optimizer.report.kl_measured
    seen = torch.randn(16, 3)
    apart = [agent.policy.train(mode).get_distribution(seen).distribution.mean for mode in (True, True, False, False)]
    assert torch.equal(apart[2], apart[3])
    assert not torch.equal(apart[1], apart[2])  # the control: there is something that could have been measured


@pytest.mark.parametrize("shared", [True, False])
def test_minibatches_may_be_larger_than_what_the_statistics_keep(shared):
    critic = CriticSettings(n_epochs=1, n_minibatches=1)
    agent = small_agent("MlpPolicy", vectorised(noise(), 33), n_steps=64, critic=critic, joint_step=shared)
    agent.learn(64 * 33)  # 2112 rows; 2048 are kept
    assert agent._n_updates == 1 and not agent.faults.counts


def test_convolutions_of_the_critics_own_learn():
    own = {**TINY_CNN, "share_features_extractor": False}
    agent = small_agent("CnnPolicy", vectorised(noise(IMAGE), 4), n_steps=128, policy_kwargs=own)
    agent.critic_optimizer.curvature.max_rows = 100  # of 25 positions each
    before = [p.detach().clone() for p in agent.critic_optimizer.parameters.values()]
    agent.learn(4 * 128)
    after = agent.critic_optimizer.parameters.values()
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


class Deep(BaseFeaturesExtractor):
    """A convolution over three axes, whose parameter has five."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=8)
        self.volume, self.layer = nn.Conv3d(1, 2, 2), nn.Linear(2 * 2 * 2 * 2, 8)

    def forward(self, observations: Tensor) -> Tensor:
        return self.layer(self.volume(observations).flatten(1))


def test_parameters_of_five_axes_are_taken_as_they_are():
    make = noise(spaces.Box(-1, 1, (1, 3, 3, 3), np.float32), TURNS)
    agent = small_agent("MlpPolicy", vectorised(make), policy_kwargs={"features_extractor_class": Deep})
    agent.learn(32)
    assert agent._n_updates == 1


REFUSED: dict[str, tuple[gym.Space[Any], dict[str, Any], str]] = {
    "whole numbers": (spaces.Box(0, 5, (2,), np.int64), {}, r"in a Box are floats, got Box"),
    "from one": (spaces.Discrete(3, start=1), {}, r"from 0, got Discrete\(3, start=1\)"),
    "optimizer": (TURNS, {"policy_kwargs": {"optimizer_class": torch.optim.RMSprop}}, "optimizer_class"),
    "damping": (TURNS, {"actor": ActorSettings(damping=float("inf"))}, "damping must be finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_thing_in_silence_is_refused(case):
    space, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        small_agent("MlpPolicy", vectorised(noise(BOX, space)), **settings)


def test_an_action_without_axes_is_no_choice():
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, spaces.Box(-1, 1, (), np.float32))), actor=REUSING)
    agent.learn(3 * 32)
    assert agent._n_updates == 3
