"""Trains on file systems that are too small, as a program of its own, which may resize them: prints what happened.

Where nobody may mount a file system of his own, a limit to the size of files stands in for it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np

from agents import checkpoint, rundir
from scripts import train
from tests.agents.test_disk import no_larger_than, run

EVERY = ["--checkpoint.period", "32", "--max-faults", "3"]


@contextlib.contextmanager
def mounted(folder: Path, kilobytes: int) -> Generator[None]:
    """Let a folder, where a file system is mounted, hold so much."""
    for size in (kilobytes, 65536):
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(folder)], check=True)
        if size == kilobytes:
            yield


def outcome(path: Path) -> dict[str, object]:
    """What a finished run has to show: its rows without the count of what the disk did not take, and its weights."""
    with (path / "progress.csv").open(encoding="utf-8") as stream:
        rows = [{k: v for k, v in row.items() if k != "faults/disk"} for row in csv.DictReader(stream)]
    policy = checkpoint.latest(rundir.existing(path)).parameters["policy"]
    return {"rows": rows, "weights": {name: tensor.tolist() for name, tensor in policy.items()}}


def told(status: object, err: io.StringIO) -> tuple[object, str]:
    lines = err.getvalue().splitlines()
    return status, lines[-1] if lines else ""


def once(path: Path, kilobytes: int, small: bool, sound: dict[str, object]) -> dict[str, object]:
    """Run until nothing fits any more, make room, and go on."""
    cramped = mounted(path.parent, kilobytes) if small else no_larger_than(1024 * kilobytes)
    with cramped, contextlib.redirect_stderr(io.StringIO()) as err:
        status, line = told(run(path, *EVERY), err)
    saved = status == 1 and checkpoint.latest(rundir.existing(path)) is not None
    with contextlib.redirect_stderr(io.StringIO()):
        again = train.main(["--resume", str(path)]) if (path / "config.yaml").exists() else run(path, *EVERY)
    same = outcome(path) == sound
    shutil.rmtree(path)
    return {"kilobytes": kilobytes, "status": status, "line": line, "saved": saved, "again": again, "same": same}


def main(folder: Path, beside: Path, small: bool) -> None:
    """Try ten sizes, from what takes hardly more than a checkpoint to what takes nearly all.

    Args:
        folder: of the small file system.
        beside: where there is room.
        small: whether it is one.
    """
    with contextlib.redirect_stdout(sys.stderr):
        run(beside / "sound", *EVERY)
        sound = outcome(beside / "sound")
        sizes = [file.stat().st_size // 1024 for file in (beside / "sound").rglob("*") if file.is_file()]
        drawn = np.random.default_rng(0).integers(4, sum(sizes) if small else max(sizes), 10).tolist()
        found = [once(folder / "run", size, small, sound) for size in drawn]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "mounted")
