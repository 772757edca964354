"""K-FAC's factors of a convolution from reduced rows: inputs averaged over positions, output gradients summed.

An example's gradient Σ_s g aᵀ is taken for (Σ_s g)(mean_s a)ᵀ. That is exact where every position has the same output
gradient, as under a mean over the whole image; KFC (`KFAC` by itself) takes the positions for independent instead. The
factors take N rows in place of N · S (Eschenhagen et al. 2023, arXiv 2311.00636, call the two "reduce" and "expand").
"""

from __future__ import annotations

from dataclasses import dataclass, field

from acktr.curvature.base import Block, CurvatureFactory, Place, Statistics
from acktr.curvature.kronecker.kfac import KFAC
from acktr.curvature.kronecker.product import KroneckerBlock


def reduced(statistics: Statistics) -> Statistics:
    """One row per example: inputs averaged over the positions, output gradients summed.

    Args:
        statistics: the layer's rows of a batch.

    Returns:
        Rows with S = 1; the same ones where it was 1 before.
    """
    if statistics.inputs.shape[1] == 1:
        return statistics
    return Statistics(statistics.inputs.mean(1, keepdim=True), statistics.output_grads.sum(2, keepdim=True))


@dataclass(frozen=True)
class KFCReduce:
    """Reduced factors for any choice that has K-FAC's two moments: `KFAC()`, `FactoredKFAC()`, `EKFAC()`.

    EKFAC takes its bases from the reduced moments, and its scalings from the examples' gradients as they are: they are
    the Fisher's diagonal in those bases, whatever gave the bases.
    """

    of: CurvatureFactory = field(default_factory=KFAC)
    """How the moments are decomposed and damped."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.

        Raises:
            ValueError: if the choice has no Kronecker factors.
        """
        block = self.of.build(place)
        if not isinstance(block, KroneckerBlock):
            raise ValueError(f"KFCReduce needs a choice with Kronecker factors, as KFAC() or EKFAC(), got {self.of}")
        block.rows_of = reduced
        return block
