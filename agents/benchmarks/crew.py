"""Runs of a campaign side by side, each in a process of its own with one thread."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from agents import configfiles, interruption, rundir
from agents.benchmarks.stages import Run, Stage, next_stage, prepare
from agents.errors import UsageError

POLL = 0.1
"""Seconds between two looks at the processes."""

_HEAD = "$ "


class Interrupted(Exception):  # ruff: ignore[error-suffix-on-exception-name] - not an error
    """The campaign stopped on request, and every process with it.

    Args:
        left: Runs that are not done.
    """

    def __init__(self, left: int) -> None:
        super().__init__(f"stopped with {_count(left)} left")
        self.left = left


@dataclass(frozen=True)
class Failure:
    """A run that could not be brought to its end."""

    run: str
    """The run in words."""
    reason: str
    """Exit status and the last line of its log."""

    def __str__(self) -> str:
        return f"{self.run} failed: {self.reason}"


@dataclass(frozen=True)
class _Job:
    run: Run
    stage: Stage
    process: subprocess.Popen[bytes]
    began: float


def work(
    runs: Sequence[Run], jobs: int, lock: int, tell: Callable[[str], None], keep: Callable[[Run], None]
) -> list[Failure]:
    """Bring runs to their end.

    Args:
        runs: The runs, in the order in which they start.
        jobs: How many at a time, at least 1.
        lock: A file that every process holds open, so that the folder stays claimed as long as one of them lives.
        tell: Where to announce each start and end.
        keep: Called with each run as soon as it is done, before that is announced.

    Returns:
        The runs that failed.

    Raises:
        Interrupted: On SIGINT or SIGTERM, after the processes have written their checkpoints.
    """
    crew = _Crew(runs, jobs, lock, tell, keep)
    with interruption.signals() as stopper:
        try:
            while crew.busy and not stopper.wanted:
                crew.start()
                crew.collect()
                time.sleep(POLL)
        except KeyboardInterrupt:
            pass  # asked twice within one look at the processes
        finally:
            left = crew.left
            crew.stop()
    if left:
        raise Interrupted(left)
    return crew.failures


class _Crew:
    """Who waits, who works, who failed."""

    def __init__(
        self,
        runs: Sequence[Run],
        jobs: int,
        lock: int,
        tell: Callable[[str], None],
        keep: Callable[[Run], None],
    ) -> None:
        self.failures: list[Failure] = []
        self._waiting = deque(runs)
        self._working: list[_Job] = []
        self._jobs, self._lock, self._tell, self._keep = jobs, lock, tell, keep

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._working)

    @property
    def left(self) -> int:
        return len(self._waiting) + len(self._working)

    def start(self) -> None:
        """Start waiting runs while there is room."""
        while self._waiting and len(self._working) < self._jobs:
            self._advance(self._waiting.popleft(), time.monotonic(), None)

    def collect(self) -> None:
        """Take note of processes that have ended, and start the next stages of their runs."""
        for job in [job for job in self._working if job.process.poll() is not None]:
            self._working.remove(job)
            reason = _complaint(job)
            if reason is None:
                self._advance(job.run, job.began, job.stage)
            else:
                self._fail(job.run, reason)

    def stop(self) -> None:
        """Ask every process to stop, and wait for it; each further signal to us is passed on, the second kills."""
        for which in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
            try:
                for job in self._working:
                    job.process.send_signal(which)
                for job in self._working:
                    job.process.wait()
                return
            except KeyboardInterrupt:
                continue

    def _advance(self, run: Run, began: float, before: Stage | None) -> None:
        stage = next_stage(run)
        if stage is None:
            self._keep(run)
            self._tell(f"{run.label} is done after {time.monotonic() - began:,.0f} s; {_count(self.left)} left")
        elif before is not None and stage.output == before.output:
            self._fail(run, f"it ended without a result ({run.directory.log})")
        else:
            try:
                self._working.append(_Job(run, stage, _spawn(run, stage, self._lock), began))
            except (OSError, UsageError) as error:
                self._fail(run, str(error))
            else:
                if before is None:
                    self._tell(f"{run.label} {stage.name}; {_count(self.left)} left")

    def _fail(self, run: Run, reason: str) -> None:
        self.failures.append(Failure(run.label, reason))
        self._tell(f"{self.failures[-1]}; {_count(self.left)} left")


def last_line(log: Path) -> str:
    """Read what a program said last.

    Args:
        log: Its log.

    Returns:
        The last line that is not empty; that it said nothing, if so.
    """
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), _HEAD)
    return "it said nothing" if last.startswith(_HEAD) else last


def _spawn(run: Run, stage: Stage, lock: int) -> subprocess.Popen[bytes]:
    prepare(run)
    with run.directory.log.open("ab") as log:
        log.write(f"{_HEAD}{' '.join(stage.command)}\n".encode())
        log.flush()
        if stage.output is None:
            return _popen(stage, log, log, lock)
        with _unfinished(stage.output).open("wb") as output:
            return _popen(stage, output, log, lock)


def _popen(stage: Stage, output: BinaryIO, log: BinaryIO, lock: int) -> subprocess.Popen[bytes]:
    places = [str(configfiles.CONFIGS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    # A session of its own: Ctrl-C reaches us alone, and we ask each process once. It would take two for haste.
    return subprocess.Popen(
        stage.command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=log,
        env=environment,
        start_new_session=True,
        pass_fds=(lock,),
    )


def _complaint(job: _Job) -> str | None:
    status, output = job.process.returncode, job.stage.output
    if status:
        return f"exit status {status}: {last_line(job.run.directory.log)} ({job.run.directory.log})"
    if output is not None:
        unfinished = _unfinished(output)
        rundir.write_text(output, unfinished.read_text(encoding="utf-8"))
        unfinished.unlink()
    return None


def _unfinished(output: Path) -> Path:
    return output.with_name(f".{output.name}.tmp")


def _count(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"
