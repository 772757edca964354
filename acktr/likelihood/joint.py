"""Policy and value of one network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from acktr.likelihood.base import Layout, Likelihood, Outputs, Part, PolicyLikelihood
from acktr.likelihood.gaussian import ScalarGaussian


@dataclass(frozen=True)
class Joint(Likelihood):
    """Independent targets given the outputs: p(action, value) = policy · value (ACKTR, Wu et al. 2017, section 3.1).

    The Fisher is the sum of both. A trust region bounds each by itself: one sum would let a value with large errors
    use up the policy's share, or a policy hide a value that runs away.
    """

    policy: PolicyLikelihood
    value: ScalarGaussian
    value_radius: float = 1.0
    """Radius of the value's KL, as a multiple of the policy's."""

    @property
    def layout(self) -> Layout:
        """The policy's outputs, then the value."""
        return (*self.policy.layout, *self.value.layout)

    def _split(self, outputs: Outputs) -> tuple[Outputs, Outputs]:
        return outputs[:-1], outputs[-1:]

    def sample(self, outputs: Outputs, generator: Generator | None = None) -> Outputs:
        """Draw both parts.

        Args:
            outputs: the policy's outputs, then the value.
            generator: source of randomness; None for torch's own.

        Returns:
            The parts' targets, one after the other.
        """
        policy, value = self._split(outputs)
        return (*self.policy.sample(policy, generator), *self.value.sample(value, generator))

    def scores(self, outputs: Outputs, targets: Outputs) -> Outputs:
        """The parts' scores, one after the other.

        Args:
            outputs: the policy's outputs, then the value.
            targets: the policy's targets, then the value's.

        Returns:
            Shaped like the outputs.
        """
        policy, value = self._split(outputs)
        return (*self.policy.scores(policy, targets[:-1]), *self.value.scores(value, targets[-1:]))

    def factors(self, outputs: Outputs) -> list[Outputs]:
        """The parts' columns, each zero in the other part.

        Args:
            outputs: the policy's outputs, then the value.

        Returns:
            As many columns as both parts have.
        """
        policy, value = self._split(outputs)
        silent_policy = tuple(torch.zeros_like(o) for o in policy)
        silent_value = torch.zeros_like(value[0])
        return [(*column, silent_value) for column in self.policy.factors(policy)] + [
            (*silent_policy, *column) for column in self.value.factors(value)
        ]

    def inner(self, outputs: Outputs, left: Outputs, right: Outputs) -> Tensor:
        """Sum of the parts' bilinear forms.

        Args:
            outputs: the policy's outputs, then the value.
            left: tangents of all outputs.
            right: tangents of all outputs.

        Returns:
            Shape [N].
        """
        policy = self.policy.inner(outputs[:-1], left[:-1], right[:-1])
        return policy + self.value.inner(outputs[-1:], left[-1:], right[-1:])

    def multiply(self, outputs: Outputs, tangent: Outputs) -> Outputs:
        """The parts' products, one after the other.

        Args:
            outputs: the policy's outputs, then the value.
            tangent: of all outputs.

        Returns:
            Shaped like the outputs.
        """
        policy = self.policy.multiply(outputs[:-1], tangent[:-1])
        return *policy, *self.value.multiply(outputs[-1:], tangent[-1:])

    def divergence(self, old: Outputs, new: Outputs) -> Tensor:
        """Sum of the parts' divergences.

        Args:
            old: the policy's outputs, then the value.
            new: the policy's outputs, then the value.

        Returns:
            Shape [N], nats.
        """
        return self.policy.divergence(old[:-1], new[:-1]) + self.value.divergence(old[-1:], new[-1:])

    def parts(self) -> list[Part]:
        """Policy and value, each with its radius."""
        return [Part(self.policy, slice(0, -1), 1.0), Part(self.value, slice(-1, None), self.value_radius)]
