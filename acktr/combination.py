"""Combining the layers' directions by the exact Fisher (two-level K-FAC).

Blocks give one direction Δ_l per layer, each as if the other layers stood still; moved together they go several times
too far, and the parameters whose block is exact pay for it. With P = [Δ_1 … Δ_L] the coefficients

    (Pᵀ F P + λ Pᵀ P) α = −Pᵀ ∇

minimise the exact quadratic model over the span of P: K-FAC's rescaling (Martens & Grosse 2015, section 6.4) with a
coefficient per layer. Related: Tselepidis et al. 2020. A state-independent log-std is a column like the others: its
block is exact and does not couple, so its coefficient comes out as 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from acktr.exact import Linearisation
from acktr.tree import Tensors

Split = Callable[[Tensors], list[Tensors]]
"""Takes a direction apart into pieces."""


@dataclass(frozen=True)
class LayerCombination:
    """One coefficient per layer."""

    previous_step: bool = False
    """Whether the previous step is one more column: momentum whose coefficient the model chooses."""
    ridge: float = 1e-6
    """Relative ridge on the system: nearly dependent columns must not cancel against each other."""

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < float("inf"):
            raise ValueError(f"ridge must be at least 0 and finite, got {self.ridge}")

    def columns(self, direction: Tensors, split: Split) -> list[Tensors]:
        """What gets a coefficient of its own.

        Args:
            direction: one tensor per trained parameter.
            split: takes a direction apart, as the curvature sees it.

        Returns:
            Pieces whose union is the direction.
        """
        return split(direction)

    def combine(
        self, pieces: list[Tensors], gradient: Tensors, damping: float, linearisation: Linearisation
    ) -> tuple[Tensors, Tensor]:
        """Solve for the coefficients and join the pieces.

        Args:
            pieces: the columns of P, each with tensors for some parameters.
            gradient: ∇, one tensor per parameter.
            damping: λ, as in the blocks' own solves.
            linearisation: the exact Fisher's forward-mode passes.

        Returns:
            The combined direction, and its exact undamped form (scalar, float64).
        """
        tangents = [linearisation.tangent(piece) for piece in pieces]
        slopes = torch.stack([_dot(piece, gradient) for piece in pieces])
        overlaps = torch.stack([torch.stack([_dot(left, right) for right in pieces]) for left in pieces])
        grams = linearisation.grams(tangents)
        system = torch.stack(grams).sum(0) + damping * overlaps
        coefficients = solve_coefficients(system, -slopes, self.ridge)
        combined = {name: torch.zeros_like(tensor) for name, tensor in gradient.items()}
        for coefficient, piece in zip(coefficients.tolist(), pieces, strict=True):
            for name, tensor in piece.items():
                combined[name].add_(tensor, alpha=coefficient)
        return combined, linearisation.form(coefficients, grams)


@dataclass(frozen=True)
class WholeDirection(LayerCombination):
    """One coefficient for the whole direction: K-FAC's own rescaling (Martens & Grosse 2015, section 6.4).

    α = −∇ᵀΔ / Δᵀ(F + λ)Δ, and with the previous step the pair (α, μ) of section 7, learning rate and momentum in one:
    on a fixed quadratic these are preconditioned conjugate gradients.
    """

    def columns(self, direction: Tensors, split: Split) -> list[Tensors]:
        """The direction as it is.

        Args:
            direction: one tensor per trained parameter.
            split: not asked.

        Returns:
            One column.
        """
        return [direction]


def solve_coefficients(system: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve a small symmetric system after scaling its diagonal to 1, with a relative ridge.

    Columns may differ by many orders of magnitude (a log-std's direction beside a wide layer's), so the ridge is
    relative to each; a column of zeros gets the coefficient 0.

    Args:
        system: shape [L, L], positive semi-definite.
        right: shape [L].
        ridge: added to the scaled diagonal.

    Returns:
        Shape [L].
    """
    scale = system.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0)
    # A column of zeros has no coefficient to solve for, and must not make the system singular.
    scaled = inverse[:, None] * system * inverse + torch.diag(ridge + (scale == 0).to(system.dtype))
    solution: Tensor = torch.linalg.solve(scaled, inverse * right)
    return inverse * solution


def _dot(left: Tensors, right: Tensors) -> Tensor:
    shared = [(left[name].double() * right[name].double()).sum().cpu() for name in left if name in right]
    return torch.stack(shared).sum() if shared else torch.zeros((), dtype=torch.float64)
