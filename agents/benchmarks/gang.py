"""Processes that do one update after the other together, and what their collectives take."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from acktr import EKFAC, Categorical, NaturalGradient, StepRule
from acktr.distributed import CommOpt, Distributed, MemOpt
from acktr.linalg import symmetric_eigen

WIDTHS, CLASSES = (256, 256, 256), 8
PLACEMENTS: dict[str, Any] = {"comm-opt": CommOpt(), "mem-opt": MemOpt()}
SMALL, LARGE = 2, 2**20
"""Numbers in the sums that latency and bandwidth are taken from."""


@dataclass(frozen=True)
class Job:
    """What each process does."""

    batches: tuple[int, ...]
    """Examples of all processes together; each batch is a measurement."""
    updates: int
    """Updates in a measurement."""
    seed: int
    """Of weights and examples."""


@dataclass(frozen=True)
class Told:
    """What the first process measured."""

    updates: dict[str, list[float]]
    """Seconds of an update, by placement, for each batch."""
    small: float
    """Seconds of a sum of a few numbers; 0 in a process by itself."""
    large: float
    """Seconds of a sum of `LARGE` numbers."""
    eigen: float
    """Seconds of an eigendecomposition of the widest factor."""


def layers() -> list[tuple[int, int]]:
    """Outputs and inputs of each layer, the bias's column among them."""
    widths = [*WIDTHS, CLASSES]
    return [(o, i + 1) for i, o in zip([WIDTHS[0], *widths[:-1]], widths, strict=True)]


def together(size: int, job: Job) -> Told:
    """Have so many processes do a job.

    Args:
        size: How many.
        job: What to do.

    Returns:
        What the first one measured.

    Raises:
        RuntimeError: If one of them fails.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        members = [context.Process(target=_member, args=(folder, rank, size, job)) for rank in range(size)]
        for member in members:
            member.start()
        for member in members:
            member.join()
        if any(member.exitcode for member in members):
            raise RuntimeError(f"one of {size} processes failed; its message stands above")
        told: Told = torch.load(Path(folder) / "told.pt", weights_only=False)
    return told


def _member(folder: str, rank: int, size: int, job: Job) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    names = ["comm-opt"] if size == 1 else list(PLACEMENTS)
    updates = {name: [_update(rank, size, job, name, batch) for batch in job.batches] for name in names}
    widest = max(width for layer in layers() for width in layer)
    factor = torch.randn(2 * widest, widest)
    eigen = _seconds(lambda: symmetric_eigen(factor.mT @ factor), 3)
    small, large = (_sum(size, numbers) for numbers in (SMALL, LARGE))
    if rank == 0:
        torch.save(Told(updates, small, large, eigen), Path(folder) / "told.pt")
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def _update(rank: int, size: int, job: Job, placement: str, batch: int) -> float:
    torch.manual_seed(job.seed)
    widths = [WIDTHS[0], *WIDTHS, CLASSES]
    modules: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        modules += [nn.Linear(i, o), nn.Tanh()]
    network = nn.Sequential(*modules[:-1])
    choice = Distributed(EKFAC(), PLACEMENTS[placement])
    optimizer = NaturalGradient(network, Categorical(), choice, radius=1e-3, rule=StepRule(combination=None))
    rows = batch * (rank + 1) // size - batch * rank // size
    torch.manual_seed(job.seed + 1 + rank)
    inputs, classes = torch.randn(rows, widths[0]), torch.randint(CLASSES, (rows,))

    def update() -> None:
        optimizer.zero_grad()
        with optimizer.recording():
            logits = network(inputs)
        optimizer.update_curvature()
        nn.functional.cross_entropy(logits, classes).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return _seconds(update, job.updates)


def _sum(size: int, numbers: int) -> float:
    if size == 1:
        return 0.0
    room = torch.zeros(numbers)
    return _seconds(lambda: dist.all_reduce(room), 20)


def _seconds(function: Callable[[], object], times: int) -> float:
    """The median of some calls, after one that warms up."""
    function()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return sorted(found)[len(found) // 2]
