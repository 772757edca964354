"""SUA: convolutions whose inputs are taken for uncorrelated between places (Grosse & Martens 2016, section 4).

The moment of the patches, [channels · offsets + 1]², is then that of the channels at one place, the same for every
offset of the kernel: with Σ = E[c cᵀ] over examples and positions, T positions and Δ offsets,

    Ω = diag(T Σ ⊗ I_Δ, T),   F̂ V = Γ V Ω,

a decomposition of [channels]² in place of [channels · offsets + 1]², and one small solve for all offsets. Σ is taken
from the patches' central offset, whose places are those of the output whatever stride and padding are.

Three versions. `SUA` has raw moments, as the reference code of EKFAC, which is not what uncorrelated means where inputs
have a mean; the bias is a block of its own, T Γ. `MeanSUA` has the uncorrelated inputs' moment exactly: covariances,
and one direction m = (μ ⊗ 1, 1) for mean and bias together, Ω = T (diag(Cov ⊗ I_Δ, 0) + m mᵀ). `SUAEKFAC` has the
Fisher's own diagonal in `SUA`'s basis. Where a layer has one offset, all is left to another choice: there the patches'
moment is no larger than the channels', and holds the bias too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.curvature.base import Block, CurvatureFactory, Place, Statistics
from acktr.curvature.kronecker.ekfac import EKFAC
from acktr.curvature.kronecker.kfac import KFAC
from acktr.linalg import symmetric_eigen
from acktr.moments import Gram, Moment


class SUABlock(Block):
    """Raw moments and a bias by itself, with exact Tikhonov damping in the eigenbasis.

    Args:
        place: the convolution's.
        ema: weight kept of the old moments per update.
    """

    output_basis: Tensor | None = None
    channel_basis: Tensor | None = None
    scaling: Tensor | None = None
    output_values: Tensor | None = None
    """Γ's eigenvalues, shape [o]."""

    def __init__(self, place: Place, ema: float) -> None:
        self.place = place
        self.channels = (place.shape[1] - place.bias) // place.offsets
        self.channel_moment = Moment(ema)
        """T E[(c, 1) (c, 1)ᵀ], shape [channels + 1]²: second moment, mean and number of positions in one."""
        self.output_moment = Moment(ema)

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self.place.shape

    @property
    def _like(self) -> dict[str, Any]:
        value = self.output_moment.value
        return {"dtype": value.dtype, "device": value.device}

    @property
    def ready(self) -> bool:
        """Whether the bases are there."""
        return self.scaling is not None

    def update(self, statistics: Statistics) -> None:
        """Average one batch's moments in.

        Args:
            statistics: the layer's rows of this batch.
        """
        kernel = self.place.offsets
        last = self.channels * kernel
        centre = statistics.inputs[..., _centre(kernel) : last : kernel].flatten(0, 1)
        rows = torch.cat([centre, centre.new_ones(len(centre), 1)], dim=1)
        self.channel_moment.update(Gram(rows, statistics.examples))
        self.output_moment.update(statistics.output_moment())

    def _decompose(self) -> None:
        moment = self.channel_moment.value
        values, basis = symmetric_eigen(moment[:-1, :-1])
        self._adopt(basis, self._spread(values, moment[-1, -1]))

    def _adopt(self, channel_basis: Tensor, input_values: Tensor) -> None:
        """Take the inputs' decomposition with one of the outputs."""
        output_values, output_basis = symmetric_eigen(self.output_moment.value)
        self._replace(output_basis, channel_basis, torch.outer(output_values, input_values))
        self.output_values = output_values

    def _replace(self, output_basis: Tensor, channel_basis: Tensor, product: Tensor) -> None:
        self.output_basis, self.channel_basis, self.scaling = output_basis, channel_basis, product

    def _spread(self, channel: Tensor, bias: Tensor) -> Tensor:
        """One number per channel and one for the bias as one per column, shape [i]."""
        columns = channel.repeat_interleave(self.place.offsets)
        return torch.cat([columns, bias.view(1)]) if self.place.bias else columns

    def _mix(self, matrix: Tensor, channels: Tensor) -> Tensor:
        """V (M ⊗ I_Δ) with M over channels; the bias's column stays."""
        width = self.channels * self.place.offsets
        body = matrix[..., :width].reshape(*matrix.shape[:-1], self.channels, self.place.offsets)
        mixed = (channels.mT @ body).flatten(-2)
        return torch.cat([mixed, matrix[..., width:]], dim=-1) if self.place.bias else mixed

    def _bases(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.output_basis is None or self.channel_basis is None or self.scaling is None:
            raise RuntimeError("the block has no bases yet; call refresh() after the first update")
        return self.output_basis, self.channel_basis, self.scaling

    def _turn(self, matrix: Tensor) -> Tensor:
        """V in the eigenbasis."""
        output_basis, channel_basis, _ = self._bases()
        return self._mix(output_basis.mT @ matrix, channel_basis)

    def _turn_back(self, coordinates: Tensor) -> Tensor:
        output_basis, channel_basis, _ = self._bases()
        return output_basis @ self._mix(coordinates, channel_basis.mT)

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(F̂ + λ)⁻¹ V in the eigenbasis.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        return self._turn_back(self._turn(matrix) / (self._bases()[2] + damping))

    def multiply(self, matrix: Tensor) -> Tensor:
        """Γ V Ω.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        moment = self.channel_moment.value
        product = self.output_moment.value @ self._mix(matrix, moment[:-1, :-1])
        if self.place.bias:
            product[:, -1] *= moment[-1, -1]
        return product

    def condition(self) -> float:
        """Largest over mean entry of the scaling."""
        scaling = self._bases()[2]
        return float(scaling.max() / scaling.mean().clamp_min(torch.finfo(scaling.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        """Moments, bases, scaling and the counts of failures and of the basis's age."""
        return {
            "channel_moment": self.channel_moment.state_dict(),
            "output_moment": self.output_moment.state_dict(),
            "counts": [self.failures, self.skipped_refreshes, self.basis_age],
            "bases": [self.output_basis, self.channel_basis, self.scaling, self.output_values],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it.

        Args:
            state: what `state_dict` returned.
        """
        self.channel_moment.load_state_dict(state["channel_moment"])
        self.output_moment.load_state_dict(state["output_moment"])
        self.failures, self.skipped_refreshes, self.basis_age = state["counts"]
        self.output_basis, self.channel_basis, self.scaling, self.output_values = state["bases"]


class MeanSUABlock(SUABlock):
    """Covariances, and one more direction for the mean and the bias: solved by Sherman and Morrison's formula."""

    mean: Tensor | None = None
    """μ ⊗ 1 in the eigenbasis, shape [channels · offsets]."""
    positions: Tensor | None = None
    """T, scalar."""

    def _decompose(self) -> None:
        covariance, mean, positions = self._moments()
        values, basis = symmetric_eigen(covariance)
        self._adopt(basis, self._spread(values, torch.zeros_like(positions)))
        self.mean, self.positions = (mean @ basis).repeat_interleave(self.place.offsets), positions

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """T Cov, μ and T."""
        moment = self.channel_moment.value
        positions = moment[-1, -1]
        mean = moment[:-1, -1] / positions.clamp_min(torch.finfo(moment.dtype).tiny)
        return moment[:-1, :-1] - positions * torch.outer(mean, mean), mean, positions

    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues of Γ ⊗ T Cov [o, channels · offsets], Γ's times T [o, 1], and the mean."""
        scaling = self._bases()[2]
        assert self.output_values is not None
        assert self.positions is not None
        assert self.mean is not None
        return scaling[:, : len(self.mean)], (self.positions * self.output_values)[:, None], self.mean

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(F̂ + λ)⁻¹ V, along each eigenvector of Γ by itself.

        With d T for its eigenvalue times T, the bias b is eliminated: b = (v_b − d T mᵀx) / (d T + λ) leaves
        (D + λ + c m mᵀ) x = v − d T / (d T + λ) v_b m with D diagonal and c = d T λ / (d T + λ), which is small; with
        b kept as a coordinate, all of its size would cancel. Without a bias c = d T.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        scaling, weights, mean = self._decomposed()
        coordinates, damped = self._turn(matrix), scaling + damping
        body, bias = coordinates[:, : len(mean)], coordinates[:, len(mean) :]
        if self.place.bias:
            share = weights / (weights + damping)
            body, factor = body - share * bias * mean, share * damping
        else:
            factor = weights
        plain, along = body / damped, mean / damped
        plain = plain - along * (factor * (plain @ mean)[:, None] / (1 + factor * (along @ mean)[:, None]))
        rest = (bias - weights * (plain @ mean)[:, None]) / (weights + damping)  # no column where there is no bias
        return self._turn_back(torch.cat([plain, rest], dim=1))

    def multiply(self, matrix: Tensor) -> Tensor:
        """Γ V Ω.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        covariance, mean, positions = self._moments()
        spread = self._mix(matrix, covariance)
        if self.place.bias:
            spread[:, -1] = 0
        direction = self._spread(mean, torch.ones_like(positions))
        return self.output_moment.value @ (spread + positions * torch.outer(matrix @ direction, direction))

    def condition(self) -> float:
        """Largest over mean entry of F̂'s diagonal in the eigenbasis."""
        scaling, weights, mean = self._decomposed()
        diagonal = torch.cat([scaling + weights * mean.square(), weights], dim=1)[:, : self.shape[1]]
        return float(diagonal.max() / diagonal.mean().clamp_min(torch.finfo(diagonal.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        """All of it, and the mean."""
        return super().state_dict() | {"mean": self.mean, "positions": self.positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it, and the mean.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.mean, self.positions = state["mean"], state["positions"]


class SUAEKFACBlock(SUABlock):
    """SUA's basis with the examples' mean squared gradients in it; they are carried over when the basis turns.

    Args:
        place: the convolution's.
        ema: weight kept of the old moments and scalings per update.
    """

    def __init__(self, place: Place, ema: float) -> None:
        super().__init__(place, ema)
        self.squares = Moment(ema)

    @property
    def ready(self) -> bool:
        """Whether there are bases and scalings in them."""
        return not self.squares.empty

    def rescale(self, statistics: Statistics) -> None:
        """Average the batch's squared per-example gradients, taken in the present bases.

        Args:
            statistics: the layer's rows of this batch.
        """
        output_basis, channel_basis, _ = self._bases()
        turned = Statistics(self._mix(statistics.inputs, channel_basis), statistics.output_grads)
        self.squares.update(turned.squares(output_basis))
        self.scaling = self.squares.value

    def _replace(self, output_basis: Tensor, channel_basis: Tensor, product: Tensor) -> None:
        if self.ready:
            old_output, old_channel, _ = self._bases()
            output_turn, channel_turn = old_output.mT @ output_basis, old_channel.mT @ channel_basis
            # The diagonal of the old F̂ as it shows in the new bases, as EKFAC's `carry_scaling`.
            carried = self._mix(output_turn.square().mT @ self.squares.value, channel_turn.square())
            self.squares.replace(carried)
            product = self.squares.value
        super()._replace(output_basis, channel_basis, product)

    def multiply(self, matrix: Tensor) -> Tensor:
        """The scalings in the eigenbasis.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        return self._turn_back(self._turn(matrix) * self._bases()[2])

    def state_dict(self) -> dict[str, Any]:
        """All of it, and the averaged squares."""
        return super().state_dict() | {"squares": self.squares.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it, and the averaged squares.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.squares.load_state_dict(state["squares"])


@dataclass(frozen=True)
class SUA:
    """K-FAC with raw channel moments for convolutions."""

    ema: float = 0.95
    """Weight kept of the old moments per update."""
    elsewhere: CurvatureFactory | None = None
    """Of layers with one offset: linear ones and 1 × 1 convolutions; None takes `KFAC(ema)`."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        if place.offsets == 1:
            return (self.elsewhere or KFAC(self.ema)).build(place)
        return SUABlock(place, self.ema)


@dataclass(frozen=True)
class MeanSUA(SUA):
    """K-FAC with covariances and a mean for convolutions: SUA as it is assumed, at next to no more cost."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        return super().build(place) if place.offsets == 1 else MeanSUABlock(place, self.ema)


@dataclass(frozen=True)
class SUAEKFAC(SUA):
    """EKFAC in SUA's basis for convolutions."""

    elsewhere: CurvatureFactory | None = None
    """Of layers with one offset: linear ones and 1 × 1 convolutions; None takes `EKFAC(ema)`."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        if place.offsets == 1:
            return (self.elsewhere or EKFAC(self.ema)).build(place)
        return SUAEKFACBlock(place, self.ema)


def _centre(offsets: int) -> int:
    """The kernel's central place: of a square one in both directions, of any odd one the one in the middle."""
    side = math.isqrt(offsets)
    return (side // 2) * (side + 1) if side * side == offsets else offsets // 2
