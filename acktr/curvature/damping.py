"""How damping enters a block that is diagonal in a Kronecker basis: the same everywhere, or with the factors' size.

Added to the scalings S of a block is λ + √λ C, where C comes from the factors' eigenvalues d_G and d_A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from acktr.linalg import split_damping


class DampingRule(Protocol):
    """A way to damp in a Kronecker basis."""

    def cross(self, output_values: Tensor, input_values: Tensor) -> Tensor | None:
        """C from d_G [o] and d_A [i], shape [o, i]; None for none."""
        ...


@dataclass(frozen=True)
class Tikhonov:
    """S + λ: the same damping in every direction."""

    def cross(self, output_values: Tensor, input_values: Tensor) -> Tensor | None:
        """None: there are no cross terms.

        Args:
            output_values: not looked at.
            input_values: not looked at.

        Returns:
            None.
        """
        return None


@dataclass(frozen=True)
class PerCoordinate:
    """S + λ + √λ (d_G + d_Aᵀ): damping in proportion to each coordinate's factors (George et al. 2018, appendix C).

    With K-FAC's S = d_G d_Aᵀ it is (d_G + √λ)(d_A + √λ)ᵀ, factored damping with π = 1. The constant before the cross
    terms is reconstructed from that identity, not read in the paper.
    """

    def cross(self, output_values: Tensor, input_values: Tensor) -> Tensor | None:
        """d_G + d_Aᵀ.

        Args:
            output_values: d_G, shape [o].
            input_values: d_A, shape [i].

        Returns:
            Shape [o, i].
        """
        return output_values[:, None] + input_values


@dataclass(frozen=True)
class FactoredTikhonov:
    """S + λ + √λ (π d_G + d_Aᵀ / π), π² = mean d_A / mean d_G: K-FAC's factored damping for any scalings.

    Beside `PerCoordinate` it does not depend on how the scale of A ⊗ G is split between A and G, which is a convention
    (for convolutions, sums over positions stand in A and means in G).
    """

    def cross(self, output_values: Tensor, input_values: Tensor) -> Tensor | None:
        """π d_G + d_Aᵀ / π.

        Args:
            output_values: d_G, shape [o].
            input_values: d_A, shape [i].

        Returns:
            Shape [o, i].
        """
        inverse, pi = split_damping(output_values.mean(), input_values.mean(), 1.0)
        return pi * output_values[:, None] + inverse * input_values
