"""A training that processes share, against one process with one process's part of the environments."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import envs
from agents import rundir
from agents.benchmarks.measuring import interleave, ratios, spread
from agents.benchmarks.ranks import trainer
from agents.benchmarks.report import Report, Table, with_range
from agents.errors import UsageError

ALONE = "one process"
_SHOWN = 300  # characters of what a training said that failed


@dataclass(frozen=True)
class Plan:
    """What to train, and by how many."""

    env_id: str = "HalfCheetah-v5"
    """Environment that is trained on."""
    ranks: int = 2
    """Processes that share a training, at least 2."""
    n_envs: int = 8
    """Environments of all of them together; one process alone has its part of them."""
    steps: int = 150_000
    """Environment steps of each training."""
    repeats: int = 5
    """Rounds, each of one training alone and one that is shared."""


def run(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Train in turn.

    Args:
        plan: What, and by how many.
        tell: Where to announce each training.

    Returns:
        Steps per second, and their ratio.

    Raises:
        UsageError: If the environments cannot be shared out evenly.
    """
    if plan.ranks < 2 or plan.n_envs % plan.ranks:
        raise UsageError(f"--n-envs {plan.n_envs} cannot be shared out evenly over --ranks {plan.ranks}, at least 2")
    envs.make(plan.env_id, 1, seed=0).close()
    shared = f"{plan.ranks} ranks"

    def speed(subject: str, number: int) -> float:
        return _speed(plan, 1 if subject == ALONE else plan.ranks, number)

    found = interleave([ALONE, shared], plan.repeats, speed, tell)
    rows = [
        (ALONE, str(plan.n_envs // plan.ranks), with_range(spread(found[ALONE]), 0), ""),
        (
            shared,
            str(plan.n_envs),
            with_range(spread(found[shared]), 0),
            with_range(ratios(found[shared], found[ALONE])),
        ),
    ]
    table = Table(f"Training {plan.env_id}", ("", "environments", "steps/s", "of one process"), rows)
    note = "one thread each; as many transitions to a process, so twice as many to an update of two"
    return Report("together", vars(plan), [table], {"steps_per_second": found}, [note])


def _speed(plan: Plan, ranks: int, seed: int) -> float:
    """Steps per second of a training in processes of its own, starts and evaluations left out."""
    count = plan.n_envs if ranks > 1 else plan.n_envs // plan.ranks
    numbers = {"env.n-envs": count, "total-timesteps": plan.steps, "seed": seed, "torch-threads": 1}
    options = [f"--{name}={number}" for name, number in {**numbers, "evaluation.episodes": 1}.items()]
    with tempfile.TemporaryDirectory(prefix="acktr-together-") as folder:
        directory = rundir.RunDirectory(Path(folder) / "run")
        command = [*trainer(ranks), plan.env_id, *options, "--run-dir", str(directory.path)]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if line.startswith("error: ")), done.stderr)
            raise UsageError(f"a training of {ranks} ended with status {done.returncode}: {said[-_SHOWN:]}")
        result: dict[str, Any] = json.loads(directory.result.read_text(encoding="utf-8"))
        return float(result["steps_per_second"])
