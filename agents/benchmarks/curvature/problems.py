"""What is learnt: networks, what their outputs mean, and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from acktr.likelihood import Bernoulli, Categorical
from agents.benchmarks.curvature.data import CLASSES, SIDE, Pictures

HIDDEN = (1000, 500, 250)
"""Hidden widths of the papers' autoencoder, down to the code and up again (Hinton & Salakhutdinov 2006)."""
CODE = 30
"""Width of the code."""
_INCOMING = 15


@dataclass(frozen=True)
class Problem:
    """Data, a network and a loss: the mean of −log p over examples, in nats."""

    name: str
    """What is learnt by what from what."""
    make: Callable[[], nn.Module]
    """Makes the network, from torch's own random numbers."""
    likelihood: Bernoulli | Categorical
    """What its outputs mean."""
    train: tuple[Tensor, Tensor]
    """Inputs and targets, [N, ...]."""
    test: tuple[Tensor, Tensor]
    """Inputs and targets, [M, ...]."""
    dampings: tuple[float, ...] = (0.01, 0.1, 1.0)
    """What is tried, in units of its Fisher's eigenvalues."""

    def network(self, seed: int) -> nn.Module:
        """Make the network.

        Args:
            seed: Of its weights.

        Returns:
            The network.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()

    def losses(self, network: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of each example.

        Args:
            network: The network.
            examples: Inputs and targets.

        Returns:
            Shape [N].
        """
        inputs, targets = examples
        return -self.likelihood.log_prob((network(inputs),), (targets,))

    def measure(self, network: nn.Module, examples: tuple[Tensor, Tensor], most: int = 2000) -> float:
        """The mean loss of a part of the examples.

        Args:
            network: The network.
            examples: Inputs and targets.
            most: Examples that are looked at, the first ones.

        Returns:
            Nats.
        """
        with torch.no_grad():
            return float(self.losses(network, (examples[0][:most], examples[1][:most])).mean())


def autoencoder(pictures: Pictures, scale: float) -> Problem:
    """The autoencoder of the papers, 784-1000-500-250-30-250-500-1000-784: sigmoids, a linear code, cross-entropy.

    Args:
        pictures: What to encode.
        scale: Hidden widths as a share of the papers'; the code keeps its 30.

    Returns:
        The problem.
    """
    down = [max(CODE, round(scale * width)) for width in HIDDEN]
    pixels = pictures.train.shape[1]
    widths = [pixels, *down, CODE, *reversed(down), pixels]
    name = f"autoencoder {'-'.join(map(str, widths))} on {len(pictures.train)} of {pictures.name}"
    return Problem(
        name,
        lambda: _sigmoids(widths, linear={len(down)}),
        Bernoulli(),
        (pictures.train, pictures.train),
        (pictures.test, pictures.test),
        dampings=(1.0, 3.0, 10.0),  # a sum over hundreds of pixels: less let every run at these learning rates break
    )


def convolutional(pictures: Pictures) -> Problem:
    """A small convolutional classifier.

    Args:
        pictures: What to tell apart.

    Returns:
        The problem.
    """
    train, test = (p.reshape(-1, 1, SIDE, SIDE) for p in (pictures.train, pictures.test))
    return Problem(
        f"conv 8-16-10 on {len(pictures.train)} of {pictures.name}",
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 49, CLASSES),
        ),
        Categorical(),
        (train, pictures.train_classes),
        (test, pictures.test_classes),
    )


def teacher(width: int, examples: int, seed: int = 0, inputs: int = 64) -> Problem:
    """A wide perceptron learns the classes that a narrow random one assigns to Gaussian inputs.

    Args:
        width: Of both hidden layers of the pupil.
        examples: For training; a quarter as many for test.
        seed: Of teacher and inputs.
        inputs: Width of the inputs.

    Returns:
        The problem.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples + examples // 4, inputs, generator=generator)
    first = torch.randn(inputs, 32, generator=generator) / inputs**0.5
    second = torch.randn(32, CLASSES, generator=generator)
    classes = ((2 * x @ first).tanh() @ second).argmax(1)
    return Problem(
        f"teacher {inputs}-{width}-{width}-{CLASSES}, {examples} examples",
        lambda: nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
        ),
        Categorical(),
        (x[:examples], classes[:examples]),
        (x[examples:], classes[examples:]),
    )


def _sigmoids(widths: list[int], linear: set[int]) -> nn.Sequential:
    """Linear layers with sigmoids between, none after the layers named and the last."""
    modules: list[nn.Module] = []
    for number, (fan_in, fan_out) in enumerate(pairwise(widths)):
        modules.append(_sparse(nn.Linear(fan_in, fan_out)))
        if number not in linear and number < len(widths) - 2:
            modules.append(nn.Sigmoid())
    return nn.Sequential(*modules)


def _sparse(layer: nn.Linear) -> nn.Linear:
    """Fifteen incoming weights of unit variance for each unit and no bias (Martens 2010): deep sigmoids stay awake."""
    with torch.no_grad():
        fan_in = layer.in_features
        chosen = torch.rand(layer.weight.shape).argsort(1) < min(_INCOMING, fan_in)
        layer.weight.copy_(torch.randn_like(layer.weight) * chosen)
        layer.bias.zero_()
    return layer
