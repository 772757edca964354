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
        (a, thin_a), (g, thin_g) = ((side, not _square(side)) for side in (self.inputs, self.output_grads))
        # Rows first: what they leave of the matrix is smaller than the matrix.
        product = matrix @ a.mT if thin_a else matrix
        product = g @ product  # gᵀ is still to come where g is rows
        product = product @ a
        return g.mT @ product if thin_g else product

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
        examples: most examples kept of a batch, drawn at random; None for all.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, batches: int, ema: float, examples: int | None = None) -> None:
        if batches < 1:
            raise ValueError(f"memory must be at least 1 batch, got {batches}")
        if examples is not None and examples < 1:
            raise ValueError(f"examples must be at least 1, or None for whole batches, got {examples}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {ema}")
        self.ema = ema
        self.examples = examples
        self.draws = 0
        """Batches of which a part was drawn; the number seeds the draw, so that runs repeat."""
        # Without any weight for the past there is nothing to keep of it.
        self.batches: deque[Batch] = deque(maxlen=batches if ema else 1)

    def part(self, statistics: Statistics) -> Statistics:
        """What is kept of a batch's examples; their mean is unbiased.

        Args:
            statistics: the layer's rows of the batch.

        Returns:
            Rows of some or all examples.
        """
        if self.examples is None or self.examples >= statistics.examples:
            return statistics
        self.draws += 1
        order = torch.randperm(statistics.examples, generator=torch.Generator().manual_seed(self.draws))
        few = order[: self.examples].to(statistics.inputs.device)
        return Statistics(statistics.inputs[few], statistics.output_grads[:, few])

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
        self.memory.batches.append(self.model.keep(self.memory.part(statistics)))

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
            "model": type(self.model).__name__,
            "batches": [list(batch) for batch in self.memory.batches],
            "draws": self.memory.draws,
            "counts": [self.failures, self.skipped_refreshes, self.basis_age],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore rows and counts.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: if its rows are of another model.
        """
        own = type(self.model).__name__
        if state.get("model", own) != own:  # older states do not say
            raise ValueError(f"rows of {state['model']}(), not of {own}()")
        self.memory.draws = state["draws"]
        self.memory.batches.clear()
        self.memory.batches.extend(tuple(batch) for batch in state["batches"])
        self.failures, self.skipped_refreshes, self.basis_age = state["counts"]


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
