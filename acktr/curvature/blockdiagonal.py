"""The whole network's curvature as the block diagonal of its layers'."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from acktr.capture import Pass
from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Statistics
from acktr.curvature.diagonal import ParameterBlock
from acktr.curvature.members import Member, members_of
from acktr.curvature.network import NetworkCurvature
from acktr.exact import Linearisation
from acktr.layers import Layer
from acktr.likelihood import Outputs
from acktr.tree import Tensors, all_finite, products_finite


class BlockDiagonal(NetworkCurvature):
    """One block per layer, and a stated one for every other parameter: nothing trained is left without a metric.

    Args:
        network: the module; never changed.
        parameters: the trained parameters among its own, by dotted name.
        factory: builds the layers' blocks.
        rules: blocks for parameters that choose their own, by the parameter's dotted name.
        max_rows: most rows (examples × positions) of a layer that enter its statistics; beyond, a random subset of
            examples stands for all, which keeps the moments unbiased.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        factory: CurvatureFactory,
        rules: Mapping[str, BlockRule] | None = None,
        max_rows: int = 2048,
    ) -> None:
        self.max_rows = max_rows
        self.members = members_of(network, parameters, factory, rules or {})
        self._followers = [m for m in self.members if type(m.block).follow is not Block.follow]
        self._latest: dict[str, Statistics] = {}
        self._free = {m.names[0]: parameters[m.names[0]] for m in self.members if isinstance(m.block, ParameterBlock)}

    @property
    def layers(self) -> list[Layer]:
        """The layers whose passes must be captured."""
        return [member.layer for member in self.members if member.layer is not None]

    def weighs(self, examples: int) -> bool:
        """Whether every trained parameter has a layer, and its rows are those of all examples.

        Args:
            examples: N.

        Returns:
            Whether `weighted_gradient` can answer.
        """
        held = (self._latest.get(member.name) for member in self.members)
        return all(rows is not None and rows.output_grads.shape[:2] == (1, examples) for rows in held)

    @property
    def forms_tell(self) -> bool:
        """Whether no block keeps something of gradients; forms are of the whole direction, dead units among it."""
        return not self._followers and not any(member.block.remembers for member in self.members)

    @property
    def ready(self) -> bool:
        """Whether every block can solve."""
        return all(member.block.ready for member in self.members)

    def update(self, record: Pass, seeds: Sequence[Outputs], refresh: bool, generator: Generator | None = None) -> bool:
        """Pull the seeds back through the recorded pass and take in what every layer saw.

        Args:
            record: the pass.
            seeds: output gradients, one backward pass each.
            refresh: whether to decompose anew.
            generator: source of randomness for subsets of rows.

        Returns:
            False if anything was not finite; then nothing was taken in.
        """
        statistics, grads = self._pulled_back(record, seeds, generator)
        if not self._finite(statistics, grads):
            return False
        for member in self.members:
            self._update_member(member, statistics.get(member.name), grads, record.examples, refresh)
        self._latest = statistics
        return True

    def _pulled_back(
        self, record: Pass, seeds: Sequence[Outputs], generator: Generator | None
    ) -> tuple[dict[str, Statistics], list[Tensors]]:
        """Every layer's rows by its name; and each seed's gradients, those of parameters without a layer among them."""
        if self._free:
            seeds = [_with_random_signs(seed, generator) for seed in seeds]
        names = [layer.name for layer in self.layers]
        rows = _Rows(record, generator)
        grads = [record.pull_back(seed, names, self._free) for seed in seeds]
        return {m.name: self._statistics(m, record, grads, rows) for m in self.members if m.layer}, grads

    def _finite(self, statistics: dict[str, Statistics], grads: list[Tensors]) -> bool:
        free = [grad[name] for grad in grads for name in self._free]
        rows = ((s.inputs, s.output_grads) for s in statistics.values())
        return products_finite(rows) and all_finite([t.square() for t in free])

    def release(self) -> None:
        """Let go of the latest update's rows; unfolded images are large."""
        self._latest = {}

    def weighted_gradient(self, weights: Tensor) -> Tensors:
        """Σ_n w_n g_n aₙᵀ / N from the latest update's own rows: one GEMM per layer instead of a backward pass.

        Args:
            weights: shape [N].

        Returns:
            One tensor per trained parameter.

        Raises:
            ValueError: if the latest update did not hold every example's one gradient of every parameter.
        """
        out: Tensors = {}
        for member in self.members:
            statistics = self._latest.get(member.name)
            if statistics is None or member.layer is None:
                raise ValueError(
                    f"'{member.name}' has no rows to weigh; give it a layer or run the loss's own backward"
                )
            if statistics.output_grads.shape[:2] != (1, len(weights)):
                raise ValueError(
                    f"{len(weights)} weights for rows of shape {tuple(statistics.output_grads.shape[:2])} (seeds, "
                    f"examples) in '{member.name}'; it takes one seed and no more than max_rows={self.max_rows} rows"
                )
            out.update(zip(member.names, member.layer.unpack(statistics.weighted_sum(weights)), strict=True))
        return out

    def _update_member(
        self, member: Member, statistics: Statistics | None, grads: list[Tensors], examples: int, refresh: bool
    ) -> None:
        block = member.block
        if isinstance(block, ParameterBlock):
            block.update_from_sums(torch.stack([grad[member.name].flatten() for grad in grads]), examples)
        elif statistics is not None:
            block.update(statistics)
            block.basis_age += 1
            if refresh or not block.ready:
                block.refresh()
            if block.ready or not block.failures:  # nothing can be measured in a basis that never was
                block.rescale(statistics)

    def _statistics(self, member: Member, record: Pass, grads: list[Tensors], rows: _Rows) -> Statistics:
        layer = member.layer
        assert layer is not None
        activations, output_grads = record.rows_of(layer.name), [grad[layer.name] for grad in grads]
        shared = output_grads[0][0].numel() // layer.shape[0]
        keep = max(1, self.max_rows // shared)
        if keep < record.examples:
            few = rows.first(keep, activations.device)
            activations, output_grads = activations[few], [grad[few] for grad in output_grads]
        # Sums of squares lose their small terms in half precision, whatever the network computes in.
        inputs, dtype = layer.inputs(activations.to(layer.dtype)), layer.dtype
        slices = [layer.output_grads(g.to(dtype)) for g in output_grads]
        # A stack of one would copy it.
        return Statistics(inputs, slices[0].unsqueeze(0) if len(slices) == 1 else torch.stack(slices))

    def follow(self, gradient: Tensors) -> Tensors:
        """Show each block that cares its part of the gradient, and put what it makes of it in its place.

        Args:
            gradient: ∇, one tensor per trained parameter.

        Returns:
            What the next `solve` is for, shaped like the gradient.
        """
        if not self._followers:
            return gradient
        out = dict(gradient)
        for member in self._followers:
            out.update(member.unpack(member.block.follow(member.pack(gradient)), gradient))
        return out

    def solve(self, tensors: Tensors, damping: float, linearisation: Linearisation | None = None) -> Tensors:
        """(F̂ + damping · I)⁻¹ applied block by block.

        Args:
            tensors: one per trained parameter.
            damping: > 0.
            linearisation: not looked at.

        Returns:
            Shaped like `tensors`.
        """
        return self._map(tensors, lambda member, matrix: member.block.solve(matrix, damping))

    def solve_with_form(
        self, tensors: Tensors, damping: float, linearisation: Linearisation | None = None
    ) -> tuple[Tensors, Tensor]:
        """The damped solve X and its undamped form Xᵀ F̂ X, block by block.

        Args:
            tensors: one per trained parameter.
            damping: > 0.
            linearisation: not looked at.

        Returns:
            X, shaped like `tensors`, and a scalar tensor.
        """
        out: Tensors = {}
        forms = []
        for member in self.members:
            matrix, form = member.block.solve_with_form(member.pack(tensors), damping)
            out.update(member.unpack(matrix, tensors))
            forms.append(form)
        return {name: out[name] for name in tensors}, torch.stack(forms).sum()

    def multiply(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensors:
        """F̂ applied block by block, undamped.

        Args:
            tensors: one per trained parameter.
            linearisation: not looked at.

        Returns:
            Shaped like `tensors`.
        """
        return self._map(tensors, lambda member, matrix: member.block.multiply(matrix))

    def solver_with_batch(
        self, damping: float, weight: float, linearisation: Linearisation | None = None
    ) -> Callable[[Tensors], Tensors]:
        """V ↦ (F̂ + w B + λ)⁻¹ V block by block, B from the rows of an update that was not released yet.

        Args:
            damping: λ > 0.
            weight: w ≥ 0.
            linearisation: not looked at.

        Returns:
            A function of tensors, one per trained parameter.
        """
        of_blocks = {m.name: m.block.solver_with_batch(damping, weight, self._latest.get(m.name)) for m in self.members}
        return lambda tensors: self._map(tensors, lambda member, matrix: of_blocks[member.name](matrix))

    def multiply_batch(self, tensors: Tensors) -> Tensors:
        """B applied block by block.

        Args:
            tensors: one per trained parameter.

        Returns:
            Shaped like `tensors`.
        """
        latest = self._latest
        return self._map(tensors, lambda m, matrix: m.block.multiply_batch(matrix, latest.get(m.name)))

    def _map(self, tensors: Tensors, function: Callable[[Member, Tensor], Tensor]) -> Tensors:
        out: Tensors = {}
        for member in self.members:
            out.update(member.unpack(function(member, member.pack(tensors)), tensors))
        return {name: out[name] for name in tensors}

    def quadratic(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensor:
        """Undamped tensorsᵀ F̂ tensors.

        Args:
            tensors: one per trained parameter.
            linearisation: not looked at.

        Returns:
            Scalar tensor ≥ 0.
        """
        return torch.stack([m.block.quadratic(m.pack(tensors)) for m in self.members]).sum()

    def split(self, tensors: Tensors) -> list[Tensors]:
        """One piece per block, each with the tensors of its own parameters only.

        Args:
            tensors: one per trained parameter.

        Returns:
            As many pieces as blocks; their union is `tensors`.
        """
        return [{name: tensors[name] for name in member.names} for member in self.members]

    def diagnostics(self) -> dict[str, float]:
        """Condition (largest, over blocks, of largest over mean eigenvalue), refreshes skipped so far, oldest basis."""
        return {
            "condition": max((m.block.condition() for m in self.members if m.block.ready), default=math.nan),
            "skipped_refreshes": float(sum(member.block.skipped_refreshes for member in self.members)),
            "basis_age": float(max(member.block.basis_age for member in self.members)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Every block's state by its name."""
        return {member.name: member.block.state_dict() for member in self.members}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore every block.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: if it is the state of other blocks, or of other settings of these; then nothing is restored.
        """
        names = {member.name for member in self.members}
        if names != set(state):
            raise ValueError(f"curvature state is of blocks {sorted(state)}, this network has {sorted(names)}")
        before = {member.name: member.block.state_dict() for member in self.members}
        for member in self.members:
            try:
                member.block.load_state_dict(state[member.name])
            except Exception as error:  # whatever comes of reading what somebody else has written
                for other in self.members:
                    other.block.load_state_dict(before[other.name])
                raise ValueError(
                    f"the state of '{member.name}' was saved under other settings of the curvature and does not fit "
                    f"its {type(member.block).__name__} ({error!r:.80}); take the settings it was saved under"
                ) from error


class _Rows:
    """Random examples of one pass, the same ones for every layer that keeps as many."""

    def __init__(self, record: Pass, generator: Generator | None) -> None:
        self._examples, self._generator = record.examples, generator
        self._order: Tensor | None = None

    def first(self, count: int, device: torch.device) -> Tensor:
        if self._order is None:
            self._order = torch.randperm(self._examples, generator=self._generator, device=device)
        return self._order[:count]


def _with_random_signs(seed: Outputs, generator: Generator | None) -> Outputs:
    """One sign per example: each example's g gᵀ stays, and examples no longer add up in expectation."""
    signs = torch.randint(0, 2, (len(seed[0]),), device=seed[0].device, generator=generator) * 2 - 1
    return tuple(signs.view(-1, *[1] * (s.dim() - 1)) * s for s in seed)
