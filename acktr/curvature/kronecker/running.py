"""EKFAC-ra: EKFAC's scalings from one squared mean gradient per batch (George et al. 2018, "running average").

Where EKFAC squares every example's gradient and then takes the mean, this takes the mean and squares once,

    S ← α S + (1 − α) N Σ_k (U_Gᵀ ∇̄_k U_A)²,     ∇̄_k = E_n[ε_n g_kn aₙᵀ],

which for independent scores of mean zero has the same expectation: N times the variance of a mean is that of one. Each
batch is a draw of a chi-square with a degree of freedom per seed, so only a long average says anything.

Deviations from the paper and its code: the gradient is that of the sampled Fisher, never the objective's, which in
reinforcement learning carries advantages and is no score. Signs ε_n = ±1 per example make the estimate unbiased for
every kind of seeds: the columns of an exact Fisher, a critic's seeds of ones above all, do not have mean zero. The
average starts whole at K-FAC's d_G d_Aᵀ and is carried over when the bases change, where the code starts anew from that
product each time: carried over it was as near to the Fisher or nearer, on small networks with a basis for every update
and for every tenth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from acktr.curvature.base import Block, Place, Statistics
from acktr.curvature.damping import DampingRule, Tikhonov
from acktr.curvature.kronecker.ekfac import EKFACBlock
from acktr.moments import Moment


class RunningEKFACBlock(EKFACBlock):
    """Scalings averaged from squared mean gradients.

    Args:
        shape: [o, i].
        ema: weight kept of the old moments per update.
        scaling_ema: α, weight kept of the old scalings per update.
        rule: how damping enters; None for `Tikhonov`.
    """

    def __init__(self, shape: tuple[int, int], ema: float, scaling_ema: float, rule: DampingRule | None = None) -> None:
        super().__init__(shape, ema, rule)
        self.squares = Moment(scaling_ema)
        self.batches = 0

    def rescale(self, statistics: Statistics) -> None:
        """Average the batch's squared mean gradients, taken in the present bases.

        Args:
            statistics: the layer's rows of this batch.
        """
        output_basis, input_basis, _ = self._bases()
        self.batches += 1
        squares = torch.zeros_like(self.squares.value)
        for mean in self._mean_gradients(statistics):
            squares += (output_basis.mT @ mean @ input_basis).square()
        self.squares.update(statistics.examples * squares)
        self.scaling = self.squares.value

    def _mean_gradients(self, statistics: Statistics) -> list[Tensor]:
        inputs = statistics.inputs
        # The count of batches seeds the signs, so that a resumed run draws the same ones.
        generator = Generator().manual_seed(self.batches)
        signs = torch.randint(0, 2, (statistics.examples, 1, 1), generator=generator) * 2 - 1
        signed = (inputs * signs.to(inputs)).flatten(0, 1) / statistics.examples
        return [grads.flatten(0, 1).mT @ signed for grads in statistics.output_grads]

    def _adopt(self, output_basis: Tensor, input_basis: Tensor, product: Tensor) -> None:
        if not self.ready:
            self.squares.begin(product)
        super()._adopt(output_basis, input_basis, product)

    def state_dict(self) -> dict[str, Any]:
        """Moments, bases, averaged squares and the number of batches."""
        return super().state_dict() | {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments, bases, averaged squares and the number of batches.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.batches = state["batches"]


@dataclass(frozen=True)
class RunningEKFAC:
    """EKFAC-ra: scalings from squared mean gradients of the sampled Fisher, cheaper than EKFAC's and noisier."""

    ema: float = 0.95
    """Weight kept of the old moments per update."""
    scaling_ema: float = 0.95
    """Weight kept of the old scalings per update; the paper's code has 0.75, an average of seven draws."""
    damping: DampingRule = field(default_factory=Tikhonov)
    """How damping enters: `Tikhonov`, `PerCoordinate` or `FactoredTikhonov`."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        return RunningEKFACBlock(place.shape, self.ema, self.scaling_ema, self.damping)
