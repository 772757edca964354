"""The interface of one block of curvature, and what feeds it: `update`, when due `refresh`, then `rescale`.

A block approximates the Fisher of one layer's matrix [o, i]; `acktr.curvature.blockdiagonal` joins blocks into the
network's. The verbs are the same at both levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from acktr.linalg import DecompositionError
from acktr.moments import Gram

MAX_FAILURES = 5
"""Refreshes in a row without a decomposition after which the block gives up."""


@dataclass(frozen=True)
class Place:
    """Where a block stands: which matrix of which layer it covers."""

    shape: tuple[int, int]
    """[o, i] of the matrix."""
    bias: bool = False
    """Whether the last column is a bias's, whose input is always 1."""
    offsets: int = 1
    """Places of a convolution's kernel; the columns before the bias's are channels × offsets, offsets fastest."""
    name: str = ""
    """The layer's dotted name; empty for a block by itself."""


@dataclass(frozen=True)
class Statistics:
    """What one Fisher pass says of one layer; rows as in `acktr.layers`."""

    inputs: Tensor
    """Shape [N, S, i]."""
    output_grads: Tensor
    """Shape [K, N, S, o], one slice per seed, per example, un-averaged."""

    @property
    def examples(self) -> int:
        """N."""
        return self.inputs.shape[0]

    def input_moment(self) -> Gram:
        """A = Σ_n Σ_s a aᵀ / N, shape [i, i] (KFC's Ω; a sum over positions)."""
        return Gram(self.inputs.flatten(0, 1), self.examples)

    def output_moment(self) -> Gram:
        """G = Σ_k Σ_n Σ_s g gᵀ / (N S), shape [o, o] (KFC's Γ; a mean over positions)."""
        return Gram(self.output_grads.flatten(0, 2), self.examples * self.inputs.shape[1])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ_n w_n Σ_s g aᵀ / N of the first seed: the objective's gradient where it is w_n times the seed.

        Args:
            weights: shape [N].

        Returns:
            Shape [o, i].
        """
        weighted = self.output_grads[0] * weights[:, None, None]
        return weighted.flatten(0, 1).mT @ self.inputs.flatten(0, 1) / self.examples

    def squares(self, output_basis: Tensor | None = None, input_basis: Tensor | None = None) -> Tensor:
        """E_n Σ_k of the squared entries of U_Gᵀ (Σ_s g aᵀ) U_A: the Fisher's diagonal in a Kronecker basis.

        With S = 1 the square of the product is the product of squares, and one GEMM does it.

        Args:
            output_basis: U_G, shape [o, o]; None for the identity.
            input_basis: U_A, shape [i, i]; None for the identity.

        Returns:
            Shape [o, i].
        """
        if self.inputs.shape[1] == 1:
            a = self.inputs[:, 0] if input_basis is None else self.inputs[:, 0] @ input_basis
            g = (
                self.output_grads.flatten(0, 2)
                if output_basis is None
                else self.output_grads.flatten(0, 2) @ output_basis
            )
            g_squares = g.square().reshape(-1, self.examples, g.shape[-1]).sum(0)
            return g_squares.mT @ a.square() / self.examples
        turned = (_turned(gradients, output_basis, input_basis) for gradients in self.gradients())
        total: Tensor = sum(t.square().sum(0) for t in turned)  # type: ignore[assignment]
        return total / self.examples

    def gradients(self) -> Iterator[Tensor]:
        """The examples' gradients Σ_s g aᵀ, seed after seed, in chunks: those of a wide layer do not fit in memory.

        Yields:
            Shape [chunk, o, i].
        """
        chunk = max(1, 2**22 // (self.output_grads.shape[-1] * self.inputs.shape[-1]))
        for grads in self.output_grads:
            for g, a in zip(torch.split(grads, chunk), torch.split(self.inputs, chunk), strict=True):
                yield g.mT @ a


def _turned(gradients: Tensor, output_basis: Tensor | None, input_basis: Tensor | None) -> Tensor:
    turned = gradients if output_basis is None else output_basis.mT @ gradients
    return turned if input_basis is None else turned @ input_basis


class Block(ABC):
    """One layer's curvature F̂ over its matrix [o, i]; shapes below are that matrix's."""

    failures = 0
    """Refreshes in a row that found no finite decomposition."""
    skipped_refreshes = 0
    """All such refreshes of this block's life."""
    basis_age = 0
    """Updates since the decomposition in use was made."""
    remembers = False
    """Whether a solve builds on the one before it."""

    @abstractmethod
    def update(self, statistics: Statistics) -> None:
        """Average one batch's statistics in."""

    def rescale(self, statistics: Statistics) -> None:
        """Take from the same batch what depends on the refreshed decomposition; most blocks need nothing.

        Args:
            statistics: the layer's rows of this batch.
        """

    def follow(self, gradient: Tensor) -> Tensor:
        """Take in the objective's gradient, and say what the next `solve` is for; most blocks hand it back as it is.

        Args:
            gradient: shape [o, i].

        Returns:
            The gradient or, where the method puts an average in its place, that; shape [o, i].
        """
        return gradient

    @abstractmethod
    def _decompose(self) -> None:
        """Bring the decomposition up to the averaged statistics, or raise DecompositionError and change nothing."""

    @abstractmethod
    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(F̂ + damping · I)⁻¹ matrix."""

    @abstractmethod
    def multiply(self, matrix: Tensor) -> Tensor:
        """F̂ matrix, undamped."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, to the last bit."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    @abstractmethod
    def condition(self) -> float:
        """Largest over mean eigenvalue of F̂: 1 for a multiple of the identity, large where few directions dominate."""

    def quadratic(self, matrix: Tensor) -> Tensor:
        """Undamped matrixᵀ F̂ matrix, a scalar ≥ 0.

        Args:
            matrix: shape [o, i].

        Returns:
            Scalar tensor.
        """
        return (matrix * self.multiply(matrix)).sum()

    def solve_with_form(self, matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """The damped solve X and its undamped form Xᵀ F̂ X; in an eigenbasis the second costs next to nothing.

        Args:
            matrix: shape [o, i].
            damping: λ > 0.

        Returns:
            X, shape [o, i], and a scalar tensor.
        """
        solution = self.solve(matrix, damping)
        return solution, self.quadratic(solution)

    def solver_with_batch(
        self, damping: float, weight: float, statistics: Statistics | None
    ) -> Callable[[Tensor], Tensor]:
        """V ↦ (F̂ + w B + λ)⁻¹ V, where B is one batch's own curvature; a block that does not tell takes F̂ for B.

        Args:
            damping: λ > 0.
            weight: w ≥ 0.
            statistics: the batch's rows; None where there are none.

        Returns:
            A function of matrices [o, i].
        """
        return lambda matrix: self.solve(matrix, damping / (1 + weight)) / (1 + weight)

    def multiply_batch(self, matrix: Tensor, statistics: Statistics | None) -> Tensor:
        """B V, where B is one batch's own curvature, undamped; a block that does not tell takes F̂ for B.

        Args:
            matrix: V, shape [o, i].
            statistics: the batch's rows; None where there are none.

        Returns:
            Shape [o, i].
        """
        return self.multiply(matrix)

    def refresh(self) -> None:
        """Decompose anew; on failure keep the last good decomposition, if there is one, and `count_failure`."""
        try:
            self._decompose()
        except DecompositionError as failure:
            self.count_failure(failure)
        else:
            self.failures = self.basis_age = 0

    def count_failure(self, failure: DecompositionError) -> None:
        """Count a refresh that found nothing, and give up after `MAX_FAILURES` in a row.

        Args:
            failure: why; raised then.
        """
        self.failures += 1
        self.skipped_refreshes += 1
        if self.failures >= MAX_FAILURES:
            raise failure

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether `solve` can be called."""

    def dense(self) -> Tensor:
        """F̂ as a matrix over row-major entries of [o, i]; for tests and tiny layers.

        Returns:
            Shape [o · i, o · i].
        """
        o, i = self.shape
        units = torch.eye(o * i, **self._like).reshape(-1, o, i)
        return torch.stack([self.multiply(unit).flatten() for unit in units], dim=1)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """[o, i]."""

    @property
    @abstractmethod
    def _like(self) -> dict[str, Any]:
        """Type and device of the block's tensors, as keyword arguments."""


class CurvatureFactory(Protocol):
    """A choice of curvature by layer: builds one block for each."""

    def build(self, place: Place) -> Block:
        """A block over the layer's matrix."""
        ...


BlockRule = Callable[[tuple[int, int]], Block]
"""Builds a block over matrices [o, i]; for parameters that choose their own."""
