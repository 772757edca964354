"""Resident memory of a process.

The peak is the kernel's high-water mark of this address space. ``getrusage`` would not do: on Linux its ``ru_maxrss``
lives on through fork and exec, so a process started by a larger one reports the size of its parent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_OURS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """What a process held, in MiB."""

    imports: float
    """Resident before environments and networks were made: interpreter, PyTorch and the other packages."""
    peak: float
    """The most that was ever resident."""


def resident(process: int | None = None) -> float | None:
    """Say what is resident now.

    Args:
        process: Of whom; None for the measuring process.

    Returns:
        MiB; None where the kernel does not tell.
    """
    return _read("VmRSS", _OURS if process is None else Path(f"/proc/{process}/status"))


def peak() -> float | None:
    """Say what was resident at most since the program of this process was loaded.

    Returns:
        MiB; None where the kernel does not tell.
    """
    return _read("VmHWM")


def since_imports(imports: float | None) -> Memory | None:
    """Finish a measurement.

    Args:
        imports: What was resident before.

    Returns:
        Both numbers; None where the kernel does not tell.
    """
    highest = peak()
    return None if imports is None or highest is None else Memory(imports, highest)


def _read(name: str, status: Path = _OURS) -> float | None:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None
