"""Learning curves: from runs to one line and one band per environment and label.

A curve's value at t steps is the mean raw return of the last episodes that ended by then.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean

from agents import configfiles, rundir
from agents.callbacks import LAST
from agents.errors import UsageError

Array = NDArray[np.float64]

POINTS = 200
"""Points of a curve."""

_BATCH = 100  # resamples of a bootstrap in memory at a time

COLUMNS = ("env_id", "label", "seed", "timesteps", "return")
"""Columns of a file of curves."""


@dataclass(frozen=True)
class Curve:
    """One run's progress."""

    env_id: str
    """The environment."""
    label: str
    """What to group the run by."""
    seed: int
    """The run's seed."""
    timesteps: Array
    """Environment steps, rising, [points]."""
    returns: Array
    """Smoothed raw return, [points]."""


@dataclass(frozen=True)
class Band:
    """Several seeds of one label on one environment."""

    timesteps: Array
    """Environment steps that all seeds have reached, [points]."""
    centre: Array
    """Interquartile mean over the seeds, [points]."""
    low: Array
    """Lower end of the confidence interval, [points]."""
    high: Array
    """Upper end of the confidence interval, [points]."""
    seeds: int
    """Number of runs."""


def read(path: Path) -> list[Curve]:
    """Read curves from wherever they lie.

    Args:
        path: A run directory, a folder of run directories at any depth, or a file that ``to_csv`` made.

    Returns:
        The curves, at least one.

    Raises:
        UsageError: If there is nothing to read.
    """
    if path.is_file():
        return read_csv(path)
    runs = [path] if (path / "config.yaml").is_file() else sorted(found.parent for found in path.rglob("config.yaml"))
    if not runs:
        raise UsageError(f"{path} holds no run; name a run directory of scripts.train, or a CSV file of curves")
    return [read_run(run) for run in runs]


def read_run(path: Path) -> Curve:
    """Smooth the training episodes of a run.

    Args:
        path: The run directory.

    Returns:
        The curve.

    Raises:
        UsageError: If no episode has ended yet, or the record is damaged.
    """
    directory = rundir.existing(path)
    env_id, label, seed = configfiles.identity(directory.config)
    if not directory.episodes.is_file():
        raise UsageError(f"{path} has no episodes.csv, as exported agents have none; name the run they come from")
    rows = rundir.read_rows(directory.episodes)
    if not rows:
        raise UsageError(f"{path} has no finished episode to plot; train it for longer, or leave it out")
    try:
        ends = np.array([float(row["timesteps"]) for row in rows])
        returns = np.array([float(row["return"]) for row in rows])
    except (KeyError, ValueError) as error:
        raise UsageError(f"{directory.episodes} is damaged ({error}); leave the run out, or train it again") from None
    timesteps, smoothed = smooth(ends, returns)
    return Curve(env_id, label, seed, timesteps, smoothed)


def smooth(ends: Array, returns: Array, window: int = LAST, points: int = POINTS) -> tuple[Array, Array]:
    """Average the last episodes at evenly spaced times.

    Args:
        ends: When each episode ended, in environment steps, rising, [episodes].
        returns: Their raw returns, [episodes].
        window: How many episodes to average, fewer at the beginning.
        points: How many times.

    Returns:
        Times from the first end to the last, and the averages, both [points].
    """
    timesteps = np.linspace(ends[0], ends[-1], points).round()
    finished = np.searchsorted(ends, timesteps, side="right")
    sums = np.concatenate([[0.0], np.cumsum(returns)])
    first = np.maximum(0, finished - window)
    return timesteps, (sums[finished] - sums[first]) / (finished - first)


def read_csv(path: Path) -> list[Curve]:
    """Read a file of curves.

    Args:
        path: The file.

    Returns:
        Its curves.

    Raises:
        UsageError: If it is none.
    """
    groups: dict[tuple[str, str, int], list[list[tuple[float, float]]]] = {}
    try:
        for row in rundir.read_rows(path):
            runs = groups.setdefault((row["env_id"], row["label"], int(row["seed"])), [[]])
            point = float(row["timesteps"]), float(row["return"])
            if runs[-1] and point[0] < runs[-1][-1][0]:  # another run of the same label and seed
                runs.append([])
            runs[-1].append(point)
    except (KeyError, ValueError) as error:
        raise UsageError(f"{path} is no file of curves ({error}); its columns must be {', '.join(COLUMNS)}") from None
    if not groups:
        raise UsageError(f"{path} holds no curve; make one with scripts.plot RUN_DIR --csv FILE")
    points = [(key, np.array(pairs)) for key, runs in groups.items() for pairs in runs]
    return [Curve(*key, pairs[:, 0], pairs[:, 1]) for key, pairs in points]


def to_csv(curves: Iterable[Curve]) -> str:
    """Write curves as text that ``read_csv`` reads.

    Args:
        curves: The curves.

    Returns:
        CSV text.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for curve in curves:
        for timesteps, value in zip(curve.timesteps, curve.returns, strict=True):
            writer.writerow([curve.env_id, curve.label, curve.seed, int(timesteps), f"{value:.6g}"])
    return text.getvalue()


def by_panel(curves: Sequence[Curve]) -> Mapping[str, Mapping[str, list[Curve]]]:
    """Group curves.

    Args:
        curves: The curves.

    Returns:
        Curves by environment and label, both in alphabetical order.
    """
    panels: dict[str, dict[str, list[Curve]]] = {}
    for curve in sorted(curves, key=lambda c: (c.env_id, c.label, c.seed)):
        panels.setdefault(curve.env_id, {}).setdefault(curve.label, []).append(curve)
    return panels


def summarise(curves: Sequence[Curve]) -> Band:
    """Turn the seeds of one label into a line and a band.

    Args:
        curves: At least one run.

    Returns:
        Interquartile mean and 95 % interval over the steps that all runs have reached.
    """
    start = max(curve.timesteps[0] for curve in curves)
    end = min(curve.timesteps[-1] for curve in curves)
    grid = np.linspace(min(start, end), end, POINTS)
    scores = np.stack([np.interp(grid, curve.timesteps, curve.returns) for curve in curves])
    low, high = stratified_bootstrap([scores])
    return Band(grid, iqm(scores), low, high, len(curves))


def iqm(scores: Array) -> Array:
    """Compute the interquartile mean: the mean without the lowest and the highest quarter.

    With fewer than four runs nothing is cut off. Agarwal et al. 2021 recommend it for few seeds: less noise
    than the median, less swayed by outliers than the mean.

    Args:
        scores: Scores, [runs, ...].

    Returns:
        Their interquartile mean over the runs, [...].
    """
    return np.asarray(trim_mean(scores, 0.25, axis=0), dtype=np.float64)


def stratified_bootstrap(
    strata: Sequence[Array], resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[Array, Array]:
    """Estimate how far the interquartile mean would move with other seeds.

    Runs are drawn again, with replacement and from each stratum as many as it has, so that no resample forgets
    a task.

    Args:
        strata: For each task the scores of its runs, [runs, points].
        resamples: How many times to draw.
        confidence: Share of the resamples that the interval holds.
        seed: Seed of the draws, so that a figure can be made again.

    Returns:
        Lower and upper end of the percentile interval, both [points].
    """
    rng = np.random.default_rng(seed)

    def draw() -> Array:
        return np.concatenate([scores[rng.integers(len(scores), size=len(scores))] for scores in strata])

    # Many resamples at a time: one by one, the means take ten times as long as the draws.
    sizes = [min(_BATCH, resamples - done) for done in range(0, resamples, _BATCH)]
    means = np.concatenate([iqm(np.stack([draw() for _ in range(size)], axis=1)) for size in sizes])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high
