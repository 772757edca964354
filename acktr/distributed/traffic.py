"""What a training step sends, foretold from the layers' widths.

    kind         when                    numbers                                        how
    statistics   curvature update        o (o + 1) / 2 + i (i + 1) / 2 by layer         all-reduce
                                         and o · i where scalings are measured
    bases        refresh                 o · p + p + i · r + r by layer of the column   broadcast down the column
    bases        curvature update        o · p + i · r by layer with scalings           broadcast along the row
    gradients    step                    one for each parameter                         all-reduce
    solutions    solve, product          o · i by layer                                 broadcast along the row

with p and r the eigenvectors kept of o outputs and i inputs. Left out are what does not grow with the layers: flags,
forms and distances, and twelve numbers a layer at a refresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from acktr.distributed.assignment import assign
from acktr.distributed.placement import Grid


@dataclass(frozen=True)
class LayerSize:
    """A layer's widths, and what its curvature keeps."""

    outputs: int
    """o."""
    inputs: int
    """i, the bias's column among them."""
    cost: float
    """Of a decomposition, in any unit; decides who owns the layer."""
    ranks: tuple[int, int] | None = None
    """Eigenvectors kept of outputs and inputs; None for all."""
    scalings: bool = False
    """Whether scalings are measured in the bases, as EKFAC does."""

    @property
    def kept(self) -> tuple[int, int]:
        """Eigenvectors of outputs and inputs."""
        return self.ranks or (self.outputs, self.inputs)

    @property
    def matrix(self) -> int:
        """Numbers of the layer's matrix."""
        return self.outputs * self.inputs

    @property
    def statistics(self) -> int:
        """Numbers that a curvature update averages."""
        triangles = self.outputs * (self.outputs + 1) // 2 + self.inputs * (self.inputs + 1) // 2
        return triangles + (self.matrix if self.scalings else 0)

    @property
    def bases(self) -> int:
        """Numbers of both sides' eigenvectors."""
        return self.outputs * self.kept[0] + self.inputs * self.kept[1]


@dataclass(frozen=True)
class Traffic:
    """Bytes in the buffers that one rank gives to collectives or gets from them."""

    statistics: int
    """At each curvature update."""
    lent: int
    """Bases, at each curvature update."""
    bases: int
    """At each refresh."""
    gradients: int
    """At each step."""
    solutions: int
    """At each solve or product with the curvature."""

    def over(self, updates: int, refreshes: int, steps: int, solves: int) -> dict[str, int]:
        """The sum over some of training, by the kinds that `ProcessRanks.traffic` counts.

        Args:
            updates: of the curvature.
            refreshes: of its decompositions.
            steps: of the optimizer.
            solves: one a step; a wake's pull takes another, and its product with the curvature a third.

        Returns:
            Bytes.
        """
        return {
            "statistics": updates * self.statistics,
            "bases": updates * self.lent + refreshes * self.bases,
            "gradients": steps * self.gradients,
            "solutions": solves * self.solutions,
        }

    def sent(self, grid: Grid, updates: int, refreshes: int, steps: int, solves: int) -> float:
        """Bytes that the mean rank sends: an all-reduce's buffer 2 (P − 1) / P times, a broadcast's (G − 1) / G times.

        Args:
            grid: of the ranks.
            updates: of the curvature.
            refreshes: of its decompositions.
            steps: of the optimizer.
            solves: as for `over`.

        Returns:
            Bytes, without the headers of packets.
        """
        reduced = updates * self.statistics + steps * self.gradients
        along_rows = (updates * self.lent + solves * self.solutions) * (grid.columns - 1) / grid.columns
        down_columns = refreshes * self.bases * (grid.rows - 1) / grid.rows
        return reduced * 2 * (grid.size - 1) / grid.size + along_rows + down_columns


def traffic(layers: Sequence[LayerSize], parameters: int, grid: Grid, rank: int, item: int = 4) -> Traffic:
    """What one rank's buffers hold.

    Args:
        layers: in the network's order.
        parameters: how many are trained.
        grid: of the ranks.
        rank: which one.
        item: bytes of a number.

    Returns:
        Bytes by occasion.
    """
    owners = assign([layer.cost for layer in layers], grid.size)
    column = grid.column_of(rank)
    mine = [layer for layer, owner in zip(layers, owners, strict=True) if grid.column_of(owner) == column]
    down, along = grid.rows > 1, grid.columns > 1
    return Traffic(
        statistics=item * sum(layer.statistics for layer in layers),
        lent=item * sum(layer.bases for layer in layers if layer.scalings) if along else 0,
        bases=item * sum(layer.bases + sum(layer.kept) for layer in mine) if down else 0,
        gradients=item * parameters,
        solutions=item * sum(layer.matrix for layer in layers) if along else 0,
    )
