"""Clocks, phases, processes of their own, and what repeated timings say."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """What one measurement took."""

    wall: float
    """Seconds on the wall clock."""
    cpu: float
    """Seconds of processor time, all threads of the measuring process together."""
    work: float = 1.0
    """Units of work done in that time: environment steps, or updates."""
    phases: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Wall and processor seconds by phase, where they were told apart."""

    def __add__(self, other: Timing) -> Timing:
        """Put two measurements one after the other, of which each did a part of the same work."""
        return Timing(self.wall + other.wall, self.cpu + other.cpu, self.work)

    def unit(self) -> Timing:
        """Scale to one unit of work.

        Returns:
            The timing, without phases.
        """
        return Timing(self.wall / self.work, self.cpu / self.work)

    def per_unit(self, clock: str) -> float:
        """Say how long a unit of work takes.

        Args:
            clock: ``wall`` or ``cpu``.

        Returns:
            Seconds.
        """
        seconds: float = getattr(self, clock)
        return seconds / self.work

    def rate(self, clock: str) -> float:
        """Say how much work a second does.

        Args:
            clock: ``wall`` or ``cpu``.

        Returns:
            Units per second; a time too short for the clock counts as a nanosecond a unit.
        """
        return 1 / max(self.per_unit(clock), 1e-9)


@dataclass(frozen=True)
class Spread:
    """Repeated numbers: the middle and both ends."""

    median: float
    """The middle."""
    low: float
    """The smallest."""
    high: float
    """The largest."""


def spread(values: Sequence[float]) -> Spread:
    """Summarise repeated numbers.

    Args:
        values: At least one.

    Returns:
        Their median and range.
    """
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Compare two subjects round by round, so that what slows a whole round down cancels.

    Args:
        ours: One number per round.
        theirs: As many.

    Returns:
        Median and range of ours ÷ theirs.
    """
    return spread([left / right for left, right in zip(ours, theirs, strict=True)])


def interleave(
    subjects: Sequence[str], repeats: int, measure: Callable[[str, int], T], tell: Callable[[str], None]
) -> dict[str, list[T]]:
    """Measure every subject once a round, each round beginning with another subject.

    Args:
        subjects: Their names.
        repeats: How many rounds.
        measure: From a subject and the number of the round to a measurement.
        tell: Where to announce what is measured next.

    Returns:
        The measurements of each subject, in the order of the rounds.
    """
    found: dict[str, list[T]] = {subject: [] for subject in subjects}
    for number in range(repeats):
        first = number % len(subjects)
        for subject in (*subjects[first:], *subjects[:first]):
            tell(f"round {number + 1} of {repeats}: {subject}")
            found[subject].append(measure(subject, number))
    return found


def isolated(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function in a new process, so that nothing of one measurement is left for the next.

    Args:
        function: A function of a module.
        *arguments: Its arguments.
        **options: Its arguments by name.

    Returns:
        What it returns; what it raises is raised here.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def clocks() -> tuple[float, float]:
    """Read both clocks, after a GPU in use has done what it was given.

    Returns:
        Seconds on the wall clock and of this process's processor time.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def timed(function: Callable[[], object], times: int) -> Timing:
    """Time repeated calls.

    Args:
        function: What to call.
        times: How often.

    Returns:
        The time they took together.
    """
    began = clocks()
    for _ in range(times):
        function()
    wall, cpu = clocks()
    return Timing(wall - began[0], cpu - began[1], float(times))


class Phases:
    """Shares time out among nested phases: each second belongs to the innermost one that is open.

    As a context manager it undoes on leaving whatever was wrapped inside.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._open: list[str] = []
        self._since = clocks()
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *exception: object) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Charge the time spent inside to a phase.

        Args:
            name: The phase.

        Yields:
            Nothing.
        """
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Charge every call of a function to a phase.

        Args:
            owner: The object or module through which it is called.
            name: Its name there.
            phase: The phase.
        """
        original = getattr(owner, name)

        def charged(*arguments: Any, **options: Any) -> Any:
            with self.phase(phase):
                return original(*arguments, **options)

        self._originals.append((owner, name, original))
        setattr(owner, name, charged)

    def clear(self) -> None:
        """Forget what was charged so far, for instance while warming up."""
        self.seconds.clear()

    def _charge(self) -> None:
        now = clocks()
        if self._open:
            wall, cpu = self.seconds.get(self._open[-1], (0.0, 0.0))
            self.seconds[self._open[-1]] = (wall + now[0] - self._since[0], cpu + now[1] - self._since[1])
        self._since = now
