"""The whole network's curvature as the block diagonal of its layers'."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from acktr.capture import Pass
from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Statistics
from acktr.curvature.diagonal import ConstantBlock, ParameterBlock
from acktr.layers import Layer, as_layer
from acktr.likelihood import Outputs
from acktr.tree import all_finite

_log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
"""One tensor per trained parameter, by its dotted name, shaped like it."""


@dataclass(frozen=True)
class Member:
    """One block and the parameters it covers."""

    name: str
    """The layer's or the parameter's dotted name."""
    block: Block
    names: tuple[str, ...]
    """Dotted names of the parameters, in the order of the matrix's columns."""
    layer: Layer | None
    """None for a parameter that is no layer's matrix."""

    def pack(self, tensors: Tensors) -> Tensor:
        """The block's matrix from the parameters' tensors.

        Args:
            tensors: by name.

        Returns:
            Shape [o, i].
        """
        mine = [tensors[name] for name in self.names]
        return mine[0].reshape(1, -1) if self.layer is None else self.layer.pack(mine)

    def unpack(self, matrix: Tensor, like: Tensors) -> Tensors:
        """The parameters' tensors from the block's matrix.

        Args:
            matrix: shape [o, i].
            like: tensors of the right shapes, by name.

        Returns:
            One tensor per parameter of this block.
        """
        if self.layer is None:
            return {self.names[0]: matrix.reshape(like[self.names[0]].shape)}
        return dict(zip(self.names, self.layer.unpack(matrix), strict=True))


class BlockDiagonal:
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
        rules = rules or {}
        chosen = {name: rules[name] for name in rules if name in parameters}
        self.members = _layer_members(network, {k: v for k, v in parameters.items() if k not in chosen}, factory)
        covered = {name for member in self.members for name in member.names}
        for name, parameter in parameters.items():
            if name not in covered:
                self.members.append(_parameter_member(name, parameter, chosen.get(name), factory))
        self._latest: dict[str, Statistics] = {}
        self._free = {m.names[0]: parameters[m.names[0]] for m in self.members if isinstance(m.block, ParameterBlock)}

    @property
    def layers(self) -> list[Layer]:
        """The layers whose passes must be captured."""
        return [member.layer for member in self.members if member.layer is not None]

    @property
    def all_layers(self) -> bool:
        """Whether every trained parameter belongs to a layer."""
        return all(member.layer is not None for member in self.members)

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
        if self._free:
            seeds = [_with_random_signs(seed, generator) for seed in seeds]
        names = [layer.name for layer in self.layers]
        grads = [record.pull_back(seed, names, self._free) for seed in seeds]
        statistics = {m.name: self._statistics(m, record, grads, generator) for m in self.members if m.layer}
        free = [grad[name] for grad in grads for name in self._free]
        if not all_finite([t for s in statistics.values() for t in (s.inputs, s.output_grads)] + free):
            return False
        for member in self.members:
            self._update_member(member, statistics.get(member.name), grads, record.examples, refresh)
        self._latest = statistics
        return True

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
            block.rescale(statistics)

    def _statistics(
        self, member: Member, record: Pass, grads: list[Tensors], generator: Generator | None
    ) -> Statistics:
        layer = member.layer
        assert layer is not None
        activations, output_grads = record.inputs_of(layer.name), [grad[layer.name] for grad in grads]
        shared = output_grads[0][0].numel() // layer.shape[0]
        keep = max(1, self.max_rows // shared)
        if keep < record.examples:
            device = activations.device
            rows = torch.randperm(record.examples, generator=generator, device=device)[:keep]
            activations, output_grads = activations[rows], [grad[rows] for grad in output_grads]
        # Sums of squares lose their small terms in half precision, whatever the network computes in.
        inputs, dtype = layer.inputs(activations.to(layer.dtype)), layer.dtype
        slices = [layer.output_grads(g.to(dtype)) for g in output_grads]
        # A stack of one would copy it.
        return Statistics(inputs, slices[0].unsqueeze(0) if len(slices) == 1 else torch.stack(slices))

    def solve(self, tensors: Tensors, damping: float) -> Tensors:
        """(F̂ + damping · I)⁻¹ applied block by block.

        Args:
            tensors: one per trained parameter.
            damping: > 0.

        Returns:
            Shaped like `tensors`.
        """
        return self._map(tensors, lambda block, matrix: block.solve(matrix, damping))

    def solve_with_form(self, tensors: Tensors, damping: float) -> tuple[Tensors, Tensor]:
        """The damped solve X and its undamped form Xᵀ F̂ X, block by block.

        Args:
            tensors: one per trained parameter.
            damping: > 0.

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

    def multiply(self, tensors: Tensors) -> Tensors:
        """F̂ applied block by block, undamped.

        Args:
            tensors: one per trained parameter.

        Returns:
            Shaped like `tensors`.
        """
        return self._map(tensors, lambda block, matrix: block.multiply(matrix))

    def _map(self, tensors: Tensors, function: Any) -> Tensors:
        out: Tensors = {}
        for member in self.members:
            out.update(member.unpack(function(member.block, member.pack(tensors)), tensors))
        return {name: out[name] for name in tensors}

    def quadratic(self, tensors: Tensors) -> Tensor:
        """Undamped tensorsᵀ F̂ tensors.

        Args:
            tensors: one per trained parameter.

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
            "condition": max(member.block.condition() for member in self.members),
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
            ValueError: if it is the state of other blocks.
        """
        names = {member.name for member in self.members}
        if names != set(state):
            raise ValueError(f"curvature state is of blocks {sorted(state)}, this network has {sorted(names)}")
        for member in self.members:
            member.block.load_state_dict(state[member.name])


def _layer_members(
    network: nn.Module, parameters: Mapping[str, nn.Parameter], factory: CurvatureFactory
) -> list[Member]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    members: list[Member] = []
    for module_name, module in network.named_modules():
        if not any(id(p) in names for p in module.parameters(recurse=False)):
            continue
        layer = as_layer(module_name, module)
        if layer is not None and all(id(p) in names for p in layer.parameters):
            mine = tuple(names[id(p)] for p in layer.parameters)
            _refuse_tied(module_name, mine, members)
            members.append(Member(module_name, factory.build(layer.shape), mine, layer))
    return members


def _refuse_tied(name: str, mine: tuple[str, ...], members: Sequence[Member]) -> None:
    for other in members:
        shared = set(mine) & set(other.names)
        if shared:
            raise ValueError(
                f"layers '{other.name}' and '{name}' share the parameter '{min(shared)}', whose Fisher is no block of "
                "either: give each its own, or freeze it"
            )


def _parameter_member(name: str, parameter: nn.Parameter, rule: BlockRule | None, factory: CurvatureFactory) -> Member:
    shape = (1, parameter.numel())
    if rule is not None:
        return Member(name, rule(shape), (name,), None)
    _log.warning("'%s' is no Linear or Conv2d layer's: its Fisher is approximated by its diagonal", name)
    return Member(name, ParameterBlock(shape, getattr(factory, "ema", 0.95)), (name,), None)


def _with_random_signs(seed: Outputs, generator: Generator | None) -> Outputs:
    """One sign per example: each example's g gᵀ stays, and examples no longer add up in expectation."""
    signs = torch.randint(0, 2, (len(seed[0]),), device=seed[0].device, generator=generator) * 2 - 1
    return tuple(signs.view(-1, *[1] * (s.dim() - 1)) * s for s in seed)


def known_fisher(fisher: float) -> BlockRule:
    """A rule for a parameter whose Fisher is a known multiple of the identity.

    Args:
        fisher: the multiple; 2 for a Gaussian's state-independent log standard deviation.

    Returns:
        The rule.
    """
    return lambda shape: ConstantBlock(shape, fisher)
