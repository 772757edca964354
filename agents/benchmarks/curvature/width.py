"""E4: what curvature costs as layers grow, and whether the cheaper ones learn as well (Puiu 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from acktr.exact import Linearisation
from acktr.optimizer import NaturalGradient
from agents.benchmarks.curvature import problems
from agents.benchmarks.curvature.experiment import (
    Claim,
    Curve,
    Experiment,
    Finding,
    Setting,
    by_problem,
    finals,
    median,
    methods_in,
)
from agents.benchmarks.curvature.methods import METHODS, Natural, chosen
from agents.benchmarks.curvature.store import Row
from agents.benchmarks.curvature.training import best_of_grid
from agents.benchmarks.measuring import timed
from agents.benchmarks.report import Table
from agents.curvatures import curvature_named

WIDTHS, BATCH, PERIOD = (512, 1024, 2048, 4096), 256, 20
_PARTS = ("gradient", "statistics", "refresh", "solve")
_LEARNT = 512


def perform(setting: Setting) -> None:
    """Time curvatures at every width; then train with each at the least.

    Args:
        setting: What is given.
    """
    store = setting.store("width")
    methods = chosen(setting.methods, "width")
    for width in WIDTHS if not setting.quick else (32, 64):
        for method in methods:
            key = {"method": method, "width": width, "batch": BATCH}
            if not store.of(key):
                setting.tell(f"width: {method}, {width}")
            store.once(key, partial(_measure, method, width))
    examples = 4000 if not setting.quick else 200
    problem = problems.teacher(_LEARNT if not setting.quick else 32, examples)
    budget = setting.budget(epochs=6, tuning=2, seeds=3)
    for method in methods:
        best_of_grid(setting.store("width_learning"), problem, method, budget, 200, PERIOD, setting.tell)


def _measure(method: str, width: int) -> Iterator[dict[str, float]]:
    problem = problems.teacher(width, BATCH)
    network, natural = problem.network(0), METHODS[method]
    inputs, targets = problem.train
    parameters = list(network.parameters())

    def gradient() -> None:
        torch.autograd.grad(problem.losses(network, (inputs, targets)).mean(), parameters)

    gradient()
    seconds = dict.fromkeys(_PARTS, 0.0) | {"gradient": timed(gradient, 3).per_unit("cpu")}
    if isinstance(natural, Natural):
        choice = curvature_named(natural.curvature, **natural.settings)
        optimizer = NaturalGradient(network, problem.likelihood, choice, fisher=natural.fisher)
        seconds |= _curvature_seconds(optimizer, problem)
    yield seconds


@torch.no_grad()
def _curvature_seconds(optimizer: NaturalGradient, problem: problems.Problem) -> dict[str, float]:
    """Time an update and a solve, with and without a decomposition, wherever a block does which part of it."""
    curvature, inputs = optimizer.curvature, problem.train[0]
    record = optimizer.run(inputs)
    seeds = optimizer.fisher(problem.likelihood, record.outputs, problem.train[1:], None)
    gradient = {name: torch.randn_like(p) / p.numel() ** 0.5 for name, p in optimizer.parameters.items()}
    linearisation = Linearisation(optimizer.network, optimizer.parameters, (inputs,), problem.likelihood)
    generator = torch.Generator().manual_seed(0)

    def update(refresh: bool) -> None:
        curvature.update(record, seeds, refresh, generator)

    def solve() -> None:
        curvature.solve(gradient, 0.1, linearisation)

    def both() -> None:
        update(True)
        solve()

    update(True)
    curvature.follow(gradient)
    solve()
    plain = {"statistics": timed(lambda: update(False), 2).per_unit("cpu"), "solve": timed(solve, 2).per_unit("cpu")}
    full = timed(both, 1).per_unit("cpu")
    return {**plain, "refresh": max(0.0, full - sum(plain.values()))}


def find(setting: Setting) -> Finding:
    """Say how cost grows.

    Args:
        setting: What is given.

    Returns:
        Times, slopes and final losses.
    """
    rows = setting.store("width").rows
    if not rows:
        return Finding()
    widths = sorted({int(row["width"]) for row in rows})
    methods = methods_in(rows)
    slopes = {method: slope(rows, method, widths) for method in methods}
    lines = []
    for method in methods:
        cells = []
        for width in widths:
            parts = [1000 * seconds_of(rows, method, width, (part,)) for part in _PARTS[1:]]
            cells.append(" + ".join(f"{ms:,.0f}" for ms in parts))
        totals = [f"{1000 * per_step(rows, method, width):,.0f}" for width in widths]
        lines.append([method, *cells, *totals, _cell(slopes[method])])
    title = f"64-w-w-10, batch {BATCH}: CPU-ms of statistics + one decomposition + solve"
    heads = [f"w = {width}" for width in widths]
    totals = [f"step, w = {width}" for width in widths]
    columns = ["", *heads, *totals, f"slope, {_from(widths)} to {widths[-1]}"]
    curves = [
        Curve("CPU-seconds of a step", method, widths, [per_step(rows, method, width) for width in widths])
        for method in methods
    ]
    learning = by_problem(setting.store("width_learning").rows, _learning)
    return Finding([Table(title, columns, lines), *learning.tables], _claims(rows, slopes, widths), curves)


def per_step(rows: list[Row], method: str, width: int) -> float:
    """What a step costs with a decomposition now and then.

    Args:
        rows: Of timings.
        method: Whose.
        width: Of the layers.

    Returns:
        Processor seconds.
    """
    return seconds_of(rows, method, width, ("gradient", "statistics", "solve")) + (
        seconds_of(rows, method, width, ("refresh",)) / PERIOD
    )


def seconds_of(rows: list[Row], method: str, width: int, parts: tuple[str, ...]) -> float:
    """What parts of a step cost.

    Args:
        rows: Of timings.
        method: Whose.
        width: Of the layers.
        parts: Which.

    Returns:
        Processor seconds.
    """
    own = [row for row in rows if (row["method"], row["width"]) == (method, str(width))]
    return sum(median(own, part) for part in parts)


def slope(rows: list[Row], method: str, widths: list[int]) -> float:
    """How decomposition and solve grow with the width, from 1024 on.

    Args:
        rows: Of timings.
        method: Whose.
        widths: At least two.

    Returns:
        The exponent; NaN for methods without curvature.
    """
    ends = _from(widths), widths[-1]
    low, high = (seconds_of(rows, method, width, ("refresh", "solve")) for width in ends)
    if not (low > 0 and high > 0 and ends[0] < ends[1]):
        return math.nan
    return math.log(high / low) / math.log(ends[1] / ends[0])


def _from(widths: list[int]) -> int:
    return next((width for width in widths[:-1] if width >= 1024), widths[0])


def _learning(every: list[Row]) -> Finding:
    rows, lines = finals(every), []
    for method in methods_in(rows):
        own = [row for row in rows if row["method"] == method]
        losses = [float(row["train_loss"]) for row in own]
        spread = f"{min(losses):.4f}–{max(losses):.4f}"
        rates = [own[0]["lr"], own[0]["damping"]]
        lines.append([method, *rates, f"{median(own, 'train_loss'):.4f}", spread, f"{median(own, 'test_loss'):.4f}"])
    title = f"{rows[0]['problem']}: loss after {rows[0]['epoch']} epochs"
    return Finding([Table(title, ["", "lr", "damping", "training, median", "range", "test, median"], lines)])


def _claims(rows: list[Row], slopes: dict[str, float], widths: list[int]) -> list[Claim]:
    source, claims = "Puiu 2022", []
    expected = (
        ("kfac", "K-FAC's cost is cubic in the width", 2.5, 3.5),
        ("rs-kfac", "RS-KFAC's cost is quadratic in the width", 1.5, 2.5),
        ("sre-kfac", "SRE-KFAC's cost is quadratic in the width", 1.5, 2.5),
        ("b-kfac", "B-KFAC's cost is linear in the width, but for the gradient's own product", 0.5, 2.0),
    )
    for method, text, low, high in expected:
        if math.isfinite(slopes.get(method, math.nan)):
            told = f"exponent {slopes[method]:.2f} between {_from(widths)} and {widths[-1]}"
            claims.append(Claim(text, source, told, low <= slopes[method] <= high))
    if {"kfac", "rs-kfac"} <= slopes.keys():
        ratio = per_step(rows, "kfac", widths[-1]) / per_step(rows, "rs-kfac", widths[-1])
        text, told = "RS-KFAC's epochs take 1/2.5 of K-FAC's", f"1/{ratio:.1f} at width {widths[-1]}"
        claims.append(Claim(text, source, told, ratio >= 2.5))
    return claims


def _cell(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.2f}"


WIDTH = Experiment("E4: cost of decomposition and solve by width, and losses", perform, find)
