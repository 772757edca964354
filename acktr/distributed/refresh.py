"""When decompositions are found, and when they come into use.

A decomposition that is under way in another thread comes into use a stated number of curvature updates after it was
begun, ready or not: who is early waits for that update, who is late is waited for. So all ranks change bases at the
same update, a run repeats itself to the last bit, and no basis is older than that number and the period of refreshes
together, or than twice that number where it is the longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from acktr.curvature.sharing import Found

Decomposed = dict[str, Found | None]
"""By layer; None where nothing finite was found."""


class Refresh(Protocol):
    """A way to find decompositions."""

    @property
    def age(self) -> int:
        """Curvature updates between a decomposition's statistics and its use."""
        ...

    def start(self, job: Callable[[], Decomposed]) -> Callable[[], Decomposed]:
        """Begin a job, and say how to get what it found."""
        ...


@dataclass(frozen=True)
class Synchronous:
    """At once: training waits."""

    age: int = field(default=0, init=False)
    """No decomposition is older than its refresh."""

    def start(self, job: Callable[[], Decomposed]) -> Callable[[], Decomposed]:
        """Do the job.

        Args:
            job: what to do.

        Returns:
            What it found.
        """
        found = job()
        return lambda: found


@dataclass(frozen=True)
class Background:
    """In a thread, while training goes on; the first one at once, because there is nothing to go on with.

    A refresh that falls due while another is under way is left out.
    """

    age: int = 1
    """Curvature updates between a decomposition's statistics and its use; 0 is `Synchronous` in another thread."""

    def __post_init__(self) -> None:
        if self.age < 0:
            raise ValueError(f"age must be at least 0, got {self.age}")

    def start(self, job: Callable[[], Decomposed]) -> Callable[[], Decomposed]:
        """Hand the job to the thread.

        Args:
            job: what to do.

        Returns:
            Waits for what it found.
        """
        return _thread().submit(job).result


@lru_cache(maxsize=1)
def _thread() -> ThreadPoolExecutor:
    """One for all networks: decompositions that compete for cores would only hold each other up."""
    return ThreadPoolExecutor(1, thread_name_prefix="acktr-refresh")


class Schedule:
    """Begins refreshes and says when one comes into use.

    Args:
        how: the way to find decompositions.
    """

    def __init__(self, how: Refresh) -> None:
        self._how = how
        self._left: int | None = None
        self._result: Callable[[], Decomposed] = dict
        self.layers: list[str] = []
        """Names of the layers, of all ranks, that the latest refresh is for."""

    @property
    def under_way(self) -> bool:
        """Whether a refresh was begun and is not in use."""
        return self._left is not None

    def begin(self, job: Callable[[], Decomposed], layers: list[str]) -> None:
        """Begin a refresh.

        Args:
            job: finds the decompositions of this rank's layers.
            layers: names of all that are refreshed, on whichever rank.
        """
        self._left, self._result, self.layers = self._how.age, self._how.start(job), layers

    def due(self) -> Decomposed | None:
        """What comes into use now, if anything does.

        Returns:
            By layer of this rank; None if nothing is due.
        """
        if self._left != 0:
            return None
        self._left = None
        return self._result()

    def advance(self) -> None:
        """Count one curvature update."""
        if self._left is not None:
            self._left -= 1

    def state(self) -> tuple[int, Decomposed] | None:
        """Updates left and what was found, which is waited for; None if nothing is under way."""
        return None if self._left is None else (self._left, self._result())

    def restore(self, state: tuple[int, Mapping[str, Found | None]] | None) -> None:
        """Go on from a state.

        Args:
            state: of `state`, those of all ranks in one.
        """
        self._left = None
        if state is not None:
            left, found = state
            self._left, self._result, self.layers = left, lambda: dict(found), list(found)
