"""Training runs that several processes share, each in the terms of what one process sees; started by test_distributed.

    python ranks_worker.py FOLDER RANK SIZE

runs every case on its rank and saves what came out; with one rank the case is the oracle of the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from acktr import (
    EKFAC,
    KFAC,
    SREKFAC,
    Backtracking,
    BlockMetric,
    Categorical,
    DiagonalGaussian,
    ExactFisher,
    FactoredKFAC,
    Joint,
    LevenbergMarquardt,
    NaturalGradient,
    ScalarGaussian,
    StepRule,
    WakeSO,
    known_fisher,
)
from acktr.distributed import Background, CommOpt, Distributed, HybridOpt, MemOpt, ProcessRanks, Synchronous, slots
from acktr.linalg import DecompositionError

EXAMPLES, UPDATES, HALF = 24, 20, 4
PLACEMENTS = {"comm": CommOpt(), "mem": MemOpt(), "hybrid": HybridOpt()}
CURVATURES = {
    "kfac": KFAC(),
    "factored": FactoredKFAC(),
    "ekfac": EKFAC(),
    "ekfac-rank": EKFAC(rank=2),
    "sre": SREKFAC(rank=2, oversampling=1, power_steps=2),
    "sre wide": SREKFAC(rank=16, oversampling=2),
}


class Actor(nn.Module):
    """Linear layers, a log-std with a known Fisher, and a gain that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 2))
        self.log_std = nn.Parameter(torch.full((2,), -0.2))

    def forward(self, x):
        mean = self.mean(x)
        return mean, self.log_std.expand_as(mean)


class Wide(nn.Sequential):
    """Layers in which bases and moments are most of what travels."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 24, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(216, 48), nn.Tanh()
        )
        self.append(nn.Linear(48, 3))


class ActorCritic(nn.Module):
    """Two parts of a likelihood, each with a radius of its own, over a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten()
        )
        self.logits, self.value = nn.Linear(12, 3), nn.Linear(12, 1)

    def forward(self, x):
        features = self.trunk(x)
        return self.logits(features), self.value(features).squeeze(-1)


@dataclass(frozen=True)
class Case:
    """One training run."""

    curvature: str = "ekfac"
    network: str = "linear"
    placement: str = "comm"
    dtype: torch.dtype = torch.float64
    refresh: Any = field(default_factory=Synchronous)
    rule: StepRule = field(default_factory=lambda: StepRule(refresh_period=3))
    damping: float | LevenbergMarquardt = 1e-2
    shares: tuple[int, ...] | None = None
    """Examples of each rank; None for equal ones."""
    closure: bool = False
    wrapped: bool = False
    """In DistributedDataParallel."""
    spoil: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    """What happens to an update's inputs."""
    lost: str | None = None
    """Method of the ranks that is left out: the negative controls."""
    updates: int = 8
    interrupted: str | None = None
    """State file from which the second half goes on."""


def made(case: Case) -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    if case.network == "linear":
        return Actor().to(case.dtype), DiagonalGaussian()
    if case.network == "wide":
        return Wide().to(case.dtype), Categorical()
    return ActorCritic().to(case.dtype), Joint(Categorical(), ScalarGaussian(0.5), value_radius=0.3)


def batch(case: Case, update: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Everyone's inputs and targets of one update."""
    generator = torch.Generator().manual_seed(100 + update)
    shape = (6,) if case.network == "linear" else (2, 6, 6)
    inputs = torch.randn(EXAMPLES, *shape, generator=generator, dtype=torch.float64).to(case.dtype)
    targets = torch.randn(EXAMPLES, 4, generator=generator, dtype=torch.float64).to(case.dtype)
    return (inputs if case.spoil is None else case.spoil(update, inputs)), targets


def loss_of(case: Case, outputs: tuple[torch.Tensor, ...], targets: torch.Tensor) -> torch.Tensor:
    if case.network == "linear":
        mean, log_std = outputs
        return (0.5 * ((targets[:, :2] - mean) / log_std.exp()).square() + log_std).sum(1).mean()
    if case.network == "wide":
        return nn.functional.cross_entropy(outputs, targets[:, :3].argmax(1))
    logits, value = outputs
    return nn.functional.cross_entropy(logits, targets[:, :3].argmax(1)) + (value - targets[:, 3]).square().mean()


def mine(case: Case, rank: int, size: int) -> slice:
    shares = case.shares if case.shares and size == len(case.shares) else (EXAMPLES // size,) * size
    return slice(sum(shares[:rank]), sum(shares[: rank + 1]))


def optimizer_of(case: Case, network: nn.Module, likelihood: Any) -> NaturalGradient:
    optimizer = NaturalGradient(
        network,
        likelihood,
        Distributed(CURVATURES[case.curvature], PLACEMENTS[case.placement], case.refresh),
        radius=0.02,
        damping=case.damping,
        momentum=0.5 if case.rule.combination is None and case.rule.wake is None else 0.0,
        weight_decay=1e-4,
        fisher=ExactFisher(),
        rule=case.rule,
        blocks={"log_std": known_fisher(2.0)},
    )
    if case.lost is not None:
        ranks = optimizer.curvature.ranks
        if isinstance(ranks, ProcessRanks):
            lose(ranks, case.lost)
    return optimizer


def lose(ranks: ProcessRanks, what: str) -> None:
    """Leave one reduction out on this rank; nothing is sent in its place, so that nobody waits for it."""
    if what == "gradient":
        ranks.mean_gradient = lambda gradient, examples: gradient
    elif what == "forms and distances":
        ranks.mean = lambda value, examples: value
    else:
        whole, calls = ranks.means, iter(range(10**6))
        skipped = {"moments": 0, "scalings": 1}[what]

        def means(kind, tensors, examples, sound=True):
            found = whole(kind, tensors, examples, sound)
            own = kind == "statistics" and next(calls) % 2 == skipped
            return found._replace(tensors=list(tensors)) if own and found else found

        ranks.means = means


def train(case: Case, rank: int, size: int) -> dict[str, Any]:
    """Every update's parameters and report."""
    network, likelihood = made(case)
    if rank:
        for parameter in network.parameters():  # the start is rank 0's
            parameter.data += 1
    called = DistributedDataParallel(network) if case.wrapped and size > 1 else network
    optimizer = optimizer_of(case, called, likelihood)
    rows, first = mine(case, rank, size), 0
    if case.interrupted is not None:
        state = torch.load(case.interrupted, weights_only=False)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = HALF
    path, reports = [], []
    for update in range(first, case.updates):
        inputs, targets = (tensor[rows] for tensor in batch(case, update))
        step(case, called, optimizer, inputs, targets)
        path.append(torch.cat([p.detach().flatten().clone() for p in network.parameters()]))
        reports.append((optimizer.report.scale, optimizer.report.kl_predicted, optimizer.report.kl_measured))
    curvature = optimizer.curvature
    return {
        "path": torch.stack(path),
        "reports": torch.tensor(reports, dtype=torch.float64),
        "skipped": dict(optimizer.causes),
        "damping": optimizer.param_groups[0]["damping"],
        "ready": [member.name for member in curvature.members if member.layer and member.block.ready],
        "traffic": dict(getattr(curvature.ranks, "traffic", {})),
        "diagnostics": curvature.diagnostics(),
    }


def step(
    case: Case, network: nn.Module, optimizer: NaturalGradient, inputs: torch.Tensor, targets: torch.Tensor
) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        with optimizer.recording():
            outputs = network(inputs)
        optimizer.update_curvature()
        loss = loss_of(case, outputs, targets)
        loss.backward()
        return loss

    if case.closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def one_bad_input(update: int, inputs: torch.Tensor) -> torch.Tensor:
    """A NaN among the last rank's examples, and an infinity a little later."""
    if update in (3, 5):
        inputs = inputs.clone()
        inputs[-1].fill_(float("nan") if update == 3 else 3e200)
    return inputs


BLOCKS = StepRule(combination=None, metric=BlockMetric(), refresh_period=2)
CASES: dict[str, Case] = {
    f"{network} {curvature} {placement}": Case(curvature, network, placement, updates=UPDATES)
    for network in ("linear", "conv")
    for curvature in ("ekfac", "sre")
    for placement in PLACEMENTS
}
"""On 2 and on 4 ranks; one process is the oracle for all placements at once."""
FEW: dict[str, Case] = {
    "low rank": Case("ekfac-rank", "conv", "mem"),
    "float32": Case("ekfac", "conv", "hybrid", dtype=torch.float32),
    "unequal": Case("ekfac", "conv", "mem", shares=(17, 7)),
    "blocks' own form, momentum": Case("ekfac", "conv", "mem", rule=BLOCKS),
    "line search": Case("ekfac", "linear", "mem", rule=StepRule(line_search=Backtracking()), closure=True),
    "Levenberg-Marquardt": Case("sre", "conv", "mem", damping=LevenbergMarquardt(0.1, period=2), closure=True),
    "wake": Case("kfac", "linear", "mem", rule=StepRule(wake=WakeSO())),
    "wrapped": Case("ekfac", "conv", "mem", wrapped=True),
    "bad input": Case("ekfac", "linear", "mem", spoil=one_bad_input),
    "kfac": Case("kfac", "conv", "mem"),
    "factored": Case("factored", "conv", "mem"),
    "factored, everywhere": Case("factored", "linear", "comm"),
    "synchronous": Case("ekfac", "conv", "mem"),
    "age 0": Case("ekfac", "conv", "mem", refresh=Background(0)),
    "age 2": Case("ekfac", "conv", "mem", refresh=Background(2)),
    "age 2 again": Case("ekfac", "conv", "mem", refresh=Background(2)),
    "uninterrupted": Case("sre", "conv", "mem", refresh=Background(2)),
}
"""On 2 ranks."""
WIDE = {
    f"{curvature} {placement}": Case(
        curvature, "wide", placement, updates=4, dtype=torch.float32, rule=StepRule(refresh_period=2)
    )
    for curvature in ("ekfac", "sre wide")
    for placement in PLACEMENTS
}
"""On 4 ranks, for what they send."""
LOST = {
    f"lost {what}": Case("ekfac", "conv", "comm", lost=what)
    for what in ("gradient", "moments", "scalings", "forms and distances")
}
"""On 2 ranks; they must not equal the oracle."""


def of(size: int) -> list[str]:
    """Which of `CASES` so many ranks run: of half of 2, one keeps a layer; and one process has no placement."""
    placements = {1: ["comm"], 2: ["comm", "mem"], 4: list(PLACEMENTS)}[size]
    return [name for name, case in CASES.items() if case.placement in placements]


def half_and_state(folder: Path, rank: int, size: int) -> None:
    """Save what ten updates leave, from rank 0, for any number of ranks to go on from."""
    case = Case("sre", "conv", "mem", refresh=Background(2))
    network, likelihood = made(case)
    optimizer = optimizer_of(case, network, likelihood)
    for update in range(HALF):
        inputs, targets = (tensor[mine(case, rank, size)] for tensor in batch(case, update))
        step(case, network, optimizer, inputs, targets)
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    if rank == 0:
        torch.save(state, folder / "half.pt")


def refused(change: Callable[[int], Case], rank: int, size: int) -> str:
    """What a rank that was set up otherwise is told."""
    try:
        train(change(rank), rank, size)
    except ValueError as error:
        return str(error)
    return ""


def failing_owner(rank: int, size: int) -> dict[str, Any]:
    """The last rank's decompositions fail at two refreshes."""
    case, real, calls = Case("ekfac", "linear", "mem"), torch.linalg.eigh, iter(range(10**6))

    def eigh(matrix):
        if rank == size - 1 and 4 <= next(calls) < 10:
            raise DecompositionError("made up")
        return real(matrix)

    torch.linalg.eigh = eigh
    try:
        return train(case, rank, size)
    finally:
        torch.linalg.eigh = real


def main(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if size == 2:  # four tell each other what is small through common memory, two everything by messages
        slots._ORDERLY.clear()
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{size}", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    if size == 4:
        half_and_state(folder, rank, size)
        found["wide"] = {name: train(case, rank, size)["traffic"] for name, case in WIDE.items()}
    cases = {name: CASES[name] for name in of(size)}
    if size < 4:
        cases |= FEW | {
            "resumed": Case("sre", "conv", "hybrid", refresh=Background(2), interrupted=f"{folder}/half.pt")
        }
    if size == 2:
        cases |= LOST
    found |= {name: train(case, rank, size) for name, case in cases.items()}
    if size == 2:
        found["refused"] = refused(lambda rank: Case(damping=0.1 if rank == 1 else 0.01), rank, size)
        found["failing"] = failing_owner(rank, size)
    torch.save(found, folder / f"found-{size}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
