"""ACKTR from its configuration: names become the engine's types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from acktr.combination import LayerCombination, WholeDirection
from acktr.damping import GreedyDamping, LevenbergMarquardt
from acktr.distributed import Background, CommOpt, Distributed, HybridOpt, MemOpt, Placement, Synchronous
from acktr.firstorder import Adam
from acktr.fisher import EmpiricalFisher, ExactFisher, FisherSeeds, SampledFisher
from acktr.sb3 import ACKTR
from acktr.sb3.forgiveness import Forgiveness
from acktr.sb3.noise import LearnedNoise, Noise, ScheduledNoise
from acktr.sb3.reuse import Reuse
from acktr.sb3.scales import RunningScale
from acktr.sb3.settings import ActorSettings, CriticSettings
from acktr.step import Backtracking
from acktr.trust_region import BlockMetric, ExactMetric, StepMetric
from acktr.wake import WakeQ, WakeQE, WakeRule, WakeSO
from agents.config import AcktrConfig, RanksConfig
from agents.curvatures import curvature_of
from agents.errors import UsageError
from agents.schedules import nearing, schedule
from agents.stepconfig import ActorConfig, CriticConfig


def make_acktr(config: AcktrConfig, common: dict[str, Any], ranks: RanksConfig | None = None) -> ACKTR:
    """Make the agent.

    Args:
        config: The algorithm's settings.
        common: Arguments that it shares with the peers, by name.
        ranks: How several processes share the curvature's work; None for one by itself.

    Returns:
        The untrained agent.
    """
    actor, critic = actor_settings(config.actor), critic_settings(config.critic)
    if ranks is not None:
        actor = replace(actor, curvature=_shared(actor.curvature, ranks))
        critic = replace(critic, curvature=_shared(critic.curvature, ranks))
    horizon = {
        "gamma": nearing(config.gamma_init, config.gamma, config.horizon_share),
        "gae_lambda": nearing(config.gae_lambda_init, config.gae_lambda, config.horizon_share),
    }
    common = common | horizon
    return ACKTR(actor=actor, critic=critic, joint_step=config.joint_step, precision=config.precision, **common)


def _shared(curvature: Any, ranks: RanksConfig) -> Any:
    if isinstance(curvature, Adam):
        return curvature
    refresh = Synchronous() if ranks.refresh_age is None else Background(ranks.refresh_age)
    return Distributed(curvature, _PLACEMENTS[ranks.placement](), refresh)


def actor_settings(config: ActorConfig) -> ActorSettings:
    """Translate the policy's steps.

    Args:
        config: Names and numbers.

    Returns:
        The library's settings.
    """
    return ActorSettings(
        curvature=curvature_of(config),
        fisher=_FISHERS[config.fisher](),
        radius=schedule(config.radius, config.radius_decay),
        damping=_damping(config),
        momentum=config.momentum,
        combination=_combination(config),
        metric=_METRICS[config.metric](),
        corrections=config.corrections,
        line_search=_LINE_SEARCHES[config.line_search],
        curvature_damping=_CURVATURE_DAMPINGS[config.curvature_damping],
        curvature_examples=config.curvature_examples,
        exact_examples=config.exact_examples,
        measure_period=config.measure_period,
        statistics_period=config.statistics_period,
        refresh_period=config.refresh_period,
        cold_start=config.cold_start,
        n_epochs=config.n_epochs,
        n_minibatches=config.n_minibatches,
        clip_range=config.clip_range,
        max_rollout_kl=config.max_rollout_kl,
        wake=_WAKES[config.wake](config.wake_decay),
        noise=_noise(config),
        scale=None if config.scale_decay is None else RunningScale(config.scale_decay),
        reuse=Reuse(config.reused_rollouts) if config.reused_rollouts else None,
        exploration_kl=schedule(config.exploration_kl, config.exploration_decay),
    )


def critic_settings(config: CriticConfig) -> CriticSettings:
    """Translate the value function's steps.

    Args:
        config: Names and numbers.

    Returns:
        The library's settings.
    """
    return CriticSettings(
        curvature=curvature_of(config),
        fisher=_FISHERS[config.fisher](),
        radius=schedule(config.radius, config.radius_decay),
        damping=_damping(config),
        momentum=config.momentum,
        combination=_combination(config),
        metric=_METRICS[config.metric](),
        corrections=config.corrections,
        exact_examples=config.exact_examples,
        curvature_examples=config.curvature_examples,
        measure_period=config.measure_period,
        statistics_period=config.statistics_period,
        refresh_period=config.refresh_period,
        n_epochs=config.n_epochs,
        n_minibatches=config.n_minibatches,
        averaged=config.averaged,
        renewed_at=config.renewed_at,
    )


_PLACEMENTS: dict[str, Callable[[], Placement]] = {"comm-opt": CommOpt, "hybrid-opt": HybridOpt, "mem-opt": MemOpt}
_FISHERS: dict[str, type[FisherSeeds]] = {
    "sampled": SampledFisher,
    "exact": ExactFisher,
    "empirical": EmpiricalFisher,
}
_LINE_SEARCHES: dict[str, Backtracking | None] = {"none": None, "backtracking": Backtracking()}
_WAKES: dict[str, Callable[[float], WakeRule | None]] = {
    "none": lambda _: None,
    "so": WakeSO,
    "q": WakeQ,
    "qe": WakeQE,
}
_CURVATURE_DAMPINGS: dict[str, GreedyDamping | None] = {"none": None, "greedy": GreedyDamping()}
_METRICS: dict[str, type[StepMetric]] = {"exact": ExactMetric, "block": BlockMetric}


def _damping(config: ActorConfig | CriticConfig) -> float | LevenbergMarquardt:
    return LevenbergMarquardt(config.damping) if config.damping_rule == "levenberg-marquardt" else config.damping


def _noise(config: ActorConfig) -> Noise:
    if config.log_std_final is None:
        if config.forgiven_noise:
            raise UsageError(
                "forgiven_noise tries out a scheduled noise; set log_std_final too, or forgiven_noise False"
            )
        return LearnedNoise(schedule(config.noise_min, config.noise_decay))
    if config.noise_min > 0:
        raise UsageError(
            f"noise_min {config.noise_min} bounds a learned noise, log_std_final {config.log_std_final} is the end of "
            "one that is not; leave one of them out (noise_min 0, log_std_final None)"
        )
    return ScheduledNoise(config.log_std_final, Forgiveness() if config.forgiven_noise else None)


def _combination(config: ActorConfig | CriticConfig) -> LayerCombination | None:
    if config.combination == "none":
        return None
    kind = WholeDirection if config.combination.startswith("whole") else LayerCombination
    return kind(previous_step=config.combination.endswith("-and-momentum"))
