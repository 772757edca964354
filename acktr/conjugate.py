"""Conjugate gradients for one positive definite system, warm-started with a safeguard, and preconditioned if wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
"""A symmetric positive definite linear map between tensors of one shape."""


@dataclass(frozen=True)
class Solution:
    """Where the iteration stopped."""

    tensor: Tensor
    """x, shaped like the right-hand side."""
    iterations: int
    """Steps taken."""
    residual: float
    """‖b − M x‖ / ‖b‖ by the recursion; 0 where b is."""


@dataclass(frozen=True)
class Stop:
    """When to stop."""

    tolerance: float = 1e-3
    """Relative residual that is enough, ≥ 0."""
    iterations: int = 20
    """Steps at most, ≥ 1."""
    progress: float = 0.0
    """Stop also once the last max(10, k / 10) of k steps lowered φ = ½ xᵀMx − bᵀx by less than this share of it each
    (Martens 2010, section 4.4, with 5e-4); 0 never does."""

    def __post_init__(self) -> None:
        for name in ("tolerance", "progress"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")


def conjugate_gradient(
    product: Operator, right: Tensor, stop: Stop, start: Tensor | None = None, precondition: Operator | None = None
) -> Solution:
    """Solve M x = b; every step lessens the error in the energy norm √(eᵀMe) (Hestenes & Stiefel 1952).

    A warm start enters as its best multiple, (bᵀx₀ / x₀ᵀMx₀) x₀: in the energy norm that is never further from the
    solution than 0 is, so that a start from another problem costs one product and harms nothing.

    Args:
        product: M.
        right: b, any shape.
        stop: when to stop.
        start: x₀, shaped like b; None for 0.
        precondition: P⁻¹ with P near M; None for the identity.

    Returns:
        x, with NaN in it where b is not finite; where a product is not, the solution before it.
    """
    solution, residual = _warm(product, right, start)
    goal = stop.tolerance**2 * float(_dot(right, right))
    direction = preconditioned = residual if precondition is None else precondition(residual)
    slope, count = _dot(residual, preconditioned), 0
    size, values = float(_dot(residual, residual)), [_phi(solution, right, residual)]
    while count < stop.iterations and size > goal and not _stalled(values, stop.progress):
        image = product(direction)
        curvature = _dot(direction, image)
        if not 0 < float(curvature) < math.inf:  # rounding, at the end of what the type can tell apart; or NaN
            break
        length = slope / curvature
        solution, residual = solution + length * direction, residual - length * image
        preconditioned = residual if precondition is None else precondition(residual)
        previous, slope = slope, _dot(residual, preconditioned)
        direction = preconditioned + (slope / previous) * direction
        size, count = float(_dot(residual, residual)), count + 1
        if stop.progress:
            values.append(_phi(solution, right, residual))
    norm = float(_dot(right, right))
    # What is not finite in b stops the loop before it starts; it must not pass for a solution of 0.
    return Solution(solution + 0 * right, count, (size / norm) ** 0.5 if norm else 0.0)


def _warm(product: Operator, right: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best multiple of the start, and its residual."""
    if start is not None:
        image = product(start)
        curvature = _dot(start, image)
        if float(curvature) > 0:
            multiple = _dot(start, right) / curvature
            return multiple * start, right - multiple * image
    return torch.zeros_like(right), right


def _phi(solution: Tensor, right: Tensor, residual: Tensor) -> float:
    return -0.5 * float(_dot(solution, right + residual))


def _stalled(values: list[float], progress: float) -> bool:
    k = len(values) - 1
    window = max(10, k // 10)
    if not progress or k <= window or values[-1] >= 0:
        return False
    return values[-1] - values[-1 - window] > window * progress * values[-1]


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum()
