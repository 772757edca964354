"""A symmetric matrix from its leading eigenvectors, and one eigenvalue for all the others.

    K̂ = U D Uᵀ + t (I − U Uᵀ)

with U [n, m] orthonormal. Functions of K̂ cost O(n m) per column: f(K̂) M = U [f(D) − f(t)] Uᵀ M + f(t) M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """What is known of a factor's eigenvalues and eigenvectors."""

    basis: Tensor
    """U, orthonormal columns, shape [n, m]."""
    values: Tensor
    """D, shape [m], ascending."""
    tail: Tensor
    """t, the eigenvalue of all directions outside of the basis; scalar, not looked at where m = n."""
    trace: Tensor
    """tr K of the factor itself; scalar. The model's own trace is another where the tail is not the rest's mean."""

    @property
    def width(self) -> int:
        """The factor's n."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """The basis's m."""
        return self.basis.shape[1]

    @property
    def mean(self) -> Tensor:
        """The factor's mean eigenvalue, tr K / n."""
        return self.trace / self.width

    @property
    def largest(self) -> Tensor:
        """The largest eigenvalue."""
        return self.values[-1]

    def multiply(self, matrix: Tensor) -> Tensor:
        """K̂ M.

        Args:
            matrix: M, shape [n, k].

        Returns:
            Shape [n, k].
        """
        return self._apply(matrix, self.values, self.tail)

    def solve(self, matrix: Tensor, damping: Tensor) -> Tensor:
        """(K̂ + λ)⁻¹ M.

        Args:
            matrix: M, shape [n, k].
            damping: λ > 0, scalar tensor.

        Returns:
            Shape [n, k].
        """
        return self._apply(matrix, 1 / (self.values + damping), 1 / (self.tail + damping))

    def _apply(self, matrix: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
        inside = self.basis.mT @ matrix
        if self.rank == self.width:
            return self.basis @ (kept[:, None] * inside)
        # In place: one copy of the matrix less, and wide ones are bound by memory.
        return (rest * matrix).addmm_(self.basis, (kept - rest)[:, None] * inside)

    def state_dict(self) -> dict[str, Tensor]:
        """All four tensors."""
        return {"basis": self.basis, "values": self.values, "tail": self.tail, "trace": self.trace}


class Tail(Protocol):
    """How a spectrum goes on behind the last kept eigenvalue."""

    def __call__(self, values: Tensor, trace: Tensor, width: int) -> Tensor:
        """The one eigenvalue of all directions outside of the basis.

        Args:
            values: D, shape [m], ascending.
            trace: tr K, scalar.
            width: n.

        Returns:
            t ≥ 0, scalar.
        """
        ...


@dataclass(frozen=True)
class MeanOfRest:
    """t = (tr K − Σ D) / (n − m): the model keeps the factor's trace."""

    def __call__(self, values: Tensor, trace: Tensor, width: int) -> Tensor:
        """The mean of what the basis leaves out.

        Args:
            values: D, shape [m].
            trace: tr K, scalar.
            width: n.

        Returns:
            Scalar; 0 where nothing is left out.
        """
        return (trace - values.sum()).clamp_min(0) / max(1, width - len(values))


@dataclass(frozen=True)
class LastKept:
    """t = min D, as in the later code of the randomised K-FACs' author: no direction left out counts for less."""

    def __call__(self, values: Tensor, trace: Tensor, width: int) -> Tensor:
        """The smallest kept eigenvalue.

        Args:
            values: D, shape [m], ascending.
            trace: not looked at.
            width: not looked at.

        Returns:
            Scalar.
        """
        return values[0]


@dataclass(frozen=True)
class ZeroTail:
    """t = 0: outside of the basis there is damping alone, as the papers have it."""

    def __call__(self, values: Tensor, trace: Tensor, width: int) -> Tensor:
        """Nothing.

        Args:
            values: gives type and device.
            trace: not looked at.
            width: not looked at.

        Returns:
            Scalar 0.
        """
        return values.new_zeros(())
