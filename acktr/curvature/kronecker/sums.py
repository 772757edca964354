"""The exact inverse of a sum of two Kronecker products (Martens & Grosse 2015, appendix B).

With P^(−½) C P^(−½) = E₁ s₁ E₁ᵀ, Q^(−½) D Q^(−½) = E₂ s₂ E₂ᵀ, K₁ = P^(−½) E₁ and K₂ = Q^(−½) E₂ both terms of
P ⊗ Q + w C ⊗ D are diagonal in one basis, so that Q X P + w D X C = V has the solution

    X = K₂ [(K₂ᵀ V K₁) / (1 + w s₂ s₁ᵀ)] K₁ᵀ
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from acktr.linalg import split_damping, symmetric_eigen


def kronecker_sum_solver(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], weight: float, damping: float
) -> Callable[[Tensor], Tensor]:
    """V ↦ ((A + π√λ) ⊗ (G + √λ/π) + w A′ ⊗ G′)⁻¹ V.

    The damping is factored, because with a third term λ I no basis is common to all three.

    Args:
        first: A [i, i] and G [o, o], positive semi-definite.
        second: A′ [i, i] and G′ [o, o], positive semi-definite.
        weight: w ≥ 0.
        damping: λ > 0.

    Returns:
        A function of matrices [o, i]; the decompositions behind it are made at once, and may fail.
    """
    (A, G), (other_A, other_G) = first, second
    of_outputs, of_inputs = split_damping(G.diagonal().mean(), A.diagonal().mean(), damping)
    inputs, input_values = _common_basis(A, of_inputs, other_A)
    outputs, output_values = _common_basis(G, of_outputs, other_G)
    divisor = 1 + weight * torch.outer(output_values, input_values)
    return lambda matrix: outputs @ ((outputs.mT @ matrix @ inputs) / divisor) @ inputs.mT


def _common_basis(matrix: Tensor, damping: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """K and s with Kᵀ (matrix + damping) K = I and Kᵀ other K = diag(s)."""
    values, vectors = symmetric_eigen(matrix)
    whitening = vectors / (values + damping).sqrt()
    common, turn = symmetric_eigen(whitening.mT @ other @ whitening)
    return whitening @ turn, common
