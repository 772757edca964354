"""Running averages without a start-up bias."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Gram:
    """rowsᵀ rows / count, multiplied out where it is needed: into an average it goes without a room of its own."""

    rows: Tensor
    """Shape [R, n]."""
    count: int
    """What the sum over rows is divided by."""

    @property
    def value(self) -> Tensor:
        """The matrix, shape [n, n]."""
        width = self.rows.shape[1]
        return self.add_to(self.rows.new_empty(width, width), 0.0, 1.0)

    def add_to(self, matrix: Tensor, kept: float, share: float) -> Tensor:
        """Overwrite a matrix M with kept · M + share · rowsᵀ rows / count.

        Of wide matrices the blocks below the diagonal are copied from above it, which saves three eighths of the work.

        Args:
            matrix: shape [n, n], symmetric.
            kept: factor of what is there; 0 does not look at it.
            share: factor of what is added.

        Returns:
            The matrix.
        """
        width, alpha = len(matrix), share / self.count
        # A GPU has better things to do with its time than to start four products in place of one.
        blocks = 4 if width >= 256 and matrix.device.type == "cpu" else 1
        edges = [width * k // blocks for k in range(blocks + 1)]
        for first, last in pairwise(edges):
            left, right = self.rows[:, first:last], self.rows[:, first:]
            matrix[first:last, first:].addmm_(left.mT, right, beta=kept, alpha=alpha)
            if last < width:
                matrix[last:, first:last] = matrix[first:last, last:].mT
        return matrix


class Moment:
    """Exponential average that divides out the weight its first zero still holds.

    After k updates the value is Σ_j (1 − ema) ema^(k−j) x_j / (1 − ema^k): the first batch counts whole, and no
    left-over of an identity start distorts the scale of the curvature.

    Args:
        ema: weight kept of the old value per update, in [0, 1); 0 keeps the latest batch alone.

    Raises:
        ValueError: if `ema` is outside [0, 1).
    """

    def __init__(self, ema: float) -> None:
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {ema}")
        self.ema = ema
        self._sum: Tensor | None = None
        self._weight = 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing was averaged yet."""
        return self._sum is None

    @property
    def value(self) -> Tensor:
        """The debiased average.

        Raises:
            RuntimeError: if there was no update yet.
        """
        if self._sum is None:
            raise RuntimeError("the curvature holds no statistics yet; update it with a batch first")
        return self._sum / self._weight

    def update(self, batch: Tensor | Gram) -> None:
        """Average one batch in.

        Args:
            batch: the batch's own moment, any shape, always the same.
        """
        if self._sum is None:
            self._sum = (1 - self.ema) * (batch.value if isinstance(batch, Gram) else batch)
        elif isinstance(batch, Gram):
            batch.add_to(self._sum, self.ema, 1 - self.ema)
        else:
            self._sum.mul_(self.ema).add_(batch, alpha=1 - self.ema)
        self._weight = self.ema * self._weight + (1 - self.ema)

    def begin(self, value: Tensor) -> None:
        """Start over from a value that counts whole, as if it were the average of many batches.

        Args:
            value: what is known before any batch.
        """
        self._sum, self._weight = value.clone(), 1.0

    def replace(self, value: Tensor) -> None:
        """Exchange the average for another view of it, keeping its weight.

        Args:
            value: the debiased average seen in other coordinates.
        """
        self._sum = value * self._weight

    def state_dict(self) -> dict[str, Any]:
        """The sum and its weight, to the last bit."""
        return {"sum": None if self._sum is None else self._sum.clone(), "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: the sum and its weight.
        """
        self._sum = None if state["sum"] is None else state["sum"].clone()
        self._weight = float(state["weight"])
