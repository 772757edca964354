"""Decompositions that say when they fail.

`torch.linalg.eigh` reads one triangle, so a NaN in the other passes unseen, and returns NaN for an Inf without raising:
finiteness is therefore checked before and after, and failures climb a ladder of float32, float64, CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from acktr.tree import all_finite

FIRST_STEPS = 4
"""Steps of subspace iteration from a random start; each sharpens the spectrum by one power."""


class DecompositionError(ArithmeticError):
    """No rung of the ladder gave a finite decomposition."""


def eigen_cost(width: int) -> float:
    """Multiplications of a symmetric eigendecomposition, as many as take the time that it takes.

    Args:
        width: n.

    Returns:
        8 n³, about the time of eight products of such matrices.
    """
    return 8.0 * width**3


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, clamped at 0) and eigenvectors of a positive semi-definite matrix.

    Args:
        matrix: shape [n, n], symmetric up to rounding.

    Returns:
        Eigenvalues [n] and eigenvectors [n, n] in columns, in the matrix's type and on its device.

    Raises:
        DecompositionError: if the matrix is not finite, or no rung of the ladder succeeds.
    """
    if not _finite(matrix):
        raise DecompositionError(f"a {tuple(matrix.shape)} moment is not finite")
    found = _climbed(torch.linalg.eigh, (matrix + matrix.mT) / 2)
    if found is None:
        raise DecompositionError(f"no eigendecomposition of a {tuple(matrix.shape)} moment was finite")
    values, vectors = found
    return values.clamp_min(0), vectors


def _climbed(decompose: Callable[[Tensor], Sequence[Tensor]], matrix: Tensor) -> list[Tensor] | None:
    """The first finite decomposition on the ladder, in the matrix's type and on its device."""
    for rung in (matrix, matrix.double(), matrix.double().cpu()):
        try:
            parts = decompose(rung)
        except RuntimeError:
            continue
        if all(_finite(part) for part in parts):
            return [part.to(matrix) for part in parts]
    return None


def leading_eigenvectors(matrix: Tensor, count: int, start: Tensor | None = None) -> Tensor:
    """Eigenvectors of the largest eigenvalues of a positive semi-definite matrix.

    From a start, one step of subspace iteration with a Rayleigh–Ritz rotation: one product with the matrix, which
    follows a slowly changing moment as well as a decomposition does at a fraction of its price. Without one, the start
    is drawn at random and followed by `FIRST_STEPS` (Halko, Martinsson & Tropp 2011, algorithm 4.4), or, where most of
    the eigenvectors are wanted, the whole matrix is decomposed.

    Args:
        matrix: shape [n, n], symmetric up to rounding.
        count: how many, 1 to n.
        start: orthonormal columns near the wanted space, shape [n, count]; None if there are none yet.

    Returns:
        Shape [n, count], orthonormal columns, by ascending eigenvalue.

    Raises:
        DecompositionError: if the matrix is not finite or no decomposition is.
    """
    if count == len(matrix) or (start is None and 4 * count >= len(matrix)):
        return symmetric_eigen(matrix)[1][:, -count:]
    if not _finite(matrix):
        raise DecompositionError(f"a {tuple(matrix.shape)} moment is not finite")
    space = random_columns(matrix, count) if start is None else start
    return ritz_pairs(matrix, sharpened(matrix, space, FIRST_STEPS if start is None else 1))[1]


def random_columns(matrix: Tensor, count: int, seed: int = 0) -> Tensor:
    """Columns of independent normal numbers, in a matrix's height and type; the same ones for the same seed.

    Args:
        matrix: shape [n, ...].
        count: how many.
        seed: any will do, and a stated one makes runs repeatable.

    Returns:
        Shape [n, count].
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(matrix), count, generator=generator, dtype=matrix.dtype).to(matrix.device)


def sharpened(matrix: Tensor, space: Tensor, steps: int) -> Tensor:
    """Turn a space towards the leading eigenvectors: power steps with a new orthonormal basis after each.

    Without it, directions that are weaker than the first by more than the type's precision are lost in the power.

    Args:
        matrix: shape [n, n], symmetric.
        space: columns, shape [n, m], m ≤ n.
        steps: how many, at least 1.

    Returns:
        Orthonormal columns, shape [n, m].

    Raises:
        DecompositionError: if the matrix is not finite.
    """
    if not _finite(matrix):
        raise DecompositionError(f"a {tuple(matrix.shape)} moment is not finite")
    for _ in range(steps):
        space = torch.linalg.qr(matrix @ space)[0]
    return space


def ritz_pairs(matrix: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh–Ritz: a positive semi-definite matrix's best eigenpairs inside a space.

    The symmetric randomised eigendecomposition of Halko, Martinsson & Tropp 2011 (section 5.3) on a sharpened space.

    Args:
        matrix: shape [n, n], symmetric.
        space: orthonormal columns, shape [n, m].

    Returns:
        Values [m], ascending and none above the matrix's own of the same rank, and orthonormal vectors [n, m].

    Raises:
        DecompositionError: if there are none that are finite.
    """
    values, turn = symmetric_eigen(space.mT @ matrix @ space)
    vectors: Tensor = space @ turn
    if not _finite(vectors):
        raise DecompositionError(f"no leading eigenvectors of a {tuple(matrix.shape)} moment were finite")
    return values, vectors


def singular_pairs(matrix: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of a symmetric matrix projected on a space from the left.

    The right side (V of QQᵀK = PSVᵀ) holds one product with the matrix more than the space itself, so both values and
    vectors are closer than the Ritz pairs of the same space; the price is an SVD of an [m, n] matrix.

    Args:
        matrix: shape [n, n], symmetric.
        space: Q, orthonormal columns, shape [n, m].

    Returns:
        Values [m], ascending and none above the matrix's own of the same rank, and orthonormal vectors [n, m].

    Raises:
        DecompositionError: if no rung of the ladder succeeds.
    """
    found = _climbed(lambda projected: torch.linalg.svd(projected, full_matrices=False)[1:], space.mT @ matrix)
    if found is None:
        raise DecompositionError(f"no singular value decomposition of a {tuple(matrix.shape)} moment was finite")
    values, vectors = found
    return values.flip(0), vectors.mT.flip(1)


def damped_inverse(matrix: Tensor, damping: Tensor) -> Tensor:
    """(matrix + damping · I)⁻¹ by `damped_cholesky`.

    Args:
        matrix: shape [n, n], positive semi-definite up to rounding.
        damping: scalar tensor, > 0.

    Returns:
        Shape [n, n].
    """
    return torch.cholesky_inverse(damped_cholesky(matrix, damping))


def damped_cholesky(matrix: Tensor, damping: Tensor | float) -> Tensor:
    """Cholesky factor of matrix + damping · I, with ten times the damping after each failure, three times at most.

    Args:
        matrix: shape [n, n], positive semi-definite up to rounding.
        damping: scalar, > 0.

    Returns:
        The lower factor, shape [n, n].

    Raises:
        DecompositionError: if the matrix is not finite or no damping tried makes it positive definite.
    """
    if not _finite(matrix):
        raise DecompositionError(f"a {tuple(matrix.shape)} moment is not finite")
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor: Tensor
    for escalation in (1.0, 10.0, 100.0, 1000.0):
        factor, info = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2 + escalation * damping * identity)
        if int(info) == 0:
            return factor
    raise DecompositionError(f"a {tuple(matrix.shape)} moment plus {1000 * float(damping):g} is not positive definite")


def split_damping(output_mean: Tensor, input_mean: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Share a damping out between the factors: √λ/π for the outputs' and π√λ for the inputs'.

    Args:
        output_mean: G's mean eigenvalue, tr G / o.
        input_mean: A's mean eigenvalue, tr A / i.
        damping: λ > 0.

    Returns:
        The outputs' and the inputs', whose product is λ.
    """
    tiny = torch.finfo(input_mean.dtype).tiny
    # A zero factor (all inputs dead, or a saturated policy) would send π to 0 or ∞.
    ratio = input_mean.clamp_min(tiny) / output_mean.clamp_min(tiny)
    pi = ratio.sqrt().clamp(1e-8, 1e8)
    root = damping**0.5
    return root / pi, root * pi


def form_or(form: Tensor, other: Tensor) -> Tensor:
    """A quadratic form where rounding left it one, positive and finite.

    Args:
        form: scalar.
        other: what stands in for it, scalar.

    Returns:
        Scalar tensor.
    """
    return torch.where((form > 0) & (form < math.inf), form, other)


def _finite(tensor: Tensor) -> bool:
    # A finite sum has finite terms, and costs a fifteenth of looking at each; a sum may overflow where no term did.
    return all_finite([tensor]) or bool(torch.isfinite(tensor).all())
