"""Combining the layers' directions by the exact Fisher (two-level K-FAC).

Blocks give one direction Δ_l per layer, each as if the other layers stood still; moved together they go several times
too far, and the parameters whose block is exact pay for it. With P = [Δ_1 … Δ_L] the coefficients

    (Pᵀ F P + λ Pᵀ P) α = −Pᵀ ∇

minimise the exact quadratic model over the span of P: K-FAC's rescaling (Martens & Grosse 2015, section 6.4) with a
coefficient per layer. Related: Tselepidis et al. 2020. A state-independent log-std is a column like the others: its
block is exact and does not couple, so its coefficient comes out as 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acktr.exact import Linearisation, Tensors


@dataclass(frozen=True)
class Combination(ABC):
    """Coefficients of the columns of P from the exact Fisher on the batch; subclasses say what a column is."""

    previous_step: bool = False
    """Whether the previous step is one more column: momentum whose coefficient the model chooses."""
    ridge: float = 1e-6
    """Relative ridge on the system: nearly dependent columns must not cancel against each other."""

    @abstractmethod
    def columns(self, descents: Sequence[Tensors], split: Callable[[Tensors], list[Tensors]]) -> list[Tensors]:
        """The columns of P.

        Args:
            descents: the blocks' direction of each part of the objective.
            split: cuts a direction into its layers' pieces.

        Returns:
            Tensors for some or all parameters, per column.
        """

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
            The combined direction, and its exact undamped quadratic form αᵀ Pᵀ F P α (scalar, float64).
        """
        gram = linearisation.gram([linearisation.tangent(piece) for piece in pieces])
        slopes = torch.stack([_dot(piece, gradient) for piece in pieces])
        overlaps = torch.stack([torch.stack([_dot(left, right) for right in pieces]) for left in pieces])
        coefficients = solve_coefficients(gram + damping * overlaps, -slopes, self.ridge)
        combined = {name: torch.zeros_like(tensor) for name, tensor in gradient.items()}
        for coefficient, piece in zip(coefficients.tolist(), pieces, strict=True):
            for name, tensor in piece.items():
                combined[name].add_(tensor, alpha=coefficient)
        return combined, coefficients @ gram @ coefficients


@dataclass(frozen=True)
class LayerCombination(Combination):
    """One coefficient per layer, and per part of the objective if it has several."""

    def columns(self, descents: Sequence[Tensors], split: Callable[[Tensors], list[Tensors]]) -> list[Tensors]:
        """Every layer's piece of every direction.

        Args:
            descents: the blocks' direction of each part of the objective.
            split: cuts a direction into its layers' pieces.

        Returns:
            Layers times parts columns.
        """
        return [piece for descent in descents for piece in split(descent)]


@dataclass(frozen=True)
class ObjectiveCombination(Combination):
    """One coefficient per part of the objective: policy and value on a shared trunk each get a length of their own.

    On images a value's per-example gradients are nearly equal (the background is), and blocks, which cannot see one
    direction common to all layers, make its step a thousand times too long: scaled back together with it, a policy
    would stand still. With one part this is K-FAC's exact coefficient of the whole step.

    The damping is left to the blocks: two numbers are well determined by a batch, and with λ in their system a value
    of small weight would be damped away.
    """

    def combine(
        self, pieces: list[Tensors], gradient: Tensors, damping: float, linearisation: Linearisation
    ) -> tuple[Tensors, Tensor]:
        """Solve for the coefficients without damping and join the pieces.

        Args:
            pieces: the directions.
            gradient: ∇, one tensor per parameter.
            damping: unused here.
            linearisation: the exact Fisher's forward-mode passes.

        Returns:
            The combined direction, and its exact quadratic form (scalar, float64).
        """
        return super().combine(pieces, gradient, 0.0, linearisation)

    def columns(self, descents: Sequence[Tensors], split: Callable[[Tensors], list[Tensors]]) -> list[Tensors]:
        """The directions themselves.

        Args:
            descents: the blocks' direction of each part of the objective.
            split: unused.

        Returns:
            As many columns as parts.
        """
        return list(descents)


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
    scaled = inverse[:, None] * system * inverse + ridge * torch.eye(len(right), dtype=system.dtype)
    solution: Tensor = torch.linalg.solve(scaled, inverse * right)
    return inverse * solution


def _dot(left: Tensors, right: Tensors) -> Tensor:
    shared = [(left[name].double() * right[name].double()).sum().cpu() for name in left if name in right]
    return torch.stack(shared).sum() if shared else torch.zeros((), dtype=torch.float64)
