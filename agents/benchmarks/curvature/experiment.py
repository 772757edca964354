"""What the experiments have in common: what they are given, and what they say at the end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agents.benchmarks.curvature.data import Pictures, digits
from agents.benchmarks.curvature.store import Row, Store
from agents.benchmarks.curvature.training import Budget
from agents.benchmarks.report import Table


@dataclass(frozen=True)
class Setting:
    """What an experiment is given."""

    folder: Path
    """Where its measurements lie."""
    data: Path | None
    """Where MNIST lies; None draws pictures."""
    methods: tuple[str, ...] | None
    """Who was asked for; None takes those of the experiment."""
    scale: float
    """Hidden widths of the autoencoder as a share of the papers'."""
    quick: bool
    """Whether a look is enough."""
    epochs: int | None
    """Of runs that count; None takes the experiment's."""
    seeds: int | None
    """Runs that count, per method; None takes the experiment's."""
    tell: Callable[[str], None]
    """Where to announce each measurement."""

    def store(self, name: str) -> Store:
        """Open a file of measurements.

        Args:
            name: The experiment.

        Returns:
            What is there already, ready to grow.
        """
        return Store(self.folder, name)

    def budget(self, epochs: int, tuning: int, seeds: int) -> Budget:
        """Cut an experiment's budget to what was asked for.

        Args:
            epochs: Of runs that count.
            tuning: Of runs that choose.
            seeds: Runs that count.

        Returns:
            The budget.
        """
        if self.quick:
            epochs, tuning, seeds = 1, 1, min(seeds, 2)
        return Budget(self.epochs or epochs, min(tuning, self.epochs or tuning), self.seeds or seeds)

    def pictures(self, drawn: Callable[[int], Pictures], examples: int) -> Pictures:
        """Get pictures: MNIST-10k where it is, others where it is not.

        Args:
            drawn: Draws as many as it is told.
            examples: For training, at most.

        Returns:
            The pictures.
        """
        examples = min(examples, 200) if self.quick else examples
        if self.data is None:
            return drawn(examples + min(1000, examples // 9)).part(examples)
        return digits(self.data).part(examples)


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what was seen here."""

    paper: str
    """The claim."""
    source: str
    """Who makes it."""
    ours: str
    """Our figure; empty where it was not measured."""
    agrees: bool | None
    """Whether it is the same; None where nothing can be said."""


@dataclass(frozen=True)
class Curve:
    """A line of a figure."""

    panel: str
    """Which figure."""
    label: str
    """Which line."""
    x: Sequence[float]
    """Across."""
    y: Sequence[float]
    """Up."""


@dataclass(frozen=True)
class Finding:
    """What an experiment found, in words and numbers."""

    tables: Sequence[Table] = ()
    """For the reader."""
    claims: Sequence[Claim] = ()
    """Held against the papers."""
    curves: Sequence[Curve] = ()
    """For figures."""


@dataclass(frozen=True)
class Experiment:
    """One experiment."""

    about: str
    """One line on what it asks."""
    perform: Callable[[Setting], None]
    """Measures what is not there yet."""
    find: Callable[[Setting], Finding]
    """Says what is there."""


def by_problem(rows: Sequence[Row], find: Callable[[list[Row]], Finding]) -> Finding:
    """Tell runs of several problems or lengths apart, which may lie in one folder.

    Args:
        rows: Of runs, or of measurements on problems.
        find: What one group says, tuning left out.

    Returns:
        What all of them say, one after the other.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("stage", "final") == "final":
            groups.setdefault((row["problem"], row.get("epochs", "")), []).append(row)
    found = [find(group) for group in groups.values()]
    joined = (tuple(part for one in found for part in getattr(one, name)) for name in ("tables", "claims", "curves"))
    return Finding(*joined)


def finals(rows: Iterable[Row]) -> list[Row]:
    """Where runs ended.

    Args:
        rows: Of runs that count, on one problem.

    Returns:
        The last row of each.
    """
    return list({(r["method"], r["batch"], r["refresh"], r["seed"]): r for r in rows}.values())


def median(rows: Iterable[Row], column: str) -> float:
    """The middle of a column.

    Args:
        rows: Some rows.
        column: A column of numbers.

    Returns:
        The median; NaN without rows.
    """
    numbers = [float(row[column]) for row in rows]
    return statistics.median(numbers) if numbers else float("nan")


def by_epoch(rows: Iterable[Row], method: str) -> list[tuple[int, float, float]]:
    """A method's way down.

    Args:
        rows: Of runs.
        method: Whose.

    Returns:
        Of each epoch steps, processor seconds and training loss, medians over seeds.
    """
    own = [row for row in rows if row["method"] == method]
    epochs = sorted({int(row["epoch"]) for row in own})
    groups = [[row for row in own if int(row["epoch"]) == epoch] for epoch in epochs]
    return [(int(g[0]["steps"]), median(g, "cpu_seconds"), median(g, "train_loss")) for g in groups]


def first_below(way: Sequence[tuple[int, float, float]], loss: float) -> tuple[int, float] | None:
    """When a loss was reached.

    Args:
        way: Of ``by_epoch``.
        loss: The loss.

    Returns:
        Steps and seconds at the end of that epoch; None if it never was.
    """
    return next(((steps, seconds) for steps, seconds, reached in way if reached <= loss), None)


def methods_in(rows: Iterable[Row]) -> list[str]:
    """Who is there.

    Args:
        rows: Some rows.

    Returns:
        Methods in the order in which they came.
    """
    return list(dict.fromkeys(row["method"] for row in rows))
