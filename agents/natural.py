"""ACKTR from its configuration: names become the engine's types."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

from acktr.combination import LayerCombination, WholeDirection
from acktr.curvature import (
    BKFAC,
    BKFACC,
    BRKFAC,
    CGFAC,
    EKFAC,
    KFAC,
    RSKFAC,
    SENG,
    SREKFAC,
    SUA,
    SUAEKFAC,
    Curvature,
    DenseFisher,
    Diagonal,
    ExactCG,
    FactoredKFAC,
    KFCReduce,
    MeanSUA,
    PerExample,
    Tridiagonal,
)
from acktr.damping import GreedyDamping, LevenbergMarquardt
from acktr.firstorder import Adam
from acktr.fisher import EmpiricalFisher, ExactFisher, FisherSeeds, SampledFisher
from acktr.sb3 import ACKTR
from acktr.sb3.settings import ActorSettings, CriticSettings
from acktr.step import Backtracking
from acktr.trust_region import BlockMetric, ExactMetric, StepMetric
from agents.config import AcktrConfig, ActorConfig, CriticConfig
from agents.errors import UsageError
from agents.schedules import schedule


def make_acktr(config: AcktrConfig, common: dict[str, Any]) -> ACKTR:
    """Make the agent.

    Args:
        config: The algorithm's settings.
        common: Arguments that it shares with the peers, by name.

    Returns:
        The untrained agent.
    """
    actor, critic = actor_settings(config.actor), critic_settings(config.critic)
    return ACKTR(actor=actor, critic=critic, joint_step=config.joint_step, precision=config.precision, **common)


def actor_settings(config: ActorConfig) -> ActorSettings:
    """Translate the policy's steps.

    Args:
        config: Names and numbers.

    Returns:
        The library's settings.
    """
    return ActorSettings(
        curvature=_curvature(config),
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
        noise_min=schedule(config.noise_min, config.noise_decay),
    )


def critic_settings(config: CriticConfig) -> CriticSettings:
    """Translate the value function's steps.

    Args:
        config: Names and numbers.

    Returns:
        The library's settings.
    """
    return CriticSettings(
        curvature=_curvature(config),
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
    )


def _kfc_reduce(ema: float, rank: int | None = None) -> Curvature:
    return KFCReduce(EKFAC(ema, rank))


def _mean_sua(ema: float, rank: int | None = None) -> Curvature:
    return MeanSUA(ema, EKFAC(ema, rank))


def _sua(ema: float, rank: int | None = None) -> Curvature:
    return SUA(ema, EKFAC(ema, rank))


def _sua_ekfac(ema: float, rank: int | None = None) -> Curvature:
    return SUAEKFAC(ema, EKFAC(ema, rank))


_CURVATURES: dict[str, Any] = {
    "ekfac": EKFAC,
    "kfac": KFAC,
    "factored-kfac": FactoredKFAC,
    "diagonal": Diagonal,
    "rs-kfac": RSKFAC,
    "sre-kfac": SREKFAC,
    "b-kfac": BKFAC,
    "b-r-kfac": BRKFAC,
    "b-kfac-c": BKFACC,
    "cg-fac": CGFAC,
    "cg-fac-e": partial(CGFAC, operator=PerExample()),
    "kfc-reduce": _kfc_reduce,
    "mean-sua": _mean_sua,
    "seng": SENG,
    "sua": _sua,
    "sua-ekfac": _sua_ekfac,
    "tridiagonal": Tridiagonal,
    "dense-fisher": DenseFisher,
}
_FISHERS: dict[str, type[FisherSeeds]] = {
    "sampled": SampledFisher,
    "exact": ExactFisher,
    "empirical": EmpiricalFisher,
}
_LINE_SEARCHES: dict[str, Backtracking | None] = {"none": None, "backtracking": Backtracking()}
_CURVATURE_DAMPINGS: dict[str, GreedyDamping | None] = {"none": None, "greedy": GreedyDamping()}
_METRICS: dict[str, type[StepMetric]] = {"exact": ExactMetric, "block": BlockMetric}


def _curvature(config: ActorConfig | CriticConfig) -> Curvature | Adam:
    if config.curvature == "adam":
        return Adam(config.adam_rate)
    ranked = [name for name, choice in _CURVATURES.items() if "rank" in signature(choice).parameters]
    if config.rank is not None and config.curvature not in ranked:
        names = " or ".join(ranked)
        raise UsageError(f"rank {config.rank} needs curvature {names}, got {config.curvature}; leave rank at null")
    if config.curvature == "exact-cg":
        return ExactCG()
    extra = {} if config.rank is None else {"rank": config.rank}
    choice: Curvature = _CURVATURES[config.curvature](ema=config.ema, **extra)
    return choice


def _damping(config: ActorConfig | CriticConfig) -> float | LevenbergMarquardt:
    return LevenbergMarquardt(config.damping) if config.damping_rule == "levenberg-marquardt" else config.damping


def _combination(config: ActorConfig | CriticConfig) -> LayerCombination | None:
    if config.combination == "none":
        return None
    kind = WholeDirection if config.combination.startswith("whole") else LayerCombination
    return kind(previous_step=config.combination.endswith("-and-momentum"))
