"""CG-FAC: the layers' damped systems by conjugate gradients on the batch's rows, without factors or decompositions.

(F_l + λ I) x = ∇_l, started from the last solution, in 10–20 steps of one product with F_l each. A truncated solve is
no linear map of the gradient and depends on the solution before; forms are therefore taken of the solution with F_l
itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from acktr.conjugate import Stop, conjugate_gradient
from acktr.curvature.base import Block, Place, Statistics
from acktr.curvature.rows.operators import Kronecker, RowBlock, RowMemory, RowModel


class CGBlock(RowBlock):
    """Rows in use are always the latest: there is nothing to refresh.

    Args:
        shape: [o, i].
        model: which Fisher of the rows.
        memory: how much of the past.
        stop: when the iteration stops.
    """

    remembers = True

    def __init__(self, shape: tuple[int, int], model: RowModel, memory: RowMemory, stop: Stop) -> None:
        super().__init__(shape, model, memory)
        self.stop = stop
        self.previous: Tensor | None = None

    def update(self, statistics: Statistics) -> None:
        """Keep one batch's rows and use them.

        Args:
            statistics: the layer's rows of this batch.
        """
        super().update(statistics)
        self._join()

    def _join(self) -> None:
        self._operator = self.model.operator(list(self.memory.batches), self.memory.weights())

    def _decompose(self) -> None:
        """Rows are used as they are."""

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(F̂ + λ)⁻¹ V, up to the tolerance.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i]; NaN where V is not finite.
        """
        operator = self.operator
        size = float(matrix.abs().max())
        if size == 0:
            return torch.zeros_like(matrix)
        # Of entries of order one, squares neither overflow nor vanish.
        solution = conjugate_gradient(
            lambda x: torch.add(operator.multiply(x), x, alpha=damping), matrix / size, self.stop, self.previous
        ).tensor
        if bool(torch.isfinite(solution.sum())):
            self.previous = solution
        return size * solution

    def state_dict(self) -> dict[str, Any]:
        """Rows and the last solution."""
        return super().state_dict() | {"previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore rows and the last solution.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.previous = state["previous"]
        if self.memory.batches:
            self._join()


@dataclass(frozen=True)
class CGFAC:
    """CG-FAC with K-FAC's operator V → G V A, or with the exact block of the examples (`operator=PerExample()`)."""

    ema: float = 0.95
    """Weight of a kept batch relative to the next newer one."""
    memory: int = 4
    """Batches kept. The note knows the latest alone, which `memory=1` gives; a few more are an average."""
    examples: int | None = None
    """Most examples kept of a batch, drawn at random; None for all."""
    operator: RowModel = field(default_factory=Kronecker)
    """Which Fisher of the rows: `Kronecker()` or `PerExample()`."""
    stop: Stop = field(default_factory=Stop)
    """Relative residual and number of steps."""

    def __post_init__(self) -> None:
        RowMemory(self.memory, self.ema, self.examples)  # says what is out of range

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        return CGBlock(place.shape, self.operator, RowMemory(self.memory, self.ema, self.examples), self.stop)
