"""All experiments: what to do, doing it, and what it says about the papers' claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from agents import rundir
from agents.benchmarks.curvature import autoencoder, conv, fidelity, methods, refresh, width
from agents.benchmarks.curvature.experiment import Claim, Curve, Experiment, Finding, Setting
from agents.benchmarks.report import Report, Table
from agents.errors import UsageError

Name = Literal["fidelity", "spectra", "cost", "autoencoder", "refresh", "width", "conv", "wake"]
"""Which experiment."""

EXPERIMENTS: dict[str, Experiment] = {
    "fidelity": fidelity.FIDELITY,
    "spectra": fidelity.SPECTRA,
    "cost": autoencoder.COST,
    "autoencoder": autoencoder.AUTOENCODER,
    "refresh": refresh.REFRESH,
    "width": width.WIDTH,
    "conv": conv.CONV,
    "wake": conv.WAKE,
}
"""In the order in which they run."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    experiments: tuple[Name, ...] = get_args(Name)
    """Experiments, in any order."""
    methods: tuple[str, ...] | None = None
    """Methods by name (curvatures as configurations name them, sgd, adam, …); None takes each experiment's own."""
    seeds: int | None = None
    """Runs per method, after tuning; None takes each experiment's own number."""
    epochs: int | None = None
    """Passes over the data of these runs; None takes each experiment's own number."""
    data: Path | None = None
    """Folder that holds mnist/ with MNIST's test file; None draws strokes and shapes instead."""
    scale: float = 0.25
    """Hidden widths of the autoencoder as a share of the papers' 1000-500-250; its code keeps 30."""
    quick: bool = False
    """Only see whether everything runs: a minute or two, and numbers that mean nothing."""
    summary_only: bool = False
    """Measure nothing; summarise what is there."""


def check(plan: Plan) -> None:
    """Make sure that a plan can be carried out.

    Args:
        plan: The plan.

    Raises:
        UsageError: If there is nothing to do, or a name or number is wrong.
    """
    if not plan.experiments:
        raise UsageError(f"--experiments is empty; name at least one of {', '.join(EXPERIMENTS)}")
    if plan.methods is not None and not plan.methods:
        raise UsageError("--methods is empty; name at least one, for example ekfac")
    methods.check(plan.methods or ())
    if not 0 < plan.scale <= 4:
        raise UsageError(f"--scale must be above 0 and at most 4, got {plan.scale}")


def run(plan: Plan, output: Path, tell: Callable[[str], None]) -> Report:
    """Measure what is not there yet, and say what is.

    Args:
        plan: What to measure.
        output: Folder of the measurements; the same command goes on in it.
        tell: Where to announce each measurement.

    Returns:
        Tables, and the papers' claims beside our figures.
    """
    check(plan)
    scale, folder = (min(plan.scale, 0.05), output / "quick") if plan.quick else (plan.scale, output)
    setting = Setting(folder, plan.data, plan.methods, scale, plan.quick, plan.epochs, plan.seeds, tell)
    wanted = {name: EXPERIMENTS[name] for name in EXPERIMENTS if name in plan.experiments}
    for experiment in wanted.values():
        if not plan.summary_only:
            experiment.perform(setting)
    return summarise(plan, {name: experiment.find(setting) for name, experiment in wanted.items()}, folder)


def summarise(plan: Plan, findings: Mapping[str, Finding], output: Path) -> Report:
    """Join what was found, and draw it.

    Args:
        plan: What was measured.
        findings: By experiment.
        output: Folder of the figure.

    Returns:
        The report, with a page in Markdown beside it.
    """
    claims = [claim for found in findings.values() for claim in found.claims]
    tables = [table for found in findings.values() for table in found.tables]
    curves = [curve for found in findings.values() for curve in found.curves]
    if curves:
        figure = draw(curves)
        rundir.write_whole(output / "curves.png", lambda stream: figure.savefig(stream, format="png", dpi=110))
    where = f"MNIST-10k from {plan.data}" if plan.data else "strokes and shapes drawn by this program"
    notes = [f"Pictures: {where}.", *(["A quick look: the numbers mean nothing."] if plan.quick else [])]
    page = "\n\n".join([markdown(_claims_table(claims)), *map(markdown, tables)]) + "\n"
    results = {name: {"claims": found.claims, "tables": found.tables} for name, found in findings.items()}
    return Report("curvature", vars(plan), [*tables, _claims_table(claims)], results, notes, {".md": page})


def markdown(table: Table) -> str:
    """Write a table for a page.

    Args:
        table: The table.

    Returns:
        Its title in bold and its rows.
    """
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join([f"**{table.title}**", "", *("| " + " | ".join(cells) + " |" for cells in lines)])


def draw(curves: Sequence[Curve]) -> Any:
    """Draw curves, one panel for each figure; both axes are logarithmic where numbers span a decade.

    Args:
        curves: The curves.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[Curve]] = {}
    for curve in curves:
        panels.setdefault(curve.panel, []).append(curve)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for line in lines:
            number = labels.index(line.label)
            axis.plot(
                line.x, line.y, label=line.label, color=f"C{number % 10}", linestyle=["-", "--", ":"][number // 10 % 3]
            )
        axis.set_title(title, fontsize="medium")
        for name, values in (
            ("x", [x for line in lines for x in line.x]),
            ("y", [y for line in lines for y in line.y]),
        ):
            positive = [v for v in values if 0 < v < float("inf")]
            if positive and len(positive) == len(values) and max(positive) > 10 * min(positive):
                getattr(axis, f"set_{name}scale")("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _claims_table(claims: Sequence[Claim]) -> Table:
    words = {True: "agrees", False: "does not agree", None: "not measured"}
    rows = [[claim.paper, claim.source, claim.ours, words[claim.agrees]] for claim in claims]
    return Table("The papers' claims", ["claim", "source", "here", ""], rows)
