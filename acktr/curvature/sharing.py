"""Blocks whose work several processes can share.

What such a block averages are means over examples, so that the mean over processes, weighted by their examples, is what
one process with all of the examples would have averaged. What it decomposes comes from these averages alone, and can be
found elsewhere: in another process, or in another thread while training goes on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor

from acktr.curvature.base import Block, Statistics
from acktr.moments import Gram

Summary = list[Gram | Tensor]
"""Means over a batch's examples; a `Gram` is symmetric."""
Found = list[Tensor]
"""A decomposition: tensors of at most two dimensions, always as many."""


class SharedBlock(Block):
    """A block that tells apart what it averages, what it decomposes and what it measures in the new bases."""

    @abstractmethod
    def summary(self, statistics: Statistics) -> Summary:
        """What one batch adds to the averages."""

    @abstractmethod
    def take(self, summary: Summary) -> None:
        """Average a summary in."""

    @abstractmethod
    def decomposing(self) -> Callable[[], Found]:
        """What decomposes the averages as they are now and changes nothing; it may run later, in another thread."""

    @abstractmethod
    def adopt(self, found: Found) -> None:
        """Use a decomposition from now on."""

    @property
    @abstractmethod
    def decomposition_cost(self) -> float:
        """Multiplications of a decomposition, of which only the ratio to other blocks' is looked at."""

    def bases(self) -> list[Tensor]:
        """What `measured` needs of the decomposition in use; nothing, for who measures nothing."""
        return []

    @property
    def basis_shapes(self) -> list[tuple[int, int]]:
        """Shapes of `bases`, known before there are any."""
        return []

    def measured(self, statistics: Statistics, bases: list[Tensor]) -> list[Tensor]:
        """Means over the batch's examples, taken in the bases.

        Args:
            statistics: the layer's rows of this batch.
            bases: of `bases`.

        Returns:
            As many tensors for every batch; none, for who measures nothing.
        """
        return []

    def take_measured(self, measured: list[Tensor]) -> None:
        """Average in what was measured.

        Args:
            measured: of `measured`, or the mean of several.
        """

    def rescale(self, statistics: Statistics) -> None:
        """Measure in the present bases, and average that in.

        Args:
            statistics: the layer's rows of this batch.
        """
        self.take_measured(self.measured(statistics, self.bases()))

    def _decompose(self) -> None:
        self.adopt(self.decomposing()())

    @property
    def shareable(self) -> bool:
        """Whether the verbs above say all; not where a method's own state follows rows or gradients."""
        return type(self).rescale is SharedBlock.rescale and type(self).follow is Block.follow
