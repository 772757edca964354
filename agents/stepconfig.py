"""How ACKTR's policy and value function step, as names and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Decay = Literal["constant", "linear", "late"]
"""How a value develops: as it is, falling linearly to 0 at the end of training, or that in its last fifth alone."""

Curvature = Literal[
    "ekfac",
    "ekfac-ra",
    "ekfac-c",
    "kfac",
    "factored-kfac",
    "kfe-rmsprop",
    "kfe-adagrad",
    "kfe-adam",
    "diagonal",
    "rs-kfac",
    "sre-kfac",
    "b-kfac",
    "b-r-kfac",
    "b-kfac-c",
    "cg-fac",
    "cg-fac-e",
    "seng",
    "kfc-reduce",
    "sua",
    "mean-sua",
    "sua-ekfac",
    "tridiagonal",
    "dense-fisher",
    "exact-cg",
    "adam",
]
"""Which approximation of the curvature; exact-cg averages nothing over batches, adam has none, and no trust region
either."""

Wake = Literal["none", "so", "q", "qe"]
"""No wake, its second-order form with a linear or a quadratic model of the objective, or exact divergences."""

Fisher = Literal["sampled", "exact", "empirical"]
"""Output gradients of actions that the model draws, of all it could draw, or of those that were taken."""

Combination = Literal["layers", "layers-and-momentum", "whole", "whole-and-momentum", "none"]
"""One coefficient per layer or one for the whole direction, one more for the previous step, or all of them 1."""

LineSearch = Literal["none", "backtracking"]
"""Steps that meet their radius, or such as lower the loss within it."""

DampingRule = Literal["constant", "levenberg-marquardt"]
"""The damping as it is, or set by how well the quadratic model foretells the loss."""


@dataclass(frozen=True)
class ActorConfig:
    """The policy's natural-gradient steps."""

    curvature: Curvature
    """The Fisher approximation that gives each layer its direction; adam in its place leaves aside all that follows but
    adam_rate, passes, minibatches, clip, stop and noise."""
    adam_rate: float
    """Step size of adam."""
    ema: float
    """Share of the old statistics kept at each update of the curvature."""
    rank: int | None
    """Eigenvectors kept of a wide factor, or singular vectors that seng keeps of an example's gradient in a
    convolution. None: all of them, but 64 of the randomised and Brand K-FACs'."""
    fisher: Fisher
    """Which output gradients feed the curvature."""
    radius: float
    """Largest KL of one step, in nats per dimension of the action; a discrete action has one."""
    radius_decay: Decay
    """How the radius develops."""
    damping: float
    """Added to the curvature's eigenvalues."""
    damping_rule: DampingRule
    """How the damping develops."""
    momentum: float
    """Share of the previous step carried into the next direction."""
    combination: Combination
    """Which coefficients of the step are solved from the exact Fisher."""
    metric: Literal["exact", "block"]
    """The quadratic form that predicts the KL: the exact Fisher or the layers' blocks."""
    corrections: int
    """Forward passes that may rescale a step until its measured KL meets the radius."""
    line_search: LineSearch
    """What a step must do; backtracking is TRPO's search, in the place of the corrections."""
    curvature_damping: Literal["none", "greedy"]
    """Whether the direction's damping is searched for beside that of the quadratic model."""
    curvature_examples: int | None
    """Examples of a batch from which the curvature is taken; None takes all."""
    exact_examples: int | None
    """Examples of a batch in the exact forms; None takes all."""
    measure_period: int
    """Steps between two that measure how far they went, after the first fifty, which all do."""
    statistics_period: int
    """Steps between two updates of the curvature, after the first fifty, which all update it."""
    refresh_period: int
    """Updates between two refreshes of the bases."""
    cold_start: int
    """First updates that take a short plain gradient step while statistics gather."""
    n_epochs: int
    """Passes over each rollout."""
    n_minibatches: int
    """Steps per pass."""
    clip_range: float
    """Clip of the importance ratio, which matters after a rollout's first step."""
    max_rollout_kl: float | None
    """Stop a rollout's steps once the policy is this far from the behaviour policy, in nats."""
    wake: Wake
    """Whether divergences to the policies of the past hold each step back (KLD-WRM), and how they are taken."""
    wake_decay: float
    """Share of the old wake kept at each step; small numbers, because the noise of consecutive gradients adds up."""
    noise_min: float
    """Least noise of continuous actions where it is learned: of d dimensions each keeps a standard deviation of
    noise_min / d."""
    noise_decay: Decay
    """How the least noise develops."""
    log_std_final: float | None
    """Logarithm of the standard deviation at the end of training, to which it moves from policy.log_std_init linearly;
    None learns the noise."""
    forgiven_noise: bool
    """Try out before training whether the first scheduled noise ends episodes that rest survives, and lower the whole
    schedule until it does not; the steps it takes count."""
    scale_decay: float | None
    """Advantages are divided by no less than a running standard deviation with this decay per rollout; null divides
    each rollout's by its own alone."""
    reused_rollouts: int
    """Earlier rollouts that take part in each step of a policy with networks of its own; 0 for the present one
    alone."""
    exploration_kl: float
    """Expected KL, in nats per dimension of the action, between the policy and one drawn around it by the curvature for
    each environment and rollout; 0 draws none. For small policies on vectors."""
    exploration_decay: Decay
    """How that KL develops."""


@dataclass(frozen=True)
class CriticConfig:
    """The value function's Gauss-Newton steps."""

    curvature: Curvature
    """The Gauss-Newton approximation that gives each layer its direction; adam in its place leaves aside all that
    follows but adam_rate, passes and minibatches."""
    adam_rate: float
    """Step size of adam."""
    ema: float
    """Share of the old statistics kept at each update of the curvature."""
    rank: int | None
    """Eigenvectors kept of a wide factor, or singular vectors that seng keeps of an example's gradient in a
    convolution. None: all of them, but 64 of the randomised and Brand K-FACs'."""
    fisher: Fisher
    """Which output gradients feed the curvature."""
    radius: float
    """Largest mean squared change of the value in one step, as a share of the residual variance."""
    radius_decay: Decay
    """How the radius develops."""
    damping: float
    """Added to the curvature's eigenvalues."""
    damping_rule: DampingRule
    """How the damping develops."""
    momentum: float
    """Share of the previous step carried into the next direction."""
    combination: Combination
    """Which coefficients of the step are solved from the exact Gauss-Newton matrix."""
    metric: Literal["exact", "block"]
    """The quadratic form that predicts the change: the exact matrix or the layers' blocks."""
    corrections: int
    """Forward passes that may rescale a step until its measured change meets the radius."""
    exact_examples: int | None
    """Examples of a batch in the exact forms; None takes all."""
    curvature_examples: int | None
    """Examples of a batch from which the curvature is taken; None takes all."""
    measure_period: int
    """Steps between two that measure how far they went, after the first fifty, which all do."""
    statistics_period: int
    """Steps between two updates of the curvature, after the first fifty, which all update it."""
    refresh_period: int
    """Updates between two refreshes of the bases."""
    n_epochs: int
    """Passes over each rollout."""
    n_minibatches: int
    """Steps per pass."""
    averaged: float
    """Share of a rollout's steps, its last ones, over whose parameters the value ends as the mean."""
    renewed_at: float | None
    """Share of training after which the value begins anew from its first parameters; null for never."""
