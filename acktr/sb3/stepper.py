"""Who takes an agent's steps, from its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from acktr.curvature.members import known_fisher
from acktr.firstorder import Adam, FirstOrder
from acktr.optimizer import NaturalGradient
from acktr.sb3.networks import reached_parameters
from acktr.sb3.ranks import shared
from acktr.sb3.schedules import at
from acktr.sb3.settings import ActorSettings, CriticSettings
from acktr.sb3.steps import Stepper
from acktr.step import StepRule

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR


def stepper_of(
    agent: ACKTR, network: Any, likelihood: Any, settings: ActorSettings | CriticSettings, observations: Any
) -> Stepper:
    """Make the optimizer of one of an agent's networks.

    Args:
        agent: who learns, with its part of everyone's environments.
        network: reads observations.
        likelihood: what its outputs mean.
        settings: the actor's or the critic's.
        observations: any batch.

    Returns:
        A natural gradient, or Adam in its place.
    """
    parameters, seed, settings = (
        reached_parameters(network, observations),
        agent.seed or 0,
        agent.part.share(settings),
    )
    if isinstance(settings.curvature, Adam):
        return FirstOrder(network, likelihood, settings.curvature, parameters=parameters, seed=seed, ranks=agent.ranks)
    rule = StepRule(
        combination=settings.combination,
        metric=settings.metric,
        corrections=settings.corrections,
        examples=settings.exact_examples,
        measure_period=settings.measure_period,
        statistics_period=settings.statistics_period,
        refresh_period=settings.refresh_period,
        line_search=settings.line_search if isinstance(settings, ActorSettings) else None,
        curvature_damping=settings.curvature_damping if isinstance(settings, ActorSettings) else None,
        cold_start=settings.cold_start if isinstance(settings, ActorSettings) else 0,
        wake=settings.wake if isinstance(settings, ActorSettings) else None,
    )
    return NaturalGradient(
        network,
        likelihood,
        settings.curvature if agent.ranks.size == 1 else shared(settings.curvature),
        radius=at(settings.radius, 1.0),
        damping=settings.damping,
        momentum=settings.momentum,
        fisher=settings.fisher,
        rule=rule,
        parameters=parameters,
        blocks={"policy.log_std": known_fisher(2.0)},
        seed=seed,
    )
