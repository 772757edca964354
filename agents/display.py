"""Live progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Protocol

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display(Protocol):
    """Shows how far training is."""

    def update(self, timesteps: int, mean_return: float | None) -> None:
        """Show the state.

        Args:
            timesteps: Environment steps so far.
            mean_return: Mean raw return of the last episodes; None before the first has ended.
        """

    def close(self) -> None:
        """End the display."""


class Bar:
    """A bar with return, speed and remaining time.

    Args:
        total: Environment steps in all.
        start: Steps that a former part of the run has taken.
    """

    def __init__(self, total: int, start: int) -> None:
        self._speed = Speed(start)
        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("return {task.fields[score]}"),
            TextColumn("{task.fields[speed]} steps/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", total=total, completed=start, score="–", speed="–")
        self._progress.start()

    def update(self, timesteps: int, mean_return: float | None) -> None:
        """Move the bar.

        Args:
            timesteps: Environment steps so far.
            mean_return: Mean raw return of the last episodes; None before the first has ended.
        """
        speed = f"{self._speed.at(timesteps):,.0f}"
        self._progress.update(self._task, completed=timesteps, score=_score(mean_return), speed=speed)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


class Lines:
    """One line every few seconds.

    Args:
        total: Environment steps in all.
        start: Steps that a former part of the run has taken.
        period: Seconds between two lines.
    """

    def __init__(self, total: int, start: int, period: float = 10.0) -> None:
        self._total = total
        self._period = period
        self._speed = Speed(start)
        self._next = time.monotonic() + period

    def update(self, timesteps: int, mean_return: float | None) -> None:
        """Print a line if it is time.

        Args:
            timesteps: Environment steps so far.
            mean_return: Mean raw return of the last episodes; None before the first has ended.
        """
        if time.monotonic() < self._next and timesteps < self._total:
            return
        self._next = time.monotonic() + self._period
        speed = self._speed.at(timesteps)
        left = timedelta(seconds=round(max(0, self._total - timesteps) / speed)) if speed else "?"
        print(
            f"{timesteps:,}/{self._total:,}  return {_score(mean_return)}  {speed:,.0f} steps/s  left {left}",
            flush=True,
        )

    def close(self) -> None:
        """Do nothing; the lines stay."""


class Speed:
    """Mean speed since the display began.

    Args:
        start: Environment steps at that time.
    """

    def __init__(self, start: int) -> None:
        self._start = start
        self._since = time.monotonic()

    def at(self, timesteps: int) -> float:
        """Compute the speed.

        Args:
            timesteps: Environment steps so far.

        Returns:
            Steps per second.
        """
        return (timesteps - self._start) / max(time.monotonic() - self._since, 1e-9)


def for_stdout(total: int, start: int) -> Display:
    """Choose the display that standard output can show.

    Args:
        total: Environment steps in all.
        start: Steps that a former part of the run has taken.

    Returns:
        A bar on a terminal, lines elsewhere.
    """
    return Bar(total, start) if sys.stdout.isatty() else Lines(total, start)


def _score(mean_return: float | None) -> str:
    return "–" if mean_return is None else f"{mean_return:,.2f}"
