"""The exact Fisher, inverted by conjugate gradients: TRPO's direction, and Hessian-free optimisation's.

Nothing is estimated and nothing averaged: F is that of the batch at hand, whole, and its products are passes through
the network (Schulman et al. 2015, appendix C; Martens 2010, where F is the Gauss–Newton matrix, which for the
likelihoods here is the same). What a block approximation gives in one product takes as many passes as there are
iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from acktr.capture import Pass
from acktr.conjugate import Operator, Solution, Stop, conjugate_gradient
from acktr.curvature.base import BlockRule, CurvatureFactory
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.network import NetworkCurvature
from acktr.exact import Linearisation
from acktr.layers import Layer
from acktr.likelihood import Outputs
from acktr.tree import Tensors


class ExactCGCurvature(NetworkCurvature):
    """F of the batch by passes through the network; its inverse by conjugate gradients.

    Args:
        parameters: the trained parameters, by dotted name.
        settings: of the solves.
        preconditioner: an approximation of F that solves at once, fed like any other; None for none.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: ExactCG,
        preconditioner: BlockDiagonal | None = None,
    ) -> None:
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._settings = settings
        self._preconditioner = preconditioner
        self._previous: Tensor | None = None
        self.last: Solution | None = None
        """The latest solve."""

    @property
    def layers(self) -> list[Layer]:
        """The preconditioner's layers."""
        return [] if self._preconditioner is None else self._preconditioner.layers

    def weighs(self, examples: int) -> bool:
        """Never: nothing is kept of a pass.

        Args:
            examples: unused.

        Returns:
            False.
        """
        return False

    @property
    def ready(self) -> bool:
        """Whether the preconditioner is, if there is one."""
        return self._preconditioner is None or self._preconditioner.ready

    def update(self, record: Pass, seeds: Sequence[Outputs], refresh: bool, generator: Generator | None = None) -> bool:
        """Show the preconditioner the pass; F itself needs no statistics.

        Args:
            record: the pass.
            seeds: output gradients, one backward pass each.
            refresh: whether to decompose anew.
            generator: source of randomness for subsets of rows.

        Returns:
            False if anything was not finite; then nothing was taken in.
        """
        if self._preconditioner is None:
            return True
        taken = self._preconditioner.update(record, seeds, refresh, generator)
        self._preconditioner.release()
        return taken

    def weighted_gradient(self, weights: Tensor) -> Tensors:
        """Refuse: nothing is kept of a pass.

        Args:
            weights: unused.

        Raises:
            ValueError: always.
        """
        raise ValueError("the exact Fisher keeps no rows to weigh; run the loss's own backward")

    @torch.no_grad()
    def solve(self, tensors: Tensors, damping: float, linearisation: Linearisation | None = None) -> Tensors:
        """(F + damping · I)⁻¹ applied to tensors, as far as the iterations go.

        A truncated solve is no linear operator, and with a warm start it depends on the solve before.

        Args:
            tensors: one per trained parameter.
            damping: > 0.
            linearisation: the network around its parameters, on the batch whose Fisher is meant.

        Returns:
            Shaped like `tensors`.
        """
        around, right = _needed(linearisation), self._flat(tensors)
        size = float(right.abs().max()) or 1.0

        def product(vector: Tensor) -> Tensor:
            return torch.add(self._flat(around.multiply(self._unflat(vector))), vector, alpha=damping)

        start = None if self._previous is None else self._settings.warm_start * self._previous
        # Of entries of order one, squares neither overflow nor vanish.
        solution = conjugate_gradient(product, right / size, self._settings.stop, start, self._preconditioning(damping))
        self.last = solution
        if self._settings.warm_start:
            # One that is not finite is no start: the search for a step will refuse it.
            self._previous = solution.tensor if bool(torch.isfinite(solution.tensor).all()) else None
        return self._unflat(size * solution.tensor)

    def _preconditioning(self, damping: float) -> Operator | None:
        inner = self._preconditioner
        if inner is None:
            return None
        return lambda vector: self._flat(inner.solve(self._unflat(vector), damping))

    def multiply(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensors:
        """F applied to tensors.

        Args:
            tensors: one per trained parameter.
            linearisation: the network around its parameters, on the batch whose Fisher is meant.

        Returns:
            Shaped like `tensors`.
        """
        product = _needed(linearisation).multiply(tensors)
        return {name: product[name] for name in tensors}

    def quadratic(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensor:
        """The form tensorsᵀ F tensors, by one forward-mode pass.

        Args:
            tensors: one per trained parameter.
            linearisation: the network around its parameters, on the batch whose Fisher is meant.

        Returns:
            Scalar tensor ≥ 0.
        """
        return _needed(linearisation).fisher_form(tensors)

    def multiply_batch(self, tensors: Tensors) -> Tensors:
        """Refuse: who asks for it moves the network meanwhile.

        Args:
            tensors: unused.

        Raises:
            ValueError: always.
        """
        raise ValueError("WakeQE moves the network within a step, and the exact Fisher with it; take WakeQ or WakeSO")

    def split(self, tensors: Tensors) -> list[Tensors]:
        """The whole: F knows how the layers move together.

        Args:
            tensors: one per trained parameter.

        Returns:
            One piece.
        """
        return [tensors]

    def diagnostics(self) -> dict[str, float]:
        """Iterations of the latest solve and the residual it left, relative to the right side; 0 before the first."""
        solution = self.last
        own = {
            "cg_iterations": float(solution.iterations) if solution else 0.0,
            "cg_residual": solution.residual if solution else 0.0,
        }
        return own if self._preconditioner is None else own | self._preconditioner.diagnostics()

    def state_dict(self) -> dict[str, Any]:
        """The solution that the next solve starts from, and the preconditioner."""
        inner = self._preconditioner
        return {
            "previous": None if self._previous is None else self._previous.clone(),
            "preconditioner": None if inner is None else inner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: if it is the state of another curvature.
        """
        if state.keys() != {"previous", "preconditioner"}:
            raise ValueError(f"curvature state is of {sorted(state)}, not of conjugate gradients")
        if self._preconditioner is not None:
            if state["preconditioner"] is None:
                raise ValueError("the state was saved without a preconditioner; leave it out, or begin anew with one")
            self._preconditioner.load_state_dict(state["preconditioner"])
        self._previous = None if state["previous"] is None else state["previous"].clone()

    def _flat(self, tensors: Tensors) -> Tensor:
        return torch.cat([tensors[name].reshape(-1) for name in self._shapes])

    def _unflat(self, vector: Tensor) -> Tensors:
        pieces = torch.split(vector, [shape.numel() for shape in self._shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}


def _needed(linearisation: Linearisation | None) -> Linearisation:
    if linearisation is None:
        raise ValueError("the exact Fisher is that of a network on a batch; pass its linearisation")
    return linearisation


@dataclass(frozen=True)
class ExactCG:
    """The exact Fisher of each batch, inverted by conjugate gradients.

    It wants more damping than a curvature that averages: along what one batch tells next to nothing of, its F is next
    to nothing too, and noise goes far. TRPO's is 0.1.
    """

    stop: Stop = field(default_factory=lambda: Stop(1e-3, 10))
    """When a solve is good enough."""
    warm_start: float = 0.0
    """Share of the previous solution that a solve starts from (Martens & Sutskever 2012, 0.95 falling to 0); 0 starts
    from nothing."""
    preconditioner: CurvatureFactory | None = None
    """Blocks whose damped solve stands in for F⁻¹ in every iteration, so that few are enough; None for none."""

    def __post_init__(self) -> None:
        if not 0 <= self.warm_start <= 1:
            raise ValueError(f"warm_start must be in [0, 1], got {self.warm_start}")

    @classmethod
    def hessian_free(cls) -> ExactCG:
        """Hessian-free optimisation's solves (Martens 2010): long, warm, until progress stalls.

        Its other half is `LevenbergMarquardt.hessian_free()` as the optimizer's damping. His preconditioner, a power of
        the empirical Fisher's diagonal, is left out; `preconditioner=Diagonal()` is nearest to it.

        Returns:
            The choice.
        """
        return cls(Stop(tolerance=0.0, iterations=100, progress=5e-4), warm_start=0.95)

    def over(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        rules: Mapping[str, BlockRule],
    ) -> NetworkCurvature:
        """The curvature of a network's trained parameters.

        Args:
            network: the module; never changed.
            parameters: the trained ones among its own, by dotted name.
            rules: for the preconditioner; the exact Fisher knows every parameter's.

        Returns:
            The curvature.
        """
        inner = self.preconditioner
        return ExactCGCurvature(
            parameters, self, None if inner is None else BlockDiagonal(network, parameters, inner, rules)
        )
