"""Factors of a Kronecker product: a running moment K = E[x xᵀ] and what is known of its spectrum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.curvature.lowrank.spectrum import Spectrum, Tail
from acktr.curvature.sharing import Found
from acktr.linalg import eigen_cost, random_columns, sharpened, symmetric_eigen
from acktr.moments import Gram, Moment

Pairs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Eigenvalues (ascending) and eigenvectors of a matrix [n, n] inside a space [n, m]; `linalg.ritz_pairs` is one."""


class Factor(ABC):
    """One side of a Kronecker product, seen through its spectrum."""

    spectrum: Spectrum | None = None
    """As of the latest refresh; None before it."""

    @abstractmethod
    def update(self, batch: Gram | Tensor) -> None:
        """Average one batch's moment in.

        Args:
            batch: its rows, not multiplied out yet; or the moment itself, for who needs no rows.
        """

    @abstractmethod
    def refresh(self) -> None:
        """Bring the spectrum up to the average, or raise DecompositionError and change nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The spectrum; subclasses add what theirs comes from."""
        return {"spectrum": None if self.spectrum is None else self.spectrum.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: the spectrum and what it comes from.
        """
        self.spectrum = None if state["spectrum"] is None else Spectrum(**state["spectrum"])


class DenseFactor(Factor):
    """All eigenvectors: for factors so narrow that a few of them would cost no less.

    Args:
        ema: weight kept of the old moment per update.
    """

    def __init__(self, ema: float) -> None:
        self.moment = Moment(ema)

    def update(self, batch: Gram | Tensor) -> None:
        """Average one batch's moment in.

        Args:
            batch: its rows, or the moment itself.
        """
        self.moment.update(batch)

    def refresh(self) -> None:
        """Decompose the moment."""
        self.adopt(self.decomposing()())

    def decomposing(self) -> Callable[[], Found]:
        """What decomposes the moment as it is now, and changes nothing.

        Returns:
            Finds values, ascending, vectors, and the trace.
        """
        matrix = self.moment.value
        return lambda: [*symmetric_eigen(matrix), matrix.trace()]

    def adopt(self, found: Found) -> None:
        """Use new eigenpairs from now on.

        Args:
            found: values, vectors and trace.
        """
        values, vectors, trace = found
        self.spectrum = Spectrum(vectors, values, values.new_zeros(()), trace)

    def cost(self, width: int) -> float:
        """Multiplications of a refresh, as far as its width tells.

        Args:
            width: n.

        Returns:
            Their number.
        """
        return eigen_cost(width)

    def state_dict(self) -> dict[str, Any]:
        """Moment and spectrum."""
        return super().state_dict() | {"moment": self.moment.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moment and spectrum.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.moment.load_state_dict(state["moment"])


@dataclass(frozen=True)
class FixedRank:
    """The same number of eigenvectors at every refresh."""

    most: int
    """How many."""

    def choose(self, values: Tensor, trace: Tensor) -> tuple[int, int]:
        """How many eigenvectors to keep, and how many to ask for next time.

        Args:
            values: found eigenvalues, ascending.
            trace: tr K.

        Returns:
            Both numbers.
        """
        return min(self.most, len(values)), self.most


@dataclass(frozen=True)
class AdaptiveRank:
    """As few eigenvectors as leave out no more than a share of the trace.

    The first refresh looks for `most`, later ones for what the one before needed; where that was too little, the next
    asks for more. The author's code steps by ± 10 towards its target; here the found values say at once how many of
    them would have done.
    """

    error: float = 0.033
    """Largest share of the trace to leave out, in (0, 1)."""
    least: int = 8
    """Fewest eigenvectors."""
    most: int = 256
    """Most eigenvectors."""
    growth: int = 10
    """How many more to ask for where the found ones were too few."""

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise ValueError(f"error must be in (0, 1), a share of the trace, got {self.error}")
        if not 1 <= self.least <= self.most:
            raise ValueError(f"least and most must be 1 ≤ least ≤ most, got {self.least} and {self.most}")
        if self.growth < 1:
            raise ValueError(f"growth must be at least 1, got {self.growth}")

    def choose(self, values: Tensor, trace: Tensor) -> tuple[int, int]:
        """How many eigenvectors to keep, and how many to ask for next time.

        Args:
            values: found eigenvalues, ascending.
            trace: tr K.

        Returns:
            Both numbers.
        """
        left_out = trace - values.flip(0).cumsum(0)
        missed = int((left_out > self.error * trace).sum())  # `left_out` falls, so these are the first ones
        if missed == len(values):
            return min(missed, self.most), min(missed + self.growth, self.most)
        kept = min(max(missed + 1, self.least), self.most, len(values))
        return kept, kept


@dataclass(frozen=True)
class Sketch:
    """How leading eigenvectors are looked for."""

    pairs: Pairs
    """Eigenpairs inside a space."""
    oversampling: int
    """Columns of the space beside those that are kept."""
    power_steps: int
    """Power steps from a random space."""
    follow_steps: int | None
    """Power steps from the space of the last refresh; None starts at random every time."""

    def __call__(self, matrix: Tensor, rank: int, start: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Look for the leading eigenpairs.

        Args:
            matrix: shape [n, n], positive semi-definite.
            rank: how many are wanted.
            start: orthonormal columns near the wanted space, the best ones last; None if there are none yet.
            seed: of the columns drawn at random.

        Returns:
            Values, ascending, and vectors of the whole space: min(n, rank + oversampling) of them.
        """
        size = min(len(matrix), rank + self.oversampling)
        if start is None or self.follow_steps is None:
            space = sharpened(matrix, random_columns(matrix, size, seed), self.power_steps)
        else:
            known = start[:, -size:]
            fresh = random_columns(matrix, size - known.shape[1], seed)
            space = sharpened(matrix, torch.cat([known, fresh], dim=1), self.follow_steps)
        return self.pairs(matrix, space)


class SketchedFactor(DenseFactor):
    """Leading eigenvectors of the moment by a randomised sketch.

    Args:
        ema: weight kept of the old moment per update.
        rank: how many.
        sketch: how they are looked for.
        tail: the eigenvalue of all the others.
    """

    def __init__(self, ema: float, rank: FixedRank | AdaptiveRank, sketch: Sketch, tail: Tail) -> None:
        super().__init__(ema)
        self.rank, self.sketch, self.tail = rank, sketch, tail
        self.wanted, self.refreshes = rank.most, 0

    def decomposing(self) -> Callable[[], Found]:
        """What sketches the moment as it is now, from the last refresh's basis where there is one.

        Returns:
            Finds all values and the kept vectors of the sketch, and the trace.
        """
        matrix, wanted, seed = self.moment.value, self.wanted, self.refreshes
        trace, start = matrix.trace(), None if self.spectrum is None else self.spectrum.basis

        def decompose() -> Found:
            values, vectors = self.sketch(matrix, wanted, start, seed)
            return [values, vectors[:, -self.rank.choose(values, trace)[0] :], trace]

        return decompose

    def adopt(self, found: Found) -> None:
        """Use new eigenpairs from now on.

        Args:
            found: all values, the kept vectors, and the trace.
        """
        values, vectors, trace = found
        kept, self.wanted = self.rank.choose(values, trace)
        self.refreshes += 1
        values = values[-kept:]
        self.spectrum = Spectrum(vectors, values, self.tail(values, trace, len(vectors)), trace)

    def cost(self, width: int) -> float:
        """Multiplications of a sketch: products with the moment, and orthonormal columns after each.

        Args:
            width: n.

        Returns:
            Their number.
        """
        columns, steps = self.wanted + self.sketch.oversampling, self.sketch.follow_steps or self.sketch.power_steps
        return float((steps + 1) * width * columns * (width + 4 * columns)) + eigen_cost(columns)

    def state_dict(self) -> dict[str, Any]:
        """Moment, spectrum, the rank asked for next and the number of refreshes."""
        return super().state_dict() | {"counts": [self.wanted, self.refreshes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moment, spectrum, rank and number.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.wanted, self.refreshes = state["counts"]
