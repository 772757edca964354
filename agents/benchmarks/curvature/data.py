"""Pictures to learn from: MNIST's files where the user has them, strokes and shapes drawn here where not."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d

from agents.errors import UsageError

SIDE = 28
"""Pixels of an edge of every picture."""
CLASSES = 10
"""Digits, or kinds of shapes."""

_MNIST = "t10k"
_TEST = 1000
_TYPES = {0x08: np.uint8}  # of the types that the format knows, the one that MNIST has


@dataclass(frozen=True)
class Pictures:
    """Grey pictures, cut into training and test."""

    name: str
    """Where they are from, in a word or two."""
    train: Tensor
    """Shape [N, 784], in [0, 1]."""
    test: Tensor
    """Shape [M, 784]."""
    train_classes: Tensor
    """Shape [N], int64."""
    test_classes: Tensor
    """Shape [M], int64."""

    def part(self, examples: int) -> Pictures:
        """Keep fewer of them.

        Args:
            examples: How many for training; as many at most for test.

        Returns:
            The first ones.
        """
        n = examples
        return Pictures(self.name, self.train[:n], self.test[:n], self.train_classes[:n], self.test_classes[:n])

    def smaller(self, factor: int) -> Pictures:
        """Average squares of pixels.

        Args:
            factor: Edge of a square.

        Returns:
            Pictures with fewer pixels.
        """
        train, test = (avg_pool2d(p.reshape(-1, 1, SIDE, SIDE), factor).flatten(1) for p in (self.train, self.test))
        return replace(self, train=train, test=test)


def digits(folder: Path) -> Pictures:
    """Read MNIST's test file and cut it 9,000 to 1,000: MNIST-10k, which is not MNIST.

    Args:
        folder: Holds ``mnist/t10k-images-idx3-ubyte`` and ``mnist/t10k-labels-idx1-ubyte``, packed with gzip or not.

    Returns:
        The digits.

    Raises:
        UsageError: If pictures and labels do not belong together.
    """
    pictures = read_idx(folder / "mnist" / f"{_MNIST}-images-idx3-ubyte")
    labels = read_idx(folder / "mnist" / f"{_MNIST}-labels-idx1-ubyte")
    if pictures.shape != (len(labels), SIDE, SIDE):
        raise UsageError(f"{folder}/mnist has pictures {pictures.shape} and {len(labels)} labels; fetch the files anew")
    return _cut("MNIST-10k", torch.from_numpy(pictures).reshape(len(labels), -1) / 255, torch.from_numpy(labels))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an array in the IDX format of MNIST's files: two zeros, type, rank, sizes as big-endian words, entries.

    Args:
        path: The file; with .gz behind its name it is unpacked.

    Returns:
        The array.

    Raises:
        UsageError: If there is no such file, or it is of another format.
    """
    packed = path.with_name(f"{path.name}.gz")
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read {path}[.gz]: {error}; give --data the folder that holds mnist/") from None
    rank = content[3] if len(content) > 3 else 0
    sizes = np.frombuffer(content[4 : 4 + 4 * rank], dtype=">u4").astype(int)
    body = content[4 + 4 * rank :]
    if content[:2] != b"\0\0" or content[2] not in _TYPES or len(sizes) != rank or len(body) != math.prod(sizes):
        raise UsageError(f"{path}[.gz] is no whole IDX file of bytes; fetch it anew")
    return np.frombuffer(body, dtype=_TYPES[content[2]]).reshape(sizes).copy()


def strokes(count: int, seed: int = 0) -> Pictures:
    """Draw curves through three random points, as the CURVES set of the autoencoder papers has them.

    Args:
        count: How many pictures, the last tenth for test.
        seed: Of the points.

    Returns:
        The pictures; their classes say how strongly the curve bends.
    """
    points = torch.rand(count, 3, 2, generator=torch.Generator().manual_seed(seed)) * (SIDE - 7) + 3
    t = torch.linspace(0, 1, 40)[:, None]
    first, middle, last = (points[:, i, None] for i in range(3))
    path = (1 - t) ** 2 * first + 2 * t * (1 - t) * middle + t**2 * last
    bend = (points[:, 0] - 2 * points[:, 1] + points[:, 2]).norm(dim=1)
    classes = torch.bucketize(bend, bend.quantile(torch.linspace(0, 1, CLASSES + 1)[1:-1]))
    return _cut("strokes", _ink(path), classes)


def shapes(count: int, seed: int = 0) -> Pictures:
    """Draw outlines with one to five petals, shallow or deep, at random places, sizes and angles.

    Args:
        count: How many pictures, the last tenth for test.
        seed: Of everything random.

    Returns:
        The pictures and their ten classes.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (count,), generator=generator)
    radius, angle, centre = (torch.rand(count, n, generator=generator) for n in (1, 1, 2))
    t = torch.linspace(0, 2 * math.pi, 60)
    depth = 0.25 + 0.35 * (classes % 2)[:, None]
    petals = 1 + depth * torch.cos((classes // 2 + 1)[:, None] * t + 2 * math.pi * angle)
    reach = (5 + 3 * radius) * petals / (1 + depth)
    turned = t + 2 * math.pi * angle
    path = torch.stack([reach * turned.cos(), reach * turned.sin()], -1)
    return _cut("shapes", _ink(path + 10 + 7 * centre[:, None]), classes)


def _ink(path: Tensor) -> Tensor:
    """Pixels [N, 784] darkened by their distance from the nearest point of a path [N, T, 2]."""
    grid = torch.arange(SIDE, dtype=path.dtype)
    rows, columns = ((path[:, :, axis, None] - grid).square() for axis in (0, 1))  # [N, T, 28] each
    ink = torch.zeros(len(path), SIDE, SIDE)
    for n in range(0, len(path), 200):  # squares of all pixels' distances to all points do not fit in memory
        squares = rows[n : n + 200, :, :, None] + columns[n : n + 200, :, None, :]
        ink[n : n + 200] = torch.exp(-squares.amin(1) / 0.8)
    return ink.flatten(1)


def _cut(name: str, pictures: Tensor, classes: Tensor) -> Pictures:
    train = len(pictures) - min(_TEST, len(pictures) // 10)
    classes = classes.long()
    return Pictures(name, pictures[:train], pictures[train:], classes[:train], classes[train:])
