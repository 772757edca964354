"""How far, how often and in which metric the actor and the critic step.

Every field is a plain value or a small frozen type, so a run's whole recipe prints on one line and
pickles with the agent.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, BasePolicy

from acktr.combination import LayerCombination
from acktr.curvature import EKFAC, Curvature
from acktr.damping import GreedyDamping, LevenbergMarquardt
from acktr.firstorder import Adam
from acktr.fisher import ExactFisher, FisherSeeds, SampledFisher
from acktr.sb3.noise import LearnedNoise, Noise
from acktr.sb3.reuse import Reuse
from acktr.sb3.scales import RunningScale
from acktr.sb3.schedules import Schedule, at
from acktr.step import Backtracking
from acktr.trust_region import BlockMetric, ExactMetric, StepMetric
from acktr.wake import WakeRule


@dataclass(frozen=True)
class ActorSettings:
    """The policy's natural-gradient steps."""

    curvature: Curvature | Adam = field(default_factory=EKFAC)
    """The Fisher approximation that gives each layer its direction; `Adam` in place of the natural gradient leaves
    everything below aside but passes, minibatches, clip, stop and noise."""
    fisher: FisherSeeds = field(default_factory=SampledFisher)
    """Which output gradients feed the curvature: sampled, exact or empirical."""
    radius: Schedule = 0.02
    """Largest KL(old ‖ new) of one step on its batch, in nats per dimension of the action (a Discrete action has one).

    The KL of a Gaussian is a sum over dimensions, and so is what the noise in a gradient spends of it."""
    damping: float | LevenbergMarquardt = 0.01
    """Added to the curvature's eigenvalues, positive and finite. A `LevenbergMarquardt` sets it as training goes."""
    momentum: float = 0.0
    """Share of the previous step carried into the next direction; 0 for none."""
    combination: LayerCombination | None = field(default_factory=LayerCombination)
    """Solve one coefficient per layer from the exact Fisher; None keeps every coefficient at 1."""
    metric: StepMetric = field(default_factory=ExactMetric)
    """The quadratic form that sets the distance."""
    corrections: int = 2
    """Forward passes that may rescale a step until its measured KL meets the radius; 0 trusts the prediction."""
    line_search: Backtracking | None = None
    """Shorten a step until the loss goes down within the radius, or take none (TRPO); None asks for distance alone."""
    curvature_damping: GreedyDamping | None = None
    """A damping of its own for the direction; None solves with that of the quadratic model."""
    curvature_examples: int | None = None
    """Examples of each step from which the curvature is taken; None for the step's whole batch.

    A part gives the same curvature, averaged over more steps (Martens & Grosse 2015, section 8, take an eighth)."""
    exact_examples: int | None = None
    """Of these (of all, where a step leaves the curvature alone), examples in the exact forms; None for all."""
    measure_period: int = 1
    """Steps between two that measure their KL, after the first fifty, which all do."""
    statistics_period: int = 1
    """Steps between two updates of the curvature, after the first fifty, which all update it."""
    refresh_period: int = 1
    """Updates between two refreshes of the bases."""
    cold_start: int = 0
    """First updates that only gather statistics and take a short plain gradient step instead."""
    n_epochs: int = 1
    """Passes over each rollout."""
    n_minibatches: int = 1
    """Steps per pass, each on its own part of the rollout."""
    clip_range: float = 0.2
    """PPO's clip of the importance ratio, which differs from 1 after a rollout's first step only."""
    max_rollout_kl: float | None = None
    """Stop a rollout's steps once the policy is this far from the behaviour policy, in nats; None never stops."""
    wake: WakeRule | None = None
    """Divergences to the policies of the past that hold each step back (KLD-WRM): `WakeSO`, `WakeQ` or `WakeQE`; the
    radius bounds the step all the same. None for none."""
    noise: Noise = field(default_factory=LearnedNoise)
    """How the standard deviations of Box actions develop: by `LearnedNoise`, which may have a floor, or by
    `ScheduledNoise`."""
    reuse: Reuse | None = None
    """Let transitions of earlier rollouts take part in each step, by their importance; None for the present one alone.

    For networks of the policy's own, and environments that all act by the policy itself."""
    scale: RunningScale | None = None
    """Divide advantages by no less than what earlier rollouts had; None divides each rollout's by its own standard
    deviation. For an agent with `normalize_advantage`."""
    exploration_kl: Schedule = 0.0
    """Expected KL(policy ‖ drawn policy) in nats per dimension of the action, where each environment acts by weights of
    its own for a rollout, drawn around the policy's with the curvature as their precision; 0 draws none.

    Noise that is the same for a state throughout a rollout, and largest where the actions depend on the weights least.
    Evaluation and saves know the policy itself alone."""

    @property
    def explores(self) -> bool:
        """Whether policies may be drawn at some time of training."""
        return any(at(self.exploration_kl, tenths / 10) > 0 for tenths in range(11))

    @classmethod
    def for_images(cls) -> ActorSettings:
        """Settings for convolutions, where every pass is dear.

        Returns:
            EKFAC in leading eigenvectors, fed by a part of the batch at every eighth step, and little damping.
        """
        return cls(
            curvature=EKFAC(rank=64),
            radius=0.01,
            damping=3e-4,
            combination=None,
            metric=BlockMetric(),
            corrections=1,
            curvature_examples=160,
            measure_period=8,
            statistics_period=8,
            refresh_period=2,
            cold_start=10,
        )


@dataclass(frozen=True)
class CriticSettings:
    """The value function's Gauss–Newton steps (networks of its own; a shared trunk steps with the actor)."""

    curvature: Curvature | Adam = field(default_factory=EKFAC)
    """The Gauss–Newton approximation that gives each layer its direction; `Adam` in place of the natural gradient
    leaves everything below aside but passes and minibatches."""
    fisher: FisherSeeds = field(default_factory=ExactFisher)
    """Exact by default: for a scalar output it is one backward pass of ones, without noise."""
    radius: Schedule = 0.3
    """Largest mean squared change of the value in one step, as a share of the residual variance."""
    damping: float | LevenbergMarquardt = 0.01
    """Added to the curvature's eigenvalues. A `LevenbergMarquardt` sets it as training goes."""
    momentum: float = 0.0
    """Share of the previous step carried into the next direction; 0 for none."""
    combination: LayerCombination | None = None
    """Solve one coefficient per layer from the exact Gauss–Newton matrix; None keeps every coefficient at 1."""
    metric: StepMetric = field(default_factory=BlockMetric)
    """The quadratic form that sets the distance; one measured correction makes up for its errors."""
    corrections: int = 1
    """Forward passes that may rescale a step until its measured change meets the radius."""
    exact_examples: int | None = None
    """Examples of each step in the exact forms; None for the whole batch."""
    curvature_examples: int | None = None
    """Examples of each step from which the curvature is taken; None for the step's whole batch."""
    measure_period: int = 1
    """Steps between two that measure the change of the value, after the first fifty, which all do."""
    statistics_period: int = 1
    """Steps between two updates of the curvature, after the first fifty, which all update it."""
    refresh_period: int = 4
    """Updates between two refreshes of the bases."""
    n_epochs: int = 10
    """Passes over each rollout."""
    n_minibatches: int = 4
    """Steps per pass."""
    averaged: float = 0.0
    """Share of a rollout's steps, its last ones, over whose parameters the value ends as the mean; 0 for where the last
    step led."""
    renewed_at: float | None = None
    """Share of training after which the value begins anew from its first parameters; None for never."""


def usual_actor(aliases: dict[str, type[BasePolicy]], policy: str | type[ActorCriticPolicy]) -> ActorSettings:
    """Settings for who gives none.

    Args:
        aliases: policies by name.
        policy: a name or a class.

    Returns:
        Those for images where the policy is a convolutional one.
    """
    kind = aliases.get(policy) if isinstance(policy, str) else policy  # SB3 refuses what is neither
    images = isinstance(kind, type) and issubclass(kind, ActorCriticCnnPolicy)
    return ActorSettings.for_images() if images else ActorSettings()
