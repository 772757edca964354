"""The interface of a likelihood."""

from __future__ import annotations

from typing import Protocol

from torch import Generator, Tensor

Outputs = tuple[Tensor, ...]
"""A network's outputs (or targets, or tangents), N examples first."""


class Likelihood(Protocol):
    """A distribution over targets, parameterised by a network's outputs."""

    def sample(self, outputs: Outputs, generator: Generator | None = None) -> Outputs:
        """Draw targets from the model, one per example."""
        ...

    def scores(self, outputs: Outputs, targets: Outputs) -> Outputs:
        """Gradient of −log p(target) by the outputs, per example."""
        ...

    def factors(self, outputs: Outputs) -> list[Outputs]:
        """Columns R_k, shaped like the outputs, with Σ_k R_k R_kᵀ = F_out for every example."""
        ...

    def inner(self, outputs: Outputs, left: Outputs, right: Outputs) -> Tensor:
        """The bilinear form leftᵀ F_out right per example, shape [N]."""
        ...

    def divergence(self, old: Outputs, new: Outputs) -> Tensor:
        """KL(old ‖ new) per example in nats, shape [N]."""
        ...

    def distance(self, old: Outputs, new: Outputs) -> Tensor:
        """What a trust region bounds: the mean KL(old ‖ new) in nats, unless a likelihood bounds its parts apart."""
        return self.divergence(old, new).mean()

    def form(self, outputs: Outputs, tangent: Outputs) -> Tensor:
        """Twice the distance to second order, for outputs that move by `tangent`; scalar, float64."""
        return self.inner(outputs, tangent, tangent).double().mean()


class PolicyLikelihood(Likelihood, Protocol):
    """A likelihood whose targets are actions."""

    def log_prob(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Log-probability of the targets per example, differentiable, shape [N]."""
        ...

    def entropy(self, outputs: Outputs) -> Tensor:
        """Entropy per example, differentiable, shape [N]."""
        ...
