"""All experiments: what to do, doing it, and what it says about the papers' claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from agents import rundir
from agents.benchmarks.curvature import autoencoder, conv, fidelity, methods, page, refresh, width
from agents.benchmarks.curvature.experiment import Claim, Experiment, Finding, Setting
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
    """Runs per method after tuning, and rounds of cost; None takes each experiment's own number."""
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
    page: Path | None = None
    """Markdown page whose part between <!-- measured --> and <!-- /measured --> is written anew from what is there."""


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
    if plan.page is not None:
        page.parts(plan.page)
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

    Raises:
        UsageError: If the plan cannot be carried out, or there is nothing to summarise.
    """
    check(plan)
    scale, folder = (min(plan.scale, 0.05), output / "quick") if plan.quick else (plan.scale, output)
    setting = Setting(folder, plan.data, plan.methods, scale, plan.quick, plan.epochs, plan.seeds, tell)
    wanted = {name: experiment for name, experiment in EXPERIMENTS.items() if name in plan.experiments}
    for experiment in wanted.values():
        if not plan.summary_only:
            experiment.perform(setting)
    findings: dict[str, Finding] = {name: experiment.find(setting) for name, experiment in wanted.items()}
    if not any(found.tables for found in findings.values()):
        raise UsageError(f"{folder} holds no measurement of {', '.join(wanted)}; leave --summary-only out to measure")
    return summarise(plan, findings, folder)


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
        figure = page.draw(curves)
        rundir.write_whole(output / "curves.png", lambda stream: figure.savefig(stream, format="png", dpi=110))
    where = f"MNIST-10k from {plan.data}" if plan.data else "strokes and shapes drawn by this program"
    notes = [f"Pictures: {where}.", *(["A quick look: the numbers mean nothing."] if plan.quick else [])]
    text = "\n\n".join(map(page.markdown, [_claims_table(claims), *tables])) + "\n"
    if plan.page is not None:
        page.rewrite(plan.page, text)
    results = {name: {"claims": found.claims, "tables": found.tables} for name, found in findings.items()}
    return Report("curvature", vars(plan), [*tables, _claims_table(claims)], results, notes, {".md": text})


def _claims_table(claims: Sequence[Claim]) -> Table:
    words = {True: "agrees", False: "does not agree", None: "not measured"}
    rows = [[claim.paper, claim.source, claim.ours, words[claim.agrees]] for claim in claims]
    return Table("The papers' claims", ["claim", "source", "here", ""], rows)
