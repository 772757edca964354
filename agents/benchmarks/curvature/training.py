"""One run from its settings, and the best of a grid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from agents.benchmarks.curvature.methods import METHODS, Rates
from agents.benchmarks.curvature.problems import Problem
from agents.benchmarks.curvature.store import Row, Store

BROKEN = 3.0
"""A loss this many times the first one is a run that broke."""


@dataclass(frozen=True)
class Run:
    """The settings of one run."""

    method: str
    """Who learns."""
    batch: int
    """Examples of a step."""
    refresh: int
    """Steps between two decompositions of a curvature."""
    lr: float
    """Learning rate."""
    damping: float
    """Of the curvature."""
    seed: int
    """Of weights, order and draws."""
    epochs: int
    """Passes over the training examples."""


@dataclass(frozen=True)
class Budget:
    """How much an experiment may cost."""

    epochs: int
    """Of the runs that count."""
    tuning: int
    """Epochs of the runs that choose learning rate and damping."""
    seeds: int
    """Runs that count, per method."""


def train(problem: Problem, run: Run) -> Iterator[dict[str, Any]]:
    """Train, and look after each epoch.

    Args:
        problem: What is learnt.
        run: By whom and how.

    Yields:
        Epoch, steps, seconds of learning alone (wall clock and processor), loss in training and test; a run that broke
        ends with a loss of infinity.
    """
    network = problem.network(run.seed)
    step = METHODS[run.method].start(problem, network, Rates(run.lr, run.damping), run.refresh, run.seed)
    order = torch.Generator().manual_seed(run.seed)
    inputs, targets = problem.train
    wall = cpu = 0.0
    steps, start = 0, problem.measure(network, problem.train)
    yield _point(0, 0, 0.0, 0.0, start, problem.measure(network, problem.test))
    for epoch in range(1, run.epochs + 1):
        began, broken = (time.perf_counter(), time.process_time()), False
        try:
            for rows in torch.split(torch.randperm(len(inputs), generator=order), run.batch):
                if len(rows) == run.batch or len(inputs) < run.batch:
                    step(inputs[rows], targets[rows])
                    steps += 1
        except FloatingPointError:  # the optimizer gave up
            broken = True
        wall, cpu = wall + time.perf_counter() - began[0], cpu + time.process_time() - began[1]
        loss = math.inf if broken else problem.measure(network, problem.train)
        if not loss < BROKEN * start:
            yield _point(epoch, steps, wall, cpu, math.inf, math.inf)
            return
        yield _point(epoch, steps, wall, cpu, loss, problem.measure(network, problem.test))


def best_of_grid(
    store: Store, problem: Problem, method: str, budget: Budget, batch: int, refresh: int, tell: Callable[[str], None]
) -> list[Row]:
    """Tune a method by training loss, as the papers did, then run it from every seed.

    Args:
        store: Keeps the runs.
        problem: What is learnt.
        method: By whom.
        budget: How long.
        batch: Examples of a step.
        refresh: Steps between two decompositions.
        tell: Where to announce each run.

    Returns:
        The rows of the runs that count.
    """
    grid = METHODS[method].rates(problem)

    def rows_of(rates: Rates, stage: str, seed: int, epochs: int) -> list[Row]:
        run = Run(method, batch, refresh, rates.lr, rates.damping, seed, epochs)
        key = {"problem": problem.name, "stage": stage, **asdict(run)}
        if not store.of(key):
            tell(f"{store.path.stem}: {method}, batch {batch}, refresh {refresh}, {rates}, seed {seed}, {stage}")
        return store.once(key, lambda: train(problem, run))

    best = grid[0]
    if len(grid) > 1:
        best = min(grid, key=lambda rates: float(rows_of(rates, "tuning", 0, budget.tuning)[-1]["train_loss"]))
    return [row for seed in range(budget.seeds) for row in rows_of(best, "final", seed, budget.epochs)]


def _point(epoch: int, steps: int, wall: float, cpu: float, train_loss: float, test_loss: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "steps": steps,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "train_loss": train_loss,
        "test_loss": test_loss,
    }
