"""Training processes struck by signals at random instants and resumed, held against one that was never stopped."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import random
import runpy
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from agents import checkpoint
from agents.rundir import RunDirectory

SECTIONS = ("parameters", "normaliser", "rng", "worlds", "log")
"""Parts of a checkpoint that two equal runs have in common; the rest holds their seconds."""

_PATIENCE = 30.0
"""How many times the reference's seconds, and how many seconds more, a process may take before it counts as hanging."""

KILL = "SIGKILL"
INTERRUPTIONS = ("SIGTERM", "SIGINT", "SIGINT twice")
_SIGNALS = {
    KILL: (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
}


@dataclass
class Torment:
    """What became of the runs on one environment."""

    env_id: str
    """The environment."""
    seconds: float
    """What the run that was never stopped took."""
    runs: int = 0
    """Runs that were brought to their end."""
    blows: Counter[str] = field(default_factory=Counter)
    """Processes stopped, by signal."""
    without_checkpoint: int = 0
    """Processes that were gone before the run's first checkpoint."""
    half_written: int = 0
    """Processes that were gone within the writing of a file."""
    failures: list[str] = field(default_factory=list)
    """Resumes that did not go on, and runs that came out different."""


def torment(
    env_id: str,
    arguments: Sequence[str],
    blows: Sequence[str],
    rng: random.Random,
    folder: Path,
    tell: Callable[[str], None],
) -> Torment:
    """Train again and again, stopping and resuming, until every blow has struck a process.

    Args:
        env_id: What to train on.
        arguments: Further options of the training, seed included.
        blows: What to send, one to a process: `KILL` or one of `INTERRUPTIONS`.
        rng: Draws the instants, each uniform over what a whole run takes.
        folder: An empty folder for the runs.
        tell: Where to announce each run.

    Returns:
        What was found; its failures are empty if every run equals the one never stopped.
    """
    warm = begin(["--help"], folder / "help.log")  # the first process waits for the imports, and must not be the clock
    warm.join()
    whole, began = folder / "never-stopped", time.monotonic()
    if _wait(begin([env_id, *arguments, "--run-dir", str(whole)], _log(whole)), None, began):
        return Torment(env_id, 0.0, failures=[f"{env_id}: the run that was never stopped failed ({_log(whole)})"])
    found, left = Torment(env_id, time.monotonic() - began), list(blows)
    while left and len(found.failures) < 3:
        path = folder / f"run-{found.runs}"
        complaint = _survive(path, [env_id, *arguments], left, rng, found)
        found.failures += [complaint] if complaint else differences(whole, path)
        found.runs += 1
        struck = f"{found.blows.total()} of {len(blows)} processes stopped"
        tell(f"{env_id}: {struck}, {found.runs} runs, {len(found.failures)} failures")
    return found


def begin(
    arguments: Sequence[str], log: Path, door: str = "scripts.train", environ: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a program in a process of its own, forked where PyTorch is loaded already.

    So that a kill hits the training and not the imports, which nobody loses anything by.

    Args:
        arguments: Of the program.
        log: Where its output goes.
        door: The program.
        environ: What its environment holds besides; None for nothing.

    Returns:
        The process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "agents.training", "agents.natural", "envs.mujoco", "scripts.console"])
    process = context.Process(target=_run, args=(door, list(arguments), str(log), dict(environ or {})))
    process.start()
    return process


def differences(whole: Path, path: Path) -> list[str]:
    """Compare two finished runs to the last bit.

    Args:
        whole: One of them.
        path: The other.

    Returns:
        What differs, of their tables without seconds, and of their final agents.
    """
    one, other = RunDirectory(whole), RunDirectory(path)
    found = [] if one.progress.read_bytes() == other.progress.read_bytes() else ["progress.csv"]
    found += [] if _rows(one.episodes) == _rows(other.episodes) else ["episodes.csv"]
    found += [] if _evaluations(one.evaluations) == _evaluations(other.evaluations) else ["evaluations.json"]
    left, right = checkpoint.load(one.final), checkpoint.load(other.final)
    for section in SECTIONS:
        found += list(unequal(getattr(left, section), getattr(right, section), section))[:1]
    return [f"{path}: {', '.join(found)} differ from {whole}"] if found else []


def _survive(path: Path, arguments: Sequence[str], blows: list[str], rng: random.Random, found: Torment) -> str | None:
    directory = RunDirectory(path)
    while True:
        known = directory.config.exists()
        command = ["--resume", str(path)] if known else [*arguments, "--run-dir", str(path)]
        before, process, began = _size(_log(path)), begin(command, _log(path)), time.monotonic()
        if blows:
            process.join(rng.uniform(0, found.seconds))
            if process.is_alive():
                status = _strike(process, blows[0], rng, found.seconds)
                if status:  # 0: it came to its end before it could stop, and the blow is left for another
                    _note(found, blows.pop(0), directory)
                    # Whoever is struck before the program's own first line has nothing to say, and nothing to lose.
                    if status not in _STOPPED and _size(_log(path)) > before:
                        return f"{path} was left by its process with status {status} ({_log(path)})"
                    continue
        status = _wait(process, found.seconds, began)
        return f"{path} ended with status {status} ({_log(path)})" if status else None


_STOPPED = (130, -signal.SIGKILL, -signal.SIGTERM)
"""How a process may end that was stopped; SIGTERM's own, where it came before anyone watched for it."""


def _strike(process: BaseProcess, blow: str, rng: random.Random, seconds: float) -> int | str | None:
    for which in _SIGNALS[blow]:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, which)
            process.join(rng.uniform(0, 0.02))
    return _wait(process, seconds, time.monotonic())


def _note(found: Torment, blow: str, directory: RunDirectory) -> None:
    found.blows[blow] += 1
    found.without_checkpoint += not checkpoint.listing(directory)
    found.half_written += any(directory.path.rglob("*.tmp"))


def _wait(process: BaseProcess, seconds: float | None, began: float) -> int | str | None:
    """Wait for a process to end by itself.

    Returns:
        Its exit status, or that it hangs.
    """
    limit = None if seconds is None else _PATIENCE * (seconds + 1) - (time.monotonic() - began)
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return "none: it hangs"
    return process.exitcode


def _run(door: str, arguments: list[str], log: str, environ: dict[str, str]) -> None:
    os.environ.update(environ)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    print(f"$ {door} {shlex.join(arguments)}", flush=True)
    torch.set_num_threads(1)
    sys.argv = [door, *arguments]
    runpy.run_module(door, run_name="__main__", alter_sys=True)


def _log(path: Path) -> Path:
    return path.with_name(f"{path.name}.log")


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _rows(table: Path) -> list[dict[str, str]]:
    text = table.read_text(encoding="utf-8") if table.exists() else ""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(io.StringIO(text))]


def _evaluations(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(path.read_text(encoding="utf-8"))]


def unequal(one: Any, other: Any, where: str) -> Iterator[str]:
    """Find where two states differ in any bit.

    Args:
        one: Tensors, numbers and text in plain containers.
        other: The same, of another state.
        where: Their name.

    Yields:
        The name of each part that differs.
    """
    if type(one) is not type(other):
        yield where
    elif isinstance(one, torch.Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape) or not _same_bits(one, other):
            yield where
    elif isinstance(one, Mapping):
        if one.keys() != other.keys():
            yield where
        for key in one.keys() & other.keys():
            yield from unequal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield where
        for index, pair in enumerate(zip(one, other, strict=False)):
            yield from unequal(*pair, f"{where}[{index}]")
    elif repr(one) != repr(other):
        yield where


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(left, right)
