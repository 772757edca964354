"""RS-KFAC and SRE-KFAC: K-FAC with leading eigenvectors from a randomised sketch (Puiu 2022).

Averaged moments have few large eigenvalues however wide the layer: batches older than m updates weigh ema^m. A sketch
of r + oversampling columns finds them at O(n² r) in place of O(n³), a solve costs O(o i r) in place of O(o i (o + i)).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from acktr.curvature.base import Block, Place
from acktr.curvature.lowrank.factors import AdaptiveRank, DenseFactor, Factor, FixedRank, Pairs, Sketch, SketchedFactor
from acktr.curvature.lowrank.pair import FactorDamping, FactorPairBlock, SplitDamping
from acktr.curvature.lowrank.spectrum import MeanOfRest, Tail
from acktr.linalg import ritz_pairs, singular_pairs


@dataclass(frozen=True)
class SREKFAC:
    """K-FAC with leading eigenvectors by symmetric randomised eigendecomposition of each factor.

    Deviations from the paper: sketches start from the basis of the last refresh, as one step from there follows a slow
    average as well as several from a random space do; every power step orthonormalises, without which float32 loses
    all modes below 1e-7 of the first; λ is split between the factors, and what the basis leaves out gets its mean.
    """

    ema: float = 0.95
    """Weight kept of the old moments per update."""
    rank: int | AdaptiveRank = 64
    """Eigenvectors kept of a factor more than twice as wide as rank + oversampling; narrower factors are decomposed
    whole, which costs no less there."""
    oversampling: int = 10
    """Columns of the sketch beside those kept, ≥ 0."""
    power_steps: int = 4
    """Power steps from a random space, ≥ 1."""
    follow_steps: int | None = 1
    """Power steps from the basis of the last refresh, ≥ 1; None starts from a random space every time."""
    tail: Tail = field(default_factory=MeanOfRest)
    """The eigenvalue of all other directions."""
    damping: FactorDamping = field(default_factory=SplitDamping)
    """How the damping enters the factors."""

    def __post_init__(self) -> None:
        if isinstance(self.rank, int) and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}; KFAC() keeps all eigenvectors")
        if self.oversampling < 0:
            raise ValueError(f"oversampling must be at least 0, got {self.oversampling}")
        if self.power_steps < 1:
            raise ValueError(f"power_steps must be at least 1, got {self.power_steps}")
        if self.follow_steps is not None and self.follow_steps < 1:
            raise ValueError(f"follow_steps must be at least 1, or None to start at random, got {self.follow_steps}")

    def _pairs(self) -> Pairs:
        return ritz_pairs

    @property
    def sketch(self) -> Sketch:
        """How eigenvectors are looked for."""
        return Sketch(self._pairs(), self.oversampling, self.power_steps, self.follow_steps)

    def factor(self, width: int) -> Factor:
        """One factor of a layer.

        Args:
            width: its n.

        Returns:
            A sketched factor, or a dense one where it is narrow.
        """
        rank = self.rank if isinstance(self.rank, AdaptiveRank) else FixedRank(self.rank)
        if width <= 2 * (rank.most + self.oversampling):
            return DenseFactor(self.ema)
        return SketchedFactor(self.ema, rank, self.sketch, self.tail)

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        outputs, inputs = place.shape
        return FactorPairBlock(place.shape, self.factor(outputs), self.factor(inputs), self.damping)


@dataclass(frozen=True)
class RSKFAC(SREKFAC):
    """K-FAC with leading eigenvectors by randomised singular value decomposition of each factor, its V side.

    From the same sketch it is a little closer than SRE-KFAC, and a little dearer; all else is the same.
    """

    def _pairs(self) -> Pairs:
        return singular_pairs
