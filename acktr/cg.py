"""Conjugate gradients: A x = b from products with A alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
"""A symmetric positive definite matrix, as its product with vectors [n]."""


@dataclass(frozen=True)
class Stopping:
    """When to stop."""

    iterations: int = 10
    """Products with the matrix at most, beside the one that a start costs."""
    tolerance: float = 1e-3
    """Norm of the residual relative to the right side that is small enough."""
    progress: float = 0.0
    """Stop also once the last max(10, k / 10) of k iterations lowered φ = ½ xᵀAx − bᵀx by less than this share of it
    each (Martens 2010, section 4.4, with 5e-4); 0 never does."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        for name in ("tolerance", "progress"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients came to."""

    vector: Tensor
    """x, shape [n]."""
    iterations: int
    """Products with the matrix, that of the start left out."""
    residual: float
    """‖b − A x‖ / ‖b‖ by the recursion; 0 for b = 0."""


def conjugate_gradient(
    product: Operator,
    right: Tensor,
    stopping: Stopping,
    start: Tensor | None = None,
    precondition: Operator | None = None,
) -> Solution:
    """Minimise φ(x) = ½ xᵀAx − bᵀx over growing Krylov spaces (Hestenes & Stiefel 1952).

    Whatever stops it, φ(x) ≤ 0: the solution is never worse than nothing, and bᵀx ≥ ½ xᵀAx ≥ 0 makes −x a descent
    direction where b is a gradient.

    Args:
        product: A.
        right: b, shape [n].
        stopping: when to stop.
        start: first x; one with φ > 0 is replaced by zeros, and None is zeros.
        precondition: an approximation of A⁻¹.

    Returns:
        The solution; where a product is not finite, the last one before it.
    """
    x, r = _begin(product, right, start)
    z = r if precondition is None else precondition(r)
    p, rz, size = z, float(r @ z), float(right.norm())
    values, k, residual = [_phi(x, right, r)], 0, _relative(r, size)
    while k < stopping.iterations and residual > stopping.tolerance and not _stalled(values, stopping.progress):
        q = product(p)
        curvature = float(p @ q)
        # Rounding, or numbers that are none: what is known so far is what there is.
        if not 0 < curvature < math.inf:
            break
        x, r = torch.add(x, p, alpha=rz / curvature), torch.sub(r, q, alpha=rz / curvature)
        z = r if precondition is None else precondition(r)
        rz, before = float(r @ z), rz
        p = torch.add(z, p, alpha=rz / before) if before else z
        k, residual = k + 1, _relative(r, size)
        values.append(_phi(x, right, r))
    return Solution(x, k, residual)


def _begin(product: Operator, right: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    if start is not None:
        r = right - product(start)
        if _phi(start, right, r) <= 0:
            return start, r
    return torch.zeros_like(right), right


def _phi(x: Tensor, right: Tensor, residual: Tensor) -> float:
    return -0.5 * float(x @ (right + residual))


def _relative(residual: Tensor, size: float) -> float:
    return float(residual.norm()) / size if size else 0.0


def _stalled(values: list[float], progress: float) -> bool:
    k = len(values) - 1
    window = max(10, k // 10)
    return (
        bool(progress)
        and k > window
        and values[-1] < 0
        and values[-1] - values[-1 - window] > (window * progress * values[-1])
    )
