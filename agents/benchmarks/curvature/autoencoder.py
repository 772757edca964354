"""E1: the deep autoencoder of Martens & Grosse 2015 and George et al. 2018, and what a step of it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from agents.benchmarks.curvature.methods import METHODS, chosen
from agents.benchmarks.curvature.problems import Problem
from agents.benchmarks.curvature.store import Row
from agents.benchmarks.curvature.training import best_of_grid
from agents.benchmarks.measuring import timed
from agents.benchmarks.report import Table

BATCH, REFRESH = 500, 20
COST_BATCH = 1000
PEER = "sgd-momentum"
_KFAC = ("kfac", "factored-kfac")


def perform(setting: Setting) -> None:
    """Train everyone, each with the best of its grid.

    Args:
        setting: What is given.
    """
    problem = problems.autoencoder(setting.pictures(data.strokes, 9000), setting.scale)
    store, budget = setting.store("autoencoder"), setting.budget(epochs=10, tuning=3, seeds=1)
    for method in chosen(setting.methods, "autoencoder"):
        best_of_grid(store, problem, method, budget, _batch(problem), REFRESH, setting.tell)


def perform_cost(setting: Setting) -> None:
    """Time steps of everyone on the papers' whole autoencoder.

    Args:
        setting: What is given.
    """
    scale = setting.scale if setting.quick else 1.0
    problem = problems.autoencoder(setting.pictures(data.strokes, COST_BATCH), scale)
    store = setting.store("cost")
    for number in range(1 if setting.quick else setting.seeds or 2):
        for method in chosen(setting.methods, "cost"):
            key = {"problem": problem.name, "method": method, "batch": len(problem.train[0]), "round": number}
            if not store.of(key):
                setting.tell(f"cost: {method}, round {number + 1}")
            store.once(key, lambda method=method: _cost(problem, method))  # type: ignore[misc]


def _cost(problem: Problem, method: str) -> Iterator[dict[str, float]]:
    """Time a step, and apart from it one that also decomposes."""
    times = {}
    for kind, refresh, repeats in (("plain", 10**9, 4), ("refreshing", 1, 1)):
        rates = METHODS[method].rates(problem)[-1]
        step = METHODS[method].start(problem, problem.network(0), rates, refresh, seed=0)
        step(*problem.train)  # the first step always decomposes
        timing = timed(lambda step=step: step(*problem.train), repeats)  # type: ignore[misc]
        times[kind] = timing.per_unit("cpu")
    refresh_seconds = max(0.0, times["refreshing"] - times["plain"])
    yield {"step_seconds": times["plain"], "refresh_seconds": refresh_seconds}


def find(setting: Setting) -> Finding:
    """Say how far everyone came.

    Args:
        setting: What is given.

    Returns:
        Losses, times to the peer's loss, and the papers' claims.
    """
    return by_problem(setting.store("autoencoder").rows, _find)


def _find(rows: list[Row]) -> Finding:
    ways = {method: by_epoch(rows, method) for method in methods_in(finals(rows))}
    goal = ways[PEER][-1][2] if ways.get(PEER) else float("nan")
    lines, curves = [], []
    for last in finals(rows):
        reached = first_below(ways[last["method"]], goal)
        cells = [last["lr"], last["damping"], last["epoch"], last["train_loss"], last["test_loss"], last["cpu_seconds"]]
        lines.append([last["method"], *cells, *(map(_short, reached) if reached else ["", ""])])
    for method, way in ways.items():
        curves.append(Curve("autoencoder, by epoch", method, list(range(len(way)))[1:], [p[2] for p in way][1:]))
        curves.append(Curve("autoencoder, by CPU-second", method, [p[1] for p in way][1:], [p[2] for p in way][1:]))
    columns = ["", "lr", "damping", "epochs", "training loss", "test loss", "CPU s", "steps to SGD's", "CPU s to it"]
    title = f"{rows[0]['problem']}: cross-entropy in nats, batch {rows[0]['batch']}, decomposed every {REFRESH} steps"
    return Finding([Table(title, columns, lines)], _claims(ways), curves)


def find_cost(setting: Setting) -> Finding:
    """Say what steps cost.

    Args:
        setting: What is given.

    Returns:
        Seconds of a step and its ratio to the peer's, with a decomposition every twentieth step.
    """
    return by_problem(setting.store("cost").rows, _find_cost)


def _find_cost(rows: list[Row]) -> Finding:
    rounds = sorted({row["round"] for row in rows})
    lines, ratios = [], {}
    for method in methods_in(rows):
        own = {row["round"]: row for row in rows if row["method"] == method}
        plain, refresh = (min(float(r[c]) for r in own.values()) for c in ("step_seconds", "refresh_seconds"))
        peers = [float(r["step_seconds"]) for r in rows if r["method"] == PEER]
        ratios[method] = (plain + refresh / REFRESH) / min(peers) if peers else float("nan")
        lines.append([method, f"{1000 * plain:,.0f}", f"{1000 * refresh:,.0f}", f"{ratios[method]:.2f}"])
    title = f"{rows[0]['problem']}, batch {rows[0]['batch']}: CPU-ms, the least of {len(rounds)} rounds"
    columns = ["", "step", "decomposition", f"÷ {PEER}, one decomposition in {REFRESH} steps"]
    thrifty = {name: ratio for name, ratio in ratios.items() if name.startswith(_KFAC)}
    best = min(thrifty, key=thrifty.__getitem__, default=None)
    ours = f"{best} {ratios[best]:.2f} ×" if best else ""
    claim = Claim(
        "A K-FAC update costs about 1.5 × SGD's",
        "Grosse's slides; Martens & Grosse 2015",
        ours,
        ratios[best] <= 1.5 if best else None,
    )
    return Finding([Table(title, columns, lines)], [claim])


def _claims(ways: dict[str, list[tuple[int, float, float]]]) -> list[Claim]:
    kfac = _best(ways, _KFAC)
    claims = [_faster(ways, kfac)]
    if {"kfac", "kfac-no-momentum"} <= ways.keys():
        with_it, without = ways["kfac"][-1][2], ways["kfac-no-momentum"][-1][2]
        ours = f"after {len(ways['kfac']) - 1} epochs {with_it:.1f} with, {without:.1f} without"
        claims.append(
            Claim("Only momentum makes K-FAC so much faster", "Martens & Grosse 2015", ours, with_it < without)
        )
    pairs = (
        ("ekfac", "EKFAC's training loss is below K-FAC's at equal epochs", "George et al. 2018"),
        ("ekfac-ra", "EKFAC-ra's training loss is below K-FAC's at equal epochs", "George et al. 2018"),
        ("tridiagonal", "The block-tridiagonal form makes 25–40 % more progress a step", "Martens & Grosse 2015"),
    )
    for method, text, source in pairs:
        if kfac and method in ways:
            own, theirs = ways[method][-1][2], ways[kfac][-1][2]
            told = f"{method} {own:.1f}, {kfac} {theirs:.1f} after {len(ways[method]) - 1} epochs"
            if method == "tridiagonal":
                reached = first_below(ways[method], theirs)
                told += f"; {reached[0]} steps in place of {ways[kfac][-1][0]}" if reached else ""
            claims.append(Claim(text, source, told, own < theirs))
    return claims


def _faster(ways: dict[str, list[tuple[int, float, float]]], kfac: str | None) -> Claim:
    text = "K-FAC with momentum needs several times fewer steps, and a third of the time, of SGD with momentum"
    source = "Martens & Grosse 2015; Grosse's slides"
    reached = first_below(ways[kfac], ways[PEER][-1][2]) if kfac and ways.get(PEER) else None
    if kfac is None or PEER not in ways:
        return Claim(text, source, "", None)
    steps, seconds, loss = ways[PEER][-1]
    if reached is None:
        return Claim(text, source, f"{kfac} does not reach SGD's {loss:.1f}", False)
    ours = f"to SGD's {loss:.1f}: {steps / reached[0]:.1f} × fewer steps, {seconds / reached[1]:.2f} × less CPU time"
    return Claim(text, source, f"{kfac} {ours}", steps / reached[0] >= 3 and seconds / reached[1] >= 3)


def _best(ways: dict[str, list[tuple[int, float, float]]], names: Sequence[str]) -> str | None:
    return min((name for name in names if name in ways), key=lambda name: ways[name][-1][2], default=None)


def _batch(problem: Problem) -> int:
    return min(BATCH, max(1, len(problem.train[0]) // 4))


def _short(number: float) -> str:
    return f"{number:.4g}"


AUTOENCODER = Experiment("E1: training loss of a deep autoencoder, by epoch and by second", perform, find)
COST = Experiment("E1, E3: what a step of the papers' autoencoder costs", perform_cost, find_cost)
