"""Fishers of batches whose rows are kept: no average, no factor of the layer's width need be formed.

A batch of N examples and K seeds has the block F = Σ_k Σ_n ∇ ∇ᵀ / N, ∇_kn = Σ_s g aᵀ. `PerExample` is that block
itself, `Kronecker` is K-FAC's model of it, A ⊗ G. Several batches are averaged as rows of one, with weights √ρʲ for a
batch j updates old.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from acktr.curvature.base import Block, Statistics
from acktr.linalg import symmetric_eigen
from acktr.moments import Gram

Batch = tuple[Tensor, ...]
"""What is kept of one batch; who keeps it knows what it means."""


class RowOperator(ABC):
    """A layer's Fisher F̂ from kept rows, as products; matrices are [o, i]."""

    @abstractmethod
    def multiply(self, matrix: Tensor) -> Tensor:
        """F̂ matrix."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """F̂'s diagonal, shape [o, i]."""

    def quadratic(self, matrix: Tensor) -> Tensor:
        """matrixᵀ F̂ matrix.

        Args:
            matrix: shape [o, i].

        Returns:
            Scalar tensor ≥ 0.
        """
        return (matrix * self.multiply(matrix)).sum()


class RowModel(Protocol):
    """What is kept of a batch, and the Fisher that several of them make."""

    def keep(self, statistics: Statistics) -> Batch:
        """The batch's own tensors, free of the memory of the pass."""
        ...

    def operator(self, batches: Sequence[Batch], weights: Sequence[float]) -> RowOperator:
        """Σ_j weight_j F_j."""
        ...


class ExampleOperator(RowOperator):
    """F̂ = JᵀJ with one scaled gradient of an example and seed per row of J, [R, o · i]."""

    @abstractmethod
    def along(self, matrix: Tensor) -> Tensor:
        """J matrix, shape [R]."""

    @abstractmethod
    def back(self, coefficients: Tensor) -> Tensor:
        """Jᵀ coefficients, shape [o, i]."""

    @abstractmethod
    def gram(self) -> Tensor:
        """J Jᵀ, shape [R, R]."""

    @abstractmethod
    def columns(self, places: Tensor) -> Tensor:
        """Some columns of J.

        Args:
            places: row-major indices into [o, i], shape [k].

        Returns:
            Shape [R, k].
        """

    def multiply(self, matrix: Tensor) -> Tensor:
        """Jᵀ J matrix.

        Args:
            matrix: shape [o, i].

        Returns:
            Shape [o, i].
        """
        return self.back(self.along(matrix))

    def quadratic(self, matrix: Tensor) -> Tensor:
        """‖J matrix‖².

        Args:
            matrix: shape [o, i].

        Returns:
            Scalar tensor.
        """
        return self.along(matrix).square().sum()


@dataclass(frozen=True)
class ExampleRows(ExampleOperator):
    """J by its factors: with one position a row is g ⊗ a, and J Jᵀ = (a aᵀ) ∘ (g gᵀ) without J."""

    inputs: Tensor
    """Shape [N, S, i]."""
    output_grads: Tensor
    """Shape [K, N, S, o], scaled."""

    def along(self, matrix: Tensor) -> Tensor:
        """Σ_s gᵀ V a for each seed and example.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [K · N].
        """
        return (self.output_grads * (self.inputs @ matrix.mT)).sum((2, 3)).flatten()

    def back(self, coefficients: Tensor) -> Tensor:
        """Σ_kn c_kn Σ_s g aᵀ.

        Args:
            coefficients: c, shape [K · N].

        Returns:
            Shape [o, i].
        """
        weights = coefficients.view(*self.output_grads.shape[:2], 1, 1)
        return (weights * self.output_grads).sum(0).flatten(0, 1).mT @ self.inputs.flatten(0, 1)

    def gram(self) -> Tensor:
        """Σ_s Σ_t (a_s · a_t)(g_s · g_t) for each pair of rows.

        Returns:
            Shape [K · N, K · N].
        """
        seeds, examples, positions = self.output_grads.shape[:3]
        rows, grads = self.inputs.flatten(0, 1), self.output_grads.flatten(1, 2)
        inputs, all_grads = rows @ rows.mT, self.output_grads.flatten(0, 2)
        blocks = []
        for mine in grads:
            products = (mine @ all_grads.mT).view(len(rows), seeds, len(rows)) * inputs[:, None]
            if positions > 1:
                products = products.view(examples, positions, seeds, examples, positions).sum((1, 4))
            blocks.append(products.reshape(examples, -1))
        return torch.cat(blocks)

    def columns(self, places: Tensor) -> Tensor:
        """Σ_s g_p a_q for the places (p, q).

        Args:
            places: row-major indices into [o, i], shape [k].

        Returns:
            Shape [K · N, k].
        """
        width = self.inputs.shape[-1]
        chosen = self.output_grads[..., places // width] * self.inputs[..., places % width]
        return chosen.sum(2).flatten(0, 1)

    def diagonal(self) -> Tensor:
        """Sums of the squared gradients' entries.

        Returns:
            Shape [o, i].
        """
        return Statistics(self.inputs, self.output_grads).squares() * len(self.inputs)


@dataclass(frozen=True)
class ExampleGradients(ExampleOperator):
    """J itself: where a weight is shared by many positions, an example's gradient is smaller than its rows."""

    gradients: Tensor
    """Shape [R, o, i], scaled."""

    def along(self, matrix: Tensor) -> Tensor:
        """J V.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [R].
        """
        return self.gradients.flatten(1) @ matrix.flatten()

    def back(self, coefficients: Tensor) -> Tensor:
        """Jᵀ c.

        Args:
            coefficients: c, shape [R].

        Returns:
            Shape [o, i].
        """
        return (coefficients @ self.gradients.flatten(1)).view(self.gradients.shape[1:])

    def gram(self) -> Tensor:
        """J Jᵀ.

        Returns:
            Shape [R, R].
        """
        rows = self.gradients.flatten(1)
        return rows @ rows.mT

    def columns(self, places: Tensor) -> Tensor:
        """Some columns of J.

        Args:
            places: row-major indices into [o, i], shape [k].

        Returns:
            Shape [R, k].
        """
        return self.gradients.flatten(1)[:, places]

    def diagonal(self) -> Tensor:
        """Sums of squares.

        Returns:
            Shape [o, i].
        """
        return self.gradients.square().sum(0)


ROOM = 4
"""How many times the room of its rows an example's gradient may take to be kept in their place."""


@dataclass(frozen=True)
class PerExample:
    """The exact block: F = Σ_kn ∇ ∇ᵀ / N with the sum over positions inside each gradient."""

    rank: int | None = None
    """Singular vectors kept of an example's gradient where a weight is shared by more positions than that, so that it
    takes rank · (o + i) numbers in place of o · i; None keeps the gradient whole."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, or None for whole gradients, got {self.rank}")

    def keep(self, statistics: Statistics) -> Batch:
        """Rows, or gradients, whichever is smaller to work with.

        Args:
            statistics: the layer's rows of a batch.

        Returns:
            Inputs [N, S, i] and output gradients [K, N, S, o], or the gradients [K · N, o, i] alone; over √N.
        """
        scale = 1 / math.sqrt(statistics.examples)
        positions, (o, i) = statistics.inputs.shape[1], _shape(statistics)
        if self.rank is not None and self.rank < min(positions, o, i):
            parts = [_leading(gradients, self.rank) for gradients in statistics.gradients()]
            return torch.cat([left for left, _ in parts]), torch.cat([g for _, g in parts]).unsqueeze(0) * scale
        if positions > 1 and o * i <= ROOM * positions * (o + i):
            return (torch.cat(list(statistics.gradients())) * scale,)
        return statistics.inputs.clone(), statistics.output_grads * scale

    def operator(self, batches: Sequence[Batch], weights: Sequence[float]) -> ExampleOperator:
        """All rows one below the other.

        Args:
            batches: of `keep`.
            weights: one per batch.

        Returns:
            The operator.
        """
        scaled = [(*batch[:-1], batch[-1] * math.sqrt(w)) for batch, w in zip(batches, weights, strict=True)]
        shapes = {tuple((t.shape[:-3], t.shape[-2:]) for t in batch) for batch in scaled}
        if len(shapes) == 1 and len(scaled[0]) == 2:
            inputs, output_grads = zip(*scaled, strict=True)
            return ExampleRows(torch.cat(inputs), torch.cat(output_grads, dim=1))
        # Images of several sizes have rows of several lengths; their gradients are all alike.
        return ExampleGradients(torch.cat([_gradients(batch) for batch in scaled]))


@dataclass(frozen=True)
class Kronecker:
    """K-FAC's product of the batch's own two moments, A ⊗ G; each as rows where these are fewer than its width."""

    def keep(self, statistics: Statistics) -> Batch:
        """Both sides' rows, or their moments where these are smaller.

        Args:
            statistics: the layer's rows of a batch.

        Returns:
            Of the inputs and of the output gradients, [rows, width] or [width, width].
        """
        return _compact(statistics.input_moment()), _compact(statistics.output_moment())

    def operator(self, batches: Sequence[Batch], weights: Sequence[float]) -> RowOperator:
        """The product of the averaged moments (not the average of products, which has no two factors).

        Args:
            batches: of `keep`.
            weights: one per batch.

        Returns:
            The operator.
        """
        inputs, output_grads = zip(*batches, strict=True)
        return KroneckerOperator(_joined(inputs, weights), _joined(output_grads, weights))


@dataclass(frozen=True)
class KroneckerOperator(RowOperator):
    """V → G V A by rows, gᵀ (g V aᵀ) a, or by moments."""

    inputs: Tensor
    """Rows [R, i] with R < i and A = rowsᵀ rows, or A itself, [i, i]."""
    output_grads: Tensor
    """The same of G."""

    def multiply(self, matrix: Tensor) -> Tensor:
        """G V A.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        a, g = self.inputs, self.output_grads
        right = matrix @ a if _square(a) else (matrix @ a.mT) @ a
        return g @ right if _square(g) else g.mT @ (g @ right)

    def diagonal(self) -> Tensor:
        """Products of the factors' diagonals.

        Returns:
            Shape [o, i].
        """
        a, g = (t.diagonal() if _square(t) else t.square().sum(0) for t in (self.inputs, self.output_grads))
        return torch.outer(g, a)


class RowMemory:
    """The last batches and their weights.

    Args:
        batches: how many are kept.
        ema: weight of a batch relative to the next newer one.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, batches: int, ema: float) -> None:
        if batches < 1:
            raise ValueError(f"memory must be at least 1 batch, got {batches}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {ema}")
        self.ema = ema
        # Without any weight for the past there is nothing to keep of it.
        self.batches: deque[Batch] = deque(maxlen=batches if ema else 1)

    def weights(self) -> list[float]:
        """One per batch, oldest first; they sum to 1."""
        raw = [self.ema**age for age in reversed(range(len(self.batches)))]
        return [weight / sum(raw) for weight in raw]


class RowBlock(Block):
    """A block whose Fisher is made of kept rows; subclasses say how it is solved.

    Args:
        shape: [o, i].
        model: what is kept of a batch.
        memory: how much of the past.
    """

    def __init__(self, shape: tuple[int, int], model: RowModel, memory: RowMemory) -> None:
        self._shape = shape
        self.model = model
        self.memory = memory
        self._operator: RowOperator | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self._shape

    @property
    def _like(self) -> dict[str, Any]:
        tensor = self.memory.batches[-1][0]
        return {"dtype": tensor.dtype, "device": tensor.device}

    @property
    def ready(self) -> bool:
        """Whether there are rows in use."""
        return self._operator is not None

    @property
    def operator(self) -> RowOperator:
        """The Fisher in use.

        Raises:
            RuntimeError: if there is none yet.
        """
        if self._operator is None:
            raise RuntimeError("the curvature holds no statistics yet; update it with a batch first")
        return self._operator

    def update(self, statistics: Statistics) -> None:
        """Keep one batch's rows, and let go of the oldest.

        Args:
            statistics: the layer's rows of this batch.
        """
        self.memory.batches.append(self.model.keep(statistics))

    def multiply(self, matrix: Tensor) -> Tensor:
        """F̂ V.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        return self.operator.multiply(matrix)

    def quadratic(self, matrix: Tensor) -> Tensor:
        """Vᵀ F̂ V.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Scalar tensor.
        """
        return self.operator.quadratic(matrix)

    def condition(self) -> float:
        """Largest over mean diagonal entry of F̂, without a decomposition."""
        diagonal = self.operator.diagonal()
        return float(diagonal.max() / diagonal.mean().clamp_min(torch.finfo(diagonal.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        """The kept rows and the counts of failures and of the basis's age."""
        return {
            "batches": [list(batch) for batch in self.memory.batches],
            "counts": [self.failures, self.skipped_refreshes, self.basis_age],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore rows and counts.

        Args:
            state: what `state_dict` returned.
        """
        self.memory.batches.clear()
        self.memory.batches.extend(tuple(batch) for batch in state["batches"])
        self.failures, self.skipped_refreshes, self.basis_age = state["counts"]


def _shape(statistics: Statistics) -> tuple[int, int]:
    return statistics.output_grads.shape[-1], statistics.inputs.shape[-1]


def _leading(gradients: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximations L Rᵀ of matrices [R, o, i], as rows [R, rank, i] and [R, rank, o]."""
    # The larger side's products would be as large as the gradients themselves.
    tall = gradients.shape[1] > gradients.shape[2]
    matrices = gradients.mT if tall else gradients
    unit = matrices / matrices.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(gradients.dtype).tiny)
    vectors = symmetric_eigen(unit @ unit.mT)[1][..., -rank:].mT
    rest = vectors @ matrices
    return (vectors, rest) if tall else (rest, vectors)


def _gradients(batch: Batch) -> Tensor:
    return batch[0] if len(batch) == 1 else torch.cat(list(Statistics(*batch).gradients()))


def _compact(gram: Gram) -> Tensor:
    rows = gram.rows
    return rows / math.sqrt(gram.count) if len(rows) < rows.shape[1] else gram.value


def _joined(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    width = parts[0].shape[1]
    if sum(len(part) for part in parts) < width:
        return torch.cat([math.sqrt(w) * part for part, w in zip(parts, weights, strict=True)])
    if len(parts) == 1:
        return parts[0]
    moments = (w * (part if _square(part) else part.mT @ part) for part, w in zip(parts, weights, strict=True))
    total: Tensor = sum(moments)  # type: ignore[assignment]
    return total


def _square(part: Tensor) -> bool:
    return part.shape[0] == part.shape[1]
