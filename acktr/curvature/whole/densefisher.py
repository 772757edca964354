"""The whole network's dense Fisher, for small networks: what every other curvature here approximates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from acktr.capture import Pass
from acktr.curvature.base import BlockRule
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.dense import MAX_PARAMETERS, DenseBlock, check_size
from acktr.curvature.diagonal import Diagonal
from acktr.curvature.members import Member, layer_members
from acktr.curvature.network import NetworkCurvature
from acktr.exact import Linearisation
from acktr.layers import Layer
from acktr.likelihood import Outputs
from acktr.tree import Tensors, products_finite


class DenseFisherCurvature(NetworkCurvature):
    """All layers' parameters in one dense matrix; parameters with a rule or without a layer keep blocks of their own.

    Args:
        network: the module; never changed.
        parameters: the trained parameters among its own, by dotted name.
        settings: the choice.
        rules: blocks for parameters that choose their own, by the parameter's dotted name.
        max_rows: most examples of a batch that enter the matrix; beyond, a random subset stands for all.

    Raises:
        ValueError: if the network has no layer, or more parameters than the settings allow.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        settings: DenseFisher,
        rules: Mapping[str, BlockRule] | None = None,
        max_rows: int = 2048,
    ) -> None:
        layered = {name: p for name, p in parameters.items() if name not in (rules or {})}
        # Their own blocks are never fed: what is wanted is which layer covers which parameters.
        self._members = layer_members(network, layered, Diagonal())
        covered = {name for member in self._members for name in member.names}
        others = {name: p for name, p in parameters.items() if name not in covered}
        self._others = BlockDiagonal(network, others, Diagonal(settings.ema), rules) if others else None
        self._sizes = [member.block.shape[0] * member.block.shape[1] for member in self._members]
        size = sum(self._sizes)
        if not size:
            raise ValueError(
                "the network trains no Linear or Conv2d layer, and the dense Fisher is theirs; take Diagonal()"
            )
        check_size(size, settings.max_parameters, "the network")
        self._block = DenseBlock((1, size), settings.ema)
        self._max_rows = max_rows
        self._latest: Tensor | None = None

    @property
    def layers(self) -> list[Layer]:
        """The layers whose passes must be captured."""
        return [member.layer for member in self._members if member.layer is not None]

    def weighs(self, examples: int) -> bool:
        """Whether every trained parameter belongs to a layer, and all examples' gradients are held.

        Args:
            examples: N.

        Returns:
            Whether `weighted_gradient` can answer.
        """
        return self._others is None and self._latest is not None and len(self._latest) == examples

    @property
    def ready(self) -> bool:
        """Whether the matrix is decomposed and every other block can solve."""
        return self._block.ready and (self._others is None or self._others.ready)

    def update(self, record: Pass, seeds: Sequence[Outputs], refresh: bool, generator: Generator | None = None) -> bool:
        """Pull the seeds back and take in the outer products of the examples' gradients.

        Args:
            record: the pass.
            seeds: output gradients, one backward pass each.
            refresh: whether to decompose anew.
            generator: source of randomness for subsets of rows.

        Returns:
            False if anything was not finite; then nothing was taken in.
        """
        rows: Tensor | None = None
        if record.examples > self._max_rows:
            device = record.outputs[0].device
            rows = torch.randperm(record.examples, generator=generator, device=device)[: self._max_rows]
        names = [member.name for member in self._members]
        grads = [self._jacobian(record, record.pull_back(seed, names, {}), rows) for seed in seeds]
        if not products_finite((rows, rows.new_ones(1)) for rows in grads):
            return False
        if self._others is not None and not self._others.update(record, seeds, refresh, generator):
            return False
        self._block.update_from_gradients(grads, len(grads[0]))
        self._block.basis_age += 1
        if refresh or not self._block.ready:
            self._block.refresh()
        self._latest = grads[0] if len(grads) == 1 else None
        return True

    def _jacobian(self, record: Pass, grads: Tensors, rows: Tensor | None) -> Tensor:
        """One seed's gradients, shape [N, P]: of every example by the entries of all layers' matrices."""
        return torch.cat([_gradients(member, record, grads[member.name], rows) for member in self._members], dim=1)

    def release(self) -> None:
        """Let go of the latest update's gradients."""
        self._latest = None

    def weighted_gradient(self, weights: Tensor) -> Tensors:
        """Σ_n w_n j_n / N from the latest update's own gradients.

        Args:
            weights: shape [N].

        Returns:
            One tensor per trained parameter.

        Raises:
            ValueError: if the latest update did not hold every example's one gradient of every parameter.
        """
        if self._latest is None or not self.weighs(len(weights)):
            raise ValueError(
                f"{len(weights)} weights need one seed's gradient of as many examples (max_rows={self._max_rows}) by "
                "every parameter; run the loss's own backward"
            )
        return self._apart(weights @ self._latest / len(weights), {})

    def solve(self, tensors: Tensors, damping: float, linearisation: Linearisation | None = None) -> Tensors:
        """(F̂ + damping · I)⁻¹ applied to tensors.

        Args:
            tensors: one per trained parameter.
            damping: > 0.
            linearisation: not looked at.

        Returns:
            Shaped like `tensors`.
        """
        own = self._apart(self._block.solve(self._joined(tensors), damping), tensors)
        rest = {} if self._others is None else self._others.solve(self._rest(tensors), damping)
        return {name: (own | rest)[name] for name in tensors}

    def solve_with_form(
        self, tensors: Tensors, damping: float, linearisation: Linearisation | None = None
    ) -> tuple[Tensors, Tensor]:
        """The damped solve X and its undamped form Xᵀ F̂ X.

        Args:
            tensors: one per trained parameter.
            damping: > 0.
            linearisation: not looked at.

        Returns:
            X, shaped like `tensors`, and a scalar tensor.
        """
        vector, form = self._block.solve_with_form(self._joined(tensors), damping)
        solution = self._apart(vector, tensors)
        if self._others is not None:
            rest, others_form = self._others.solve_with_form(self._rest(tensors), damping)
            solution, form = solution | rest, form + others_form
        return {name: solution[name] for name in tensors}, form

    def multiply(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensors:
        """F̂ applied to tensors, undamped.

        Args:
            tensors: one per trained parameter.
            linearisation: not looked at.

        Returns:
            Shaped like `tensors`.
        """
        own = self._apart(self._block.multiply(self._joined(tensors)), tensors)
        rest = {} if self._others is None else self._others.multiply(self._rest(tensors))
        return {name: (own | rest)[name] for name in tensors}

    def quadratic(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensor:
        """Undamped tensorsᵀ F̂ tensors.

        Args:
            tensors: one per trained parameter.
            linearisation: not looked at.

        Returns:
            Scalar tensor ≥ 0.
        """
        own = self._block.quadratic(self._joined(tensors))
        return own if self._others is None else own + self._others.quadratic(self._rest(tensors))

    def _joined(self, tensors: Tensors) -> Tensor:
        return torch.cat([member.pack(tensors).flatten() for member in self._members]).unsqueeze(0)

    def _apart(self, vector: Tensor, like: Tensors) -> Tensors:
        out: Tensors = {}
        for member, piece in zip(self._members, torch.split(vector.flatten(), self._sizes), strict=True):
            out.update(member.unpack(piece.view(member.block.shape), like))
        return out

    def _rest(self, tensors: Tensors) -> Tensors:
        covered = {name for member in self._members for name in member.names}
        return {name: tensor for name, tensor in tensors.items() if name not in covered}

    def split(self, tensors: Tensors) -> list[Tensors]:
        """The matrix's parameters in one piece, for it knows how they move together, and every other block's.

        Args:
            tensors: one per trained parameter.

        Returns:
            Pieces whose union is `tensors`.
        """
        own = {name: tensors[name] for member in self._members for name in member.names}
        return [own, *([] if self._others is None else self._others.split(self._rest(tensors)))]

    def diagnostics(self) -> dict[str, float]:
        """Largest over mean eigenvalue, refreshes skipped so far, age of the eigenvectors."""
        block = self._block
        return {
            "condition": block.condition() if block.ready else math.nan,
            "skipped_refreshes": float(block.skipped_refreshes),
            "basis_age": float(block.basis_age),
        }

    def state_dict(self) -> dict[str, Any]:
        """The matrix's state and every other block's."""
        return {
            "dense": self._block.state_dict(),
            "others": None if self._others is None else self._others.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: if it is the state of another curvature.
        """
        if state.keys() != {"dense", "others"}:
            raise ValueError(f"curvature state is of {sorted(state)}, not of a dense Fisher")
        self._block.load_state_dict(state["dense"])
        if self._others is not None:
            self._others.load_state_dict(state["others"])


def _gradients(member: Member, record: Pass, grads: Tensor, rows: Tensor | None) -> Tensor:
    """The examples' gradients by one layer's matrix, row after row, shape [N, o · i]."""
    layer = member.layer
    assert layer is not None
    activations = record.rows_of(layer.name)
    if rows is not None:
        activations, grads = activations[rows], grads[rows]
    matrices = layer.output_grads(grads.to(layer.dtype)).mT @ layer.inputs(activations.to(layer.dtype))
    return matrices.flatten(1)


@dataclass(frozen=True)
class DenseFisher:
    """The whole network's dense Fisher; for small networks."""

    ema: float = 0.95
    """Weight kept of the old matrix per update."""
    max_parameters: int = MAX_PARAMETERS
    """Larger networks are refused."""

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
            rules: blocks of parameters that choose their own.

        Returns:
            The curvature.
        """
        return DenseFisherCurvature(network, parameters, self, rules)
