"""Noisy natural gradient: variational inference whose posterior's precision is the curvature (Zhang et al. 2018).

Example:
    optimizer = NoisyNaturalGradient(network, Categorical(), KFAC(ema=0.99), Evidence(len(data)))
    with optimizer.sampled():
        with optimizer.recording():
            logits = network(inputs)
        optimizer.update_curvature()
        F.cross_entropy(logits, classes).backward()
    optimizer.step()
    logits, = optimizer.predict(inputs, samples=10)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, nn

from acktr.curvature import BlockRule, Curvature
from acktr.curvature.posterior import Posterior
from acktr.draws import Draws, Evidence
from acktr.fisher import FisherSeeds
from acktr.likelihood import Likelihood
from acktr.objective import Loss
from acktr.optimizer import NaturalGradient
from acktr.step import StepRule
from acktr.tree import Tensors, all_finite
from acktr.trust_region import BlockMetric


class NoisyNaturalGradient(Draws, NaturalGradient):
    """The posterior N(θ, λ/N · (F̂ + γ_in)⁻¹), whose mean θ steps along natural gradients taken at draws from it.

    With w drawn, v = ∇ log p(y | x, w) − γ_in w and γ_in = λ/(N η):

        m ← μ m + (1 − μ) v,    θ ← θ + lr · (F̂ + γ_in + γ_ex)⁻¹ m / (1 − μᵗ),    F̂ ← ema F̂ + (1 − ema) F(w)

    The curvature names the method: `FactoredKFAC` is noisy K-FAC as published (NG-MVG, a matrix-variate posterior),
    `KFAC` the same with exact Tikhonov damping, whose covariance is exact where K-FAC is; `EKFAC` is noisy EKFAC, and
    `Diagonal` noisy Adam (NG-FFG), which has no square root under the step. Moments must average many batches, or the
    posterior's width is noise: an ema of 0.99 to 0.999.

    While few batches are in, F̂ is blind to most directions, and the posterior would be as wide as the prior there. So
    every direction counts as having a curvature of `initial_curvature` more, which fades like an average's start over
    `warmup` updates, for draws and steps alike (the paper's code starts its averages at the identity, to this effect).

    What differs from the paper: the diagonal is that of per-example gradients, as the derivation has it, where the
    paper's code squares a batch's mean gradient; averages are debiased; before the first statistics no noise is drawn,
    where the prior's would be.

    Args:
        network: the module; never changed. Its parameters are θ, but inside `sampled()`.
        likelihood: what its outputs mean; may be replaced between steps (a learned noise).
        curvature: the approximation; by layer, with blocks that can be drawn from.
        evidence: N, λ and η.
        lr: step size, ≥ 0.
        radius: largest KL per step in nats, by the curvature's own form; ∞ leaves `lr` alone.
        damping: γ_ex, added in steps only; ≥ 0, and > 0 where λ = 0.
        momentum: μ, weight kept of the averaged gradient, in [0, 1).
        initial_curvature: ≥ 0; 0 trusts the first batch.
        warmup: updates in which it fades to 1/e, ≥ 1.
        fisher: which output gradients feed the curvature.
        statistics_period: passes between two updates of the curvature, after the first fifty.
        refresh_period: updates between two decompositions.
        parameters: the trained ones by dotted name; None for all that require gradients.
        blocks: curvature of parameters that choose their own, by dotted name.
        seed: of the optimizer's own generator.

    Raises:
        ValueError: if a number is out of range, or the curvature cannot be drawn from.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        curvature: Curvature,
        evidence: Evidence,
        *,
        lr: float = 1e-2,
        radius: float = math.inf,
        damping: float = 0.0,
        momentum: float = 0.9,
        initial_curvature: float = 1.0,
        warmup: int = 100,
        fisher: FisherSeeds | None = None,
        statistics_period: int = 1,
        refresh_period: int = 1,
        parameters: Mapping[str, nn.Parameter] | None = None,
        blocks: Mapping[str, BlockRule] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not damping >= 0 or damping + evidence.damping == 0:
            raise ValueError(f"damping must be at least 0, and positive where kl_weight is 0, got {damping}")
        if not 0 <= initial_curvature < math.inf:
            raise ValueError(f"initial_curvature must be at least 0 and finite, got {initial_curvature}")
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, got {warmup}")
        self.evidence, self.initial_curvature, self.warmup = evidence, initial_curvature, warmup
        # Exact forms and measured KLs compare outputs at one point; here the passes are at others than the step.
        rule = StepRule(None, BlockMetric(), 0, statistics_period=statistics_period, refresh_period=refresh_period)
        super().__init__(
            network,
            likelihood,
            curvature,
            lr=lr,
            radius=radius,
            damping=evidence.damping + damping,
            fisher=fisher,
            rule=rule,
            parameters=parameters,
            blocks=blocks,
            seed=seed,
        )
        if self._ranks.size > 1:
            raise ValueError("weights are drawn from a posterior that ranks do not share; use one process")
        self.param_groups[0]["gradient_momentum"] = momentum
        self.posterior = Posterior(self.curvature, self.parameters)

    def _noise(self, generator: Generator) -> Tensors:
        scale = self.evidence.scale if self.posterior.ready else 0.0
        return self.posterior.sample(scale, self.evidence.damping + self._blindness, generator)

    @property
    def _blindness(self) -> float:
        """What is left of the initial curvature; it changes with the decompositions alone, which hold a damping."""
        updates = self._updates // self.rule.refresh_period * self.rule.refresh_period
        left = self.initial_curvature * math.exp(-updates / self.warmup)
        return left if left > 1e-3 * self.param_groups[0]["damping"] else 0.0

    @property
    def divergence(self) -> float:
        """KL(posterior ‖ prior) in nats; 0 at λ = 0, where it has no weight, and before the first statistics."""
        if not self.evidence.kl_weight or not self.posterior.ready:
            return 0.0
        damping = self.evidence.damping + self._blindness
        return self.posterior.divergence(self.evidence.scale, damping, self.evidence.prior_variance)

    @torch.no_grad()
    def descend(self, loss: Loss | None = None, before: float | None = None) -> None:
        """Take the step of the mean, as `step` does.

        Args:
            loss: not looked at; no part of this step asks for it again.
            before: not looked at.
        """
        group = self.param_groups[0]
        damping = group["damping"]
        group["damping"] = damping + self._blindness
        try:
            super().descend(loss, before)
        finally:
            group["damping"] = damping
            self._forget_draws()

    def _gradient(self) -> Tensors:
        gradient, momentum = self._gradient_over_draws(), self.param_groups[0]["gradient_momentum"]
        if self.evidence.damping:
            for name, weights in self._weights_over_draws().items():
                gradient[name] = gradient[name].add(weights, alpha=self.evidence.damping)
        if not momentum or not all_finite(gradient.values()):  # what is not finite is skipped, and leaves no trace
            return gradient
        for name, p in self.parameters.items():
            state, new = self.state[p], gradient[name]
            average, weight = state.get("average", torch.zeros_like(new)), state.get("weight", 0.0)
            state["average"] = momentum * average + (1 - momentum) * new
            state["weight"] = momentum * weight + 1 - momentum
            gradient[name] = state["average"] / state["weight"]
        return gradient

    def state_dict(self) -> dict[str, Any]:
        """As `NaturalGradient` has it; between two steps, and refused inside `sampled()`."""
        self._check_mean()
        return super().state_dict()
