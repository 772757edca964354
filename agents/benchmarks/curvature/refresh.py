"""E2: decompositions now and then, K-FAC against EKFAC, over batch sizes (George et al. 2018, figures 4 and 5)."""

from __future__ import annotations

import math
import statistics

from agents.benchmarks.curvature import data, problems
from agents.benchmarks.curvature.experiment import (
    Claim,
    Curve,
    Experiment,
    Finding,
    Setting,
    by_problem,
    finals,
    methods_in,
)
from agents.benchmarks.curvature.methods import chosen
from agents.benchmarks.curvature.store import Row
from agents.benchmarks.curvature.training import best_of_grid
from agents.benchmarks.measuring import spread
from agents.benchmarks.report import Table, with_range

PERIODS, BATCHES = (1, 20, 50, 100), (50, 200, 500)


def perform(setting: Setting) -> None:
    """Train with every period and batch size, each tuned.

    Args:
        setting: What is given.
    """
    pictures = setting.pictures(data.strokes, 3000).smaller(2)
    problem = problems.autoencoder(pictures, setting.scale / 2)
    store, budget = setting.store("refresh"), setting.budget(epochs=12, tuning=2, seeds=3)
    for batch in BATCHES if not setting.quick else BATCHES[:1]:
        for period in PERIODS if not setting.quick else PERIODS[::3]:
            for method in chosen(setting.methods, "refresh"):
                best_of_grid(store, problem, method, budget, batch, period, setting.tell)


def find(setting: Setting) -> Finding:
    """Say where each ended.

    Args:
        setting: What is given.

    Returns:
        Training losses, and whether EKFAC gains where decompositions are old and batches large.
    """
    return by_problem(setting.store("refresh").rows, _find)


def _find(every: list[Row]) -> Finding:
    rows = finals(every)
    methods = methods_in(rows)
    periods, batches = (sorted({int(row[c]) for row in rows}) for c in ("refresh", "batch"))
    lines = [
        [f"batch {batch}, every {period}", *(_cell(losses_of(rows, m, batch, period)) for m in methods)]
        for batch in batches
        for period in periods
    ]
    epochs = max(int(row["epoch"]) for row in rows)
    title = (
        f"{rows[0]['problem']}: loss after {epochs} epochs by batch and steps between decompositions [range] (seeds)"
    )
    curves = [
        Curve(f"batch {batch}", method, periods, [loss_of(rows, method, batch, period) for period in periods])
        for batch in batches
        for method in methods
    ]
    claims = [claim for ours in methods if ours != "kfac" for claim in _claims(rows, ours, batches, periods)]
    return Finding([Table(title, ["", *methods], lines)], claims, curves)


def losses_of(rows: list[Row], method: str, batch: int, period: int) -> list[float]:
    """Where a method ended.

    Args:
        rows: Last rows of runs.
        method: Whose.
        batch: Examples of a step.
        period: Steps between decompositions.

    Returns:
        Training losses, one for each seed.
    """
    wanted = (method, str(batch), str(period))
    return [float(r["train_loss"]) for r in rows if (r["method"], r["batch"], r["refresh"]) == wanted]


def loss_of(rows: list[Row], method: str, batch: int, period: int) -> float:
    """Where the middle seed ended.

    Args:
        rows: Last rows of runs.
        method: Whose.
        batch: Examples of a step.
        period: Steps between decompositions.

    Returns:
        The median training loss; NaN if it did not run.
    """
    losses = losses_of(rows, method, batch, period)
    return statistics.median(losses) if losses else math.nan


def _claims(rows: list[Row], ours: str, batches: list[int], periods: list[int]) -> list[Claim]:
    def gain(batch: int, period: int) -> float:
        return loss_of(rows, "kfac", batch, period) - loss_of(rows, ours, batch, period)

    source, old = "George et al. 2018", periods[-1]
    gains = {(batch, period): gain(batch, period) for batch in batches for period in periods}
    if not all(map(math.isfinite, gains.values())):
        return []
    below = sum(g > 0 for (_, period), g in gains.items() if period > 1)
    amortised = sum(period > 1 for _, period in gains)
    return [
        Claim(
            f"With amortised decompositions {ours} trains faster than K-FAC",
            source,
            f"lower training loss in {below} of {amortised} settings",
            below > amortised / 2 if amortised else None,
        ),
        Claim(
            f"The gain of {ours} shrinks with small batches",
            source,
            "; ".join(f"batch {batch}: {gains[batch, old]:+.2f} nats at every {old}" for batch in batches),
            gains[batches[-1], old] > gains[batches[0], old] if len(batches) > 1 else None,
        ),
    ]


def _cell(losses: list[float]) -> str:
    if len(losses) < 2:
        return "".join(f"{loss:.2f}" for loss in losses)
    return f"{with_range(spread(losses))} ({len(losses)})"


REFRESH = Experiment("E2: training loss by batch and steps between decompositions; [range] (seeds)", perform, find)
