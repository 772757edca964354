"""The loss that a step goes down on, for who looks at it again after the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acktr.likelihood import Outputs

Loss = Callable[[Outputs], Tensor | float]
"""The mean loss of the recorded batch, from the network's outputs on it now."""


def number(loss: Tensor | float) -> float:
    """A loss as a number, with or without its graph.

    Args:
        loss: scalar.

    Returns:
        Its value.
    """
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


@dataclass(frozen=True)
class Objective:
    """h = loss + ½ decay ‖θ‖²."""

    loss: Loss
    leaves: Sequence[Tensor]
    """θ."""
    decay: float = 0.0

    def value(self, outputs: Outputs, loss: float | None = None) -> float:
        """The objective at the present parameters.

        Args:
            outputs: the network's, on the recorded batch.
            loss: the loss, where it is known.

        Returns:
            h.
        """
        known = number(self.loss(outputs)) if loss is None else loss
        if not self.decay:
            return known
        squares = sum(float(square) ** 2 for square in torch._foreach_norm(list(self.leaves)))
        return known + 0.5 * self.decay * squares


@dataclass(frozen=True)
class Foretold:
    """What the quadratic model says of a step of any length along one direction."""

    slope: float
    """∇ᵀΔ."""
    curvature: float
    """Δᵀ(F + λ)Δ."""

    def reduction(self, scale: float) -> float:
        """M(ηΔ) − M(0).

        Args:
            scale: η.

        Returns:
            Negative where the model goes down.
        """
        return scale * self.slope + 0.5 * scale**2 * self.curvature

    def ratio(self, scale: float, change: float) -> float:
        """ρ = (h(θ + ηΔ) − h(θ)) / (M(ηΔ) − M(0)).

        Args:
            scale: η.
            change: of the loss.

        Returns:
            ρ; NaN for a step that the model does not go down on, of length 0 for instance.
        """
        reduction = self.reduction(scale)
        return change / reduction if reduction < 0 else float("nan")
