"""A disk that is full, read-only or away: what it does not take is kept and tried again, and training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from stable_baselines3.common.logger import KVWriter, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

from agents import rundir

KIND = "disk"
"""What failed attempts are counted under."""


class Disk:
    """Tries to write, counts what fails, and says when it is enough.

    Args:
        limit: Checkpoints in a row that cannot be written before the run ends.
        note: Counts a fault: its kind, and what broke.
    """

    def __init__(self, limit: int, note: Callable[[str, str], None]) -> None:
        self._limit, self._note = limit, note
        self._unsaved = 0

    def note(self, what: str) -> None:
        """Count something that failed.

        Args:
            what: One line.
        """
        self._note(KIND, what)

    def takes(self, what: str, write: Callable[[], object]) -> bool:
        """Try to write something that can wait.

        Args:
            what: Its name.
            write: Writes it.

        Returns:
            Whether it is written.
        """
        try:
            write()
        except OSError as error:
            self.note(f"cannot write {what}: {reason(error)}")
            return False
        return True

    def saves(self, write: Callable[[], object]) -> bool:
        """Try to write a checkpoint.

        Args:
            write: Writes it.

        Returns:
            Whether it is written.

        Raises:
            OSError: If it is one too many in a row that is not.
        """
        try:
            write()
        except OSError as error:
            self._unsaved += 1
            self.note(f"cannot write a checkpoint: {reason(error)}")
            if self._unsaved >= self._limit:
                raise
            return False
        self._unsaved = 0
        return True


class Events(KVWriter):
    """TensorBoard's events; those that cannot be written are lost, and the next ones go into a new file.

    Args:
        directory: The run.
        timesteps: Where it stands.
        disk: Counts what fails.
    """

    def __init__(self, directory: rundir.RunDirectory, timesteps: int, disk: Disk) -> None:
        self._folder, self._disk = directory.tensorboard, disk
        # Events of steps that will be taken again must not show twice.
        self._purge = timesteps + 1 if self._folder.is_dir() else None
        self._format: TensorBoardOutputFormat | None = None
        disk.takes("TensorBoard's events", self._open)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Write one row.

        Args:
            key_values: The values, by name.
            key_excluded: Formats that a value is not for.
            step: Environment steps.
        """
        if self._format is not None and not self._folder.is_dir():
            self._disk.note(f"{self._folder} is gone; it is made again")
            self._drop()
        if not self._disk.takes("TensorBoard's events", lambda: self._write(key_values, key_excluded, step)):
            self._drop()

    def close(self) -> None:
        """Close the file."""
        if self._format is not None and not self._disk.takes("TensorBoard's events", self._format.close):
            self._drop()

    def _write(self, key_values: Mapping[str, Any], key_excluded: Mapping[str, tuple[str, ...]], step: int) -> None:
        self._open()
        assert self._format is not None
        self._format.write(dict(key_values), dict(key_excluded), step)

    def _open(self) -> None:
        if self._format is None:
            self._format = TensorBoardOutputFormat(str(self._folder))
            if self._purge is not None:
                self._format.writer.close()
                self._format.writer = SummaryWriter(str(self._folder), purge_step=self._purge)
                self._purge = None

    def _drop(self) -> None:
        if self._format is not None:
            with suppress(OSError):
                self._format.close()
        self._format = None


def reason(error: OSError) -> str:
    """Say what the system says.

    Args:
        error: What it raised.

    Returns:
        One line, with the file's name where it is known.
    """
    return " ".join(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}".split())
