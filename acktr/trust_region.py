"""How far to step: the largest factor that keeps the Fisher-approximated KL within a radius.

KL(old ‖ new) ≈ ½ η² Δᵀ F Δ ≤ δ gives η = min(η_max, √(2δ / Δᵀ F Δ)) (ACKTR, Wu et al. 2017, section 3.2).
Two deviations from the published code, which has √(δ / Δᵀ(F + λ)Δ): the factor 2 of the KL's expansion, and no damping
in the form, because damping is no distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ExactMetric:
    """Δᵀ F Δ with the exact Fisher of the batch: one forward-mode pass."""


@dataclass(frozen=True)
class BlockMetric:
    """Δᵀ F̂ Δ with the blocks' own approximation: free, but blind to layers that move together."""


StepMetric = ExactMetric | BlockMetric


def is_form(quadratic: float) -> bool:
    """Whether a number can be a form: rounding may leave less than nothing of one, which tells no distance.

    Args:
        quadratic: Δᵀ F Δ.

    Returns:
        Whether it is finite and not negative.
    """
    return 0 <= quadratic < math.inf


def trust_region_scale(quadratic: float, radius: float, max_scale: float) -> float:
    """η = min(η_max, √(2δ / quadratic)).

    Args:
        quadratic: Δᵀ F Δ.
        radius: δ in nats, ≥ 0; ∞ for none.
        max_scale: η_max, ≥ 0.

    Returns:
        η in [0, η_max]; 0 if the form is negative or not finite, because then no step is known to be safe.
    """
    if not is_form(quadratic):
        return 0.0
    return max_scale if quadratic == 0 else min(max_scale, math.sqrt(2 * radius / quadratic))


def corrected_scale(scale: float, measured: float, radius: float, max_scale: float) -> float:
    """The scale at which a KL that grows with its square would meet the radius.

    Args:
        scale: η of the step that was measured.
        measured: its KL in nats; not finite means it broke the network.
        radius: δ in nats.
        max_scale: η_max.

    Returns:
        The new η, at most ten times smaller or larger, because the square law holds near the radius only.
    """
    if not measured < float("inf"):
        return scale / 10
    ratio = math.sqrt(radius / max(measured, 1e-300))
    return min(max_scale, scale * min(10.0, max(0.1, ratio)))
