"""Which output gradients feed the curvature: the Fisher's seeds.

Each seed is shaped like the network's outputs; pulled back through the network, seeds g_k give the
Fisher as Σ_k E_n[g_k g_kᵀ]. Martens & Grosse 2015, section 5, on why targets come from the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Generator

from acktr.likelihood import Likelihood, Outputs


class FisherSeeds(Protocol):
    """A way to seed the Fisher's backward pass."""

    def __call__(
        self, likelihood: Likelihood, outputs: Outputs, targets: Outputs | None, generator: Generator | None
    ) -> list[Outputs]:
        """Seeds with Σ_k E[g_k g_kᵀ] = F_out, one backward pass each."""
        ...


@dataclass(frozen=True)
class SampledFisher:
    """Scores of targets drawn from the model: unbiased, one backward pass per draw."""

    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def __call__(
        self, likelihood: Likelihood, outputs: Outputs, targets: Outputs | None, generator: Generator | None
    ) -> list[Outputs]:
        """Draw `samples` targets and return their scores over √samples.

        Args:
            likelihood: what the outputs mean.
            outputs: the network's outputs, detached.
            targets: ignored; the model draws its own.
            generator: source of randomness.

        Returns:
            `samples` seeds.
        """
        scale = 1 / math.sqrt(self.samples)
        draws = (likelihood.sample(outputs, generator) for _ in range(self.samples))
        return [tuple(scale * s for s in likelihood.scores(outputs, draw)) for draw in draws]


@dataclass(frozen=True)
class ExactFisher:
    """The columns of F_out's square root: no noise, one backward pass per output dimension."""

    def __call__(
        self, likelihood: Likelihood, outputs: Outputs, targets: Outputs | None, generator: Generator | None
    ) -> list[Outputs]:
        """Return the likelihood's factors.

        Args:
            likelihood: what the outputs mean.
            outputs: the network's outputs, detached.
            targets: ignored.
            generator: ignored; nothing is drawn.

        Returns:
            One seed per column.
        """
        return likelihood.factors(outputs)


@dataclass(frozen=True)
class EmpiricalFisher:
    """Scores of the given targets: the true Fisher only where the model itself drew them (Kunstner et al. 2019)."""

    def __call__(
        self, likelihood: Likelihood, outputs: Outputs, targets: Outputs | None, generator: Generator | None
    ) -> list[Outputs]:
        """Return the scores of the given targets.

        Args:
            likelihood: what the outputs mean.
            outputs: the network's outputs, detached.
            targets: the data's targets, or the actions taken.
            generator: ignored; nothing is drawn.

        Returns:
            One seed.

        Raises:
            ValueError: if no targets are given.
        """
        if targets is None:
            raise ValueError("EmpiricalFisher needs the targets, got None; pass update_curvature(outputs, targets=...)")
        return [likelihood.scores(outputs, targets)]
