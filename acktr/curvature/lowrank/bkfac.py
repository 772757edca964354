"""B-KFAC, B-R-KFAC and B-KFAC-C: K-FAC whose factors are updated by the batch's rows at linear cost (Puiu 2022).

Only layers far wider than their batch's rows profit: a factor with rank + columns ≥ n, and those of a convolution,
whose rows are examples × positions, are SRE-KFAC's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from acktr.curvature.base import Block, Place
from acktr.curvature.lowrank.brand import BrandFactor, Correction, Overwrite, Repair
from acktr.curvature.lowrank.factors import Factor
from acktr.curvature.lowrank.pair import FactorDamping, FactorPairBlock, SplitDamping
from acktr.curvature.lowrank.randomised import SREKFAC

_MOST_COLUMNS = 128


@dataclass(frozen=True)
class BKFAC:
    """K-FAC with Brand's updates; no moment is ever formed.

    Deviations from the paper: averages are debiased as everywhere here; a random subset stands for a large batch; what
    was discarded is metered and returns as the eigenvalue of all directions outside of the basis; λ is split.
    """

    ema: float = 0.95
    """Weight kept of the old moments per update."""
    rank: int = 64
    """Eigenvectors that an update starts from; between updates there are up to rank + columns, and all are used."""
    columns: int | None = None
    """Most rows of a batch that enter an update; beyond, a random subset stands for all. None for twice the rank, and
    no more than 128."""
    damping: FactorDamping = field(default_factory=SplitDamping)
    """How the damping enters the factors."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}; KFAC() keeps all eigenvectors")
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"columns must be at least 1, or None for twice the rank, got {self.columns}")

    def _repair(self) -> Repair | None:
        return None

    def factor(self, width: int) -> Factor:
        """One factor of a layer without positions.

        Args:
            width: its n.

        Returns:
            A Brand factor, or SRE-KFAC's where it is narrow.
        """
        columns = min(_MOST_COLUMNS, 2 * self.rank) if self.columns is None else self.columns
        if self.rank + columns >= width:
            return self._sketched.factor(width)
        return BrandFactor(width, self.ema, self.rank, columns, self._repair())

    @property
    def _sketched(self) -> SREKFAC:
        return SREKFAC(self.ema, self.rank, damping=self.damping)

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        if place.offsets > 1:
            return self._sketched.build(place)
        outputs, inputs = place.shape
        return FactorPairBlock(place.shape, self.factor(outputs), self.factor(inputs), self.damping)


@dataclass(frozen=True)
class BRKFAC(BKFAC):
    """B-KFAC with a maintained moment whose sketch overwrites the basis now and then."""

    overwrite_period: int = 25
    """Updates between two sketches of the moment, made at the next refresh."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overwrite_period < 1:
            raise ValueError(f"overwrite_period must be at least 1, got {self.overwrite_period}")

    def _repair(self) -> Repair:
        return Overwrite(self.overwrite_period, self.rank, self._sketched.sketch)


@dataclass(frozen=True)
class BKFACC(BKFAC):
    """B-KFAC with a maintained moment that corrects a random part of the basis now and then."""

    correction_period: int = 5
    """Updates between two corrections, made at the next refresh."""
    share: float = 0.2
    """Of the basis's columns, in (0, 1], that a correction turns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction_period < 1:
            raise ValueError(f"correction_period must be at least 1, got {self.correction_period}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}; BKFAC() corrects nothing")

    def _repair(self) -> Repair:
        return Correction(self.correction_period, self.share)
