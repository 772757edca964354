"""The interface of a likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

Outputs = tuple[Tensor, ...]
"""A network's outputs (or targets, or tangents), N examples first."""


Layout = tuple[tuple[str, str], ...]
"""A network's outputs by name, each with its dimensions, such as ("logits", "N, C")."""


def check_outputs(likelihood: Likelihood, outputs: Outputs) -> None:
    """Hold a network's outputs against what a likelihood reads in them.

    Args:
        likelihood: the likelihood.
        outputs: the network's.

    Raises:
        ValueError: if their number or their dimensions differ, or there is no example among them.
    """
    layout: Layout = getattr(likelihood, "layout", ())  # somebody's own may be no more than its methods
    wanted, found = [dimensions.count(",") + 1 for _, dimensions in layout], [output.dim() for output in outputs]
    if layout and wanted != found:
        expected = " and ".join(f"{name} [{dimensions}]" for name, dimensions in layout)
        returned = " and ".join(str(list(output.shape)) for output in outputs)
        flatten = "; end it in nn.Flatten(0)" if (wanted, found) == ([1], [2]) and outputs[0].shape[1] == 1 else ""
        raise ValueError(
            f"a {type(likelihood).__name__} reads {expected}, and the network returned {returned or 'nothing'}{flatten}"
        )
    if any(output.shape[:1] == (0,) for output in outputs):
        raise ValueError("the recorded batch is empty; a curvature is a mean over examples and needs at least one")


def outputs_of(returned: Tensor | Outputs) -> Outputs:
    """What a network returned, as a tuple.

    Args:
        returned: a tensor, or tensors.

    Returns:
        The tensors.
    """
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)


class Likelihood(Protocol):
    """A distribution over targets, parameterised by a network's outputs."""

    @property
    def layout(self) -> Layout:
        """The outputs by name, and the dimensions of each; () where they can be anything."""
        return ()

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

    def multiply(self, outputs: Outputs, tangent: Outputs) -> Outputs:
        """F_out tangent per example, shaped like the outputs; this one differentiates the bilinear form.

        Args:
            outputs: the network's.
            tangent: of the outputs.

        Returns:
            Shaped like the outputs.
        """
        with torch.enable_grad():
            left = tuple(torch.zeros_like(t, requires_grad=True) for t in tangent)
            return torch.autograd.grad(self.inner(outputs, left, tangent).sum(), left)

    def divergence(self, old: Outputs, new: Outputs) -> Tensor:
        """KL(old ‖ new) per example in nats, shape [N]."""
        ...

    def parts(self) -> list[Part]:
        """What a trust region bounds apart; one part, the likelihood itself, unless it is made of several."""
        return [Part(self, slice(None), 1.0)]

    def distance(self, old: Outputs, new: Outputs) -> Tensor:
        """The largest mean KL(old ‖ new) among the parts in units of their radii, in nats; scalar."""
        distances = [p.likelihood.divergence(old[p.outputs], new[p.outputs]).mean() / p.radius for p in self.parts()]
        return torch.stack(distances).max()


@dataclass(frozen=True)
class Part:
    """A likelihood with a radius of its own."""

    likelihood: Likelihood
    outputs: slice
    """Which of the network's outputs are its own."""
    radius: float
    """As a multiple of the trust region's."""


class PolicyLikelihood(Likelihood, Protocol):
    """A likelihood whose targets are actions."""

    def log_prob(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Log-probability of the targets per example, differentiable, shape [N]."""
        ...

    def entropy(self, outputs: Outputs) -> Tensor:
        """Entropy per example, differentiable, shape [N]."""
        ...
