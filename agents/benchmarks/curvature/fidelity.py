"""How near each curvature is to the dense Fisher of a small network, in float64 and without sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from acktr.curvature import NetworkCurvature
from acktr.exact import Linearisation
from acktr.fisher import ExactFisher
from acktr.likelihood import Categorical
from acktr.optimizer import NaturalGradient
from acktr.step import StepRule
from acktr.tree import Tensors
from agents.benchmarks.curvature import data
from agents.benchmarks.curvature.data import CLASSES
from agents.benchmarks.curvature.experiment import (
    Claim,
    Curve,
    Experiment,
    Finding,
    Setting,
    by_problem,
    median,
    methods_in,
)
from agents.benchmarks.curvature.methods import CURVATURES, METHODS, Natural, chosen
from agents.benchmarks.curvature.store import Row
from agents.benchmarks.report import Table
from agents.curvatures import curvature_named

DAMPING = 1e-2
FROZEN_AT = 20
_SIZES = (16, 8, 6, 8, CLASSES)
_POINTS = (FROZEN_AT, 40, 80, 160, 320)


@dataclass(frozen=True)
class World:
    """A small network on a small batch, and its gradient and Fisher written out."""

    name: str
    """The network, and what it learns from."""
    network: nn.Module
    """In float64."""
    inputs: Tensor
    """All examples."""
    classes: Tensor
    """Their targets."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By dotted name."""
        return dict(self.network.named_parameters())

    def flat(self, tensors: Tensors) -> Tensor:
        """Join tensors.

        Args:
            tensors: One per parameter.

        Returns:
            One vector.
        """
        return torch.cat([tensors[name].flatten() for name in self.parameters])

    def tensors(self, vector: Tensor) -> Tensors:
        """Undo ``flat``.

        Args:
            vector: Of all parameters.

        Returns:
            One tensor per parameter.
        """
        pieces = torch.split(vector, [p.numel() for p in self.parameters.values()])
        return {name: v.view_as(p) for (name, p), v in zip(self.parameters.items(), pieces, strict=True)}

    def loss(self) -> Tensor:
        """The mean cross-entropy.

        Returns:
            Nats, differentiable.
        """
        return -Categorical().log_prob((self.network(self.inputs),), (self.classes,)).mean()

    def gradient(self) -> Tensors:
        """The loss's gradient.

        Returns:
            One tensor per parameter.
        """
        grads = torch.autograd.grad(self.loss(), list(self.parameters.values()))
        return dict(zip(self.parameters, grads, strict=True))

    def fisher(self) -> Tensor:
        """E_n[Jᵀ F_out J] by reverse-mode Jacobians: no line of it is the engine's but the output's Fisher.

        Returns:
            Shape [P, P].
        """
        detached = {name: p.detach() for name, p in self.parameters.items()}

        def output(tensors: Tensors, x: Tensor) -> Any:
            return functional_call(self.network, tensors, (x.unsqueeze(0),)).squeeze(0)

        jacobians = vmap(jacrev(output), (None, 0))(detached, self.inputs)
        J = torch.cat([jacobians[name].flatten(2) for name in detached], 2)
        p = self.network(self.inputs).detach().softmax(1)
        F_out = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        return torch.einsum("nci,ncd,ndj->ij", J, F_out, J) / len(J)


def world(setting: Setting, steps: int) -> tuple[World, torch.optim.Optimizer]:
    """Make the small world, trained a little: at the start a Fisher has too little structure.

    Args:
        setting: What is given.
        steps: Of Adam.

    Returns:
        The world, and the optimizer to go on with.
    """
    pictures = setting.pictures(data.shapes, 200).smaller(7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [m for fan_in, fan_out in pairwise(_SIZES) for m in (nn.Linear(fan_in, fan_out), nn.Tanh())]
    name = f"{'-'.join(map(str, _SIZES))} tanh on {len(pictures.train)} of {pictures.name}"
    made = World(name, nn.Sequential(*layers[:-1]).double(), 3 * pictures.train.double(), pictures.train_classes)
    optimizer = torch.optim.Adam(made.network.parameters(), 0.01)
    for _ in range(steps):
        _descend(made, optimizer)
    return made, optimizer


def observer(made: World, curvature: str, settings: dict[str, Any]) -> NaturalGradient:
    """Make an optimizer that looks on: its curvature decomposes once, and nobody takes its steps.

    Args:
        made: The world.
        curvature: Name of the curvature.
        settings: Of it.

    Returns:
        The optimizer.
    """
    rule, choice = StepRule(refresh_period=10**9), curvature_named(curvature, **settings)
    return NaturalGradient(made.network, Categorical(), choice, rule=rule, fisher=ExactFisher())


def matrix_of(made: World, act: Callable[[Tensors], Tensors]) -> Tensor:
    """Write a linear map out.

    Args:
        made: The world.
        act: The map.

    Returns:
        Shape [P, P], symmetrised.
    """
    size = sum(p.numel() for p in made.parameters.values())
    columns = [made.flat(act(made.tensors(unit))) for unit in torch.eye(size, dtype=torch.float64)]
    matrix = torch.stack(columns, 1)
    return (matrix + matrix.mT) / 2


def distances(F: Tensor, approximation: Tensor, damping: float) -> tuple[float, float]:
    """Measure how far a matrix is from the Fisher.

    Args:
        F: The Fisher, [P, P].
        approximation: Stands for it, [P, P].
        damping: λ, so that both are definite.

    Returns:
        ‖F − F̂‖ / ‖F‖ in Frobenius norms, and KL(N(0, F̂ + λ) ‖ N(0, F + λ)) in nats per dimension.
    """
    identity = damping * torch.eye(len(F), dtype=F.dtype)
    ratios = torch.linalg.eigvals(torch.linalg.solve(F + identity, approximation + identity)).real.clamp_min(1e-12)
    kl = 0.5 * (ratios - 1 - ratios.log()).mean()
    return float((F - approximation).norm() / F.norm()), float(kl)


def perform(setting: Setting) -> None:
    """Hold every curvature against the dense Fisher.

    Args:
        setting: What is given.
    """
    made, _ = world(setting, 50)
    store, F = setting.store("fidelity"), made.fisher()
    for method in _subjects(setting):
        key = {"problem": made.name, "method": method, "damping": DAMPING}
        store.once(key, partial(_fidelity, made, F, method))


def _fidelity(made: World, F: Tensor, method: str) -> Iterator[dict[str, float]]:
    curvature, linearisation = _ready(made, method)
    frobenius, kl = distances(F, matrix_of(made, partial(curvature.multiply, linearisation=linearisation)), DAMPING)
    gradient = made.gradient()
    ours = made.flat(curvature.solve(curvature.follow(gradient), DAMPING, linearisation))
    flat = made.flat(gradient)
    damped = F + DAMPING * torch.eye(len(F), dtype=F.dtype)
    exact = torch.linalg.solve(damped, flat)
    # What the quadratic model gains at the best multiple of the direction, as a share of what it can gain.
    progress = (ours @ flat) ** 2 / (ours @ damped @ ours) / (exact @ flat)
    cosine = ours @ exact / ours.norm() / exact.norm()
    yield {"frobenius": frobenius, "kl": kl, "cosine": float(cosine), "progress": float(progress)}


def _ready(made: World, method: str) -> tuple[NetworkCurvature, Linearisation]:
    natural = METHODS[method]
    assert isinstance(natural, Natural)
    optimizer = observer(made, natural.curvature, dict(natural.settings))
    optimizer.observe(made.inputs, (made.classes,))
    parameters = {name: p for name, p in made.parameters.items() if p.requires_grad}
    linearisation = Linearisation(made.network, parameters, (made.inputs,), Categorical())
    return optimizer.curvature, linearisation


def perform_spectra(setting: Setting) -> None:
    """Follow the Fisher through training, with bases found once and with bases found anew.

    Args:
        setting: What is given.
    """
    store, points = setting.store("spectra"), _POINTS if not setting.quick else _POINTS[:2]
    name = world(setting, 0)[0].name
    for method in _curvatures(chosen(setting.methods, "spectra")):
        key = {"problem": name, "method": method, "damping": DAMPING}
        store.once(key, partial(_follow, setting, method, points))


def _follow(setting: Setting, method: str, points: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    made, adam = world(setting, points[0])
    natural = METHODS[method]
    assert isinstance(natural, Natural)
    frozen = observer(made, natural.curvature, dict(natural.settings))
    step = points[0]
    for point in points:
        for _ in range(point - step):
            _descend(made, adam)
            frozen.observe(made.inputs, (made.classes,))
        if point == points[0]:
            frozen.observe(made.inputs, (made.classes,))
        step, F = point, made.fisher()
        fresh, linearisation = _ready(made, method)
        for bases, curvature in (("frozen", frozen.curvature), ("fresh", fresh)):
            solve = partial(curvature.solve, damping=DAMPING, linearisation=linearisation)
            # What preconditions, whatever the block calls its product: the solve, undone.
            used = torch.linalg.inv(matrix_of(made, solve)) - DAMPING * torch.eye(len(F), dtype=F.dtype)
            own, true = (torch.linalg.eigvalsh((m + m.mT) / 2) for m in (used, F))
            spectra = (own - true).norm() / true.norm()
            yield {"step": point, "bases": bases, "spectra": float(spectra), "frobenius": distances(F, used, 1.0)[0]}


def find(setting: Setting) -> Finding:
    """Say who is how near.

    Args:
        setting: What is given.

    Returns:
        Distances, and theorem 3.
    """
    return by_problem(setting.store("fidelity").rows, _find)


def _find(rows: list[Row]) -> Finding:
    columns = ["frobenius", "kl", "cosine", "progress"]
    lines = [[row["method"], *(f"{float(row[c]):.3f}" for c in columns)] for row in rows]
    title = f"{rows[0]['problem']}: exact Fisher, damping {DAMPING}, float64"
    heads = ["", "‖F−F̂‖/‖F‖", "KL per dimension", "cosine of the damped solves", "share of the exact step's progress"]
    of = {row["method"]: {c: float(row[c]) for c in columns} for row in rows}
    claims = []
    if {"kfac", "ekfac"} <= of.keys():
        ours, theirs = of["ekfac"]["frobenius"], of["kfac"]["frobenius"]
        text = "EKFAC is never further from the Fisher than K-FAC, in Frobenius norm (theorem 3)"
        claims.append(Claim(text, "George et al. 2018", f"{ours:.3f} against {theirs:.3f}", ours <= theirs))
    if {"factored-kfac", "tridiagonal"} <= of.keys():  # whose damping is the same
        ours, theirs = of["tridiagonal"]["progress"], of["factored-kfac"]["progress"]
        told = f"{100 * ours:.0f} % of the exact step's progress against {100 * theirs:.0f} %"
        claims.append(
            Claim("Block-tridiagonal is nearer than block-diagonal", "Martens & Grosse 2015", told, ours > theirs)
        )
    return Finding([Table(title, heads, lines)], claims)


def find_spectra(setting: Setting) -> Finding:
    """Say how well old bases serve.

    Args:
        setting: What is given.

    Returns:
        Distances of the spectra over training.
    """
    return by_problem(setting.store("spectra").rows, _find_spectra)


def _find_spectra(rows: list[Row]) -> Finding:
    methods, steps = methods_in(rows), sorted({int(row["step"]) for row in rows})

    def at(method: str, bases: str, step: int, column: str) -> float:
        wanted = (method, bases, str(step))
        return median([r for r in rows if (r["method"], r["bases"], r["step"]) == wanted], column)

    kinds = [(method, bases) for method in methods for bases in ("frozen", "fresh")]
    lines = [
        [f"{method}, {bases}, {name}", *(f"{at(method, bases, s, c):.3f}" for s in steps)]
        for c, name in (("spectra", "spectra"), ("frobenius", "matrices"))
        for method, bases in kinds
    ]
    title = f"Distance from the Fisher's spectrum and from the Fisher, relative, by step; bases frozen at {steps[0]}"
    curves = [
        Curve("spectra", f"{method}, {bases}", steps, [at(method, bases, s, "spectra") for s in steps])
        for method, bases in kinds
    ]
    claims = []
    if {"kfac", "ekfac"} <= set(methods) and len(steps) > 1:
        ours, theirs = (max(at(m, "frozen", s, "spectra") for s in steps[1:]) for m in ("ekfac", "kfac"))
        text = "With frozen bases EKFAC's spectrum stays nearer to the Fisher's than K-FAC's (figure 5c)"
        claims.append(Claim(text, "George et al. 2018", f"at most {ours:.2f} against {theirs:.2f}", ours < theirs))
    return Finding([Table(title, ["", *map(str, steps)], lines)], claims, curves)


def _descend(made: World, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    made.loss().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _subjects(setting: Setting) -> list[str]:
    wanted = [*CURVATURES, *(n for n, m in METHODS.items() if isinstance(m, Natural) and m.settings)]
    return _curvatures(wanted if setting.methods is None else setting.methods)


def _curvatures(names: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if isinstance(METHODS[name], Natural)]


FIDELITY = Experiment(
    "Frobenius and KL distances from the dense Fisher, and how well damped solves agree", perform, find
)
SPECTRA = Experiment("Distance from the Fisher's spectrum with old bases", perform_spectra, find_spectra)
