"""EKFAC: K-FAC's eigenbasis with the Fisher's own diagonal in it (George et al. 2018).

F̂ = (U_A ⊗ U_G) diag(S) (U_A ⊗ U_G)ᵀ with S = E[(U_Gᵀ ∇ U_A)²], the closest to the Fisher of all matrices with these
eigenvectors (theorem 3: never further from it than K-FAC).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from acktr.curvature.base import Block, Place, Statistics
from acktr.curvature.damping import DampingRule, Tikhonov
from acktr.curvature.kronecker.kfac import EigenBlock
from acktr.curvature.lowrank.ekfac import LowRankEKFACBlock
from acktr.moments import Moment


class ScaledBlock(EigenBlock):
    """F̂ = (U_A ⊗ U_G) diag(S) (U_A ⊗ U_G)ᵀ, whatever fills the scaling S."""

    def multiply(self, matrix: Tensor) -> Tensor:
        """U_G [(U_Gᵀ V U_A) ∘ S] U_Aᵀ.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        output_basis, input_basis, scaling = self._bases()
        return output_basis @ ((output_basis.mT @ matrix @ input_basis) * scaling) @ input_basis.mT

    def quadratic(self, matrix: Tensor) -> Tensor:
        """Σ (U_Gᵀ V U_A)² ∘ S.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Scalar tensor.
        """
        output_basis, input_basis, scaling = self._bases()
        return ((output_basis.mT @ matrix @ input_basis).square() * scaling).sum()

    def _form(self, solution: Tensor, coordinates: Tensor) -> Tensor:
        return (coordinates.square() * self._bases()[2]).sum()

    def solver_with_batch(
        self, damping: float, weight: float, statistics: Statistics | None
    ) -> Callable[[Tensor], Tensor]:
        """V ↦ U_G [(U_Gᵀ V U_A) / (S + w S_B + λ)] U_Aᵀ.

        Args:
            damping: λ > 0.
            weight: w ≥ 0.
            statistics: the batch's rows; None takes S for S_B.

        Returns:
            A function of matrices [o, i].
        """
        output_basis, input_basis, scaling = self._bases()
        divisor = self._damped(scaling, damping) + weight * self._batch_scaling(statistics)
        return lambda matrix: output_basis @ ((output_basis.mT @ matrix @ input_basis) / divisor) @ input_basis.mT

    def multiply_batch(self, matrix: Tensor, statistics: Statistics | None) -> Tensor:
        """U_G [(U_Gᵀ V U_A) ∘ S_B] U_Aᵀ.

        Args:
            matrix: V, shape [o, i].
            statistics: the batch's rows; None takes S for S_B.

        Returns:
            Shape [o, i].
        """
        output_basis, input_basis, _ = self._bases()
        coordinates = (output_basis.mT @ matrix @ input_basis) * self._batch_scaling(statistics)
        return output_basis @ coordinates @ input_basis.mT

    def _batch_scaling(self, statistics: Statistics | None) -> Tensor:
        """S of one batch, in the present bases; S itself for who takes it from elsewhere."""
        return self._bases()[2]


class EKFACBlock(ScaledBlock):
    """Eigenbases refreshed now and then, scalings averaged at every update and carried over when the bases turn.

    Args:
        shape: [o, i].
        ema: weight kept of the old moments and scalings per update.
        rule: how damping enters; None for `Tikhonov`.
    """

    def __init__(self, shape: tuple[int, int], ema: float, rule: DampingRule | None = None) -> None:
        super().__init__(shape, ema, rule)
        self.squares = Moment(ema)

    @property
    def ready(self) -> bool:
        """Whether there are bases and scalings in them."""
        return not self.squares.empty

    def bases(self) -> list[Tensor]:
        """U_G and U_A, which scalings are measured in."""
        return list(self._bases()[:2])

    @property
    def basis_shapes(self) -> list[tuple[int, int]]:
        """[o, o] and [i, i]."""
        return [(width, width) for width in self.shape]

    def measured(self, statistics: Statistics, bases: list[Tensor]) -> list[Tensor]:
        """The batch's mean squared per-example gradient in the bases.

        Args:
            statistics: the layer's rows of this batch.
            bases: U_G and U_A.

        Returns:
            One tensor, shape [o, i].
        """
        return [statistics.squares(*bases)]

    def take_measured(self, measured: list[Tensor]) -> None:
        """Average the squares in.

        Args:
            measured: of `measured`, or the mean of several.
        """
        self.squares.update(measured[0])
        self.scaling = self.squares.value

    def _batch_scaling(self, statistics: Statistics | None) -> Tensor:
        output_basis, input_basis, scaling = self._bases()
        return scaling if statistics is None else statistics.squares(output_basis, input_basis)

    def _adopt(self, output_basis: Tensor, input_basis: Tensor, product: Tensor) -> None:
        if self.output_basis is not None and self.input_basis is not None and self.ready:
            output_turn, input_turn = self.output_basis.mT @ output_basis, self.input_basis.mT @ input_basis
            self.squares.replace(carry_scaling(self.squares.value, output_turn, input_turn))
            product = self.squares.value
        super()._adopt(output_basis, input_basis, product)

    def state_dict(self) -> dict[str, Any]:
        """Moments, bases and averaged squares."""
        return super().state_dict() | {"squares": self.squares.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments, bases and averaged squares.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.squares.load_state_dict(state["squares"])


def carry_scaling(scaling: Tensor, output_turn: Tensor, input_turn: Tensor) -> Tensor:
    """What a matrix that is diagonal in the old bases shows on the diagonal of the new ones.

    S' = (R_G ∘ R_G)ᵀ S (R_A ∘ R_A), R = U_oldᵀ U_new. Not in the paper, whose code starts afresh at each refresh:
    without it the average would mix squares taken along different directions.

    Args:
        scaling: S in the old bases, shape [o, i].
        output_turn: R_G, shape [o, o].
        input_turn: R_A, shape [i, i].

    Returns:
        Shape [o, i]; the trace is that of S.
    """
    return output_turn.square().mT @ scaling @ input_turn.square()


_WORTHWHILE = 4
"""How many times as wide as the rank a factor must be for leading eigenvectors to be cheaper than all of them."""


@dataclass(frozen=True)
class EKFAC:
    """EKFAC with scalings from per-example gradients of every batch (the paper's intra-batch estimate)."""

    ema: float = 0.95
    """Weight kept of the old moments and scalings per update."""
    rank: int | None = None
    """Eigenvectors kept of a factor more than four times as wide; the others share their mean eigenvalue. None keeps
    all, as do narrower factors, whose decomposition would cost no less."""
    damping: DampingRule = field(default_factory=Tikhonov)
    """How damping enters: `Tikhonov`, `PerCoordinate` or `FactoredTikhonov`."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, or None for all eigenvectors, got {self.rank}")
        if self.rank is not None and not isinstance(self.damping, Tikhonov):
            raise ValueError(
                f"{self.damping} needs the eigenvalue of every direction, rank={self.rank} keeps the leading ones: "
                "use rank=None or Tikhonov()"
            )

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        output_rank, input_rank = (self._kept(width) for width in place.shape)
        if (output_rank, input_rank) == place.shape:
            return EKFACBlock(place.shape, self.ema, self.damping)
        return LowRankEKFACBlock(place.shape, self.ema, (output_rank, input_rank))

    def _kept(self, width: int) -> int:
        return width if self.rank is None or width <= _WORTHWHILE * self.rank else self.rank
