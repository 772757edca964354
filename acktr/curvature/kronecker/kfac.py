"""K-FAC: F̂ = A ⊗ G (Martens & Grosse 2015; KFC for convolutions, Grosse & Martens 2016).

Over a layer's matrix V [o, i] the product acts as F̂ V = G V A, with A = E[a aᵀ] over inputs and G = E[g gᵀ] over
output gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from acktr.curvature.base import Block, Place
from acktr.curvature.damping import DampingRule, Tikhonov
from acktr.curvature.kronecker.product import WholeFactorsBlock
from acktr.curvature.sampling import SampledBlock
from acktr.curvature.sharing import Found, SharedBlock
from acktr.linalg import (
    DecompositionError,
    damped_cholesky,
    damped_inverse,
    eigen_cost,
    form_or,
    split_damping,
    symmetric_eigen,
)
from acktr.tree import all_finite


class EigenBlock(SampledBlock, WholeFactorsBlock, SharedBlock):
    """K-FAC in its eigenbasis: any damping from one decomposition, by default exact Tikhonov damping.

    X = U_G [(U_Gᵀ V U_A) / (d_G d_Aᵀ + λ)] U_Aᵀ.

    Args:
        shape: [o, i].
        ema: weight kept of the old moments per update.
        rule: how damping enters; None for `Tikhonov`.
    """

    output_basis: Tensor | None = None
    input_basis: Tensor | None = None
    scaling: Tensor | None = None
    cross: Tensor | None = None
    """What √λ multiplies in the damping, shape [o, i]; None for nothing."""

    def __init__(self, shape: tuple[int, int], ema: float, rule: DampingRule | None = None) -> None:
        super().__init__(shape, ema)
        self.rule = rule or Tikhonov()

    @property
    def ready(self) -> bool:
        """Whether the bases are there."""
        return self.scaling is not None

    def decomposing(self) -> Callable[[], Found]:
        """The eigendecompositions of both moments.

        Returns:
            Finds d_G [o], U_G [o, o], d_A [i] and U_A [i, i].
        """
        A, G = self.input_moment.value, self.output_moment.value

        def decompose() -> Found:
            input_values, input_basis = symmetric_eigen(A)
            output_values, output_basis = symmetric_eigen(G)
            product = torch.outer(output_values, input_values)
            if not all_finite([product]):  # moments of different batches, each of which was in range
                shape = tuple(product.shape)
                raise DecompositionError(f"eigenvalues of {shape} factors are too large to be multiplied")
            return [output_values, output_basis, input_values, input_basis]

        return decompose

    def adopt(self, found: Found) -> None:
        """Use new bases from now on.

        Args:
            found: d_G, U_G, d_A and U_A.
        """
        output_values, output_basis, input_values, input_basis = found
        self._adopt(output_basis, input_basis, torch.outer(output_values, input_values))
        self.cross = self.rule.cross(output_values, input_values)

    @property
    def decomposition_cost(self) -> float:
        """Two eigendecompositions."""
        return sum(eigen_cost(width) for width in self.shape)

    def _adopt(self, output_basis: Tensor, input_basis: Tensor, product: Tensor) -> None:
        self.output_basis, self.input_basis, self.scaling = output_basis, input_basis, product

    def _bases(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.output_basis is None or self.input_basis is None or self.scaling is None:
            raise RuntimeError("the block has no bases yet; call refresh() after the first update")
        return self.output_basis, self.input_basis, self.scaling

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(F̂ + λ)⁻¹ V in the eigenbasis, with the rule's cross terms.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        output_basis, input_basis, _ = self._bases()
        return output_basis @ self._coordinates(matrix, damping) @ input_basis.mT

    def solve_with_form(self, matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """X = U_G C U_Aᵀ with C = (U_Gᵀ V U_A) / (S + λ), and its form.

        The moments' Xᵀ F̂ X, and Σ C² ∘ S where that is no form or F̂ is S in these bases.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            X, shape [o, i], and a scalar tensor.
        """
        output_basis, input_basis, _ = self._bases()
        coordinates = self._coordinates(matrix, damping)
        solution = output_basis @ coordinates @ input_basis.mT
        return solution, self._form(solution, coordinates)

    def _form(self, solution: Tensor, coordinates: Tensor) -> Tensor:
        # Rounding leaves X a rest along directions that the division all but took away: large moments make infinity of
        # it, or less than nothing. They go first where they can: they may have moved since the bases were found.
        return form_or(self.quadratic(solution), (coordinates.square() * self._bases()[2]).sum())

    def _coordinates(self, matrix: Tensor, damping: float) -> Tensor:
        output_basis, input_basis, scaling = self._bases()
        return (output_basis.mT @ matrix @ input_basis) / self._damped(scaling, damping)

    def _damped(self, scaling: Tensor, damping: float) -> Tensor:
        return scaling + damping if self.cross is None else scaling + damping + damping**0.5 * self.cross

    def spread(self, noise: Tensor, damping: float) -> Tensor:
        """U_G [E / √(S + λ)] U_Aᵀ: of exactly the damped inverse's covariance.

        Args:
            noise: E, shape [..., o, i].
            damping: λ > 0.

        Returns:
            Shape [..., o, i].
        """
        output_basis, input_basis, scaling = self._bases()
        return output_basis @ (noise * self._damped(scaling, damping).rsqrt()) @ input_basis.mT

    def spectrum(self, damping: float) -> Tensor:
        """S + λ.

        Args:
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        return self._damped(self._bases()[2], damping)

    def effective_dimension(self, damping: float) -> Tensor:
        """Σ S over what the damping makes of S, the cross terms' part of it included.

        Args:
            damping: λ > 0.

        Returns:
            Scalar tensor.
        """
        scaling = self._bases()[2]
        return (scaling / self._damped(scaling, damping)).sum()

    def condition(self) -> float:
        """Largest over mean entry of the scaling."""
        scaling = self._bases()[2]
        return float(scaling.max() / scaling.mean().clamp_min(torch.finfo(scaling.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        """Moments, bases, scaling and cross terms."""
        return super().state_dict() | {
            "output_basis": self.output_basis,
            "input_basis": self.input_basis,
            "scaling": self.scaling,
            "cross": self.cross,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments, bases, scaling and cross terms.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.output_basis, self.input_basis, self.scaling, self.cross = (
            state["output_basis"],
            state["input_basis"],
            state["scaling"],
            state["cross"],
        )


class FactoredBlock(SampledBlock, WholeFactorsBlock, SharedBlock):
    """K-FAC with factored Tikhonov damping (Martens & Grosse 2015, section 6.3).

    X = (G + √λ/π I)⁻¹ V (A + π√λ I)⁻¹ with π² = (tr A / i) / (tr G / o).
    """

    _inverses: tuple[float, Tensor, Tensor] | None = None
    _roots: tuple[float, Tensor, Tensor] | None = None

    @property
    def ready(self) -> bool:
        """Whether there are moments to invert."""
        return not self.input_moment.empty

    def _decompose(self) -> None:
        # The damping enters the inverses themselves; before the first `solve` it is not known.
        if self._inverses is not None:
            damping = self._inverses[0]
            self._inverses = (damping, *self._invert(damping))
        if self._roots is not None:
            self._roots = (self._roots[0], *self._root(self._roots[0]))

    def decomposing(self) -> Callable[[], Found]:
        """Both inverses with the damping of the last `solve`; nothing, where there was none yet.

        Returns:
            Finds (G + √λ/π)⁻¹, (A + π√λ)⁻¹ and λ, in summands.
        """
        if self._inverses is None:
            return list
        damping = self._inverses[0]
        (G, output_damping), (A, input_damping) = self._split(damping)
        label = _summands(damping, G)
        return lambda: [damped_inverse(G, output_damping), damped_inverse(A, input_damping), label]

    def adopt(self, found: Found) -> None:
        """Use new inverses until the damping changes.

        Args:
            found: of `decomposing`; nothing leaves them to the next `solve`.
        """
        # Whoever found them may have begun before the damping changed: then the next `solve` inverts anew, as it does
        # where an older file does not say which damping it was.
        self._inverses = (sum(found[2].tolist()), found[0], found[1]) if len(found) == 3 else None
        self._roots = None

    @property
    def decomposition_cost(self) -> float:
        """Two Cholesky inverses, of n³ each."""
        return sum(float(width) ** 3 for width in self.shape)

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(G + √λ/π)⁻¹ V (A + π√λ)⁻¹.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        if self._inverses is None or self._inverses[0] != damping:
            self._inverses = (damping, *self._invert(damping))
        _, output_inverse, input_inverse = self._inverses
        return output_inverse @ matrix @ input_inverse

    def _invert(self, damping: float) -> tuple[Tensor, Tensor]:
        (G, output_damping), (A, input_damping) = self._split(damping)
        return damped_inverse(G, output_damping), damped_inverse(A, input_damping)

    def _root(self, damping: float) -> tuple[Tensor, Tensor]:
        (G, output_damping), (A, input_damping) = self._split(damping)
        return damped_cholesky(G, output_damping), damped_cholesky(A, input_damping)

    def _split(self, damping: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        A, G = self.input_moment.value, self.output_moment.value
        of_outputs, of_inputs = split_damping(G.diagonal().mean(), A.diagonal().mean(), damping)
        return (G, of_outputs), (A, of_inputs)

    def _roots_for(self, damping: float) -> tuple[Tensor, Tensor]:
        if self._roots is None or self._roots[0] != damping:
            self._roots = (damping, *self._root(damping))
        return self._roots[1], self._roots[2]

    def spread(self, noise: Tensor, damping: float) -> Tensor:
        """L_G⁻ᵀ E L_A⁻¹ with L Lᵀ the damped factors: matrix-normal noise (Zhang et al. 2018, section 3.3).

        Args:
            noise: E, shape [..., o, i].
            damping: λ > 0.

        Returns:
            Shape [..., o, i].
        """
        output_root, input_root = self._roots_for(damping)
        left = torch.linalg.solve_triangular(output_root.mT, noise, upper=True)
        drawn: Tensor = torch.linalg.solve_triangular(input_root, left, upper=False, left=False)
        return drawn

    def spectrum(self, damping: float) -> Tensor:
        """All products of the damped factors' eigenvalues.

        Args:
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        output_root, input_root = self._roots_for(damping)
        return torch.outer(torch.linalg.svdvals(output_root).square(), torch.linalg.svdvals(input_root).square())

    def effective_dimension(self, damping: float) -> Tensor:
        """The product of tr G (G + √λ/π)⁻¹ and tr A (A + π√λ)⁻¹.

        Args:
            damping: λ > 0.

        Returns:
            Scalar tensor.
        """
        moments = self.output_moment.value, self.input_moment.value
        roots = self._roots_for(damping)
        output, inputs = (torch.cholesky_solve(m, root).trace() for m, root in zip(moments, roots, strict=True))
        return output * inputs

    def state_dict(self) -> dict[str, Any]:
        """Moments, and the inverses and their roots made since the last refresh."""
        return super().state_dict() | {"inverses": self._inverses, "roots": self._roots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments, inverses and roots.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self._inverses, self._roots = state["inverses"], state.get("roots")  # older states have none

    def condition(self) -> float:
        """Largest over mean diagonal entry of F̂, without a decomposition."""
        A, G = self.input_moment.value.diagonal(), self.output_moment.value.diagonal()
        return float(A.max() * G.max() / (A.mean() * G.mean()).clamp_min(torch.finfo(A.dtype).tiny))


@dataclass(frozen=True)
class KFAC:
    """K-FAC in the factors' eigenbases, with exact Tikhonov damping unless another rule is given."""

    ema: float = 0.95
    """Weight kept of the old moments per update."""
    damping: DampingRule = field(default_factory=Tikhonov)
    """How damping enters: `Tikhonov`, `PerCoordinate` or `FactoredTikhonov`."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        return EigenBlock(place.shape, self.ema, self.damping)


@dataclass(frozen=True)
class FactoredKFAC:
    """K-FAC with factored Tikhonov damping, by Cholesky."""

    ema: float = 0.95
    """Weight kept of the old moments per update."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        return FactoredBlock(place.shape, self.ema)


def _summands(number: float, like: Tensor) -> Tensor:
    """Three numbers of a matrix's type, with which they travel, that add up to a float of 53 bits exactly."""
    parts: list[float] = []
    for _ in range(3):
        parts.append(float(like.new_tensor(number - sum(parts))))
    return like.new_tensor(parts)
