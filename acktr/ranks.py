"""The processes that train one network together, as the optimizer sees them.

Each holds its own examples and the same parameters. Whatever decides over a step has to come out alike in all of them:
means over examples are taken over everyone's, and numbers that arithmetic may round differently are the first one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from acktr.tree import Tensors


class LostRankError(RuntimeError):
    """A process does not answer any more: it died, hangs, or is elsewhere in the program than the others."""


class BrokenRankError(RuntimeError):
    """Something broke in one process, and all of them were told and raise this."""


class Ranks:
    """A process by itself; `acktr.distributed` has those of a process group."""

    size = 1
    """How many there are."""
    rank = 0
    """Which of them this one is."""

    def begin(self, tensors: Sequence[Tensor], settings: str) -> None:
        """Start from the first one's parameters, after a look at whether all were set up alike.

        Args:
            tensors: parameters and buffers, overwritten in place.
            settings: a description of how this one was set up.
        """

    def mean(self, value: Tensor, examples: int) -> Tensor:
        """The mean over all examples of what is a mean over this one's.

        Args:
            value: of any shape, alike everywhere.
            examples: how many are behind it.

        Returns:
            Shaped like the value.
        """
        return value

    def mean_gradient(self, gradient: Tensors, examples: int) -> Tensors:
        """The gradient of the mean loss over all examples.

        Args:
            gradient: of the mean over this one's.
            examples: how many these are.

        Returns:
            By name.
        """
        return gradient

    def agreed(self, value: float) -> float:
        """The first one's number.

        Args:
            value: what it is here.

        Returns:
            What it is there.
        """
        return value

    def all(self, flag: bool) -> bool:
        """Whether something holds everywhere.

        Args:
            flag: whether it holds here.

        Returns:
            Whether it does.
        """
        return flag

    def total(self, number: float) -> float:
        """Everyone's numbers together.

        Args:
            number: what it is here.

        Returns:
            The sum.
        """
        return number

    def gathered(self, thing: Any) -> list[Any]:
        """Everyone's.

        Args:
            thing: what can be pickled.

        Returns:
            One for each.
        """
        return [thing]

    def first(self, thing: Any) -> Any:
        """The first one's.

        Args:
            thing: what can be pickled; looked at there alone.

        Returns:
            What it is there.
        """
        return thing

    def any(self, flag: bool) -> bool:
        """Whether something holds anywhere.

        Args:
            flag: whether it holds here.

        Returns:
            Whether it does.
        """
        return not self.all(not flag)
