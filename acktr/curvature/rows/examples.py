"""The exact block of a batch's examples, F = Σ_k Σ_n ∇ ∇ᵀ / N with ∇_kn = Σ_s g aᵀ, as products with its rows.

A row is kept as its factors g and a, or, where positions share the weight, as the gradient itself.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acktr.curvature.base import Statistics
from acktr.curvature.rows.operators import Batch, RowOperator
from acktr.linalg import symmetric_eigen


class ExampleOperator(RowOperator):
    """F̂ = JᵀJ with one scaled gradient of an example and seed per row of J, [R, o · i]."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """R and o · i."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the rows are."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> ExampleOperator:
        """The same rows in another type."""

    @abstractmethod
    def explicit(self) -> Tensor:
        """J, shape [R, o · i]."""

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

    @property
    def size(self) -> tuple[int, int]:
        """R and o · i."""
        seeds, examples, _, outputs = self.output_grads.shape
        return seeds * examples, outputs * self.inputs.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.inputs.device

    def to(self, dtype: torch.dtype) -> ExampleRows:
        """The same factors in another type.

        Args:
            dtype: which.

        Returns:
            J.
        """
        return ExampleRows(self.inputs.to(dtype), self.output_grads.to(dtype))

    def explicit(self) -> Tensor:
        """J, an example's gradient by its sum over positions.

        Returns:
            Shape [K · N, o · i].
        """
        return torch.cat(list(Statistics(self.inputs, self.output_grads).gradients())).flatten(1)

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

    @property
    def size(self) -> tuple[int, int]:
        """R and o · i."""
        return len(self.gradients), self.gradients[0].numel()

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.gradients.device

    def to(self, dtype: torch.dtype) -> ExampleGradients:
        """The same gradients in another type.

        Args:
            dtype: which.

        Returns:
            J.
        """
        return ExampleGradients(self.gradients.to(dtype))

    def explicit(self) -> Tensor:
        """J, shape [R, o · i]."""
        return self.gradients.flatten(1)

    def along(self, matrix: Tensor) -> Tensor:
        """J V.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [R].
        """
        return self.explicit() @ matrix.flatten()

    def back(self, coefficients: Tensor) -> Tensor:
        """Jᵀ c.

        Args:
            coefficients: c, shape [R].

        Returns:
            Shape [o, i].
        """
        return (coefficients @ self.explicit()).view(self.gradients.shape[1:])

    def gram(self) -> Tensor:
        """J Jᵀ.

        Returns:
            Shape [R, R].
        """
        rows = self.explicit()
        return rows @ rows.mT

    def columns(self, places: Tensor) -> Tensor:
        """Some columns of J.

        Args:
            places: row-major indices into [o, i], shape [k].

        Returns:
            Shape [R, k].
        """
        return self.explicit()[:, places]

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
