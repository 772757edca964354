"""Several independent yes-or-no answers: pixels of an autoencoder, several labels at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from acktr.likelihood.base import Layout, Likelihood, Outputs


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """D independent answers by their log-odds z, with p = σ(z); F_out = diag(p (1 − p)).

    Targets may lie between 0 and 1, as grey pixels do: −log p is then the cross-entropy.
    """

    layout: ClassVar[Layout] = (("log-odds", "N, D"),)

    def sample(self, outputs: Outputs, generator: Generator | None = None) -> Outputs:
        """Draw answers.

        Args:
            outputs: (log-odds [N, D],).
            generator: source of randomness; None for torch's own.

        Returns:
            (zeros and ones [N, D],).
        """
        return (torch.bernoulli(outputs[0].sigmoid(), generator=generator),)

    def scores(self, outputs: Outputs, targets: Outputs) -> Outputs:
        """P − target.

        Args:
            outputs: (log-odds [N, D],).
            targets: (answers [N, D],) in [0, 1].

        Returns:
            (shape [N, D],).
        """
        return (outputs[0].sigmoid() - targets[0],)

    def factors(self, outputs: Outputs) -> list[Outputs]:
        """√(p (1 − p)) e_d for each answer.

        Args:
            outputs: (log-odds [N, D],).

        Returns:
            D columns.
        """
        deviation = _variance(outputs[0]).sqrt()
        return [(F.pad(deviation[:, d : d + 1], (d, deviation.shape[1] - d - 1)),) for d in range(deviation.shape[1])]

    def inner(self, outputs: Outputs, left: Outputs, right: Outputs) -> Tensor:
        """Σ_d p (1 − p) left right.

        Args:
            outputs: (log-odds [N, D],).
            left: tangent of the log-odds.
            right: tangent of the log-odds.

        Returns:
            Shape [N].
        """
        return (_variance(outputs[0]) * left[0] * right[0]).sum(-1)

    def divergence(self, old: Outputs, new: Outputs) -> Tensor:
        """Σ_d p_old (z_old − z_new) + log(1 + e^z_new) − log(1 + e^z_old).

        Args:
            old: (log-odds [N, D],).
            new: (log-odds [N, D],).

        Returns:
            Shape [N], nats.
        """
        (z,), (w,) = old, new
        return (z.sigmoid() * (z - w) + F.softplus(w) - F.softplus(z)).sum(-1)

    def log_prob(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Log-probability of the targets; differentiable.

        Args:
            outputs: (log-odds [N, D],).
            targets: (answers [N, D],) in [0, 1].

        Returns:
            Shape [N], nats.
        """
        return -F.binary_cross_entropy_with_logits(outputs[0], targets[0], reduction="none").sum(-1)


def _variance(log_odds: Tensor) -> Tensor:
    # σ(z) σ(−z): 1 − p would lose its digits where p is near 1.
    return log_odds.sigmoid() * (-log_odds).sigmoid()
