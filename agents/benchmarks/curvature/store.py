"""What was measured so far, as CSV files that a stopped benchmark goes on from."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from agents import rundir
from agents.errors import UsageError

Row = dict[str, str]


class Store:
    """The rows of one experiment: each measurement's settings, and what it found.

    Args:
        folder: Where the file lies or will.
        name: Of the experiment.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.csv"
        self.rows: list[Row] = rundir.read_rows(self.path) if self.path.exists() else []

    def once(self, key: Mapping[str, Any], measure: Callable[[], Iterable[Mapping[str, Any]]]) -> list[Row]:
        """Measure, unless that was done before.

        Args:
            key: The measurement's settings.
            measure: Measures; one mapping per row, without the settings.

        Returns:
            The rows.

        Raises:
            UsageError: If the file is of another program's making.
        """
        found = self.of(key)
        if found:
            return found
        rows = [{name: _cell(value) for name, value in {**key, **row}.items()} for row in measure()]
        if self.rows and rows and list(self.rows[0]) != list(rows[0]):
            raise UsageError(f"{self.path} has other columns than this program; name another --output")
        self.rows += rows
        rundir.write_text(self.path, to_csv(self.rows))
        return rows

    def of(self, key: Mapping[str, Any]) -> list[Row]:
        """Find a measurement.

        Args:
            key: Its settings, or some of them.

        Returns:
            Its rows, none if it was not made.
        """
        wanted = {name: _cell(value) for name, value in key.items()}
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]


def to_csv(rows: list[Row]) -> str:
    """Write rows as text.

    Args:
        rows: The rows, all with the same columns.

    Returns:
        CSV text, empty for no rows.
    """
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
