"""Bayesian regression: noisy natural gradients and Bayes by Backprop on the UCI sets, with error and likelihood."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import nn

from acktr import (
    EKFAC,
    KFAC,
    BayesByBackprop,
    Diagonal,
    Evidence,
    FactoredKFAC,
    GammaPrecision,
    NoisyNaturalGradient,
    ScalarGaussian,
)
from acktr.curvature import CurvatureFactory
from agents.benchmarks import regression
from agents.benchmarks.regression import GENERATED, Split
from agents.benchmarks.report import Report, Table
from agents.errors import UsageError
from agents.schema import nearest

CURVATURES: dict[str, Callable[[float], CurvatureFactory]] = {
    "noisy-factored-kfac": FactoredKFAC,
    "noisy-kfac": KFAC,
    "noisy-ekfac": EKFAC,
    "noisy-adam": Diagonal,
}
"""What a noisy natural gradient draws by: noisy K-FAC as published, in the eigenbasis, EKFAC, and its diagonal form."""

METHODS = (*CURVATURES, "bayes-by-backprop")

PUBLISHED = {
    "boston": {"bayes-by-backprop": (2.517, -2.500), "noisy-adam": (2.396, -2.430), "noisy-kfac": (2.296, -2.336)},
    "concrete": {"bayes-by-backprop": (5.770, -3.169), "noisy-adam": (5.916, -3.166), "noisy-kfac": (5.173, -3.073)},
    "energy": {"bayes-by-backprop": (0.499, -1.552), "noisy-adam": (0.749, -1.601), "noisy-kfac": (0.438, -1.411)},
    "kin8nm": {"bayes-by-backprop": (0.079, 1.118), "noisy-adam": (0.078, 1.130), "noisy-kfac": (0.076, 1.151)},
    "naval": {"bayes-by-backprop": (0.000, 6.431), "noisy-adam": (0.000, 6.435), "noisy-kfac": (0.000, 7.182)},
    "power": {"bayes-by-backprop": (4.224, -2.851), "noisy-adam": (4.220, -2.851), "noisy-kfac": (4.085, -2.818)},
    "protein": {"bayes-by-backprop": (4.390, -2.900), "noisy-adam": (4.397, -2.900), "noisy-kfac": (4.058, -2.820)},
    "wine": {"bayes-by-backprop": (0.639, -0.971), "noisy-adam": (0.637, -0.968), "noisy-kfac": (0.634, -0.961)},
    "yacht": {"bayes-by-backprop": (0.983, -2.380), "noisy-adam": (1.221, -2.393), "noisy-kfac": (0.827, -2.274)},
}
"""Test RMSE and log-likelihood in Zhang et al. 2018, table 1; their noisy K-FAC damps its factors each by itself."""


@dataclass(frozen=True)
class Recipe:
    """How a network is fitted: one hidden layer of ReLUs, Gaussian noise of learned precision."""

    steps: int = 20_000
    """As many for every set: a small one needs them as much as a large one."""
    batch: int = 32
    """Examples per step."""
    hidden: int = 50
    """Hidden units."""
    lr: float = 0.02
    """First step size of noisy natural gradients; it falls linearly to a hundredth."""
    adam_lr: float = 0.01
    """First step size of Bayes by Backprop."""
    ema: float = 0.99
    """Weight kept of the old curvature per step."""
    particles: int = 1
    """Draws of the weights per step."""
    samples: int = 100
    """Draws at the test."""
    kl_weight: float = 1.0
    """Of the divergence to the prior."""
    prior_variance: float = 1.0
    """Of every weight."""
    damping: float = 0.0
    """Extrinsic damping of steps."""
    refresh_period: int = 10
    """Steps between two decompositions."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    data: Path | None = None
    """Folder of the UCI sets as plain text, the target in the last column; none measures on a generated set."""
    sets: tuple[str, ...] = ("boston", "yacht", "energy")
    """Sets to fit, of those in the folder."""
    methods: tuple[str, ...] = METHODS
    """Methods to fit them with."""
    splits: int = 3
    """Random divisions into 90 % for training and 10 % for the test (published: ten)."""
    steps: int = Recipe.steps
    """Steps of each fit."""


@dataclass(frozen=True)
class Row:
    """One fit."""

    set: str
    """The data."""
    method: str
    """Who fitted."""
    split: int
    """Which division."""
    rmse: float
    """Root mean squared error of the posterior's mean prediction, in the target's unit."""
    log_likelihood: float
    """Mean log-density of a test target, in its own unit."""
    seconds: float
    """Time of the fit."""


def run(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Fit every set with every method.

    Args:
        plan: What to measure.
        tell: Where to announce what is measured next.

    Returns:
        What was found.

    Raises:
        UsageError: If a set or a method is unknown, or a set is missing.
    """
    for method in plan.methods:
        if method not in METHODS:
            raise UsageError(f"there is no method {method!r}; did you mean {nearest(method, list(METHODS))}?")
    sets: tuple[str, ...] = (GENERATED,)
    if plan.data is None:
        note = f"no --data was given: {GENERATED} was generated and stands for the UCI sets"
    else:
        sets, note = plan.sets, f"data read from {plan.data}"
    rows = measure(plan.data, sets, plan.methods, plan.splits, Recipe(steps=plan.steps), tell)
    tables = [table_of(name, [row for row in rows if row.set == name]) for name in sets]
    results = {"rows": [asdict(row) for row in rows]}
    return Report("uci", vars(plan), tables, results, [note], {".csv": as_csv(rows)})


def measure(
    data: Path | None,
    sets: Iterable[str],
    methods: Iterable[str],
    splits: int,
    recipe: Recipe,
    tell: Callable[[str], None],
) -> list[Row]:
    """Fit sets with methods, split by split.

    Args:
        data: Folder of the sets; None generates one.
        sets: Their names.
        methods: Names of methods.
        splits: Divisions of each.
        recipe: How to fit.
        tell: Where to announce what is fitted next.

    Returns:
        One row per fit.
    """
    tables = {name: regression.friedman1() if data is None else regression.load(name, data) for name in sets}
    rows = []
    for name, table in tables.items():
        for number, split in enumerate(regression.splits(table, splits)):
            for method in methods:
                tell(f"{name}, {method}, split {number + 1} of {splits}")
                started = time.perf_counter()
                rmse, likelihood = fit(split, method, recipe, number)
                rows.append(Row(name, method, number, rmse, likelihood, time.perf_counter() - started))
    return rows


def fit(split: Split, method: str, recipe: Recipe, seed: int) -> tuple[float, float]:
    """Fit one split and test it.

    Args:
        split: The data.
        method: One of ``METHODS``.
        recipe: How to fit.
        seed: Of weights, batches and draws.

    Returns:
        Test RMSE and log-likelihood.
    """
    torch.manual_seed(seed)
    examples = len(split.targets)
    width = split.inputs.shape[1]
    network = nn.Sequential(nn.Linear(width, recipe.hidden), nn.ReLU(), nn.Linear(recipe.hidden, 1), nn.Flatten(0))
    precision = GammaPrecision(examples)
    optimizer = _optimizer(network, method, recipe, examples, seed)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=recipe.steps)
    for rows in islice(_batches(examples, recipe.batch), recipe.steps):
        _step(optimizer, precision, split.inputs[rows], split.targets[rows], recipe.particles)
        falling.step()
    (values,) = optimizer.predict(split.test_inputs, samples=recipe.samples)
    return split.rmse(values.mean(0)), split.log_likelihood(precision.log_prob(values, split.test_targets))


def _batches(examples: int, size: int) -> Iterator[torch.Tensor]:
    """Shuffled rows without end, each once per pass."""
    while True:
        yield from torch.randperm(examples).chunk(-(-examples // size))


def _optimizer(
    network: nn.Module, method: str, recipe: Recipe, examples: int, seed: int
) -> NoisyNaturalGradient | BayesByBackprop:
    evidence = Evidence(examples, recipe.kl_weight, recipe.prior_variance)
    if method == "bayes-by-backprop":
        return BayesByBackprop(network, ScalarGaussian(), evidence, lr=recipe.adam_lr, seed=seed)
    curvature = CURVATURES[method](recipe.ema)
    return NoisyNaturalGradient(
        network,
        ScalarGaussian(),
        curvature,
        evidence,
        lr=recipe.lr,
        damping=recipe.damping,
        refresh_period=recipe.refresh_period,
        seed=seed,
    )


def _step(
    optimizer: NoisyNaturalGradient | BayesByBackprop,
    precision: GammaPrecision,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    particles: int,
) -> None:
    likelihood = optimizer.likelihood = precision.likelihood
    for _ in range(particles):
        with optimizer.sampled():
            record = optimizer.run(inputs)
            optimizer.update_curvature()
            residuals = targets - record.outputs[0]
            optimizer.pull_back((-residuals / likelihood.variance / len(targets),))
            precision.update(residuals)
    optimizer.step()


def table_of(name: str, rows: Sequence[Row]) -> Table:
    """Sum the fits of one set up.

    Args:
        name: The set.
        rows: Its fits.

    Returns:
        A line for each method.
    """
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        published = PUBLISHED.get(name, {}).get("noisy-kfac" if "kfac" in method else method, ("–", "–"))
        lines.append((
            method,
            _spread([row.rmse for row in mine]),
            str(published[0]),
            _spread([row.log_likelihood for row in mine]),
            str(published[1]),
            f"{fmean(row.seconds for row in mine):.1f}",
        ))
    columns = ("method", "RMSE", "published", "log-likelihood", "published", "seconds")
    return Table(f"{name}: mean ± deviation over {len({row.split for row in rows})} splits", columns, lines)


def as_csv(rows: Sequence[Row]) -> str:
    """Write fits as a table of text.

    Args:
        rows: The fits.

    Returns:
        Comma-separated values with a headline.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def _spread(numbers: Sequence[float]) -> str:
    deviation = f" ± {stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{fmean(numbers):.3f}{deviation}"
