"""The dense Fisher: no structure assumed, of one layer or of the whole network; for small ones.

F = E_n[Σ_k j_kn j_knᵀ] with j the gradient of an example's seed by all parameters. It is what every approximation here
approximates, averaged over batches like them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.curvature.base import Block, Place, Statistics
from acktr.linalg import form_or, symmetric_eigen
from acktr.moments import Gram, Moment

MAX_PARAMETERS = 4096
"""Beyond, the matrix has more than sixteen million entries and its eigenvectors take seconds."""


class DenseBlock(Block):
    """F̂ itself over the entries of a matrix, row after row, and its eigenvectors, so that any damping can be added.

    Args:
        shape: [o, i].
        ema: weight kept of the old matrix per update.
    """

    def __init__(self, shape: tuple[int, int], ema: float) -> None:
        self._shape = shape
        self.moment = Moment(ema)
        self.basis: Tensor | None = None
        self.scaling: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self._shape

    @property
    def _like(self) -> dict[str, Any]:
        value = self.moment.value
        return {"dtype": value.dtype, "device": value.device}

    @property
    def ready(self) -> bool:
        """Whether the eigenvectors are there."""
        return self.basis is not None

    def update(self, statistics: Statistics) -> None:
        """Average the examples' outer products of gradients in.

        Args:
            statistics: the layer's rows of this batch.
        """
        self.update_from_gradients(statistics.gradients(), statistics.examples)

    def update_from_gradients(self, gradients: Iterable[Tensor], examples: int) -> None:
        """Average one batch in.

        Args:
            gradients: of examples, seed after seed, in chunks [chunk, ...] whose rows are shaped like the matrix.
            examples: N.
        """
        size = self._shape[0] * self._shape[1]
        batch: Tensor | None = None
        for chunk in gradients:
            batch = chunk.new_zeros(size, size) if batch is None else batch
            Gram(chunk.reshape(len(chunk), size), examples).add_to(batch, 1.0, 1.0)
        if batch is not None:
            self.moment.update(batch)

    def _decompose(self) -> None:
        self.scaling, self.basis = symmetric_eigen(self.moment.value)

    def _eigen(self) -> tuple[Tensor, Tensor]:
        if self.basis is None or self.scaling is None:
            raise RuntimeError("the block has no bases yet; call refresh() after the first update")
        return self.scaling, self.basis

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(F̂ + λ)⁻¹ V.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        _, basis = self._eigen()
        return (basis @ self._coordinates(matrix, damping)).view(matrix.shape)

    def solve_with_form(self, matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """X = U c with c = (Uᵀ V) / (s + λ), and the matrix's own Xᵀ F̂ X; Σ c² s where that is no form.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            X, shape [o, i], and a scalar tensor.
        """
        scaling, basis = self._eigen()
        coordinates = self._coordinates(matrix, damping)
        solution = (basis @ coordinates).view(matrix.shape)
        return solution, form_or(self.quadratic(solution), (coordinates.square() * scaling).sum())

    def _coordinates(self, matrix: Tensor, damping: float) -> Tensor:
        scaling, basis = self._eigen()
        return (basis.mT @ matrix.flatten()) / (scaling + damping)

    def multiply(self, matrix: Tensor) -> Tensor:
        """F̂ V.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        return (self.moment.value @ matrix.flatten()).view(matrix.shape)

    def condition(self) -> float:
        """Largest over mean eigenvalue."""
        scaling, _ = self._eigen()
        return float(scaling.max() / scaling.mean().clamp_min(torch.finfo(scaling.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        """The matrix, its eigenvectors and the counts of failures and of their age."""
        return {
            "moment": self.moment.state_dict(),
            "basis": self.basis,
            "scaling": self.scaling,
            "counts": [self.failures, self.skipped_refreshes, self.basis_age],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them.

        Args:
            state: what `state_dict` returned.
        """
        self.moment.load_state_dict(state["moment"])
        self.basis, self.scaling = state["basis"], state["scaling"]
        self.failures, self.skipped_refreshes, self.basis_age = state["counts"]


@dataclass(frozen=True)
class DenseBlocks:
    """The dense Fisher of each layer; what K-FAC and EKFAC approximate. For small layers."""

    ema: float = 0.95
    """Weight kept of the old matrix per update."""
    max_parameters: int = MAX_PARAMETERS
    """Larger layers are refused."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        check_size(place.shape[0] * place.shape[1], self.max_parameters, f"layer '{place.name}'")
        return DenseBlock(place.shape, self.ema)


def check_size(size: int, limit: int, what: str) -> None:
    """Refuse what is too large for a dense matrix.

    Args:
        size: parameters.
        limit: most of them.
        what: has them.

    Raises:
        ValueError: if there are more.
    """
    if size > limit:
        raise ValueError(
            f"{what} has {size} parameters, and their dense Fisher {size}² entries; take a smaller one, another "
            f"curvature, or raise max_parameters={limit}"
        )
