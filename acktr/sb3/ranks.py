"""Several processes with one agent: which environments are whose, and what each does without the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from acktr.curvature import Curvature
from acktr.distributed import Distributed, Grid, ProcessRanks
from acktr.distributed.ranks import running
from acktr.ranks import BrokenRankError, LostRankError, Ranks

if TYPE_CHECKING:
    from acktr.sb3.settings import ActorSettings, CriticSettings

T = TypeVar("T")
S = TypeVar("S", "ActorSettings", "CriticSettings", "ActorSettings | CriticSettings")

_FORESEEN = (FloatingPointError, ValueError, MemoryError, torch.OutOfMemoryError)

_log = logging.getLogger("acktr.ranks")


def ranks_here() -> Ranks:
    """The processes that train with this one.

    Returns:
        Those of torch's process group; this one alone where there is none.
    """
    if not running():
        return Ranks()
    size = torch.distributed.get_world_size()
    return ProcessRanks(Grid(size, size))


def shared(curvature: Any) -> Curvature:
    """A choice whose work the processes share.

    Args:
        curvature: a choice, shared already or not.

    Returns:
        One that is.
    """
    return curvature if isinstance(curvature, Distributed) else Distributed(curvature)


@dataclass(frozen=True)
class Part:
    """This process's environments among everyone's."""

    first: int
    """How many come before them."""
    count: int
    """How many there are."""
    counts: tuple[int, ...]
    """How many every process has."""

    @property
    def total(self) -> int:
        """Everyone's."""
        return sum(self.counts)

    def share(self, settings: S) -> S:
        """Settings in which numbers of examples are this process's part.

        Args:
            settings: of an actor or a critic.

        Returns:
            The same where there is one process.
        """
        if self.count == self.total:
            return settings
        return replace(
            settings,
            curvature_examples=self.of(settings.curvature_examples),
            exact_examples=self.of(settings.exact_examples),
        )

    def of(self, number: int | None) -> int | None:
        """This process's share of a number of examples that is meant for everyone's.

        Args:
            number: at least 1, or None for all.

        Returns:
            At least 1; the shares add up to the number where none would be 0.
        """
        if number is None:
            return None
        begin, end = (number * place // self.total for place in (self.first, self.first + self.count))
        return max(1, end - begin)


def part_of(ranks: Ranks, count: int) -> Part:
    """Find this process's place; a call for all of them.

    Args:
        ranks: the processes.
        count: environments of this one.

    Returns:
        Its part.
    """
    counts = tuple(ranks.gathered(count))
    return Part(sum(counts[: ranks.rank]), count, counts)


def everyones(ranks: Ranks, local: Callable[[], T]) -> list[T]:
    """Do something in each process without the others, and tell everyone what came of it.

    Args:
        ranks: the processes.
        local: what to do; it must not wait for the others.

    Returns:
        What came of it, of each process in turn.

    Raises:
        BrokenRankError: in all processes, if it raised in one.
        LostRankError: if a process is gone.
    """
    if ranks.size == 1:
        return [local()]
    found, broke = None, None
    try:
        found = local()
    except LostRankError:
        raise
    except Exception as error:
        broke = " ".join(f"{error}".split()) or type(error).__name__
        if not isinstance(error, _FORESEEN):
            _log.exception("rank %d broke", ranks.rank)
    told = ranks.gathered((found, broke))
    for rank, (_, complaint) in enumerate(told):
        if complaint is not None:
            raise BrokenRankError(f"rank {rank}: {complaint}")
    return [thing for thing, _ in told]
