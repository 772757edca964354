"""Which layers of a network follow each other, with nothing but an elementwise activation between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from acktr.chain import Linked, flat
from acktr.curvature.members import Member

ELEMENTWISE = {
    nn.CELU,
    nn.Dropout,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
}
"""Modules that act on every unit by itself."""


def chains_in(network: nn.Module, members: Sequence[Member]) -> list[list[Member]]:
    """The longest chains of linear layers that a network shows: in what it says of its links, or in its sequences.

    A trunk ends where it branches into heads, because the heads are no part of its sequence.

    Args:
        network: the module.
        members: its layers' among others.

    Returns:
        Chains of two layers and more, each layer in one at most.
    """
    linear = {id(m.layer.module): m for m in members if m.layer is not None and type(m.layer.module) is nn.Linear}
    chains: list[list[Member]] = []
    taken: set[int] = set()
    for modules in _sequences(network):
        for run in _runs(modules, linear.keys() - taken):
            taken.update(run)
            chains.append([linear[one] for one in run])
    return chains


def chains_named(names: Sequence[Sequence[str]], members: Sequence[Member]) -> list[list[Member]]:
    """The chains that someone states.

    Args:
        names: dotted names of each chain's layers, the first layer first.
        members: the network's.

    Returns:
        The chains.

    Raises:
        ValueError: if a name is no linear layer's, or stands in two places, or a chain has one layer only.
    """
    linear = {m.name: m for m in members if m.layer is not None and isinstance(m.layer.module, nn.Linear)}
    stated = [name for chain in names for name in chain]
    for name in stated:
        if name not in linear:
            raise ValueError(f"'{name}' is no trained linear layer of this network, which has {sorted(linear)}")
        if stated.count(name) > 1:
            raise ValueError(f"layer '{name}' stands in the chains {stated.count(name)} times; it has one place")
    for chain in names:
        if len(chain) < 2:
            raise ValueError(f"a chain has two layers or more, got {list(chain)}; leave single ones out")
    return [[linear[name] for name in chain] for chain in names]


def _sequences(network: nn.Module) -> Iterator[list[nn.Module]]:
    links = network.links() if isinstance(network, Linked) else None
    if links is not None:
        yield list(flat(links.modules))
        return
    inside: set[int] = set()
    for module in network.modules():
        if type(module) is nn.Sequential and id(module) not in inside:
            inside.update(id(part) for part in module.modules())
            yield list(flat([module]))


def _runs(modules: Iterable[nn.Module], linear: set[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for module in (*modules, None):
        if id(module) in linear and id(module) not in run:
            run.append(id(module))
        elif type(module) not in ELEMENTWISE:
            if len(run) > 1:
                yield run
            run = []
