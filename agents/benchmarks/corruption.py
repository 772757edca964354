"""Checkpoints damaged at random: none may be used as if it were whole, and none may bring a program down."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agents import checkpoint
from agents.benchmarks.torment import SECTIONS, begin, unequal
from agents.errors import UsageError
from agents.rundir import RunDirectory

_DOOR_PERIOD = 20
"""Every so many damages, the programs themselves are run on the directory too."""


@dataclass
class Damage:
    """What became of the damaged checkpoints."""

    older_used: int = 0
    """Times an older, whole one was used, and the damaged ones were named."""
    refused: int = 0
    """Times nothing whole was left, and one line said so."""
    doors: int = 0
    """Programs that were run on a damaged directory."""
    kinds: Counter[str] = field(default_factory=Counter)
    """How many files were damaged in which way."""
    failures: list[str] = field(default_factory=list)
    """Damages that went unnoticed, and what ended in anything but one line."""


def spoil(data: bytes, kind: str, rng: random.Random) -> bytes:
    """Damage the content of a file.

    Args:
        data: The content.
        kind: One of ``KINDS``.
        rng: Draws where.

    Returns:
        Other bytes than the content's.
    """
    spoiled = KINDS[kind](bytearray(data), rng)
    return bytes(spoiled) if spoiled != data else data[:-1]


def _flip_a_bit(data: bytearray, rng: random.Random) -> bytearray:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _change_bytes(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.randint(2, 64)):
        data[rng.randrange(len(data))] ^= rng.randint(1, 255)
    return data


def _change_the_head(data: bytearray, rng: random.Random) -> bytearray:
    data[rng.randrange(32)] ^= rng.randint(1, 255)
    return data


def _zero_a_part(data: bytearray, rng: random.Random) -> bytearray:
    first = rng.randrange(len(data))
    size = min(rng.randint(1, 4096), len(data) - first)
    data[first : first + size] = bytes(size)
    return data


KINDS: Mapping[str, Callable[[bytearray, random.Random], bytearray]] = {
    "one bit flipped": _flip_a_bit,
    "bytes changed": _change_bytes,
    "a byte at its beginning changed": _change_the_head,
    "a part zeroed": _zero_a_part,
    "cut short": lambda data, rng: data[: rng.randrange(len(data))],
    "grown": lambda data, rng: data + rng.randbytes(rng.randint(1, 4096)),
    "empty": lambda _data, _rng: bytearray(),
    "all zeros": lambda data, _rng: bytearray(len(data)),
    "random bytes": lambda data, rng: bytearray(rng.randbytes(len(data))),
}
"""Ways to damage a file."""


def corrupt(run: Path, count: int, rng: random.Random, folder: Path, tell: Callable[[str], None]) -> Damage:
    """Damage the newest checkpoints of copies of a run, and read the copies.

    Args:
        run: A finished run with at least two checkpoints.
        count: How many files to damage.
        rng: Draws which, how and where.
        folder: An empty folder for the copies.
        tell: Where to announce every fiftieth.

    Returns:
        What was found; its failures are empty if nothing damaged was used and nothing crashed.
    """
    found, number = Damage(), 0
    while sum(found.kinds.values()) < count and len(found.failures) < 10:
        copy, number = folder / f"copy-{number}", number + 1
        shutil.copytree(run, copy)
        directory = RunDirectory(copy)
        steps = list(reversed(checkpoint.listing(directory)))
        victims = steps[: rng.choice([1, 1, 2, len(steps)])]
        if rng.random() < 0.5:
            directory.final.unlink()  # else it may stand in for the newest checkpoint
        elif rng.random() < 0.5:
            victims.append(directory.final)
        left = directory.final.exists() + len(steps) > len(victims)
        for victim in victims:
            kind = rng.choice(list(KINDS))
            found.kinds[kind] += 1
            victim.write_bytes(spoil(victim.read_bytes(), kind, rng))
        complaint = _read(directory, victims, left, run, found)
        if complaint is None and number % _DOOR_PERIOD == 1:
            complaint = _open_doors(copy, left, found)
        if complaint is not None:
            found.failures.append(f"{copy}: {complaint}")
            continue  # and keep the copy
        shutil.rmtree(copy)
        if number % 50 == 0:
            tell(f"{sum(found.kinds.values())} of {count} checkpoints damaged, {len(found.failures)} failures")
    return found


def _read(directory: RunDirectory, victims: list[Path], some_left: bool, run: Path, found: Damage) -> str | None:
    told: list[str] = []
    try:
        state = checkpoint.latest(directory, told.append)
    except UsageError as error:
        found.refused += not some_left
        return _about(str(error), victims[0]) if not some_left else f"refused although one was whole: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if state is None or state.path in victims:
        return f"{state and state.path} was used"
    original = checkpoint.load(run / state.path.relative_to(directory.path))
    if any(any(unequal(getattr(state, name), getattr(original, name), name)) for name in SECTIONS):
        return f"{state.path} was read with another content"
    for victim in victims:
        if not any(_about(line, victim) is None for line in told):
            return f"{victim} was not named: {told}"
    found.older_used += 1
    return None


def _about(line: str, victim: Path) -> str | None:
    if "\n" in line or str(victim) not in line:
        return f"not one line about {victim}: {line}"
    return None


def _open_doors(copy: Path, some_left: bool, found: Damage) -> str | None:
    for door, arguments in (
        ("scripts.evaluate", [str(copy), "--episodes", "1"]),
        ("scripts.train", ["--resume", str(copy)]),
    ):
        log = copy.with_name(f"{copy.name}.log")
        log.unlink(missing_ok=True)
        process = begin(arguments, log, door)
        process.join()
        found.doors += 1
        text = log.read_text(encoding="utf-8")
        if process.exitcode != (0 if some_left else 2) or "Traceback" in text:
            return f"{door} ended with status {process.exitcode} ({log})"
        if not some_left and text.count("\n") != 2:  # the command line's own is the first
            return f"{door} said more than one line ({log})"
    return None
