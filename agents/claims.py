"""Folders that one program at a time may work in."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from agents.errors import UsageError

with suppress(ImportError):  # POSIX alone has it
    import fcntl


@contextmanager
def claimed(folder: Path, otherwise: str) -> Generator[int]:
    """Claim a folder.

    The claim is a lock on the open folder, which ends with the last process that holds it open: whoever is killed gives
    it up, and who is still at work for a program that was killed does not. Where folders cannot be locked (Windows)
    nothing is claimed.

    Args:
        folder: The folder, which is there.
        otherwise: What to say if somebody else holds it.

    Yields:
        The open folder, to be handed on to processes that work in it too; -1 where nothing is claimed.

    Raises:
        UsageError: If somebody else holds it.
    """
    if os.name != "posix":
        yield -1
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(otherwise) from None
        yield handle
    finally:
        os.close(handle)
