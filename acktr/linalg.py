"""Decompositions that say when they fail.

`torch.linalg.eigh` reads one triangle, so a NaN in the other passes unseen, and returns NaN for an Inf without raising:
finiteness is therefore checked before and after, and failures climb a ladder of float32, float64, CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acktr.tree import all_finite

FIRST_STEPS = 4
"""Steps of subspace iteration from a random start; each sharpens the spectrum by one power."""


class DecompositionError(ArithmeticError):
    """No rung of the ladder gave a finite decomposition."""


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
    symmetric = (matrix + matrix.mT) / 2
    for rung in (symmetric, symmetric.double(), symmetric.double().cpu()):
        try:
            values, vectors = torch.linalg.eigh(rung)
        except RuntimeError:
            continue
        if _finite(values) and _finite(vectors):
            return values.clamp_min(0).to(matrix), vectors.to(matrix)
    raise DecompositionError(f"no eigendecomposition of a {tuple(matrix.shape)} moment was finite")


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
    space = _random_start(matrix, count) if start is None else start
    for _ in range(FIRST_STEPS if start is None else 1):
        space = torch.linalg.qr(matrix @ space)[0]
    vectors: Tensor = space @ symmetric_eigen(space.mT @ matrix @ space)[1]
    if not _finite(vectors):
        raise DecompositionError(f"no leading eigenvectors of a {tuple(matrix.shape)} moment were finite")
    return vectors


def _random_start(matrix: Tensor, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # any will do, and the same one makes runs repeatable
    return torch.randn(len(matrix), count, generator=generator, dtype=matrix.dtype).to(matrix.device)


def damped_inverse(matrix: Tensor, damping: Tensor) -> Tensor:
    """(matrix + damping · I)⁻¹ by `damped_root`.

    Args:
        matrix: shape [n, n], positive semi-definite up to rounding.
        damping: scalar tensor, > 0.

    Returns:
        Shape [n, n].
    """
    return torch.cholesky_inverse(damped_root(matrix, damping))


def damped_root(matrix: Tensor, damping: Tensor) -> Tensor:
    """The Cholesky factor of matrix + damping · I, with ten times the damping after each failure, three times at most.

    Args:
        matrix: shape [n, n], positive semi-definite up to rounding.
        damping: scalar tensor, > 0.

    Returns:
        Shape [n, n], lower triangular.

    Raises:
        DecompositionError: if the matrix is not finite or no damping tried makes it positive definite.
    """
    if not _finite(matrix):
        raise DecompositionError(f"a {tuple(matrix.shape)} moment is not finite")
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for escalation in (1.0, 10.0, 100.0, 1000.0):
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2 + escalation * damping * identity)
        if int(info) == 0:
            return factor
    raise DecompositionError(f"a {tuple(matrix.shape)} moment plus {1000 * float(damping):g} is not positive definite")


def _finite(tensor: Tensor) -> bool:
    # A finite sum has finite terms, and costs a fifteenth of looking at each; a sum may overflow where no term did.
    return all_finite([tensor]) or bool(torch.isfinite(tensor).all())
