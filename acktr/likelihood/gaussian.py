"""Normal distributions: of actions, and of values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from acktr.likelihood.base import Layout, Likelihood, Outputs, PolicyLikelihood


@dataclass(frozen=True)
class DiagonalGaussian(PolicyLikelihood):
    """Independent normals by mean and log standard deviation; F_out = diag(1/σ², 2)."""

    layout: ClassVar[Layout] = (("mean", "N, D"), ("log_std", "N, D"))

    def sample(self, outputs: Outputs, generator: Generator | None = None) -> Outputs:
        """Draw points.

        Args:
            outputs: (mean [N, D], log_std [N, D]).
            generator: source of randomness; None for torch's own.

        Returns:
            (points [N, D],).
        """
        mean, log_std = outputs
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return (mean + log_std.exp() * noise,)

    def scores(self, outputs: Outputs, targets: Outputs) -> Outputs:
        """((mean − x)/σ², 1 − ((x − mean)/σ)²).

        Args:
            outputs: (mean [N, D], log_std [N, D]).
            targets: (points [N, D],).

        Returns:
            Two tensors of shape [N, D].
        """
        mean, log_std = outputs
        z = (targets[0] - mean) * (-log_std).exp()
        return -z * (-log_std).exp(), 1 - z.square()

    def factors(self, outputs: Outputs) -> list[Outputs]:
        """e_d/σ_d for each mean, √2 e_d for each log_std.

        Args:
            outputs: (mean [N, D], log_std [N, D]).

        Returns:
            2 D columns.
        """
        mean, log_std = outputs
        zeros = torch.zeros_like(mean)
        columns: list[Outputs] = []
        for d in range(mean.shape[-1]):
            unit = torch.zeros_like(mean)
            unit[:, d] = 1
            columns += [(unit * (-log_std).exp(), zeros), (zeros, math.sqrt(2) * unit)]
        return columns

    def inner(self, outputs: Outputs, left: Outputs, right: Outputs) -> Tensor:
        """Σ_d left_μ right_μ / σ² + 2 left_logσ right_logσ.

        Args:
            outputs: (mean [N, D], log_std [N, D]).
            left: tangents of both.
            right: tangents of both.

        Returns:
            Shape [N].
        """
        precision = (-2 * outputs[1]).exp()
        return (precision * left[0] * right[0] + 2 * left[1] * right[1]).sum(-1)

    def multiply(self, outputs: Outputs, tangent: Outputs) -> Outputs:
        """The tangents times 1/σ² and 2.

        Args:
            outputs: (mean [N, D], log_std [N, D]).
            tangent: of both.

        Returns:
            Two tensors of shape [N, D].
        """
        return (-2 * outputs[1]).exp() * tangent[0], 2 * tangent[1]

    def divergence(self, old: Outputs, new: Outputs) -> Tensor:
        """Σ_d log(σ_new/σ_old) + (σ_old² + (μ_old − μ_new)²)/(2σ_new²) − ½.

        Args:
            old: (mean [N, D], log_std [N, D]).
            new: (mean [N, D], log_std [N, D]).

        Returns:
            Shape [N], nats.
        """
        (old_mean, old_log_std), (new_mean, new_log_std) = old, new
        shift = (old_mean - new_mean).square() * (-2 * new_log_std).exp()
        log_ratio = new_log_std - old_log_std
        # expm1 keeps the digits of a small change, where σ²/σ² − 1 would lose them.
        return (log_ratio + 0.5 * torch.expm1(-2 * log_ratio) + 0.5 * shift).sum(-1)

    def log_prob(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Log-density of the targets; differentiable.

        Args:
            outputs: (mean [N, D], log_std [N, D]).
            targets: (points [N, D],).

        Returns:
            Shape [N], nats.
        """
        mean, log_std = outputs
        z = (targets[0] - mean) * (-log_std).exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, outputs: Outputs) -> Tensor:
        """Σ_d log σ_d + ½ log 2πe; differentiable.

        Args:
            outputs: (mean [N, D], log_std [N, D]).

        Returns:
            Shape [N], nats.
        """
        return (outputs[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


@dataclass(frozen=True)
class ScalarGaussian(Likelihood):
    """A value with a fixed variance; F_out = 1/variance, so variance 1 makes the Fisher the Gauss–Newton matrix."""

    variance: float = 1.0
    layout: ClassVar[Layout] = (("value", "N"),)

    def __post_init__(self) -> None:
        if not 0 < self.variance < math.inf:
            raise ValueError(f"variance must be positive and finite, got {self.variance}")

    def sample(self, outputs: Outputs, generator: Generator | None = None) -> Outputs:
        """Draw value ± σ with equal chances.

        A deviation from a normal draw on purpose: scores enter the curvature through their second moment,
        which these two points match exactly, so the draw adds no noise of its own and still decorrelates
        the value's scores from the policy's in a shared trunk.

        Args:
            outputs: (value [N],).
            generator: source of randomness; None for torch's own.

        Returns:
            (shape [N],).
        """
        (value,) = outputs
        signs = torch.randint(0, 2, value.shape, device=value.device, generator=generator).to(value.dtype) * 2 - 1
        return (value + math.sqrt(self.variance) * signs,)

    def scores(self, outputs: Outputs, targets: Outputs) -> Outputs:
        """(value − target)/variance.

        Args:
            outputs: (value [N],).
            targets: (shape [N],).

        Returns:
            (shape [N],).
        """
        return ((outputs[0] - targets[0]) / self.variance,)

    def factors(self, outputs: Outputs) -> list[Outputs]:
        """One column of 1/σ.

        Args:
            outputs: (value [N],).

        Returns:
            One column.
        """
        return [(torch.full_like(outputs[0], 1 / math.sqrt(self.variance)),)]

    def inner(self, outputs: Outputs, left: Outputs, right: Outputs) -> Tensor:
        """The product left · right / variance.

        Args:
            outputs: (value [N],); unused, the metric is constant.
            left: tangent of the value.
            right: tangent of the value.

        Returns:
            Shape [N].
        """
        return left[0] * right[0] / self.variance

    def multiply(self, outputs: Outputs, tangent: Outputs) -> Outputs:
        """Tangent / variance.

        Args:
            outputs: (value [N],); unused, the metric is constant.
            tangent: of the value.

        Returns:
            (shape [N],).
        """
        return (tangent[0] / self.variance,)

    def divergence(self, old: Outputs, new: Outputs) -> Tensor:
        """(old − new)² / (2 variance).

        Args:
            old: (value [N],).
            new: (value [N],).

        Returns:
            Shape [N], nats.
        """
        return (old[0] - new[0]).square() / (2 * self.variance)
