"""What an update costs on so many ranks: a model on paper, from what one rank computes and a network carries.

    an update = products of this rank's examples + decompositions of the busiest owner + solves + what travels

Products are counted in multiplications: passes through the layers, moments of their rows, scalings in the bases, damped
solves. Decompositions are those of the rank with most to do, divided by how seldom they are made. A sum over P ranks
takes 2 (P − 1) / P times its bytes over the bandwidth, a broadcast once, and each collective 2 ⌈log₂ P⌉ or ⌈log₂ P⌉
latencies. Nothing overlaps but decompositions in the background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from acktr.distributed.assignment import assign
from acktr.distributed.placement import Grid
from acktr.distributed.traffic import LayerSize, traffic


@dataclass(frozen=True)
class Machine:
    """What one rank does in a second."""

    products: float
    """Multiplications of matrix products."""
    decompositions: float
    """Units of `LayerSize.cost` in decompositions."""
    bandwidth: float
    """Bytes that it sends."""
    latency: float
    """Seconds from one rank to another."""
    overhead: float = 0.0
    """Seconds of an update that no smaller batch makes fewer."""
    cores: int | None = None
    """Ranks that compute at a time; more wait for each other. None for all."""


@dataclass(frozen=True)
class Task:
    """An update of one network."""

    layers: Sequence[LayerSize]
    """Its layers."""
    positions: Sequence[int]
    """Rows of each layer for an example: 1, or a convolution's positions."""
    parameters: int
    """How many are trained."""
    examples: int
    """Of all ranks."""
    passes: float = 4.0
    """Products with each layer's weights for an example: forwards 1, the loss backwards 2, the Fisher backwards 1."""
    statistics_period: int = 1
    """Updates between two of the curvature."""
    refresh_period: int = 1
    """Curvature updates between two decompositions."""
    decisions: int = 8
    """Sums of a few numbers: what the ranks decide together."""
    background: bool = False
    """Whether decompositions are made beside the rest (`Background`), at no cost to it."""

    @property
    def multiplications(self) -> float:
        """Of an example."""
        return sum(
            rows * (layer.matrix * self.passes + _statistics(layer) / self.statistics_period)
            for layer, rows in zip(self.layers, self.positions, strict=True)
        )


@dataclass(frozen=True)
class Seconds:
    """Where an update's time goes."""

    passes: float
    """Products of this rank's examples, and the overhead."""
    decompositions: float
    """The busiest owner's, as a mean over updates."""
    solves: float
    """Of the layers that a rank keeps."""
    traffic: float
    """Sums and broadcasts."""
    background: bool = False
    """Whether decompositions are made beside the rest."""

    @property
    def whole(self) -> float:
        """All of it; of what is done side by side, the longer."""
        rest = self.passes + self.solves + self.traffic
        return max(rest, self.decompositions) if self.background else rest + self.decompositions


def update_seconds(task: Task, machine: Machine, grid: Grid) -> Seconds:
    """Foretell what an update takes.

    Args:
        task: the update.
        machine: each rank.
        grid: of the ranks.

    Returns:
        By part.
    """
    crowd = max(1.0, grid.size / machine.cores) if machine.cores else 1.0
    share = math.ceil(task.examples / grid.size)
    owners, loads = assign([layer.cost for layer in task.layers], grid.size), [0.0] * grid.size
    kept = [0.0] * grid.columns
    for layer, owner in zip(task.layers, owners, strict=True):
        loads[owner] += layer.cost
        kept[grid.column_of(owner)] += 2 * layer.matrix * (layer.kept[0] + layer.kept[1])
    seldom = task.statistics_period * task.refresh_period
    return Seconds(
        passes=machine.overhead * crowd + crowd * share * task.multiplications / machine.products,
        decompositions=crowd * max(loads) / machine.decompositions / seldom,
        solves=crowd * max(kept) / machine.products,
        traffic=_travel(task, machine, grid, owners),
        background=task.background,
    )


def _statistics(layer: LayerSize) -> float:
    """Multiplications of a row in moments, and in scalings: into the bases, squared, and multiplied out."""
    moments = layer.outputs**2 + layer.inputs**2
    return moments + (layer.bases + layer.matrix if layer.scalings else 0)


def _travel(task: Task, machine: Machine, grid: Grid, owners: Sequence[int]) -> float:
    if grid.size == 1:
        return 0.0
    columns = [traffic(task.layers, task.parameters, grid, rank) for rank in range(grid.columns)]
    of_all, steps = columns[0], math.ceil(math.log2(grid.size))
    often, seldom = 1 / task.statistics_period, 1 / task.statistics_period / task.refresh_period
    summed = of_all.gradients + often * of_all.statistics
    sent = often * of_all.lent + of_all.solutions + seldom * max(each.bases for each in columns)
    in_column = max(len({o for o in owners if grid.column_of(o) == column}) for column in range(grid.columns))
    along = len({grid.column_of(owner) for owner in owners}) if grid.columns > 1 else 0
    sums = 1 + task.decisions + often * (2 if any(layer.scalings for layer in task.layers) else 1)
    broadcasts = along + often * along * bool(of_all.lent) + seldom * in_column * (grid.rows > 1)
    carried = summed * 2 * (grid.size - 1) / grid.size + sent
    return carried / machine.bandwidth + machine.latency * steps * (2 * sums + broadcasts)
