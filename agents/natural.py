"""ACKTR from its configuration: names become the engine's types."""

from __future__ import annotations

from typing import Any

from acktr.combination import LayerCombination
from acktr.curvature import EKFAC, KFAC, Curvature, Diagonal, FactoredKFAC
from acktr.firstorder import Adam
from acktr.fisher import EmpiricalFisher, ExactFisher, FisherSeeds, SampledFisher
from acktr.sb3 import ACKTR
from acktr.sb3.settings import ActorSettings, CriticSettings
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
    return ACKTR(actor=actor, critic=critic, precision=config.precision, **common)


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
        damping=config.damping,
        momentum=config.momentum,
        combination=_combination(config),
        metric=_METRICS[config.metric](),
        corrections=config.corrections,
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
        damping=config.damping,
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


_CURVATURES: dict[str, Any] = {"ekfac": EKFAC, "kfac": KFAC, "factored-kfac": FactoredKFAC, "diagonal": Diagonal}
_FISHERS: dict[str, type[FisherSeeds]] = {
    "sampled": SampledFisher,
    "exact": ExactFisher,
    "empirical": EmpiricalFisher,
}
_METRICS: dict[str, type[StepMetric]] = {"exact": ExactMetric, "block": BlockMetric}


def curvature_named(name: str, ema: float = 0.95, **settings: Any) -> Curvature:
    """Make a choice of curvature from its name in a configuration.

    Args:
        name: One of ``agents.config.Curvature``, but adam.
        ema: Share of the old statistics kept at each update.
        **settings: Further fields of the choice; the others have its own defaults.

    Returns:
        The choice.
    """
    choice: Curvature = _CURVATURES[name](ema=ema, **settings)
    return choice


def _curvature(config: ActorConfig | CriticConfig) -> Curvature | Adam:
    if config.curvature == "adam":
        return Adam(config.adam_rate)
    if config.rank is not None and config.curvature != "ekfac":
        raise UsageError(f"rank {config.rank} needs curvature ekfac, got {config.curvature}; leave rank at null")
    extra = {} if config.rank is None else {"rank": config.rank}
    return curvature_named(config.curvature, config.ema, **extra)


def _combination(config: ActorConfig | CriticConfig) -> LayerCombination | None:
    if config.combination == "none":
        return None
    return LayerCombination(previous_step=config.combination == "layers-and-momentum")
