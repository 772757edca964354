"""Long runs: memory that grows and decompositions that fail only show after hours."""

from __future__ import annotations

import csv
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

import envs
from acktr.curvature import EKFAC
from acktr.likelihood import Categorical
from acktr.optimizer import NaturalGradient
from acktr.step import StepRule
from agents.benchmarks import engines, memory
from agents.benchmarks.measuring import isolated
from agents.benchmarks.report import Report, Table
from agents.benchmarks.torment import begin
from agents.rundir import RunDirectory

ALLOWED_GROWTH = 0.02
"""Share by which the resident memory may grow after the first tenth of a run."""
_SAMPLES = 200
_PERIOD = 0.5
"""Seconds between two looks at a process from outside."""
_BATCH, _RANK, _REFRESH_PERIOD = 64, 32, 10


@dataclass(frozen=True)
class Plan:
    """What to run for long."""

    env_id: str = "HalfCheetah-v5"
    """Environment of the training, which is configured as shipped."""
    total_timesteps: int = 5_000_000
    """Length of the training."""
    updates: int = 20_000
    """How often to update the curvature of a wide network and to step."""
    width: int = 512
    """Of its four hidden layers."""
    seed: int = 0
    """Of everything."""


@dataclass
class Soak:
    """What became of a long run."""

    name: str
    """What ran."""
    resident: list[float] = field(default_factory=list)
    """MiB, at equal distances over the run."""
    seconds: float = 0.0
    """How long it took."""
    skipped_steps: int = 0
    """Steps left out because something was not finite."""
    skipped_refreshes: int = 0
    """Decompositions done without."""
    failures: list[str] = field(default_factory=list)
    """What should not have been."""

    @property
    def after_a_tenth(self) -> float:
        """Resident MiB in the second tenth, its median."""
        tenth = max(1, len(self.resident) // 10)
        return statistics.median(self.resident[tenth : 2 * tenth] or self.resident)

    @property
    def in_the_end(self) -> float:
        """Resident MiB in the last tenth, its median."""
        return statistics.median(self.resident[-max(1, len(self.resident) // 10) :])


def run(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Run for long.

    Args:
        plan: What.
        tell: Where to announce what happens.

    Returns:
        What was found; a training that came to harm is kept where the notes say.
    """
    envs.make(plan.env_id, 1, seed=plan.seed).close()  # a mistake in an id should not cost a folder
    folder = Path(tempfile.mkdtemp(prefix="acktr-soak-"))
    tell(f"{plan.total_timesteps:,} steps on {plan.env_id}")
    soaks = [training(plan, folder)]
    tell(f"{plan.updates:,} updates of 4 layers of {plan.width}")
    soaks.append(isolated(wide_net, plan))
    failures = [complaint for soak in soaks for complaint in complaints(soak)]
    notes = [f"seed {plan.seed}; allowed: {ALLOWED_GROWTH:.0%} more than after the first tenth", *failures]
    if failures:
        notes.append(f"the training lies in {folder}")
    else:
        shutil.rmtree(folder)
    return Report("soak", vars(plan), [_table(soaks)], {"soaks": list(map(vars, soaks)), "failures": failures}, notes)


def training(plan: Plan, folder: Path) -> Soak:
    """Train in a process of its own, and look at its memory from outside.

    Args:
        plan: The plan.
        folder: Where to.

    Returns:
        What was found.
    """
    directory, log = RunDirectory(folder / "run"), folder / "run.log"
    soak, began = Soak(f"{plan.env_id}, {plan.total_timesteps:,} steps"), time.monotonic()
    flags = ["--seed", str(plan.seed), "--total-timesteps", str(plan.total_timesteps), "--run-dir", str(directory.path)]
    process = begin([plan.env_id, *flags], log)
    while process.is_alive():
        size = memory.resident(process.pid)
        if size is not None and directory.progress.exists():
            soak.resident.append(size)
        process.join(_PERIOD)
    soak.seconds = time.monotonic() - began
    if process.exitcode or not directory.progress.exists():
        soak.failures.append(f"training ended with status {process.exitcode} ({log})")
        return soak
    with directory.progress.open(encoding="utf-8") as stream:
        last = list(csv.DictReader(stream))[-1]
    soak.skipped_steps, soak.skipped_refreshes = (
        sum(int(float(last[name] or 0)) for name in last if name.endswith(ending))
        for ending in ("/skipped_steps", "/skipped_refreshes")
    )
    soak.failures += [f"{last[name]} faults: {name}" for name in last if name.startswith("faults/") and last[name]]
    return soak


def wide_net(plan: Plan) -> Soak:
    """Teach a wide network to tell the largest of some sums, with EKFAC, one step to a batch.

    Args:
        plan: The plan.

    Returns:
        What was found.
    """
    torch.set_num_threads(1)
    network, generator = engines.mlp(plan.seed, 1, plan.width).network, torch.Generator().manual_seed(plan.seed)
    rule = StepRule(refresh_period=_REFRESH_PERIOD)
    optimizer = NaturalGradient(network, Categorical(), EKFAC(rank=_RANK), rule=rule, seed=plan.seed)
    inputs_to_sums = torch.randn(64, 10, generator=generator)
    soak, losses, began = Soak(f"4 × {plan.width}, {plan.updates:,} updates"), [], time.monotonic()
    for number in range(plan.updates):
        inputs = torch.randn(_BATCH, 64, generator=generator)
        with optimizer.recording():
            logits = network(inputs)
        optimizer.update_curvature()
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, (inputs @ inputs_to_sums).argmax(1))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        size = memory.resident() if number % max(1, plan.updates // _SAMPLES) == 0 else None
        if size is not None:
            soak.resident.append(size)
    soak.seconds = time.monotonic() - began
    soak.skipped_steps = optimizer.skipped
    soak.skipped_refreshes = int(optimizer.curvature.diagnostics()["skipped_refreshes"])
    tenth = max(1, plan.updates // 10)
    first, last = statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])
    if not last < first:
        soak.failures.append(f"the loss went from {first:.3g} to {last:.3g}")
    return soak


def complaints(soak: Soak) -> list[str]:
    """Judge a run.

    Args:
        soak: What became of it.

    Returns:
        One line for each thing that should not have been.
    """
    found = list(soak.failures)
    if soak.resident and soak.in_the_end > (1 + ALLOWED_GROWTH) * soak.after_a_tenth:
        found.append(f"the memory grew from {soak.after_a_tenth:,.1f} to {soak.in_the_end:,.1f} MiB")
    if soak.skipped_steps or soak.skipped_refreshes:
        found.append(f"{soak.skipped_steps} steps and {soak.skipped_refreshes} refreshes were skipped")
    return [f"{soak.name}: {complaint}" for complaint in found]


def _table(soaks: list[Soak]) -> Table:
    columns = ("", "minutes", "MiB after a tenth", "MiB in the end", "growth", "skipped steps", "skipped refreshes")
    return Table("Long runs", columns, [_row(soak) for soak in soaks])


def _row(soak: Soak) -> tuple[str, ...]:
    skipped = str(soak.skipped_steps), str(soak.skipped_refreshes)
    if not soak.resident:
        return soak.name, f"{soak.seconds / 60:.1f}", "unknown", "unknown", "unknown", *skipped
    sizes = f"{soak.after_a_tenth:,.1f}", f"{soak.in_the_end:,.1f}"
    return soak.name, f"{soak.seconds / 60:.1f}", *sizes, f"{soak.in_the_end / soak.after_a_tenth - 1:+.2%}", *skipped
