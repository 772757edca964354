"""KLD-WRM: a wake of trust regions around the networks of the past (Puiu 2022, "Rethinking exponential averaging").

An averaged Fisher F̄ = Σ_j c_j F_j regularises a natural-gradient step by the past batches' metrics, all centred at the
present parameters θ_k. Here each divergence is measured from the network that its batch belonged to:

    s_k = argmin_s m(s) + 1/η Σ_j c_j D_KL(p_θⱼ, p_θₖ₊ₛ),     c_j ∝ ρ^(k−j), Σ_j c_j = 1.

To second order the wake is ½ sᵀF̄s + sᵀw + constant with the wake's pull w = Σ_j c_j F_j (θ_k − θ_j), for which

    w_k+1 = ρ_k+1 (w_k + F̄_k s_k)

whatever the step s_k was: scaled by a trust region, combined from layers, or not taken. The papers' code instead keeps
the last gradient, ĝ_k = g_k − ρ (η_k−1 / η_k) g_k−1, which is the same where every step was the exact argmin and not
where it was not. So a step has two parts, the way onward in proportion to η and the way back that is not,

    SO:  s = −η F̄⁻¹ g − F̄⁻¹ w                 (m linear)
    Q:   s = −η (F̄ + ηB)⁻¹ g − (F̄ + ηB)⁻¹ w    (m with the batch's own Fisher B as its curvature)

and η is the one at which the whole meets the radius: only then is 1/η the weight of the wake in the step that is taken.
QE starts from Q and lowers m + 1/η times the wake with exact symmetric KLs to the last networks, ½ (KL(p‖q) + KL(q‖p)).

What differs from the papers: F̄ is the curvature's own average with its own `ema`, and ρ the wake's, which is the same
wake where they agree; ρ_k = ρ (1 − ρ^(k−1)) / (1 − ρ^k), because the averages here are debiased; damping belongs to
every divergence of the wake, F_j + λ. At ρ = 0 SO is the step without a wake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.likelihood import Likelihood, Outputs
from acktr.tree import Tensors, all_finite


@dataclass(frozen=True)
class WakeSO:
    """A linear model of the objective, and divergences to second order."""

    decay: float = 0.33
    """ρ, weight kept of the old wake per step, in [0, 1). Consecutive gradients' noise adds up in it: keep it small."""

    def __post_init__(self) -> None:
        _check_decay(self.decay)


@dataclass(frozen=True)
class WakeQ:
    """A quadratic model of the objective, with the batch's own curvature, and divergences to second order."""

    decay: float = 0.5
    """ρ, weight kept of the old wake per step, in [0, 1)."""

    def __post_init__(self) -> None:
        _check_decay(self.decay)


@dataclass(frozen=True)
class WakeQE:
    """A quadratic model of the objective, and the exact symmetric KL to the last networks on the present batch.

    Inner steps are preconditioned by Q's own operator, where the papers' code takes plain gradient steps with a rate of
    their own: that operator is the inner problem's curvature, so that the rate is a number of order one.
    """

    decay: float = 0.5
    """ρ, weight kept of the old wake per step, in [0, 1)."""
    networks: int = 3
    """How many are remembered, the present one included; the wake ends behind them."""
    inner_steps: int = 7
    """Forward and backward passes that improve on Q's step."""
    inner_rate: float = 0.5
    """Largest share of the preconditioned inner gradient that is taken; halved where that did not help, for a while."""

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        for name in ("networks", "inner_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.inner_rate <= 1:
            raise ValueError(f"inner_rate must be in (0, 1], got {self.inner_rate}")


WakeRule = WakeSO | WakeQ | WakeQE


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")


class Wake:
    """What a run remembers of its past steps.

    Args:
        rule: which wake.
    """

    def __init__(self, rule: WakeRule) -> None:
        self.rule = rule
        self.pull: Tensors | None = None
        """w, the second-order wake's gradient at the present parameters; None for zero."""
        self.scale: float | None = None
        """η of the last step that moved."""
        self.networks: list[list[Tensor]] = []
        """Parameters of the last networks, oldest first."""
        self._steps = 0

    @property
    def quadratic(self) -> bool:
        """Whether the objective's model has the batch's own curvature."""
        return not isinstance(self.rule, WakeSO)

    def expected_scale(self, radius: float, max_scale: float) -> float:
        """η as far as it is known before the step: exactly without a radius, else that of the last step.

        Args:
            radius: δ.
            max_scale: η_max.

        Returns:
            ≥ 0.
        """
        if radius == math.inf:
            return max_scale
        return min(max_scale, 1.0 if self.scale is None else self.scale)

    def moved(self, damped: Tensors, scale: float, start: list[Tensor]) -> None:
        """Take in the step that was applied.

        Args:
            damped: (F̄ + λ) s, one tensor per trained parameter.
            scale: η.
            start: the parameters before the step; kept, not copied.
        """
        self._steps += 1
        self.scale = scale or self.scale
        ema, k = self.rule.decay, self._steps
        kept = ema * (1 - ema**k) / (1 - ema ** (k + 1))
        whole = damped if self.pull is None else {name: self.pull[name] + d for name, d in damped.items()}
        pull = {name: kept * d for name, d in whole.items()}
        self.pull = pull if kept and all_finite(pull.values()) else None
        if isinstance(self.rule, WakeQE):
            self.networks = [*self.networks, start][-(self.rule.networks - 1) :] if self.rule.networks > 1 else []

    def weights(self) -> list[float]:
        """c_j of the remembered networks and of the present one, oldest first."""
        count, decay = len(self.networks) + 1, self.rule.decay
        return [(1 - decay) * decay ** (count - 1 - j) / (1 - decay**count) for j in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """The pull, the last scale, the networks and the number of steps."""
        return {"pull": self.pull, "scale": self.scale, "networks": self.networks, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: of a wake of the same rule.
        """
        self.pull, self.scale, self._steps = state["pull"], state["scale"], state["steps"]
        self.networks = [list(network) for network in state["networks"]]


def largest_scale(forms: Sequence[Tensor], limit: float, max_scale: float) -> float:
    """The largest η ≤ η_max at which no form of η u + v is beyond the limit: a η² + 2 b η + c ≤ limit.

    Where the way back alone is beyond it and the way onward does not lead out, the η that the way onward has by itself;
    the trust region then shortens the whole.

    Args:
        forms: each [[a, b], [b, c]], the form of the way onward u and the way back v; one per part of a likelihood.
        limit: twice the radius.
        max_scale: η_max.

    Returns:
        η ≥ 0.
    """
    scale = max_scale
    for (a, b), (_, c) in (form.tolist() for form in forms):
        if not a > 0:
            continue
        discriminant = b * b - a * (c - limit)
        root = (math.sqrt(discriminant) - b) / a if discriminant >= 0 else 0.0
        scale = min(scale, root if root > 0 else math.sqrt(limit / a))
    return scale


def form_at(forms: Sequence[Tensor], scale: float) -> float:
    """The largest of the forms of η u + v.

    Args:
        forms: each [[a, b], [b, c]], the form of u and v; one per part of a likelihood.
        scale: η.

    Returns:
        max (a η² + 2 b η + c); NaN if one is.
    """
    mixture = torch.tensor([scale, 1.0], dtype=torch.float64)
    return float(torch.stack([mixture @ form @ mixture for form in forms]).max())


@dataclass(frozen=True)
class InnerProblem:
    """QE's: η times m(s) + 1/η · wake, whose gradient at 0 is η g + w to second order."""

    leaves: list[Tensor]
    """The trained parameters; moved while the problem is looked at, and put back."""
    run: Callable[[], Outputs]
    """The network's outputs on the batch at present."""
    likelihood: Likelihood
    """What they mean."""
    gradient: Tensors
    """g, by parameter."""
    curvature: Callable[[Tensors], Tensors]
    """s ↦ B s."""
    precondition: Callable[[Tensors], Tensors]
    """v ↦ (F̄ + ηB + λ)⁻¹ v."""
    scale: float
    """η."""
    damping: float
    """λ."""

    def improve(self, step: Tensors, wake: Wake) -> Tensors:
        """Take the inner steps.

        Args:
            step: where to start.
            wake: the networks of the past, under a rule `WakeQE`.

        Returns:
            The best step that was looked at, never worse than the first.
        """
        rule = wake.rule
        assert isinstance(rule, WakeQE)
        start = [p.clone() for p in self.leaves]
        past = [(network, self._outputs_at(network)) for network in (*wake.networks, start)]
        rate, best = rule.inner_rate, step
        value, slope = self._look(start, best, past, wake.weights())
        for _ in range(rule.inner_steps):
            way = self.precondition(slope)
            trial = {name: s - rate * way[name] for name, s in best.items()}
            trial_value, trial_slope = self._look(start, trial, past, wake.weights())
            if trial_value < value:
                best, value, slope = trial, trial_value, trial_slope
                rate = min(rule.inner_rate, 1.5 * rate)
            else:
                rate /= 2
        torch._foreach_copy_(self.leaves, start)
        return best

    def _outputs_at(self, network: list[Tensor]) -> Outputs:
        torch._foreach_copy_(self.leaves, network)
        with torch.no_grad():
            return tuple(output.clone() for output in self.run())

    def _look(
        self, start: list[Tensor], step: Tensors, past: list[tuple[list[Tensor], Outputs]], weights: list[float]
    ) -> tuple[float, Tensors]:
        """Value and gradient of η (gᵀs + ½ sᵀBs) + Σ_j c_j (½ KLsym_j + ½ λ ‖θ + s − θ_j‖²)."""
        torch._foreach_copy_(self.leaves, torch._foreach_add(start, list(step.values())))
        with torch.enable_grad():
            outputs = self.run()
            terms = (weight * self._divergence(old, outputs) for weight, (_, old) in zip(weights, past, strict=True))
            divergence = torch.stack(list(terms)).sum()
            grads = torch.autograd.grad(divergence, self.leaves, allow_unused=True)
        bent = self.curvature(step)
        value = divergence.detach()
        slope: Tensors = {}
        for i, (name, s) in enumerate(step.items()):
            gaps = [(c, self.leaves[i].detach() - network[i]) for c, (network, _) in zip(weights, past, strict=True)]
            value = value + self.scale * (s * (self.gradient[name] + bent[name] / 2)).sum()
            value = value + self.damping / 2 * torch.stack([c * gap.square().sum() for c, gap in gaps]).sum()
            away = torch.stack([c * gap for c, gap in gaps]).sum(0)
            slope[name] = self.scale * (self.gradient[name] + bent[name]) + self.damping * away
            grad = grads[i]
            if grad is not None:
                slope[name] = slope[name] + grad
        return float(value), slope

    def _divergence(self, old: Outputs, new: Outputs) -> Tensor:
        there, back = self.likelihood.divergence(old, new), self.likelihood.divergence(new, old)
        return 0.5 * (there + back).mean()
