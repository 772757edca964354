"""Full disks, memory that runs out, clocks that jump: the run goes on, or says why not.

The disk is made to fail by the operating system itself: the largest size of a file that this process may write.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acktr.sb3 import ACKTR
from agents import checkpoint, rundir
from agents.callbacks import Saver
from scripts import train
from tests.events import shown

SHORT = ["--env.n-envs", "2", "--acktr.n-steps", "16", "--a2c.n-steps", "16", "--evaluation.episodes", "1"]
STEPS = 640
ROLLOUTS = STEPS // 32


def run(path: Path, *flags: str) -> int:
    argv = ["toy/Constant-v0", *SHORT, "--total-timesteps", str(STEPS), "--run-dir", str(path), *flags]
    return train.main(argv)


@contextmanager
def no_larger_than(size: int) -> Generator[None]:
    """Let no file of this process grow beyond a size in bytes: writing more fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def protected(path: Path) -> Generator[None]:
    """Let nobody write below a folder: the system refuses with EACCES, root too, who is somebody else meanwhile."""
    places = [path, *(place for place in path.rglob("*") if place.is_dir())]
    for place in places:
        place.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for place in places:
            place.chmod(0o755)


def broken_at(
    monkeypatch: pytest.MonkeyPatch, rollouts: set[int], disk: Callable[[], AbstractContextManager[None]]
) -> None:
    """Break the disk from the beginning of some rollouts, before a checkpoint is due, to the end of their updates."""
    start, learn, seen = Saver._on_rollout_start, ACKTR.train, []

    def starting(self: Any) -> None:
        seen.append(1)
        with disk() if len(seen) in rollouts else nullcontext():
            start(self)

    def learning(self: Any) -> None:
        with disk() if len(seen) in rollouts else nullcontext():
            learn(self)

    monkeypatch.setattr(Saver, "_on_rollout_start", starting)
    monkeypatch.setattr(ACKTR, "train", learning)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_table_keeps_whole_rows_and_what_it_could_not_write(tmp_path: Path) -> None:
    table = rundir.Table(tmp_path / "table.csv")
    for number in range(40):
        table.append({"number": number, "square": number**2})
        if number % 3:
            with (
                no_larger_than(max(4, (tmp_path / "table.csv").stat().st_size + 2)),
                pytest.raises(OSError, match="large"),
            ):
                table.flush()
            text = (tmp_path / "table.csv").read_text()
            assert text.endswith("\n") and "38" not in text.splitlines()[-1][2:], "no part of a row stays"
        else:
            table.flush()
    table.flush()
    assert [int(row["square"]) for row in rows(tmp_path / "table.csv")] == [n**2 for n in range(40)]


def test_a_new_column_waits_too(tmp_path: Path) -> None:
    table = rundir.Table(tmp_path / "table.csv")
    table.append({"a": 1})
    table.flush()
    table.append({"a": 2, "b": 3})
    with no_larger_than(2), pytest.raises(OSError, match="large"):
        table.flush()
    table.append({"a": 4, "b": 5})
    table.flush()
    assert rows(tmp_path / "table.csv") == [{"a": "1", "b": ""}, {"a": "2", "b": "3"}, {"a": "4", "b": "5"}]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_table_whose_file_is_gone_begins_a_new_one(tmp_path: Path) -> None:
    table = rundir.Table(tmp_path / "run" / "table.csv")
    table.append({"a": 1})
    table.flush()
    shutil.rmtree(tmp_path / "run")
    table.append({"a": 2})
    table.flush()
    assert rows(tmp_path / "run" / "table.csv") == [{"a": "2"}]


@pytest.fixture
def open_path() -> Generator[Path]:
    """A folder that everybody may look into; pytest's own are for its owner alone."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


DISKS = {
    "full": (lambda path: no_larger_than(64), "File too large"),
    "read-only": (lambda path: protected(path / "run"), "Permission denied"),
}


@pytest.mark.parametrize("kind", DISKS)
def test_a_disk_that_takes_nothing_costs_time_and_nothing_else(
    kind: str, open_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path, (disk, says) = open_path, DISKS[kind]
    assert run(tmp_path / "sound", "--checkpoint.period", "32") == 0
    full = set(np.random.default_rng(0).choice(np.arange(2, ROLLOUTS), 10, replace=False).tolist())
    with monkeypatch.context() as patched:
        broken_at(patched, full, lambda: disk(tmp_path))
        assert run(tmp_path / "run", "--checkpoint.period", "32", "--max-faults", "30") == 0
    sound, ours = (checkpoint.latest(rundir.existing(tmp_path / name)) for name in ("sound", "run"))
    for name, tensor in sound.parameters["policy"].items():
        assert torch.equal(ours.parameters["policy"][name], tensor)
    known = [{k: v for k, v in row.items() if k != "faults/disk"} for row in rows(tmp_path / "run" / "progress.csv")]
    assert known == rows(tmp_path / "sound" / "progress.csv"), "rows waited until they could be written"
    assert rows(tmp_path / "run" / "progress.csv")[-1]["faults/disk"] == "10", "checkpoints alone met it"
    assert shown(tmp_path / "run" / "tensorboard")["faults/disk"] == 10
    assert f"cannot write a checkpoint: {says}" in caplog.text


def test_a_disk_that_stays_full_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        broken_at(patched, set(range(6, 10**6)), lambda: no_larger_than(64))
        assert run(tmp_path / "run", "--checkpoint.period", "32", "--max-faults", "3") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: stopped after 224 steps: cannot write: File too large")
    assert f"--resume {tmp_path / 'run'}" in line
    assert checkpoint.latest(rundir.existing(tmp_path / "run")).timesteps == 128
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert len(rows(tmp_path / "run" / "progress.csv")) == ROLLOUTS


MOUNTED = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && exec "$@"']


def test_a_small_file_system_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    """Real ones, in a mount namespace: ten sizes, so that what does not fit any more is now this file, now that."""
    small, mount = tmp_path / "small", [*MOUNTED, str(tmp_path / "small")]
    small.mkdir()
    may = bool(shutil.which("unshare")) and not subprocess.run([*mount, "true"], check=False).returncode
    program = [sys.executable, "-m", "tests.agents.small_disk", str(small), str(tmp_path)]
    command = [*mount, *program, "mounted"] if may else [*program, "limited"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 10
    for each in found:
        assert each["again"] == 0 and each["same"], each
        assert each["status"] in {0, 1, 2}, each
        assert each["status"] == 0 or ("No space left on device", "File too large")[not may] in each["line"], each
    assert sum(each["status"] == 1 for each in found) >= 3, "some began and were ended by the disk"


def test_a_tensorboard_folder_that_vanishes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, real, seen = rundir.RunDirectory(tmp_path / "run"), Saver._on_rollout_start, []
    gone = set(np.random.default_rng(0).choice(np.arange(2, ROLLOUTS), 10, replace=False).tolist())

    def vanishing(self: Any) -> None:
        real(self)
        seen.append(1)
        if len(seen) in gone:
            shutil.rmtree(directory.tensorboard)

    monkeypatch.setattr(Saver, "_on_rollout_start", vanishing)
    assert run(tmp_path / "run", "--max-faults", "30") == 0
    assert shown(directory.tensorboard)["faults/disk"] == 10
    events = EventAccumulator(str(directory.tensorboard))
    events.Reload()
    assert events.Scalars("time/fps")[-1].step == max(int(r["time/total_timesteps"]) for r in rows(directory.progress))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")]
)
def test_no_memory_left_ends_the_run_with_a_checkpoint_and_a_remedy(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ACKTR.train
    moments = np.random.default_rng(0).choice(np.arange(2, ROLLOUTS), 10, replace=False)
    for moment in sorted(32 * moments):

        def exhausted(self: Any, moment: int = moment) -> None:
            if self.num_timesteps >= moment:
                raise error
            real(self)

        with monkeypatch.context() as patched:
            patched.setattr(ACKTR, "train", exhausted)
            go_on = ["--resume", str(tmp_path / "run")]
            assert (train.main(go_on) if (tmp_path / "run").exists() else run(tmp_path / "run")) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert "out of memory" in line and "shorter rollouts (n_steps)" in line and "8 GiB" not in line
        assert checkpoint.latest(rundir.existing(tmp_path / "run")).timesteps == moment
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    steps = [int(row["time/total_timesteps"]) for row in rows(tmp_path / "run" / "progress.csv")]
    assert sorted(set(steps)) == list(range(32, STEPS + 1, 32))
    assert rows(tmp_path / "run" / "progress.csv")[-1]["faults/memory"] == "10"
    assert shown(tmp_path / "run" / "tensorboard")["faults/memory"] == 10


def test_a_clock_that_jumps_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path / "sound") == 0
    steps, now, now_ns = iter(range(10**9)), time.time, time.time_ns
    jumps = lambda: 3600.0 * (-1) ** (next(steps) // 7)  # ruff: ignore[lambda-assignment]
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now() + jumps())
        patched.setattr(time, "time_ns", lambda: now_ns() + int(jumps() * 1e9))
        assert run(tmp_path / "run") == 0
    assert (tmp_path / "run" / "progress.csv").read_bytes() == (tmp_path / "sound" / "progress.csv").read_bytes()
    seconds = [float(row["seconds"]) for row in rows(tmp_path / "run" / "episodes.csv")]
    assert seconds == sorted(seconds) and seconds[-1] < 600
