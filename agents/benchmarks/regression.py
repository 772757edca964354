"""Regression sets by the protocol of the noisy natural gradient paper: random splits, standardised, own units."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.errors import UsageError
from agents.schema import nearest

FILES = {
    "boston": "housing.data",
    "concrete": "concrete.data",
    "energy": "energy.data",
    "kin8nm": "kin8nm.data",
    "naval": "naval.data",
    "power": "power_plant.data",
    "protein": "protein.data",
    "wine": "wine.data",
    "yacht": "yacht_hydrodynamics.data",
}
"""Plain text of a set: one example a line, numbers between blanks, the last one the target."""

GENERATED = "friedman1"
"""The set that is generated where no folder is given."""


@dataclass(frozen=True)
class Split:
    """One division of a set, standardised with the mean and the deviation of its training part."""

    inputs: Tensor
    """Of the training part, shape [N, i]."""
    targets: Tensor
    """Shape [N]."""
    test_inputs: Tensor
    """Shape [M, i]."""
    test_targets: Tensor
    """Shape [M]."""
    unit: float
    """Deviation of the training part's targets: what a standardised error of 1 is in the target's own unit."""

    def rmse(self, predictions: Tensor) -> float:
        """Root mean squared error on the test part, in the target's own unit.

        Args:
            predictions: Standardised, shape [M].

        Returns:
            The error.
        """
        return self.unit * float((predictions - self.test_targets).square().mean().sqrt())

    def log_likelihood(self, log_probs: Tensor) -> float:
        """Mean log-density of the test targets in their own unit under a mixture of draws.

        Args:
            log_probs: Of the standardised test targets under each draw, shape [S, M].

        Returns:
            Nats.
        """
        mixture = log_probs.double().logsumexp(0) - math.log(len(log_probs))
        return float(mixture.mean()) - math.log(self.unit)


def load(name: str, folder: Path) -> NDArray[np.float64]:
    """Read a set.

    Args:
        name: One of ``FILES``.
        folder: Where the files are; those of a folder ``uci`` in it are found too.

    Returns:
        Examples in rows, the target in the last column.

    Raises:
        UsageError: If there is no such set, or its file is missing or no table of numbers.
    """
    if name not in FILES:
        raise UsageError(f"there is no set {name!r}; did you mean {nearest(name, list(FILES))}?")
    places = [folder / FILES[name], folder / "uci" / FILES[name]]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UsageError(f"--data {folder} holds no {FILES[name]}; put the set there, or leave {name} out of --sets")
    try:
        table = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise UsageError(f"{path} is no table of numbers ({error}); the last column must be the target") from None
    if not np.isfinite(table).all() or min(table.shape) < 2:
        raise UsageError(f"{path} is no table of finite numbers with several rows and columns")
    return table


def friedman1(examples: int = 500, seed: int = 0) -> NDArray[np.float64]:
    """Generate a set: five of ten uniform inputs count, with noise of deviation 1 (Friedman 1991).

    Args:
        examples: How many.
        seed: Of the generator.

    Returns:
        Examples in rows, the target in the last column.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(examples, 10))
    target = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return np.column_stack([x, target + rng.normal(size=examples)])


def splits(table: NDArray[np.float64], count: int, test_share: float = 0.1) -> Iterator[Split]:
    """Divide a set at random, again and again.

    Args:
        table: Examples in rows, the target in the last column.
        count: How many divisions; the k-th is the same whatever the count.
        test_share: Part of the examples for the test.

    Yields:
        One division each.
    """
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(len(table))
        cut = len(table) - max(1, round(test_share * len(table)))
        train, test = table[order[:cut]], table[order[cut:]]
        mean, deviation = train.mean(0), train.std(0)
        deviation[deviation == 0] = 1.0
        parts = [torch.as_tensor((part - mean) / deviation, dtype=torch.float32) for part in (train, test)]
        (x, y), (test_x, test_y) = ((part[:, :-1].contiguous(), part[:, -1].contiguous()) for part in parts)
        yield Split(x, y, test_x, test_y, float(deviation[-1]))
