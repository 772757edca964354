"""Ranks killed at random instants of a shared training: the job has to end, and the run to go on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import envs
from agents import checkpoint, configfiles, rundir
from agents.benchmarks.report import Report, Table
from agents.errors import UsageError

LIMIT = 30.0
"""Seconds in which a job has to end once one of its ranks is gone."""
_PATIENCE = 300.0
"""Seconds in which a job has to make its next checkpoint."""
_SAID = "died or does not answer"
_WITH = (1, 2, 3)
"""How many ranks go on with the run, in turn."""


@dataclass(frozen=True)
class Plan:
    """What to train, and how often to kill one of those who do."""

    env_id: str = "HalfCheetah-v5"
    """Environment that is trained on."""
    ranks: int = 2
    """Processes that train, at least 2."""
    kills: int = 10
    """Ranks to kill, each in a job of its own."""
    span: float = 10.0
    """Seconds from a job's first checkpoint over which the instants are drawn."""
    seed: int = 0
    """Seed of the run, of the ranks and of the instants."""


@dataclass
class Found:
    """What became of the jobs."""

    seconds: list[float] = field(default_factory=list)
    """From each kill to the end of its job."""
    ranks: Counter[int] = field(default_factory=Counter)
    """How often each rank was killed."""
    resumed: Counter[int] = field(default_factory=Counter)
    """How often so many ranks went on with the run."""
    failures: list[str] = field(default_factory=list)
    """What did not go as it should."""


def run(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Kill ranks, and go on with the run by fewer, as many and more.

    Args:
        plan: What, and how often.
        tell: Where to announce each kill.

    Returns:
        What was found; a run that came to harm is kept where its notes say.

    Raises:
        UsageError: If there are too few ranks, or the system does not tell of processes.
    """
    if plan.ranks < 2:
        raise UsageError(f"--ranks must be at least 2, got {plan.ranks}; one process has nobody to leave alone")
    if not Path("/proc/self/stat").exists():
        raise UsageError("the ranks of a job are found in /proc, which this system has not; use Linux")
    envs.make(plan.env_id, 1, seed=0).close()
    folder, rng, found = Path(tempfile.mkdtemp(prefix="acktr-ranks-")), random.Random(plan.seed), Found()
    job = _Jobs(plan, folder / "run")
    while len(found.seconds) < plan.kills and not found.failures:
        _kill(job, plan, rng, found)
        again = _WITH[(len(found.seconds) - 1) % len(_WITH)]
        if not found.failures:
            _go_on(job, again, found)
        tell(f"{len(found.seconds)} of {plan.kills} killed, {len(found.failures)} failures")
    notes = [f"seed {plan.seed}; a checkpoint after each rollout", *found.failures]
    if found.failures:
        notes.append(f"the run lies in {folder}")
    else:
        shutil.rmtree(folder)
    results = vars(found) | {"ranks": dict(found.ranks), "resumed": dict(found.resumed)}
    return Report("ranks", vars(plan), [_table(plan, found)], results, notes)


def trainer(ranks: int) -> list[str]:
    """Say how so many processes train.

    Args:
        ranks: How many.

    Returns:
        The beginning of a command line.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, "-m", "scripts.train"]


class _Jobs:
    """The same run, by one job after the other."""

    def __init__(self, plan: Plan, path: Path) -> None:
        self._plan, self.directory, self.log = plan, rundir.RunDirectory(path), path.with_name("log.txt")
        config = configfiles.shipped(plan.env_id)
        self._n_envs = max(config.env.n_envs, *_WITH, plan.ranks)
        self._period = config.learner.n_steps * self._n_envs

    def begin(self, ranks: int) -> subprocess.Popen[bytes]:
        """Start or resume the run with so many ranks."""
        known = self.directory.config.exists()
        self.log.write_bytes(b"")
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*trainer(ranks), *(self._on() if known else self._anew())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    @property
    def newest(self) -> int:
        """Steps that the newest checkpoint holds; 0 for none."""
        found = checkpoint.listing(self.directory)
        return int(found[-1].stem.split("-")[1]) if found else 0

    def wait_for_more(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until there is a newer checkpoint; False if the job ends before."""
        before, end = self.newest, time.monotonic() + _PATIENCE
        while self.newest <= before:
            if process.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def _anew(self) -> list[str]:
        steps = ("--total-timesteps", "1_000_000_000", "--checkpoint.period", str(self._period))
        places = ("--run-dir", str(self.directory.path), "--env.n-envs", str(self._n_envs))
        return [self._plan.env_id, "--seed", str(self._plan.seed), *steps, *places]

    def _on(self) -> list[str]:
        return ["--resume", str(self.directory.path)]


def _kill(job: _Jobs, plan: Plan, rng: random.Random, found: Found) -> None:
    process = job.begin(plan.ranks)
    if not job.wait_for_more(process):
        found.failures.append(f"a job of {plan.ranks} ranks made no checkpoint: {_tail(job.log)}")
        _end(process)
        return
    time.sleep(rng.uniform(0, plan.span))
    family, which = dict(_ranks(process.pid)), rng.randrange(plan.ranks)
    everybody = [*family.values(), process.pid]
    os.kill(family[which], signal.SIGKILL)
    began = time.monotonic()
    try:
        status = process.wait(2 * LIMIT)
    except subprocess.TimeoutExpired:
        status = 0
    seconds = time.monotonic() - began
    found.seconds.append(seconds)
    found.ranks[which] += 1
    lines = [line for line in _text(job.log).splitlines() if line.startswith("error: ")]
    left = [pid for pid in everybody if _is_alive(pid)]
    if seconds > LIMIT or not status:
        found.failures.append(f"the job took {seconds:.1f} s to end with status {status}")
    if len(lines) != 1 or _SAID not in lines[0] or f"rank {which} " not in lines[0]:
        found.failures.append(f"of rank {which} the job said {lines}")
    if left:
        found.failures.append(f"processes {left} are left of the job")
    _end(process)


def _go_on(job: _Jobs, ranks: int, found: Found) -> None:
    process = job.begin(ranks)
    if job.wait_for_more(process):
        found.resumed[ranks] += 1
        process.send_signal(signal.SIGTERM)
        process.wait(2 * LIMIT)
        if "stopped after" not in _text(job.log):
            found.failures.append(f"{ranks} ranks did not stop on SIGTERM: {_tail(job.log)}")
    else:
        found.failures.append(f"{ranks} ranks did not go on with the run: {_tail(job.log)}")
    _end(process)
    steps = [int(row["time/total_timesteps"]) for row in rundir.read_rows(job.directory.progress)]
    if len(set(steps)) != len(steps) or steps != sorted(steps):
        found.failures.append(f"{job.directory.progress} has rows out of order: {steps}")


def _ranks(parent: int) -> Iterator[tuple[int, int]]:
    """The ranks below a process, and their numbers in the system."""
    for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            above = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            said = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if above == parent else []
        except OSError:  # it has gone meanwhile
            continue
        yield from ((int(word[5:]), pid) for word in said if word.startswith(b"RANK="))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        for _, pid in list(_ranks(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _tail(log: Path) -> str:
    return " / ".join(_text(log).splitlines()[-5:])


def _table(plan: Plan, found: Found) -> Table:
    resumed = [str(found.resumed[ranks]) for ranks in _WITH]
    spread = _spread(found.seconds)
    row = (f"{plan.env_id}, {plan.ranks} ranks", str(len(found.seconds)), *spread, *resumed, str(len(found.failures)))
    names = ("", "killed", "seconds to the end, median", "most", *(f"went on with {n}" for n in _WITH), "failures")
    return Table("Ranks killed", names, [row])


def _spread(seconds: Sequence[float]) -> tuple[str, str]:
    if not seconds:
        return "–", "–"
    return f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"
