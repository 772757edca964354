"""A small convolutional network (Grosse & Martens 2016), and E6: paired seeds against K-FAC (Puiu 2022)."""

from __future__ import annotations

import math
import statistics

from scipy import stats

from agents.benchmarks.curvature import data, problems
from agents.benchmarks.curvature.experiment import (
    Claim,
    Curve,
    Experiment,
    Finding,
    Setting,
    by_epoch,
    by_problem,
    finals,
    first_below,
    methods_in,
)
from agents.benchmarks.curvature.methods import chosen
from agents.benchmarks.curvature.store import Row
from agents.benchmarks.curvature.training import best_of_grid
from agents.benchmarks.report import Table

BATCH, REFRESH = 200, 20
PEER, BASELINE = "sgd-momentum", "kfac"
WAKELESS = "kfac-no-momentum"
"""Whom the wakes are paired with: the same steps without one."""


def perform(setting: Setting) -> None:
    """Train everyone on the same pictures.

    Args:
        setting: What is given.
    """
    problem = problems.convolutional(setting.pictures(data.shapes, 3000))
    budget = setting.budget(epochs=8, tuning=3, seeds=1)
    for method in chosen(setting.methods, "conv"):
        best_of_grid(setting.store("conv"), problem, method, budget, BATCH, REFRESH, setting.tell)


def perform_wake(setting: Setting) -> None:
    """Train from many seeds, the same for everyone, so that differences can be paired.

    Args:
        setting: What is given.
    """
    problem = problems.convolutional(setting.pictures(data.shapes, 1000))
    budget = setting.budget(epochs=5, tuning=2, seeds=10)
    for method in chosen(setting.methods, "wake"):
        best_of_grid(setting.store("wake"), problem, method, budget, 100, REFRESH, setting.tell)


def find(setting: Setting) -> Finding:
    """Say how far everyone came.

    Args:
        setting: What is given.

    Returns:
        Losses and times.
    """
    return by_problem(setting.store("conv").rows, _find)


def _find(rows: list[Row]) -> Finding:
    ways = {method: by_epoch(rows, method) for method in methods_in(finals(rows))}
    goal = ways[PEER][-1][2] if PEER in ways else math.nan
    lines = []
    for last in finals(rows):
        reached = first_below(ways[last["method"]], goal)
        cells = [last[c] for c in ("lr", "damping", "train_loss", "test_loss", "cpu_seconds")]
        lines.append([last["method"], *cells, *((f"{reached[0]}", f"{reached[1]:.3g}") if reached else ("", ""))])
    columns = ["", "lr", "damping", "training loss", "test loss", "CPU s", "steps to SGD's", "CPU s to it"]
    title = f"{rows[0]['problem']}: cross-entropy, batch {BATCH}, {len(next(iter(ways.values()))) - 1} epochs"
    curves = [Curve("conv, by epoch", m, list(range(len(w)))[1:], [p[2] for p in w][1:]) for m, w in ways.items()]
    return Finding([Table(title, columns, lines)], _claims(ways), curves)


def _claims(ways: dict[str, list[tuple[int, float, float]]]) -> list[Claim]:
    if not {PEER, BASELINE} <= ways.keys():
        return []
    text, source = "KFC needs 10–20 × fewer steps than SGD, and trains several times faster", "Grosse & Martens 2016"
    steps, seconds, loss = ways[PEER][-1]
    reached = first_below(ways[BASELINE], loss)
    if reached is None:
        return [Claim(text, source, f"{BASELINE} does not reach SGD's {loss:.4f}", False)]
    fewer, less = steps / reached[0], seconds / reached[1]
    told = f"to SGD's {loss:.4f}: {fewer:.1f} × fewer steps, {less:.2f} × less CPU time"
    return [Claim(text, source, told, fewer >= 10 and less >= 2)]


def find_wake(setting: Setting) -> Finding:
    """Pair seeds.

    Args:
        setting: What is given.

    Returns:
        Differences from K-FAC, with 95 % intervals.
    """
    return by_problem(setting.store("wake").rows, _find_wake)


def _find_wake(every: list[Row]) -> Finding:
    rows, lines, claims = finals(every), [], []
    for method in methods_in(rows):
        differences = paired(rows, method, "test_loss")
        cells = [statistics.median(float(r[c]) for r in rows if r["method"] == method) for c in _LOSSES]
        middle, reach = interval(differences)
        told = f"{middle:+.4f} ± {reach:.4f}" if method != WAKELESS and differences else ""
        lines.append([method, *(f"{cell:.4f}" for cell in cells), told, str(len(differences))])
        if "wake" in method and told:
            text = f"{method} outperforms K-FAC on MNIST"
            claims.append(Claim(text, "Puiu 2022", f"test loss {told}, {len(differences)} pairs", middle + reach < 0))
    columns = ["", "training loss", "test loss", f"test loss − {WAKELESS}'s, paired, 95 %", "pairs"]
    return Finding([Table(f"{rows[0]['problem']}: {rows[0]['epoch']} epochs, medians", columns, lines)], claims)


_LOSSES = ("train_loss", "test_loss")


def paired(rows: list[Row], method: str, column: str) -> list[float]:
    """Differences from the baseline, seed by seed.

    Args:
        rows: Last rows of runs.
        method: Whose.
        column: Of what.

    Returns:
        One number for each seed that both have.
    """
    sides = [{r["seed"]: float(r[column]) for r in rows if r["method"] == name} for name in (method, WAKELESS)]
    return [sides[0][seed] - sides[1][seed] for seed in sides[0] if seed in sides[1]]


def interval(numbers: list[float]) -> tuple[float, float]:
    """Student's interval of a mean.

    Args:
        numbers: Independent ones.

    Returns:
        The mean and half the width of its 95 % interval; infinite for fewer than two.
    """
    mean = statistics.fmean(numbers) if numbers else math.nan
    if len(numbers) < 2:
        return mean, math.inf
    quantile = float(stats.t.ppf(0.975, len(numbers) - 1))
    return mean, quantile * statistics.stdev(numbers) / math.sqrt(len(numbers))


CONV = Experiment("Training loss of a small convolutional network", perform, find)
WAKE = Experiment("E6: ten paired seeds against K-FAC", perform_wake, find_wake)
