import sys
from dataclasses import fields, replace
from typing import Any, get_args

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

import envs
from acktr.combination import WholeDirection
from acktr.curvature import (
    EKFAC,
    DenseFisher,
    EigenAdagrad,
    EigenAdam,
    EigenRMSProp,
    ExactCG,
    PerCoordinate,
    RunningEKFAC,
    Tikhonov,
    Tridiagonal,
)
from acktr.damping import GreedyDamping, LevenbergMarquardt
from acktr.firstorder import Adam
from acktr.optimizer import NaturalGradient
from acktr.sb3 import ACKTR
from acktr.sb3.forgiveness import Forgiveness
from acktr.sb3.noise import LearnedNoise, ScheduledNoise
from acktr.sb3.settings import ActorSettings, CriticSettings
from acktr.step import Backtracking
from acktr.wake import WakeQ, WakeQE, WakeSO
from agents import build, configfiles
from agents.config import RunConfig
from agents.errors import UsageError
from agents.natural import actor_settings
from agents.networks import NatureCNN
from agents.schedules import nearing, schedule
from agents.stepconfig import ActorConfig, CriticConfig, Curvature


class Still(gym.Env[Any, Any]):
    """An environment of any spaces in which nothing happens."""

    def __init__(self, observations: Any, actions: Any) -> None:
        self.observation_space, self.action_space = observations, actions

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}


VECTOR = spaces.Box(-1, 1, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (4, 84, 84), np.uint8)
TWO = spaces.Discrete(2)


def still(observations: Any, actions: Any = TWO, n_envs: int = 2) -> VecEnv:
    return make_vec_env(lambda: Still(observations, actions), n_envs)


def config(algorithm: Any, env_id: str = "Some-v0") -> RunConfig:
    return replace(configfiles.shipped(env_id), algorithm=algorithm)


def with_actor(**values: Any) -> RunConfig:
    run = config("acktr")
    return replace(run, acktr=replace(run.acktr, actor=replace(run.acktr.actor, **values)))


def test_settings_reach_acktr() -> None:
    run = with_actor(
        radius=0.5, curvature="kfac", ema=0.5, fisher="exact", metric="block", combination="none", curvature_examples=7
    )
    agent: Any = build.make_agent(run, still(VECTOR))
    actor = agent.actor
    assert (actor.radius, actor.curvature_examples, actor.combination) == (0.5, 7, None)
    assert type(actor.curvature).__name__ == "KFAC"
    assert actor.curvature.ema == pytest.approx(0.5)
    assert type(actor.fisher).__name__ == "ExactFisher"
    assert type(actor.metric).__name__ == "BlockMetric"
    assert agent.gamma == run.acktr.gamma
    low = build.make_agent(with_actor(rank=3, statistics_period=5), still(VECTOR))
    assert (low.actor.curvature.rank, low.actor.statistics_period) == (3, 5)  # type: ignore[attr-defined]
    momentum = build.make_agent(with_actor(combination="layers-and-momentum"), still(VECTOR))
    assert momentum.actor.combination.previous_step  # type: ignore[attr-defined]


NAMES_OF_OURS = {"ema", "rank", "adam_rate", "damping_rule", "radius_decay", "wake_decay", "noise_decay"}
NAMES_OF_OURS |= {"exploration_decay", "noise_min", "log_std_final", "forgiven_noise", "reused_rollouts"}
NAMES_OF_OURS |= {"scale_decay"}
# Noise is learned, with noise_min, or scheduled, to log_std_final, perhaps with forgiven_noise.
NAMES_OF_THEIRS = {"noise", "reuse", "scale"}


@pytest.mark.parametrize(("ours", "theirs"), [(ActorConfig, ActorSettings), (CriticConfig, CriticSettings)])
def test_every_setting_of_the_library_can_be_configured(ours: Any, theirs: Any) -> None:
    configured = {f.name for f in fields(ours)}
    assert {f.name for f in fields(theirs)} - NAMES_OF_THEIRS == configured - NAMES_OF_OURS


@pytest.mark.parametrize(
    ("name", "kind"), [("tridiagonal", Tridiagonal), ("dense-fisher", DenseFisher), ("exact-cg", ExactCG)]
)
def test_curvatures_of_the_whole_network_go_by_their_names(name: str, kind: type) -> None:
    run = with_actor(curvature=name, ema=0.5)
    agent: Any = build.make_agent(replace(run, policy=replace(run.policy, pi=(16, 16))), still(VECTOR))
    assert type(agent.actor.curvature) is kind
    assert getattr(agent.actor.curvature, "ema", 0.5) == pytest.approx(0.5)


def test_a_dense_fisher_of_a_large_network_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^[^\n]*the network has \d+ parameters[^\n]*take a smaller one[^\n]*$"):
        build.make_agent(with_actor(curvature="dense-fisher"), still(VECTOR))


def test_k_fac_s_own_rules_and_trpo_s_search_go_by_their_names() -> None:
    run = with_actor(
        combination="whole-and-momentum",
        damping=0.5,
        damping_rule="levenberg-marquardt",
        curvature_damping="greedy",
        line_search="backtracking",
    )
    agent: Any = build.make_agent(run, still(VECTOR))
    assert agent.actor.combination == WholeDirection(previous_step=True)
    assert agent.actor.damping == LevenbergMarquardt(0.5)
    assert (agent.actor.curvature_damping, agent.actor.line_search) == (GreedyDamping(), Backtracking())
    assert agent.actor_optimizer.param_groups[0]["damping"] == pytest.approx(0.5)
    plain: Any = build.make_agent(with_actor(combination="whole"), still(VECTOR))
    assert plain.actor.combination == WholeDirection()
    assert plain.actor.damping == pytest.approx(0.01)
    assert (plain.actor.curvature_damping, plain.actor.line_search) == (None, None)


def test_adam_in_place_of_the_natural_gradient() -> None:
    agent: Any = build.make_agent(with_actor(curvature="adam", adam_rate=0.125), still(VECTOR))
    assert agent.actor.curvature == Adam(0.125)
    assert agent.actor_optimizer.param_groups[0]["lr"] == pytest.approx(0.125)
    assert isinstance(agent.critic_optimizer, NaturalGradient)


@pytest.mark.parametrize("name", ["cg-fac", "cg-fac-e", "kfc-reduce", "mean-sua", "seng", "sua", "sua-ekfac"])
def test_the_average_reaches_curvatures_of_rows_and_of_convolutions(name: Any) -> None:
    fast, slow = (build.make_agent(with_actor(curvature=name, ema=ema), still(VECTOR)) for ema in (0.25, 0.75))
    assert fast.actor.curvature != slow.actor.curvature  # type: ignore[attr-defined]
    assert isinstance(fast.actor_optimizer, NaturalGradient)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ekfac-ra", RunningEKFAC),
        ("ekfac-c", EKFAC),
        ("kfe-rmsprop", EigenRMSProp),
        ("kfe-adagrad", EigenAdagrad),
        ("kfe-adam", EigenAdam),
    ],
)
def test_curvatures_in_eigenbases_by_their_names(name: str, kind: Any) -> None:
    agent: Any = build.make_agent(with_actor(curvature=name, ema=0.5), still(VECTOR))
    assert type(agent.actor.curvature) is kind
    assert agent.actor.curvature.ema == pytest.approx(0.5)
    plain: Any = build.make_agent(with_actor(curvature="ekfac"), still(VECTOR)).actor  # type: ignore[attr-defined]
    assert (getattr(agent.actor.curvature, "damping", None) == PerCoordinate()) == (name == "ekfac-c")
    assert plain.curvature.damping == Tikhonov()


@pytest.mark.parametrize(
    ("name", "wake"), [("none", None), ("so", WakeSO(0.25)), ("q", WakeQ(0.25)), ("qe", WakeQE(0.25))]
)
def test_wakes_by_their_names(name: str, wake: Any) -> None:
    agent: Any = build.make_agent(with_actor(wake=name, wake_decay=0.25), still(VECTOR))
    assert agent.actor.wake == wake
    assert agent.actor_optimizer.rule.wake == wake
    assert agent.critic_optimizer.rule.wake is None
    agent.learn(2 * agent.n_steps * agent.n_envs)
    # Two steps later there is something to look back on.
    assert (agent.actor_optimizer.state_dict()["natural"]["wake"] is None) == (wake is None)


def test_every_curvature_s_name_is_another_choice() -> None:
    names = set(get_args(Curvature)) - {"adam"}
    choices = {repr(actor_settings(with_actor(curvature=name).acktr.actor).curvature) for name in names}
    assert len(choices) == len(names)


def test_a_rank_that_nothing_uses_is_refused() -> None:
    with pytest.raises(UsageError, match=r"rank 3 needs curvature ekfac or .*, got kfac"):
        build.make_agent(with_actor(rank=3, curvature="kfac"), still(VECTOR))


def test_decays_reach_acktr() -> None:
    agent: Any = build.make_agent(with_actor(radius=0.5, radius_decay="linear"), still(VECTOR))
    assert agent.actor.radius(0.25) == pytest.approx(0.125)


@pytest.mark.parametrize(("algorithm", "kind"), [("ppo", PPO), ("a2c", A2C), ("trpo", TRPO)])
def test_peers(algorithm: str, kind: type) -> None:
    run = config(algorithm)
    agent = build.make_agent(run, still(VECTOR))
    assert type(agent) is kind
    assert (agent.n_steps, agent.gae_lambda) == (run.learner.n_steps, run.learner.gae_lambda)


def test_minibatches_must_divide_the_rollout() -> None:
    run = config("ppo")
    one_each = replace(run.ppo, n_steps=5, n_minibatches=10)
    with pytest.raises(UsageError, match=r"ppo\.n_minibatches.*leaves one transition"):
        build.make_agent(replace(run, ppo=one_each), still(VECTOR))
    run = replace(run, ppo=replace(run.ppo, n_steps=5, n_minibatches=3))
    with pytest.raises(UsageError, match=r"ppo\.n_minibatches.*got 3"):
        build.make_agent(run, still(VECTOR))


def test_settings_reach_trpo() -> None:
    run = config("trpo", "HalfCheetah-v5")
    agent: Any = build.make_agent(run, still(VECTOR, n_envs=8))
    assert agent.batch_size == 128
    for name in ("cg_max_steps", "cg_damping", "target_kl", "n_critic_updates", "line_search_max_iter"):
        assert getattr(agent, name) == getattr(run.trpo, name)
    assert (agent.line_search_shrinking_factor, agent.sub_sampling_factor) == (0.8, 1)
    with pytest.raises(UsageError, match=r"trpo\.n_minibatches.*got 7"):
        build.make_agent(replace(run, trpo=replace(run.trpo, n_minibatches=7)), still(VECTOR))


def test_a_missing_trpo_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(UsageError, match=r"sb3-contrib.*pip install '\.\[workbench\]'"):
        build.make_agent(config("trpo"), still(VECTOR))


def test_networks_follow_the_configuration() -> None:
    run = config("ppo")
    run = replace(run, policy=replace(run.policy, pi=(5,), vf=(6, 7), activation="elu", log_std_init=-1.0))
    agent = build.make_agent(run, still(VECTOR, spaces.Box(-1, 1, (2,))))
    extractor = agent.policy.mlp_extractor
    assert [m.out_features for m in extractor.policy_net if isinstance(m, torch.nn.Linear)] == [5]
    assert [m.out_features for m in extractor.value_net if isinstance(m, torch.nn.Linear)] == [6, 7]
    assert isinstance(extractor.policy_net[1], torch.nn.ELU)
    assert agent.policy.log_std.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("algorithm", ["acktr", "a2c"])
def test_atari_network(algorithm: str) -> None:
    run = config(algorithm, "ALE/Pong-v5")
    agent = build.make_agent(replace(run, policy=replace(run.policy, last_conv_channels=24)), still(IMAGE))
    extractor = agent.policy.features_extractor
    assert isinstance(extractor, NatureCNN)
    shapes = [tuple(m.weight.shape) for m in extractor.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (24, 64, 3, 3), (512, 24 * 49)]


def test_kinds_of_policies() -> None:
    auto = config("ppo").policy
    assert build.policy_kind(auto, VECTOR) == "mlp"
    assert build.policy_kind(auto, IMAGE) == "cnn"
    assert build.policy_kind(auto, spaces.Dict({"a": VECTOR})) == "multi-input"
    assert build.policy_kind(replace(auto, kind="mlp"), IMAGE) == "mlp"
    with pytest.raises(UsageError, match=r"policy\.kind cnn.*mlp"):
        build.policy_kind(replace(auto, kind="cnn"), VECTOR)


def test_every_kind_of_observation_trains() -> None:
    for space in (VECTOR, spaces.Discrete(4), spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)})):
        run = config("a2c")
        build.make_agent(run, build.normalised(still(space), run)).learn(10)


@pytest.mark.parametrize(
    ("observations", "actions", "algorithm", "words"),
    [
        (spaces.Tuple([TWO, TWO]), TWO, "ppo", "observations"),
        (spaces.Dict({"a": spaces.Text(3)}), TWO, "ppo", "observations"),
        (VECTOR, spaces.Dict({"a": TWO}), "ppo", "actions"),
        (VECTOR, spaces.MultiBinary(3), "acktr", "acktr cannot choose actions"),
        (spaces.Box(0, 255, (1, 20, 20), np.uint8), TWO, "ppo", "too small"),
    ],
)
def test_unsupported_spaces_are_told_in_one_line(observations: Any, actions: Any, algorithm: str, words: str) -> None:
    env = still(VECTOR)
    env.observation_space, env.action_space = observations, actions
    with pytest.raises(UsageError, match=words) as caught:
        build.make_agent(config(algorithm), env)
    assert str(caught.value).startswith("Some-v0: ")


def test_normalisation_follows_the_configuration() -> None:
    run = config("acktr")
    wrapped = build.normalised(still(VECTOR), run)
    assert isinstance(wrapped, envs.RunningNormaliser)
    assert (wrapped.norm_obs, wrapped.norm_reward, wrapped.gamma) == (True, True, run.acktr.gamma)
    images = build.normalised(still(IMAGE), run)
    assert isinstance(images, VecNormalize)
    assert not images.norm_obs
    nothing = replace(run, normalisation=replace(run.normalisation, observations=False, rewards=False))
    assert not isinstance(build.normalised(still(VECTOR), nothing), VecNormalize)


def test_frozen_environments_learn_nothing() -> None:
    run = config("acktr")
    training = build.normalised(still(VECTOR), run)
    assert isinstance(training, VecNormalize)
    env = build.frozen(still(VECTOR), run, training)
    before = training.obs_rms.count  # type: ignore[union-attr]
    env.reset()
    env.step(np.zeros(2, int))
    assert env.obs_rms is training.obs_rms  # type: ignore[attr-defined]
    assert training.obs_rms.count == before  # type: ignore[union-attr]
    training.reset()
    assert training.obs_rms.count > before  # type: ignore[union-attr]


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cpu"):
        build.make_agent(replace(config("ppo"), device="cuda"), still(VECTOR))


def test_a_floor_for_the_noise_reaches_acktr_and_suits_continuous_actions_alone() -> None:
    run = with_actor(noise_min=0.25)
    agent: Any = build.make_agent(run, still(VECTOR, spaces.Box(-1, 1, (2,), np.float32)))
    assert agent.actor.noise == LearnedNoise(0.25)
    with pytest.raises(UsageError, match=r"a least noise .* is for Box actions, got Discrete\(2\)"):
        build.make_agent(run, still(VECTOR))


def test_a_schedule_of_the_noise_reaches_acktr_and_leaves_no_floor_beside_it() -> None:
    continuous = spaces.Box(-1, 1, (2,), np.float32)
    agent: Any = build.make_agent(with_actor(log_std_final=-2.0), still(VECTOR, continuous))
    assert agent.actor.noise == ScheduledNoise(-2.0)
    agent = build.make_agent(with_actor(log_std_final=-2.0, forgiven_noise=True), still(VECTOR, continuous))
    assert agent.actor.noise == ScheduledNoise(-2.0, Forgiveness())
    with pytest.raises(UsageError, match="forgiven_noise tries out a scheduled noise; set log_std_final too"):
        build.make_agent(with_actor(forgiven_noise=True), still(VECTOR, continuous))
    with pytest.raises(UsageError, match=r"scheduled noise .* is for Box actions, got Discrete\(2\)"):
        build.make_agent(with_actor(log_std_final=-2.0), still(VECTOR))
    with pytest.raises(UsageError, match=r"noise_min 0\.25 .* log_std_final -2\.0 .* leave one of them out"):
        build.make_agent(with_actor(log_std_final=-2.0, noise_min=0.25), still(VECTOR, continuous))


def test_exploration_by_drawn_policies_reaches_acktr() -> None:
    agent: Any = build.make_agent(with_actor(exploration_kl=0.02, exploration_decay="linear"), still(VECTOR))
    assert agent.actor.exploration_kl(0.5) == pytest.approx(0.01)
    assert agent.exploration is not None
    assert build.make_agent(with_actor(), still(VECTOR)).exploration is None  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="exploration_kl draws from the actor's curvature, and Adam has none"):
        build.make_agent(with_actor(exploration_kl=0.02, curvature="adam"), still(VECTOR))


def test_schedules() -> None:
    assert schedule(0.3, "constant") == pytest.approx(0.3)
    assert schedule(0.3, "linear")(0.5) == pytest.approx(0.15)
    assert [schedule(0.3, "late")(left) for left in (1.0, 0.2, 0.1, 0.0)] == pytest.approx([0.3, 0.3, 0.15, 0.0])


def test_a_horizon_moves_by_equal_factors_and_then_stays() -> None:
    discount = nearing(0.9999, 0.99, 0.2)
    horizons = [1 / (1 - discount(left)) for left in (1.0, 0.9, 0.8, 0.5, 0.0)]
    assert horizons == pytest.approx([10_000, 1_000, 100, 100, 100])
    assert nearing(None, 0.99, 0.2) == pytest.approx(0.99)


def test_a_first_discount_reaches_acktr() -> None:
    run = config("acktr")
    learner = replace(run.acktr, gamma=0.9, gamma_init=0.99, gae_lambda_init=0.99, horizon_share=0.5)
    agent: Any = build.make_agent(replace(run, acktr=learner), still(VECTOR))
    assert {name: (f.first, f.last, f.share) for name, f in agent.discounting.items()} == {
        "gamma": (0.99, 0.9, 0.5),
        "gae_lambda": (0.99, run.acktr.gae_lambda, 0.5),
    }
    assert build.make_agent(run, still(VECTOR)).discounting == {}, "without first values nothing is scheduled"


def test_python_s_default_for_images_is_the_shipped_configuration() -> None:
    shipped = actor_settings(configfiles.shipped("ALE/Pong-v5").acktr.actor)
    assert ActorSettings.for_images() == replace(shipped, radius=shipped.radius(1.0))
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")])
    assert ACKTR("MlpPolicy", env, _init_setup_model=False).actor == ActorSettings()
    for policy in ("CnnPolicy", ActorCriticCnnPolicy):
        assert ACKTR(policy, env, _init_setup_model=False).actor == ActorSettings.for_images()
        assert ACKTR(policy, env, actor=ActorSettings(), _init_setup_model=False).actor == ActorSettings()
