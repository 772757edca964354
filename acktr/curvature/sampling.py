"""Blocks with a square root of their damped inverse at hand: a Gaussian over the layer's weights.

Noisy natural gradient (Zhang, Sun, Duvenaud & Grosse 2018) reads a damped curvature as the precision of a posterior
over the weights, N(mean, scale · (F̂ + λ)⁻¹): narrow where the outputs depend on the weights, wide where they do not.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Generator, Tensor

from acktr.curvature.base import Block


class SampledBlock(Block):
    """A block from whose damped inverse one can draw.

    Where a block damps its factors each by itself, all verbs here speak of that matrix, as `solve` does.
    """

    @abstractmethod
    def spread(self, noise: Tensor, damping: float) -> Tensor:
        """R noise, with R Rᵀ = (F̂ + damping · I)⁻¹: white noise becomes noise of that covariance.

        Args:
            noise: shape [..., o, i].
            damping: λ > 0.

        Returns:
            Shape [..., o, i].
        """

    @abstractmethod
    def spectrum(self, damping: float) -> Tensor:
        """The eigenvalues of F̂ + damping · I.

        Args:
            damping: λ > 0.

        Returns:
            Shape [o, i], in no order.
        """

    def sample(self, scale: float, damping: float, generator: Generator) -> Tensor:
        """Draw from N(0, scale · (F̂ + damping · I)⁻¹).

        Args:
            scale: ≥ 0; 0 draws zeros.
            damping: λ > 0.
            generator: source of randomness, on the block's device.

        Returns:
            Shape [o, i].
        """
        like = {"device": generator.device} | self._like
        noise = torch.randn(self.shape, generator=generator, **like)
        return self.spread(noise.mul_(math.sqrt(scale)), damping)

    def effective_dimension(self, damping: float) -> Tensor:
        """d_eff = tr F̂ (F̂ + damping · I)⁻¹: how many directions the curvature, not the damping, decides.

        A draw at scale κ is expected to move the outputs by a KL of ½ κ d_eff.

        Args:
            damping: λ > 0.

        Returns:
            Scalar tensor between 0 and o · i.
        """
        spectrum = self.spectrum(damping)
        return (1 - damping / spectrum).sum()
