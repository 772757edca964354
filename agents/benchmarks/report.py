"""What a benchmark found: tables to read, and a JSON file to compute with."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from agents import provenance, rundir
from agents.benchmarks.measuring import Spread, Timing
from agents.errors import UsageError
from agents.schema import plain

PACKAGES = ("torch", "stable-baselines3", "sb3-contrib", "nngeometry", "curvlinops-for-pytorch", "gymnasium", "numpy")
"""Whose versions go into every file."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a headline."""

    title: str
    """One line above it."""
    columns: Sequence[str]
    """Their heads; the first column names the rows."""
    rows: Sequence[Sequence[str]]
    """As many cells each as there are columns."""

    def __str__(self) -> str:
        lines = [tuple(self.columns), *map(tuple, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join([self.title, *(_line(line, widths) for line in lines)])


@dataclass(frozen=True)
class Report:
    """The outcome of one benchmark."""

    name: str
    """The benchmark."""
    settings: Mapping[str, Any]
    """What was asked for."""
    tables: Sequence[Table]
    """For the reader."""
    results: Mapping[str, Any]
    """Every number, in plain types, dataclasses and timings."""
    notes: Sequence[str] = field(default_factory=tuple)
    """One line each on what the reader must know: peers that are missing, what differs."""
    attachments: Mapping[str, str] = field(default_factory=dict)
    """Texts of further files beside the JSON file, by suffix."""

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.tables), *(["\n".join(self.notes)] if self.notes else [])])


def check_folder(folder: Path, option: str = "--output") -> None:
    """Make sure that a report can be written into a folder, before anything is measured for it.

    Args:
        folder: The folder, which may not exist yet.
        option: What named it.

    Raises:
        UsageError: If something else stands in its place, or nothing can be written there.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UsageError(f"{option} {folder} cannot be a folder, because {nearest} is a file; name another")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"{option} {folder} cannot be written, because {nearest} is protected; name another")


def write(report: Report, folder: Path, command: Sequence[str], now: datetime) -> Path:
    """Write a report with where it came from, and its attachments.

    Args:
        report: What was found.
        folder: Where to put it.
        command: The command line that was run.
        now: The time of its start.

    Returns:
        The file, named after benchmark and time; another file of that name stays and gets a numbered neighbour.
    """
    stem = folder / f"{report.name}-{now:%Y%m%d-%H%M%S}.json"
    path, number = stem, 2
    while path.exists():
        path, number = stem.with_stem(f"{stem.stem}-{number}"), number + 1
    content = {
        "benchmark": report.name,
        "settings": plain(report.settings),
        "origin": origin(command, now),
        "results": plain(report.results),
        "notes": list(report.notes),
    }
    rundir.write_json(path, content)
    for suffix, text in report.attachments.items():
        rundir.write_text(path.with_suffix(suffix), text)
    return path


def origin(command: Sequence[str], now: datetime) -> dict[str, Any]:
    """Describe program and machine.

    Args:
        command: The command line.
        now: The time of the start.

    Returns:
        Plain types: code, versions, processor, cores, load.
    """
    described = provenance.describe(command, now)
    packages = {name: found for name in PACKAGES if (found := provenance.package_version(name))}
    return {
        **described,
        "packages": {**dict(described["packages"]), **packages},  # type: ignore[call-overload]
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_at_end": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def cpu_model(table: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor.

    Args:
        table: Where Linux describes its processors.

    Returns:
        Its model, or the architecture where nothing better is known.
    """
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", table.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def with_range(spread: Spread, digits: int = 2) -> str:
    """Write a median with its range.

    Args:
        spread: The numbers.
        digits: After the point; 0 groups thousands.

    Returns:
        For instance ``1.20 [1.10–1.31]``.
    """
    return f"{spread.median:,.{digits}f} [{spread.low:,.{digits}f}–{spread.high:,.{digits}f}]"


def raw(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Turn timings into plain types.

    Args:
        timings: One per round.

    Returns:
        Wall seconds, processor seconds, work and phases of each.
    """
    return [
        {"wall": t.wall, "cpu": t.cpu, "work": t.work, "phases": {name: list(pair) for name, pair in t.phases.items()}}
        for t in timings
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()
