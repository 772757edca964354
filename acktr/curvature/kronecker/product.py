"""Two factors as running moments: what all products of an input and an output moment have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from acktr.curvature.base import Block, Statistics
from acktr.curvature.kronecker.sums import kronecker_sum_solver
from acktr.curvature.sharing import Summary
from acktr.linalg import DecompositionError
from acktr.moments import Gram, Moment


class KroneckerBlock(Block):
    """The two factors' running moments; subclasses say how they are decomposed.

    Args:
        shape: [o, i].
        ema: weight kept of the old moments per update.
    """

    rows_of: Callable[[Statistics], Statistics] | None = None
    """What the moments are taken of, from the layer's rows; None takes these as they are."""

    def __init__(self, shape: tuple[int, int], ema: float) -> None:
        self._shape = shape
        self.input_moment = Moment(ema)
        self.output_moment = Moment(ema)

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self._shape

    @property
    def _like(self) -> dict[str, Any]:
        value = self.input_moment.value
        return {"dtype": value.dtype, "device": value.device}

    def update(self, statistics: Statistics) -> None:
        """Average one batch's moments in.

        Args:
            statistics: the layer's rows of this batch.
        """
        self.take(self.summary(statistics))

    def summary(self, statistics: Statistics) -> Summary:
        """A and G of one batch.

        Args:
            statistics: the layer's rows of this batch.

        Returns:
            Both, not multiplied out yet.
        """
        return list(self._moments(statistics))

    def _moments(self, statistics: Statistics) -> tuple[Gram, Gram]:
        """A and G of one batch, of the rows that this block takes them of."""
        statistics = self.rows_of(statistics) if self.rows_of else statistics
        return statistics.input_moment(), statistics.output_moment()

    def take(self, summary: Summary) -> None:
        """Average A and G in.

        Args:
            summary: of `summary`, or the mean of several.
        """
        A, G = summary
        self.input_moment.update(A)
        self.output_moment.update(G)

    def multiply(self, matrix: Tensor) -> Tensor:
        """G V A.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        return self.output_moment.value @ matrix @ self.input_moment.value

    def state_dict(self) -> dict[str, Any]:
        """Both moments and the counts of failures and of the basis's age."""
        return {
            "input_moment": self.input_moment.state_dict(),
            "output_moment": self.output_moment.state_dict(),
            "counts": [self.failures, self.skipped_refreshes, self.basis_age],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both moments and the counts.

        Args:
            state: what `state_dict` returned.
        """
        self.input_moment.load_state_dict(state["input_moment"])
        self.output_moment.load_state_dict(state["output_moment"])
        self.failures, self.skipped_refreshes, self.basis_age = state["counts"]


class WholeFactorsBlock(KroneckerBlock):
    """Blocks that decompose whole factors, and so can decompose a batch's own ones beside them."""

    def solver_with_batch(
        self, damping: float, weight: float, statistics: Statistics | None
    ) -> Callable[[Tensor], Tensor]:
        """V ↦ (A ⊗ G + w A_B ⊗ G_B)⁻¹ V, exactly, with factored damping of A ⊗ G whatever the block's own.

        Args:
            damping: λ > 0.
            weight: w ≥ 0.
            statistics: the batch's rows; None takes F̂ for B.

        Returns:
            A function of matrices [o, i].
        """
        if statistics is not None:
            first = self.input_moment.value, self.output_moment.value
            A, G = self._moments(statistics)
            try:
                return kronecker_sum_solver(first, (A.value, G.value), weight, damping)
            except DecompositionError:
                self.skipped_refreshes += 1
        return super().solver_with_batch(damping, weight, statistics)

    def multiply_batch(self, matrix: Tensor, statistics: Statistics | None) -> Tensor:
        """G_B V A_B.

        Args:
            matrix: V, shape [o, i].
            statistics: the batch's rows; None takes F̂ for B.

        Returns:
            Shape [o, i].
        """
        if statistics is None:
            return super().multiply_batch(matrix, statistics)
        A, G = self._moments(statistics)
        return G.value @ matrix @ A.value
