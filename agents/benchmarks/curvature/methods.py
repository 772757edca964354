"""Who learns: first-order methods and every curvature of the engine, by name.

A curvature that a configuration can name is here already; a line in ``METHODS`` gives it settings of its own, another
grid, or experiments that it takes part in without being asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from acktr.combination import LayerCombination
from acktr.fisher import FisherSeeds, SampledFisher
from acktr.optimizer import NaturalGradient
from acktr.step import StepRule
from acktr.trust_region import BlockMetric
from acktr.wake import WakeQ, WakeQE, WakeRule, WakeSO
from agents.benchmarks.curvature.problems import Problem
from agents.curvatures import curvature_named
from agents.errors import UsageError
from agents.schema import nearest
from agents.stepconfig import Curvature

CURVATURES: tuple[str, ...] = tuple(name for name in get_args(Curvature) if name != "adam")
"""The curvatures that a configuration can name."""


@dataclass(frozen=True)
class Rates:
    """What is tuned: one point of a method's grid."""

    lr: float
    """Learning rate."""
    damping: float = 0.0
    """Added to the curvature's eigenvalues; 0 for methods without curvature."""


Step = Callable[[Tensor, Tensor], None]
"""Learns from one batch of inputs and targets."""


class Method(Protocol):
    """A way to learn."""

    def rates(self, problem: Problem) -> tuple[Rates, ...]:
        """The grid, the same for all methods of a kind."""
        ...

    @property
    def experiments(self) -> frozenset[str]:
        """Those it takes part in unasked."""
        ...

    def start(self, problem: Problem, network: nn.Module, rates: Rates, refresh: int, seed: int) -> Step:
        """Begin to train a network."""
        ...


@dataclass(frozen=True)
class FirstOrder:
    """An optimizer of torch."""

    make: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
    """From parameters and learning rate."""
    learning_rates: tuple[float, ...]
    """The grid."""
    experiments: frozenset[str] = frozenset()
    """Those it takes part in unasked."""

    def rates(self, problem: Problem) -> tuple[Rates, ...]:
        """Its learning rates.

        Args:
            problem: Ignored.

        Returns:
            The grid.
        """
        return tuple(map(Rates, self.learning_rates))

    def start(self, problem: Problem, network: nn.Module, rates: Rates, refresh: int, seed: int) -> Step:
        """Begin to train.

        Args:
            problem: For its loss.
            network: What is trained.
            rates: A point of the grid.
            refresh: Ignored.
            seed: Ignored; nothing is drawn.

        Returns:
            The step.
        """
        optimizer = self.make(network.parameters(), rates.lr)

        def step(inputs: Tensor, targets: Tensor) -> None:
            optimizer.zero_grad()
            problem.losses(network, (inputs, targets)).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step


@dataclass(frozen=True)
class Natural:
    """A curvature of the engine, with steps as the papers take them: a fixed learning rate, and momentum."""

    curvature: str
    """One of ``CURVATURES``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the curvature, beyond its defaults."""
    momentum: float = 0.9
    """Share of the last direction that is kept."""
    rule: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the step's rule that are not as in the papers' fixed steps: a combination, say."""
    share: float = 1.0
    """Of the batch's examples, how many the curvature sees."""
    fisher: FisherSeeds = field(default_factory=SampledFisher)
    """The output gradients that feed the curvature."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``NaturalGradient``."""
    learning_rates: tuple[float, ...] = (0.03, 0.1)
    """The grid; the dampings are the problem's."""
    experiments: frozenset[str] = frozenset()
    """Those it takes part in unasked."""

    def rates(self, problem: Problem) -> tuple[Rates, ...]:
        """Every learning rate with every damping of the problem.

        Args:
            problem: Knows the scale of its Fisher, and so of dampings.

        Returns:
            The grid.
        """
        return tuple(Rates(lr, damping) for lr, damping in product(self.learning_rates, problem.dampings))

    def start(self, problem: Problem, network: nn.Module, rates: Rates, refresh: int, seed: int) -> Step:
        """Begin to train.

        Args:
            problem: For its likelihood, whose −log p is the loss.
            network: What is trained.
            rates: A point of the grid.
            refresh: Steps between two decompositions; statistics are taken at every step.
            seed: Of the optimizer's draws.

        Returns:
            The step.
        """
        fixed: dict[str, Any] = {
            "combination": None,
            "metric": BlockMetric(),
            "corrections": 0,
            "refresh_period": refresh,
        }
        options: dict[str, Any] = {"lr": rates.lr, "damping": rates.damping, "momentum": self.momentum}
        optimizer = NaturalGradient(
            network,
            problem.likelihood,
            curvature_named(self.curvature, **self.settings),
            rule=StepRule(**{**fixed, **self.rule}),
            fisher=self.fisher,
            seed=seed,
            **{**options, "radius": math.inf, **self.options},
        )

        def step(inputs: Tensor, targets: Tensor) -> None:
            examples = None if self.share == 1 else max(1, round(self.share * len(inputs)))
            passes = optimizer.observe(inputs, (targets,), examples)
            outputs = torch.cat([part.outputs[0] for part in passes])
            scores = problem.likelihood.scores((outputs,), (targets,))
            optimizer.pull_back(tuple(s / len(inputs) for s in scores), passes)
            optimizer.step()

        return step


def _in(*experiments: str) -> frozenset[str]:
    return frozenset(experiments)


_SGD, _ADAM = (0.003, 0.01, 0.03, 0.1), (0.001, 0.003, 0.01)
_EVERYWHERE = _in("autoencoder", "conv", "cost", "width")
_LOW_RANK = ("rs-kfac", "sre-kfac", "b-kfac", "b-r-kfac", "b-kfac-c")
_CONVOLUTIONS = ("kfc-reduce", "sua", "mean-sua", "sua-ekfac")
_COLUMNS = {"combination": LayerCombination()}
_AND_MOMENTUM = {"combination": LayerCombination(previous_step=True)}


def _in_wake(wake: WakeRule) -> Natural:
    # The wake is a memory of its own, as the paper has it; and the peer that it is to beat has none beside it either.
    return Natural("kfac", rule={"wake": wake}, momentum=0.0, learning_rates=(0.1, 0.3), experiments=_in("wake"))


METHODS: dict[str, Method] = {
    "sgd": FirstOrder(lambda p, lr: torch.optim.SGD(p, lr), _SGD),
    "sgd-momentum": FirstOrder(lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), _SGD, _EVERYWHERE),
    "adam": FirstOrder(lambda p, lr: torch.optim.Adam(p, lr), _ADAM, _EVERYWHERE),
    **{name: Natural(name) for name in CURVATURES},
    "kfac": Natural("kfac", experiments=_EVERYWHERE | _in("refresh", "spectra", "wake")),
    "ekfac": Natural("ekfac", experiments=_EVERYWHERE | _in("refresh", "spectra", "wake")),
    "factored-kfac": Natural("factored-kfac", experiments=_EVERYWHERE | _in("wake")),
    "diagonal": Natural("diagonal", experiments=_in("autoencoder", "conv")),
    "ekfac-ra": Natural("ekfac-ra", experiments=_in("autoencoder", "refresh", "spectra", "cost")),
    "tridiagonal": Natural("tridiagonal", experiments=_in("autoencoder", "cost")),
    **{name: Natural(name, experiments=_in("cost", "width")) for name in _LOW_RANK},
    **{name: Natural(name, experiments=_in("conv")) for name in _CONVOLUTIONS},
    "seng": Natural("seng", experiments=_in("cost", "conv")),
    "kfac-wake-so": _in_wake(WakeSO()),
    "kfac-wake-q": _in_wake(WakeQ()),
    "kfac-wake-qe": _in_wake(WakeQE()),
    "ekfac-rank-64": Natural("ekfac", {"rank": 64}, experiments=_in("cost", "width")),
    "kfac-no-momentum": Natural(
        "kfac", momentum=0.0, learning_rates=(0.1, 0.3), experiments=_in("autoencoder", "wake")
    ),
    "kfac-eighth": Natural("kfac", share=0.125, experiments=_in("cost")),
    "factored-kfac-eighth": Natural("factored-kfac", share=0.125, experiments=_in("cost")),
    "kfac-rescaled": Natural("kfac", momentum=0.0, rule=_COLUMNS, learning_rates=(1.0,)),
    "kfac-rescaled-momentum": Natural(
        "kfac", momentum=0.0, rule=_AND_MOMENTUM, learning_rates=(1.0,), experiments=_in("autoencoder")
    ),
}
"""Everyone, by name."""


def chosen(names: Iterable[str] | None, experiment: str) -> list[str]:
    """Say who takes part in an experiment.

    Args:
        names: Who was asked for; None for those who take part unasked.
        experiment: Its name.

    Returns:
        Names.
    """
    if names is not None:
        return list(dict.fromkeys(names))
    return [name for name, method in METHODS.items() if experiment in method.experiments]


def check(names: Iterable[str]) -> None:
    """Make sure that methods exist.

    Args:
        names: Their names.

    Raises:
        UsageError: If one does not.
    """
    for name in names:
        if name not in METHODS:
            raise UsageError(f"there is no method {name!r}; did you mean {nearest(name, list(METHODS))}?")
