"""One of several classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from acktr.likelihood.base import Layout, Outputs, PolicyLikelihood


@dataclass(frozen=True)
class Categorical(PolicyLikelihood):
    """One of C classes, by unnormalised log-probabilities; F_out = diag(p) − p pᵀ."""

    layout: ClassVar[Layout] = (("logits", "N, C"),)

    def sample(self, outputs: Outputs, generator: Generator | None = None) -> Outputs:
        """Draw classes.

        Args:
            outputs: (logits [N, C],).
            generator: source of randomness; None for torch's own.

        Returns:
            (classes [N],), int64.
        """
        (logits,) = outputs
        return (torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1),)

    def scores(self, outputs: Outputs, targets: Outputs) -> Outputs:
        """P − onehot(class).

        Args:
            outputs: (logits [N, C],).
            targets: (classes [N],).

        Returns:
            (shape [N, C],).
        """
        (logits,), (classes,) = outputs, targets
        scores = logits.softmax(-1)
        scores.scatter_add_(-1, classes.long().unsqueeze(-1), -torch.ones_like(scores[:, :1]))
        return (scores,)

    def factors(self, outputs: Outputs) -> list[Outputs]:
        """R_k = √p_k (e_k − p), since Σ p_k (e_k − p)(e_k − p)ᵀ = diag(p) − p pᵀ.

        Args:
            outputs: (logits [N, C],).

        Returns:
            C columns.
        """
        (logits,) = outputs
        p = logits.softmax(-1)
        columns = p.sqrt().unsqueeze(1) * (torch.eye(p.shape[-1], dtype=p.dtype, device=p.device) - p.unsqueeze(1)).mT
        return [(columns[:, :, k],) for k in range(p.shape[-1])]

    def inner(self, outputs: Outputs, left: Outputs, right: Outputs) -> Tensor:
        """Covariance of left and right under p.

        Args:
            outputs: (logits [N, C],).
            left: tangent of the logits.
            right: tangent of the logits.

        Returns:
            Shape [N].
        """
        # Of moments about 0 nothing would be left where logits move together, which classes do not notice.
        p = outputs[0].softmax(-1)
        one, other = (t - (p * t).sum(-1, keepdim=True) for t in (left[0], right[0]))
        return (p * one * other).sum(-1)

    def multiply(self, outputs: Outputs, tangent: Outputs) -> Outputs:
        """P ∘ (tangent − pᵀ tangent).

        Args:
            outputs: (logits [N, C],).
            tangent: of the logits.

        Returns:
            (shape [N, C],).
        """
        p = outputs[0].softmax(-1)
        return (p * (tangent[0] - (p * tangent[0]).sum(-1, keepdim=True)),)

    def divergence(self, old: Outputs, new: Outputs) -> Tensor:
        """Σ p_old (log p_old − log p_new).

        Args:
            old: (logits [N, C],).
            new: (logits [N, C],).

        Returns:
            Shape [N], nats.
        """
        log_old, log_new = old[0].log_softmax(-1), new[0].log_softmax(-1)
        return (log_old.exp() * (log_old - log_new)).sum(-1)

    def log_prob(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Log-probability of the targets; differentiable.

        Args:
            outputs: (logits [N, C],).
            targets: (classes [N],).

        Returns:
            Shape [N], nats.
        """
        return outputs[0].log_softmax(-1).gather(-1, targets[0].long().unsqueeze(-1)).squeeze(-1)

    def entropy(self, outputs: Outputs) -> Tensor:
        """−Σ p log p; differentiable.

        Args:
            outputs: (logits [N, C],).

        Returns:
            Shape [N], nats.
        """
        log_p = outputs[0].log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)
