"""RMSProp, Adagrad and Adam in the Kronecker-factored eigenbasis (George et al. 2018, "diagonal methods in the KFE").

With U_A, U_G the eigenvectors of K-FAC's factors and R = U_Gᵀ ∇ U_A the *objective's* gradient in their basis, a second
moment s of R stands where EKFAC has the Fisher's diagonal:

    X = U_G [R / (u √s + λ)] U_Aᵀ,      s ← β s + (1 − β) R²  (RMSProp, Adam),   s ← s + R²  (Adagrad)

and Adam has an average of ∇ in the place of ∇. So F̂ = U diag(u √s) Uᵀ is what the division implies, and no Fisher: the
blocks' own form is no KL. The exact metric and the measured KL do not look at F̂ and bound a step as ever; with
`BlockMetric` the first prediction is worth nothing, and the ratio of measured to predicted KL that each step learns
from the last has to make up for it.

The unit u is 1, as in the papers (`GradientScale`), or gives F̂ the trace of K-FAC's block (`FisherScale`): within a
layer both mean the same direction as λ → 0, but only then λ is a share of the same thing as in the other curvatures,
and layers keep their share of the step beside each other and beside parameters whose Fisher is known.

First moments live in parameter space: eigenvectors change sign and order at each refresh, gradients do not. Second
moments are carried over as EKFAC's scalings are. Averages are debiased, RMSProp's too, which in its source is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from acktr.curvature.base import Block, Place
from acktr.curvature.kronecker.ekfac import ScaledBlock, carry_scaling
from acktr.moments import Moment
from acktr.tree import all_finite


@dataclass(frozen=True)
class GradientScale:
    """u = 1: √s itself, in the objective's units; λ is these methods' ε."""

    def unit(self, roots: Tensor, level: Tensor) -> Tensor:
        """One.

        Args:
            roots: √s, shape [o, i].
            level: mean eigenvalue of K-FAC's block, scalar.

        Returns:
            Scalar tensor.
        """
        return torch.ones_like(level)


@dataclass(frozen=True)
class FisherScale:
    """u = mean eigenvalue of K-FAC's block / mean √s: in the Fisher's units, whatever the objective's."""

    def unit(self, roots: Tensor, level: Tensor) -> Tensor:
        """The ratio of the means.

        Args:
            roots: √s, shape [o, i].
            level: mean eigenvalue of K-FAC's block, scalar.

        Returns:
            Scalar tensor.
        """
        return level / roots.mean().clamp_min(torch.finfo(roots.dtype).tiny)


Scale = GradientScale | FisherScale


class Sum:
    """What Adagrad keeps in the place of an average."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was added yet."""
        return self._sum is None

    @property
    def value(self) -> Tensor:
        """The sum.

        Raises:
            RuntimeError: if nothing was added yet.
        """
        if self._sum is None:
            raise RuntimeError("the curvature holds no statistics yet; update it with a batch first")
        return self._sum

    def update(self, batch: Tensor) -> None:
        """Add.

        Args:
            batch: any shape, always the same.
        """
        self._sum = batch.clone() if self._sum is None else self._sum + batch

    def replace(self, value: Tensor) -> None:
        """Exchange the sum for another view of it.

        Args:
            value: the sum seen in other coordinates.
        """
        self._sum = value

    def state_dict(self) -> dict[str, Any]:
        """The sum."""
        return {"sum": None if self._sum is None else self._sum.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sum.

        Args:
            state: what `state_dict` returned.
        """
        self._sum = None if state["sum"] is None else state["sum"].clone()


class EigenMethodBlock(ScaledBlock):
    """A diagonal method in K-FAC's eigenbasis; K-FAC itself until it has seen a gradient.

    Args:
        shape: [o, i].
        ema: weight kept of the old factors per update.
        second: the second moment in the basis.
        first: the first moment in parameter space; None for a method without one.
        scale: the unit of F̂.
    """

    def __init__(
        self, shape: tuple[int, int], ema: float, second: Moment | Sum, first: Moment | None, scale: Scale
    ) -> None:
        super().__init__(shape, ema)
        self.second, self.first, self.scale = second, first, scale

    def follow(self, gradient: Tensor) -> Tensor:
        """Take a gradient into the moments; one whose squares are not finite is left out.

        Args:
            gradient: ∇, shape [o, i].

        Returns:
            What the division is for: the first moment or, without one, the gradient.
        """
        output_basis, input_basis, _ = self._bases()
        squares = (output_basis.mT @ gradient @ input_basis).square()
        if not all_finite([squares]):
            return gradient
        self.second.update(squares)
        self._rescale()
        if self.first is None:
            return gradient
        self.first.update(gradient)
        return self.first.value

    def _adopt(self, output_basis: Tensor, input_basis: Tensor, product: Tensor) -> None:
        turn = None
        if self.output_basis is not None and self.input_basis is not None and not self.second.empty:
            turn = self.output_basis.mT @ output_basis, self.input_basis.mT @ input_basis
        super()._adopt(output_basis, input_basis, product)
        if turn is not None:
            self.second.replace(carry_scaling(self.second.value, *turn))
            self._rescale()

    def _rescale(self) -> None:
        roots = self.second.value.sqrt()
        level = self.output_moment.value.diagonal().mean() * self.input_moment.value.diagonal().mean()
        self.scaling = self.scale.unit(roots, level) * roots

    def state_dict(self) -> dict[str, Any]:
        """Factors, bases and both moments."""
        moments = {"second": self.second.state_dict(), "first": None if self.first is None else self.first.state_dict()}
        return super().state_dict() | moments

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore factors, bases and both moments.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.second.load_state_dict(state["second"])
        if self.first is not None:
            self.first.load_state_dict(state["first"])


@dataclass(frozen=True)
class EigenRMSProp:
    """RMSProp in K-FAC's eigenbasis."""

    ema: float = 0.95
    """Weight kept of the old factors per update."""
    second_ema: float = 0.99
    """β, weight kept of the old second moment per step."""
    scale: Scale = field(default_factory=FisherScale)
    """The unit of F̂, and so of the damping: `FisherScale` or `GradientScale`."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        return EigenMethodBlock(place.shape, self.ema, Moment(self.second_ema), None, self.scale)


@dataclass(frozen=True)
class EigenAdagrad:
    """Adagrad in K-FAC's eigenbasis; with `FisherScale` the sum weighs directions, and does not shorten steps."""

    ema: float = 0.95
    """Weight kept of the old factors per update."""
    scale: Scale = field(default_factory=FisherScale)
    """The unit of F̂, and so of the damping: `FisherScale` or `GradientScale`."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        return EigenMethodBlock(place.shape, self.ema, Sum(), None, self.scale)


@dataclass(frozen=True)
class EigenAdam:
    """Adam in K-FAC's eigenbasis, its first moment in parameter space."""

    ema: float = 0.95
    """Weight kept of the old factors per update."""
    first_ema: float = 0.9
    """β₁, weight kept of the old first moment per step."""
    second_ema: float = 0.999
    """β₂, weight kept of the old second moment per step."""
    scale: Scale = field(default_factory=FisherScale)
    """The unit of F̂, and so of the damping: `FisherScale` or `GradientScale`."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        return EigenMethodBlock(place.shape, self.ema, Moment(self.second_ema), Moment(self.first_ema), self.scale)
