"""Where a layer's decomposition lives (KAISA, Pauloski et al. 2021): everywhere, in one place, or in between.

Ranks stand in a grid. A layer belongs to one column, and each rank of the column keeps its averages and its bases; one
of them, the layer's owner, decomposes and sends the bases down the column. Each rank of the column then solves, and
sends the solution along its row to those that keep nothing of the layer.

    ranks 0 1        two columns, two rows; a layer of column 1 is kept by ranks 1 and 3,
          2 3        1 sends its solution to 0 and 3 to 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Grid:
    """Ranks in rows and columns, counted along the rows."""

    size: int
    """How many ranks."""
    rows: int
    """How many of them keep a layer: the ranks in a column."""

    @property
    def columns(self) -> int:
        """How many ranks there are in a row."""
        return self.size // self.rows

    def column_of(self, rank: int) -> int:
        """A rank's column.

        Args:
            rank: which one.

        Returns:
            Its number.
        """
        return rank % self.columns

    def row_of(self, rank: int) -> int:
        """A rank's row.

        Args:
            rank: which one.

        Returns:
            Its number.
        """
        return rank // self.columns

    def in_column(self, column: int) -> list[int]:
        """The ranks of a column.

        Args:
            column: which one.

        Returns:
            Ascending.
        """
        return list(range(column, self.size, self.columns))

    def in_row(self, row: int) -> list[int]:
        """The ranks of a row.

        Args:
            row: which one.

        Returns:
            Ascending.
        """
        return list(range(row * self.columns, (row + 1) * self.columns))


class Placement(Protocol):
    """How many ranks keep a layer."""

    def grid(self, size: int) -> Grid:
        """The grid of so many ranks."""
        ...


@dataclass(frozen=True)
class CommOpt:
    """Every rank keeps every layer: bases travel at a refresh, solutions never. Least communication, most memory."""

    def grid(self, size: int) -> Grid:
        """One column.

        Args:
            size: how many ranks.

        Returns:
            The grid.
        """
        return Grid(size, size)


@dataclass(frozen=True)
class MemOpt:
    """The owner alone keeps a layer: solutions travel at every step. Least memory, most communication."""

    def grid(self, size: int) -> Grid:
        """One row.

        Args:
            size: how many ranks.

        Returns:
            The grid.
        """
        return Grid(size, 1)


@dataclass(frozen=True)
class HybridOpt:
    """A share of the ranks keeps a layer."""

    share: float = 0.5
    """Of the ranks, in (0, 1]; it must give a whole number that divides them."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def grid(self, size: int) -> Grid:
        """As many rows as ranks keep a layer.

        Args:
            size: how many ranks.

        Returns:
            The grid.

        Raises:
            ValueError: if that number is not whole, or does not divide the ranks.
        """
        rows = round(self.share * size)
        if rows < 1 or size % rows or abs(rows - self.share * size) > 1e-6:
            fitting = [f"{d}/{size}" for d in range(1, size + 1) if size % d == 0]
            raise ValueError(f"share {self.share} of {size} ranks makes no grid; take one of {', '.join(fitting)}")
        return Grid(size, rows)
