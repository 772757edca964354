"""What many GPUs would be worth: a cost model from constants, measured where they can be and assumed where not.

The model is `acktr.distributed.cost`. Its constants of this machine are taken from one process (two batches, a
decomposition) and from the sums of two; what it then foretells of two, three and four processes is held against what
they take. For GPUs the constants are assumptions, stated in the report.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from acktr.distributed import CommOpt, HybridOpt, MemOpt, Placement
from acktr.distributed.cost import Machine, Seconds, Task, update_seconds
from acktr.distributed.placement import Grid
from acktr.distributed.traffic import LayerSize
from acktr.linalg import eigen_cost
from agents.benchmarks import gang
from agents.benchmarks.report import Report, Table

PLACEMENTS: Mapping[str, Placement] = {"comm-opt": CommOpt(), "hybrid-opt": HybridOpt(), "mem-opt": MemOpt()}
BACKGROUND = "comm-opt, background"
"""Decompositions beside the other work, which then only wait where they are most of it."""
FORETOLD: Mapping[str, Placement] = {**PLACEMENTS, BACKGROUND: CommOpt()}
GPU = Machine(products=2e13, decompositions=1e11, bandwidth=2.5e10, latency=2e-5, overhead=3e-3)
"""Assumed of one GPU of a cluster: 20 · 10¹² multiplications a second in float32 products (40 TFLOP/s), an
eigendecomposition of width 1,024 in 86 ms, 25 GB/s and 20 µs between any two, 3 ms an update in launches."""


@dataclass(frozen=True)
class Plan:
    """What to measure, and what to foretell."""

    processes: tuple[int, ...] = (1, 2, 3, 4)
    """Processes on this machine that the model is held against; the first has to be 1."""
    batch: int = 2048
    """Examples of all of them in an update."""
    updates: int = 10
    """Updates in a measurement, whose median counts."""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of GPUs to foretell for."""
    seed: int = 0
    """Of weights and examples."""


@dataclass(frozen=True)
class Check:
    """One number of processes on this machine."""

    processes: int
    """How many."""
    placement: str
    """Where layers are kept."""
    foretold: float
    """Seconds of an update by the model."""
    measured: float
    """Seconds of an update."""


@dataclass(frozen=True)
class Row:
    """One prediction."""

    network: str
    """The network."""
    placement: str
    """Where its layers are kept."""
    batch: str
    """``fixed`` for as many examples whatever the GPUs, ``grows`` for as many on each."""
    gpus: int
    """How many."""
    seconds: Seconds
    """Of an update."""
    speed_up: float
    """Examples a second, as a multiple of one GPU's."""


def run(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Measure this machine's constants, hold the model against it, and foretell.

    Args:
        plan: What to measure and to foretell.
        tell: Where to announce what is measured next.

    Returns:
        What was found, with a table of all predictions and a figure.
    """
    told: dict[int, gang.Told] = {}
    for size in plan.processes:
        tell(f"{size} of {plan.processes[-1]} processes")
        batches = (plan.batch // 4, plan.batch) if size == 1 else (plan.batch,)
        told[size] = gang.together(size, gang.Job(batches, plan.updates, plan.seed))
    here = constants(told, plan.batch)
    checks = held(told, here, plan.batch)
    rows = [row for name, task in tasks().items() for row in foretold(name, task, plan.gpus)]
    tables = [_constants(here), _checks(checks), *(_speed_ups(rows, batch) for batch in ("fixed", "grows"))]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    notes = [
        f"{here.cores} cores, load {load:.1f}; more processes than cores share them",
        "measured: this machine's constants and updates. Assumed: every constant of a GPU; that nothing overlaps",
    ]
    results = {"here": here, "gpu": GPU, "checks": checks, "predictions": rows, "measured": told}
    return Report("scaling", vars(plan), tables, results, notes, {".csv": _csv(rows), ".svg": figure(rows, checks)})


# ------------------------------------------------------------------------------------------------------ this machine


def task_here(batch: int) -> Task:
    """The update that processes of this machine do.

    Args:
        batch: Examples of all of them.

    Returns:
        For the model.
    """
    sizes = [_layer(*shape) for shape in gang.layers()]
    return Task(sizes, [1] * len(sizes), sum(layer.matrix for layer in sizes), batch)


def constants(told: Mapping[int, gang.Told], batch: int) -> Machine:
    """Take this machine's constants from one process, and from the sums of the fewest others.

    Args:
        told: What was measured, by number of processes; 1 among them.
        batch: Examples of the larger batch of one process; the smaller has a quarter.

    Returns:
        The machine.
    """
    alone, task = told[1], task_here(batch)
    few, many = alone.updates["comm-opt"]
    products = 0.75 * batch * task.multiplications / max(many - few, 1e-9)
    widest = max(width for layer in gang.layers() for width in layer)
    machine = Machine(products, eigen_cost(widest) / alone.eigen, 1.0, 0.0, cores=_cores())
    overhead = max(many - update_seconds(task, machine, Grid(1, 1)).whole, 0.0)
    others = [told[size] for size in sorted(told) if size > 1]
    if not others:
        return replace(machine, overhead=overhead)
    # A sum between two is sent and received once: P = 2, two latencies, once its bytes.
    latency = others[0].small / 2
    bandwidth = 4 * gang.LARGE / max(others[0].large - others[0].small, 1e-9)
    return replace(machine, overhead=overhead, latency=latency, bandwidth=bandwidth)


def held(told: Mapping[int, gang.Told], here: Machine, batch: int) -> list[Check]:
    """Hold the model against what processes took.

    Args:
        told: What was measured, by number of processes.
        here: This machine's constants.
        batch: Examples of all processes.

    Returns:
        One check for each number of processes and placement.
    """
    return [
        Check(size, name, update_seconds(task_here(batch), here, PLACEMENTS[name].grid(size)).whole, seconds[-1])
        for size, found in told.items()
        for name, seconds in found.updates.items()
    ]


# ------------------------------------------------------------------------------------------------------ predictions


def tasks() -> dict[str, Task]:
    """The networks that are foretold of: Atari's with whole EKFAC bases, and one of four layers of 4,096.

    Returns:
        An update of each, with its examples on one GPU; statistics and decompositions as often as is shipped for
        images, and at every update and every hundredth.
    """
    convolutions = [(32, 8 * 8 * 4 + 1, 400), (64, 4 * 4 * 32 + 1, 81), (32, 3 * 3 * 64 + 1, 49)]
    shapes = [*convolutions, (512, 49 * 32 + 1, 1), (6, 513, 1), (1, 513, 1)]
    atari = [_layer(o, i) for o, i, _ in shapes]
    wide = [_layer(4096, 4097) for _ in range(4)]
    of_atari, of_wide = (sum(layer.matrix for layer in each) for each in (atari, wide))
    return {
        "Atari": Task(atari, [n for *_, n in shapes], of_atari, 1024, statistics_period=8, refresh_period=2),
        "4 × 4,096": Task(wide, [1] * 4, of_wide, 1024, refresh_period=100),
    }


def foretold(name: str, task: Task, gpus: Sequence[int]) -> list[Row]:
    """Foretell one network's updates.

    Args:
        name: The network.
        task: Its update; its examples are those of one GPU where the batch grows, and 64 times as many where it is
            fixed.
        gpus: Numbers of GPUs.

    Returns:
        One prediction for each placement, way to share out a batch, and number.
    """
    rows = []
    for placement, choice in FORETOLD.items():
        for batch in ("fixed", "grows"):
            one = replace(task, examples=64 * task.examples) if batch == "fixed" else task
            one = replace(one, background=placement == BACKGROUND)
            alone = update_seconds(one, GPU, Grid(1, 1)).whole / one.examples
            for count in gpus:
                if placement == "hybrid-opt" and count == 1:
                    continue
                whole = one if batch == "fixed" else replace(one, examples=one.examples * count)
                seconds = update_seconds(whole, GPU, choice.grid(count))
                rows.append(Row(name, placement, batch, count, seconds, alone * whole.examples / seconds.whole))
    return rows


def figure(rows: Sequence[Row], checks: Sequence[Check]) -> str:
    """Draw speed-ups over GPUs, and what was foretold of this machine over what was measured.

    Args:
        rows: The predictions.
        checks: The measurements.

    Returns:
        An SVG.
    """
    from matplotlib.figure import Figure  # only its users need it

    drawing = Figure(figsize=(11, 3.6), layout="constrained")
    axes = drawing.subplots(1, 3)
    for axis, name in zip(axes, dict.fromkeys(row.network for row in rows), strict=False):
        for batch, dash in (("grows", "-"), ("fixed", "--")):
            for placement, colour in zip(FORETOLD, ("C0", "C1", "C2", "C3"), strict=True):
                mine = [r for r in rows if (r.network, r.batch, r.placement) == (name, batch, placement)]
                label = f"{placement}, batch {batch}"
                axis.loglog([r.gpus for r in mine], [r.speed_up for r in mine], dash, color=colour, label=label)
        limit = [1, max(row.gpus for row in rows)]
        axis.loglog(limit, limit, ":", color="grey")
        axis.set(title=f"{name}, foretold", xlabel="GPUs", ylabel="speed-up in examples a second")
    axes[0].legend(fontsize=7)
    for placement in dict.fromkeys(check.placement for check in checks):
        held_here = [check for check in checks if check.placement == placement]
        places = [check.processes for check in held_here]
        found = [1e3 * check.measured for check in held_here]
        (line,) = axes[2].plot(places, found, "o", label=f"{placement}, measured")
        found = [1e3 * check.foretold for check in held_here]
        axes[2].plot(places, found, "-", color=line.get_color(), label="foretold")
    axes[2].set(title="this machine", xlabel="processes", ylabel="ms an update", ylim=(0, None))
    axes[2].legend(fontsize=7)
    stream = io.StringIO()
    drawing.savefig(stream, format="svg")
    return stream.getvalue()


def _layer(outputs: int, inputs: int) -> LayerSize:
    return LayerSize(outputs, inputs, eigen_cost(outputs) + eigen_cost(inputs), scalings=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _constants(here: Machine) -> Table:
    units = (
        *(("products", 1e9, "10⁹/s"), ("decompositions", 1e9, "10⁹/s"), ("bandwidth", 1e9, "GB/s")),
        *(("latency", 1e-6, "µs"), ("overhead", 1e-3, "ms")),
    )
    rows = [
        (f"{name}, {unit}", *(f"{getattr(machine, name) / scale:,.2f}" for machine in (here, GPU)))
        for name, scale, unit in units
    ]
    return Table("Constants", ("", "here, measured", "a GPU, assumed"), rows)


def _checks(checks: Sequence[Check]) -> Table:
    rows = [
        (
            f"{check.processes}, {check.placement}",
            f"{1e3 * check.foretold:.1f}",
            f"{1e3 * check.measured:.1f}",
            f"{check.measured / check.foretold:.2f}",
        )
        for check in checks
    ]
    return Table("An update here, ms", ("processes", "foretold", "measured", "ratio"), rows)


def _speed_ups(rows: Sequence[Row], batch: str) -> Table:
    mine = [row for row in rows if row.batch == batch]
    shown = [count for count in dict.fromkeys(row.gpus for row in mine) if count in {1, 8, 64, 256, 1024}]
    found = {(row.network, row.placement, row.gpus): row for row in mine}
    lines = []
    for network, placement in dict.fromkeys((row.network, row.placement) for row in mine):
        cells = [found.get((network, placement, count)) for count in shown]
        lines.append((f"{network}: {placement}", *(f"{cell.speed_up:,.1f}" if cell else "–" for cell in cells)))
    title = {"fixed": "65,536 examples on all GPUs together", "grows": "1,024 examples on each GPU"}[batch]
    return Table(f"Speed-up foretold, {title}", ("", *(f"{count:,} GPU{'s' * (count > 1)}" for count in shown)), lines)


def _csv(rows: Sequence[Row]) -> str:
    names = ("passes", "decompositions", "solves", "traffic", "whole")
    lines = [f"network,placement,batch,gpus,{','.join(f'{name}_seconds' for name in names)},speed_up"]
    for row in rows:
        parts = ",".join(f"{getattr(row.seconds, name):.6g}" for name in names)
        lines.append(f'"{row.network}","{row.placement}",{row.batch},{row.gpus},{parts},{row.speed_up:.5g}')
    return "\n".join(lines) + "\n"
