"""Which block covers which parameters of a network."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Place
from acktr.curvature.diagonal import ConstantBlock, ParameterBlock
from acktr.layers import Layer, as_layer
from acktr.tree import Tensors

_log = logging.getLogger(__name__)


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


def members_of(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    factory: CurvatureFactory,
    rules: Mapping[str, BlockRule],
) -> list[Member]:
    """One block per layer, and one for every other parameter: nothing trained is left without a metric.

    Args:
        network: the module; never changed.
        parameters: the trained parameters among its own, by dotted name.
        factory: builds the layers' blocks.
        rules: blocks for parameters that choose their own, by the parameter's dotted name.

    Returns:
        The layers' members in the network's order, then the others'.
    """
    chosen = {name: rules[name] for name in rules if name in parameters}
    members = layer_members(network, {k: v for k, v in parameters.items() if k not in chosen}, factory)
    covered = {name for member in members for name in member.names}
    for name, parameter in parameters.items():
        if name not in covered:
            members.append(_parameter_member(name, parameter, chosen.get(name), factory))
    return members


def layer_members(
    network: nn.Module, parameters: Mapping[str, nn.Parameter], factory: CurvatureFactory
) -> list[Member]:
    """One block per layer all of whose parameters are among the given ones; one that another module shares is refused.

    Args:
        network: the module.
        parameters: trained ones among its own, by dotted name.
        factory: builds the layers' blocks.

    Returns:
        The members.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    holders = _holders(network)
    members: list[Member] = []
    for module_name, module in network.named_modules():
        if not any(id(p) in names for p in module.parameters(recurse=False)):
            continue
        layer = as_layer(module_name, module)
        if layer is not None and all(id(p) in names for p in layer.parameters):
            mine = tuple(names[id(p)] for p in layer.parameters)
            for parameter in layer.parameters:
                _refuse_tied(names[id(parameter)], holders[id(parameter)])
            members.append(Member(module_name, factory.build(_place(layer)), mine, layer))
    return members


def _place(layer: Layer) -> Place:
    return Place(layer.shape, layer.bias is not None, layer.offsets, layer.name)


def _holders(network: nn.Module) -> dict[int, list[str]]:
    """The dotted names of the modules that hold a parameter, by its id."""
    holders: dict[int, list[str]] = {}
    for module_name, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module_name)
    return holders


def _refuse_tied(parameter: str, holders: Sequence[str]) -> None:
    if len(holders) > 1:
        raise ValueError(
            f"layers '{holders[0]}' and '{holders[1]}' share the parameter '{parameter}', whose Fisher is no block of "
            "either: give each its own, or freeze it"
        )


def _parameter_member(name: str, parameter: nn.Parameter, rule: BlockRule | None, factory: CurvatureFactory) -> Member:
    shape = (1, parameter.numel())
    if rule is not None:
        return Member(name, rule(shape), (name,), None)
    _log.warning("'%s' is no Linear or Conv2d layer's: its Fisher is approximated by its diagonal", name)
    return Member(name, ParameterBlock(shape, getattr(factory, "ema", 0.95)), (name,), None)


def known_fisher(fisher: float) -> BlockRule:
    """A rule for a parameter whose Fisher is a known multiple of the identity.

    Args:
        fisher: the multiple; 2 for a Gaussian's state-independent log standard deviation.

    Returns:
        The rule.

    Raises:
        ValueError: if the multiple is not positive and finite.
    """
    if not 0 < fisher < float("inf"):
        raise ValueError(f"fisher must be positive and finite, got {fisher}")
    return lambda shape: ConstantBlock(shape, fisher)
