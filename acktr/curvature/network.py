"""The interface of a whole network's curvature: blocks' verbs, over tensors by parameter name.

`update` takes in a recorded pass, `follow` the gradient and says what the next `solve` is for, `solve` gives the
direction, and `quadratic` its length. A block diagonal is one such curvature; those that look across layers, or at the
network itself, are others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Generator, Tensor, nn

from acktr.capture import Pass
from acktr.curvature.base import BlockRule
from acktr.exact import Linearisation
from acktr.layers import Layer
from acktr.likelihood import Outputs
from acktr.ranks import Ranks
from acktr.tree import Tensors


class NetworkCurvature(ABC):
    """A network's curvature F̂; tensors below are one per trained parameter, by its dotted name and shaped like it."""

    ranks = Ranks()
    """The processes that share it."""

    @property
    @abstractmethod
    def layers(self) -> list[Layer]:
        """The layers whose passes must be captured."""

    @abstractmethod
    def weighs(self, examples: int) -> bool:
        """Whether `weighted_gradient` can answer: the latest update holds one gradient of each of N examples.

        Args:
            examples: N.

        Returns:
            False too if a trained parameter has no part in what is held.
        """

    @property
    def forms_tell(self) -> bool:
        """Whether a gradient that is not finite shows in the forms of what is solved for it, and nothing keeps it."""
        return False

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether `solve` can be called."""

    @abstractmethod
    def update(self, record: Pass, seeds: Sequence[Outputs], refresh: bool, generator: Generator | None = None) -> bool:
        """Take in a recorded pass.

        Args:
            record: the pass.
            seeds: output gradients, one backward pass each.
            refresh: whether to recompute what is expensive.
            generator: source of randomness for subsets of rows.

        Returns:
            False if anything was not finite; then nothing was taken in.
        """

    def release(self) -> None:
        """Let go of what was kept of the latest pass for `weighted_gradient` and for the batch's own curvature."""

    @abstractmethod
    def weighted_gradient(self, weights: Tensor) -> Tensors:
        """The gradient of an objective whose output gradient is a number per example times the one seed.

        Args:
            weights: shape [N].

        Returns:
            One tensor per trained parameter.
        """

    def follow(self, gradient: Tensors) -> Tensors:
        """Take in the objective's gradient, and say what the next `solve` is for; most curvatures hand it back.

        Args:
            gradient: ∇, one tensor per trained parameter.

        Returns:
            The gradient or, where the method puts an average in its place, that; shaped like it.
        """
        return gradient

    @abstractmethod
    def solve(self, tensors: Tensors, damping: float, linearisation: Linearisation | None = None) -> Tensors:
        """(F̂ + damping · I)⁻¹ applied to tensors.

        Args:
            tensors: one per trained parameter.
            damping: > 0.
            linearisation: the network around its parameters, for who needs more than the statistics.

        Returns:
            Shaped like `tensors`.
        """

    @abstractmethod
    def multiply(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensors:
        """F̂ applied to tensors, undamped; the linearisation as for `solve`."""

    @abstractmethod
    def quadratic(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensor:
        """Undamped tensorsᵀ F̂ tensors, a scalar ≥ 0; the linearisation as for `solve`."""

    def solve_with_form(
        self, tensors: Tensors, damping: float, linearisation: Linearisation | None = None
    ) -> tuple[Tensors, Tensor]:
        """The damped solve X and its undamped form Xᵀ F̂ X.

        Args:
            tensors: one per trained parameter.
            damping: > 0.
            linearisation: as for `solve`.

        Returns:
            X, shaped like `tensors`, and a scalar tensor.
        """
        solution = self.solve(tensors, damping, linearisation)
        return solution, self.quadratic(solution, linearisation)

    def solver_with_batch(
        self, damping: float, weight: float, linearisation: Linearisation | None = None
    ) -> Callable[[Tensors], Tensors]:
        """V ↦ (F̂ + w B + λ)⁻¹ V, where B is the latest batch's own curvature, or F̂ where that is not known.

        Args:
            damping: λ > 0.
            weight: w ≥ 0.
            linearisation: as for `solve`.

        Returns:
            A function of tensors, one per trained parameter.
        """

        def solve(tensors: Tensors) -> Tensors:
            solution = self.solve(tensors, damping / (1 + weight), linearisation)
            return {name: tensor / (1 + weight) for name, tensor in solution.items()}

        return solve

    def multiply_batch(self, tensors: Tensors) -> Tensors:
        """B applied to tensors, where B is the latest batch's own curvature, or F̂ where that is not known.

        Args:
            tensors: one per trained parameter.

        Returns:
            Shaped like `tensors`.
        """
        return self.multiply(tensors)

    @abstractmethod
    def split(self, tensors: Tensors) -> list[Tensors]:
        """The pieces of a direction that may be given lengths of their own; their union is `tensors`."""

    @abstractmethod
    def diagnostics(self) -> dict[str, float]:
        """Numbers worth logging, always by the same names."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, to the last bit."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class NetworkCurvatureFactory(Protocol):
    """A choice of curvature for a whole network."""

    def over(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        rules: Mapping[str, BlockRule],
    ) -> NetworkCurvature:
        """The curvature of a network's trained parameters, some of which may have rules of their own."""
        ...
