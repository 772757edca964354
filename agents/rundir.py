"""A run's directory: what lies where, and how it gets there whole."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from agents.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


@dataclass(frozen=True)
class RunDirectory:
    """The places of a run's files."""

    path: Path
    """The directory itself."""

    @property
    def config(self) -> Path:
        """The resolved configuration and where the run came from."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of snapshots."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def progress(self) -> Path:
        """One row of measurements per update, the same to the last digit whenever the run is repeated or resumed."""
        return self.path / "progress.csv"

    @property
    def timing(self) -> Path:
        """What clocks say of each update, which no repetition repeats."""
        return self.path / "timing.csv"

    @property
    def episodes(self) -> Path:
        """One row per training episode, with its raw score."""
        return self.path / "episodes.csv"

    @property
    def evaluations(self) -> Path:
        """Every evaluation, episode by episode."""
        return self.path / "evaluations.json"

    @property
    def result(self) -> Path:
        """The summary of the finished run."""
        return self.path / "result.json"

    @property
    def log(self) -> Path:
        """What the program printed, where whoever started it writes that down."""
        return self.path / "log.txt"

    @property
    def model(self) -> Path:
        """The folder of the final agent."""
        return self.path / "model"

    @property
    def final(self) -> Path:
        """The final agent, in the format of the checkpoints."""
        return self.model / "agent.pt"


def new_path(env_id: str, seed: int, now: datetime) -> Path:
    """Name a new run.

    Args:
        env_id: The environment; a slash in it becomes a dash.
        seed: The run's seed.
        now: The time of the start.

    Returns:
        A path below ``runs`` in the current directory that does not exist yet.
    """
    stem = Path("runs") / env_id.replace("/", "-") / f"{now:%Y%m%d-%H%M%S}-s{seed}"
    path, again = stem, 2
    while path.exists():
        path, again = stem.with_name(f"{stem.name}-{again}"), again + 1
    return path


def create(path: Path) -> RunDirectory:
    """Make the directory of a new run.

    Args:
        path: A path that does not exist, or a directory that is empty but for the log.

    Returns:
        The directory.

    Raises:
        UsageError: If there is something already, or the directory cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        directory = RunDirectory(path)
        if any(entry != directory.log and not is_temporary(entry) for entry in path.iterdir()):
            raise UsageError(
                f"run directory {path} is not empty; name another --run-dir, or go on with --resume {path}"
            )
    except FileExistsError:
        raise UsageError(f"run directory {path} is a file; name another --run-dir") from None
    except OSError as error:
        raise UsageError(f"cannot make the run directory {path}: {error.strerror}; name another --run-dir") from None
    return directory


def existing(path: Path) -> RunDirectory:
    """Open the directory of a run.

    Args:
        path: Where the run lies.

    Returns:
        The directory.

    Raises:
        UsageError: If no run lies there.
    """
    directory = RunDirectory(path)
    if not directory.config.is_file():
        raise UsageError(f"{path} is no run directory (it has no config.yaml); name one that scripts.train made")
    return directory


def write_whole(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Write a file so that it is there completely or not at all, even if the machine stops half-way.

    What the disk does not take is an OSError, whatever `fill` makes of it on the way.

    Args:
        path: The file, replaced if it exists; its folder is made if needed.
        fill: Writes the content to the stream it is given.

    Raises:
        RuntimeError: If `fill` does, for a reason of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _Stream(io.FileIO(temporary, "wb")) as stream:
            try:
                fill(stream)
                stream.flush()
            except RuntimeError:
                # torch.save makes one of what the disk says half-way, about positions in its archive.
                if stream.fault is None:
                    raise
                raise stream.fault from None
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class _Stream(io.BufferedWriter):
    """A file to be written that remembers what went wrong, whatever becomes of the error further up."""

    fault: OSError | None = None

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as fault:
            self.fault = fault
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as fault:
            self.fault = fault
            raise


def is_temporary(path: Path) -> bool:
    """Tell the files that ``write_whole`` leaves behind if its process is killed.

    Args:
        path: A file.

    Returns:
        Whether its name is one of theirs.
    """
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(directory: RunDirectory) -> None:
    """Remove what a killed process left half-written.

    Args:
        directory: A run that no process writes to.
    """
    for folder in (directory.path, directory.checkpoints, directory.model):
        for path in filter(is_temporary, folder.iterdir() if folder.is_dir() else ()):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole.

    Args:
        path: The file.
        text: Its content.
    """
    write_whole(path, lambda stream: _ignore(stream.write(text.encode())))


def write_json(path: Path, data: object) -> None:
    """Write a JSON file whole.

    Args:
        path: The file.
        data: Content in plain types.
    """
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> object:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        complaint = " ".join(str(error).split())
        raise UsageError(f"cannot read {path}: {complaint}; restore it, or move it away to go on without it") from None
    return content


class Table:
    """A CSV file that grows by rows; a new column rewrites it whole.

    Args:
        path: The file, created by the first row.
        keep: Which rows of an existing file to keep: those for which it is true.
    """

    def __init__(self, path: Path, keep: Callable[[Mapping[str, str]], bool] = lambda _: True) -> None:
        self.path = path
        self.columns: list[str] = []
        self._pending: list[Mapping[str, object]] = []
        if path.exists():
            rows = _kept(path, keep)
            self.columns = list(rows[0]) if rows else []
            self._rewrite(rows)

    def append(self, row: Mapping[str, object]) -> None:
        """Add a row, which reaches the disk with the next ``flush``.

        Args:
            row: Values by column; columns that are not there yet are added.
        """
        self._pending.append(row)

    def flush(self) -> None:
        """Write the rows that are waiting; they go on waiting where the disk does not take them."""
        fresh = [name for row in self._pending for name in row if name not in self.columns]
        if fresh or (self._pending and not self.path.exists()):
            columns, self.columns = self.columns, [*self.columns, *dict.fromkeys(fresh)]
            try:
                self._rewrite(read_rows(self.path) if self.path.exists() else [])
            except OSError:
                self.columns = columns
                raise
        if self._pending:
            self._extend(self._lines(self._pending))
        self._pending = []

    def sync(self) -> None:
        """Write the rows that are waiting, and wait until the file would survive a power failure."""
        self.flush()
        if self.path.exists():
            _sync(self.path)

    def _extend(self, lines: str) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8", newline="") as stream:
                stream.write(lines)
        except OSError:
            # Rows stay whole, and wait; a part of them would be taken for others' columns.
            with suppress(OSError):
                os.truncate(self.path, size)
            raise

    def _rewrite(self, rows: Sequence[Mapping[str, object]]) -> None:
        header = ",".join(self.columns) + "\n" if self.columns else ""
        write_text(self.path, header + self._lines(rows))

    def _lines(self, rows: Sequence[Mapping[str, object]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()


def _kept(path: Path, keep: Callable[[Mapping[str, str]], bool]) -> list[dict[str, str]]:
    try:
        return [row for row in read_rows(path) if keep(row)]
    except (KeyError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}); move it away to go on without it") from None


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file by column names.

    A last line that a power failure cut short is left out.

    Args:
        path: The file.

    Returns:
        Its rows.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values() and None not in row]


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _ignore(_: object) -> None:
    """Drop a value, so that an expression can serve as a statement."""
