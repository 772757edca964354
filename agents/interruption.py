"""Stopping a run by signal without losing it."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stopper:
    """Turns the first SIGINT or SIGTERM into a wish to stop, and any later one into ``KeyboardInterrupt``.

    Training stops between two updates, where its state is whole; whoever cannot wait sends a second signal.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.immediate = False

    def __call__(self) -> bool:
        """Say whether to stop.

        Returns:
            True once a signal has come.
        """
        return self.wanted

    def handle(self, _signal: int, _frame: FrameType | None) -> None:
        """Take a signal.

        Raises:
            KeyboardInterrupt: On the second signal, or on the first where nothing is left to be saved.
        """
        if self.wanted or self.immediate:
            raise KeyboardInterrupt
        self.wanted = True


@contextmanager
def signals() -> Generator[Stopper, None, None]:
    """Watch SIGINT and SIGTERM for a while.

    Yields:
        Whom to ask.
    """
    stopper = Stopper()
    before: dict[signal.Signals, Any] = {s: signal.signal(s, stopper.handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopper
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
