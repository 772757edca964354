"""Our curvature against nngeometry's and curvlinops': the time of each, and whether they find the same matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from agents.benchmarks import engines
from agents.benchmarks.engines import IN_FULL, OURS, PEERS, Method, Problem, Tensors
from agents.benchmarks.measuring import Phases, Timing, interleave, isolated, ratios, spread, timed
from agents.benchmarks.report import Report, Table, raw, with_range

Choice = Literal["mlp", "atari", "all"]
"""Which networks."""

PROBLEMS: dict[str, Callable[[int], Problem]] = {"mlp": engines.mlp, "atari": engines.atari}
PHASES = ("statistics", "refresh", "solve")
"""Passes and moments; decompositions; the damped inverse times a gradient."""
_TITLES = {"mlp": "4×512, batch 2048", "atari": "Atari, batch 640"}


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    network: Choice = "all"
    """Networks to take the curvature of: four layers of 512, the Atari network, or both."""
    repeats: int = 5
    """Rounds; each measures everyone once, in another order."""
    updates: int = 3
    """Times the whole curvature is computed per measurement."""


def run(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Measure every implementation that is installed.

    Args:
        plan: What to measure.
        tell: Where to announce what is measured next.

    Returns:
        What was found.
    """
    networks = [plan.network] if plan.network != "all" else list(PROBLEMS)
    present = [peer for peer in PEERS if engines.installed(peer)]
    advice = "is not installed and was left out: pip install '.[bench]'"
    notes = [f"{peer} {advice}" for peer in PEERS if peer not in present]
    wanted = {label(*key): key for network in networks for key in _subjects(network, present)}
    failures: dict[str, str] = {}

    def attempt(subject: str, function: Callable[..., Any], *arguments: Any) -> Any:
        # A peer that cannot do it is a finding; that we cannot would be our failure.
        if subject in failures:
            return None
        try:
            return isolated(function, *arguments)
        except Exception as error:
            if wanted[subject][2] not in PEERS:
                raise
            failures[subject] = f"{subject} failed: {str(error).splitlines()[0]}"
            return None

    agreements = {}
    for subject, key in wanted.items():
        if key[2] in PEERS:
            tell(f"agreement: {subject}")
            agreements[subject] = attempt(subject, agreement, *key)
    found = interleave(list(wanted), plan.repeats, lambda s, n: attempt(s, measure, *wanted[s], plan.updates, n), tell)
    done = {subject: key for subject, key in wanted.items() if subject not in failures}
    agreements = {subject: agreements[subject] for subject in done if subject in agreements}
    return summarise(plan, done, found, agreements, [*notes, *failures.values()])


def label(network: str, method: str, who: str) -> str:
    """Name a subject.

    Args:
        network: The network.
        method: The curvature.
        who: The implementation.

    Returns:
        The three together.
    """
    return f"{network}, {method}, {who}"


def measure(network: str, method: Method, who: str, updates: int, seed: int) -> Timing:
    """Measure one subject in this process.

    Args:
        network: The network.
        method: The curvature.
        who: The implementation.
        updates: How often to compute the whole curvature and solve with it.
        seed: Of weights and batch.

    Returns:
        The time per update, with its phases.
    """
    return measure_problem(PROBLEMS[network](seed), method, who, updates)


def measure_problem(problem: Problem, method: Method, who: str, updates: int) -> Timing:
    """Measure one implementation on a given problem.

    Args:
        problem: Network and batch.
        method: The curvature.
        who: The implementation.
        updates: How often to compute it.

    Returns:
        The time per update, with its phases.
    """
    engine = engines.make(who, problem, method)
    with Phases() as phases:
        engines.tell_apart(phases, who)

        def update() -> None:
            with phases.phase("statistics"):
                engine.prepare()
            with phases.phase("solve"):
                engine.solve()

        update()  # the first one warms up and is not timed
        phases.clear()
        whole = timed(update, updates)
    return replace(whole, phases=phases.seconds)


def agreement(network: str, method: Method, peer: str) -> dict[str, float]:
    """Hold a peer's matrices against ours, on the exact Fisher, with all rows and eigenvectors.

    Args:
        network: The network.
        method: The curvature.
        peer: The other implementation.

    Returns:
        See ``compare``.
    """
    return compare(PROBLEMS[network](0), method, peer)


def compare(problem: Problem, method: Method, peer: str) -> dict[str, float]:
    """Hold a peer's matrices against ours on a given problem.

    Args:
        problem: Network and batch.
        method: The curvature.
        peer: The other implementation.

    Returns:
        ``scale``, by which the peer's product with the gradient is larger than ours; ``product``, the largest
        relative difference of a parameter's product after that scale is taken out; ``solve``, the largest relative
        difference of the damped solves as they are.
    """
    sides = []
    for who in (IN_FULL, peer):
        engine = engines.make(who, problem, method, exact=True)
        engine.prepare()
        sides.append((engine.multiply(), engine.solve()))
    (our_product, our_solve), (product, solve) = sides
    scale = _dot(product, our_product) / _dot(our_product, our_product)
    scaled = {name: tensor * scale for name, tensor in our_product.items()}
    return {"scale": scale, "product": _difference(product, scaled), "solve": _difference(solve, our_solve)}


def summarise(
    plan: Plan,
    subjects: Mapping[str, tuple[str, Method, str]],
    found: Mapping[str, Sequence[Timing]],
    agreements: Mapping[str, Mapping[str, float]],
    notes: Sequence[str],
) -> Report:
    """Turn timings and comparisons into a report.

    Args:
        plan: What was measured.
        subjects: Network, method and implementation of each subject.
        found: Its timings, one per round.
        agreements: How far each peer is from us.
        notes: What else the reader must know.

    Returns:
        Times, our time over the others', phases and agreement.
    """
    rows, results = [], {}
    for subject, (network, method, who) in subjects.items():
        seconds = {clock: [t.per_unit(clock) for t in found[subject]] for clock in ("wall", "cpu")}
        ours = {c: [t.per_unit(c) for t in found[label(network, method, OURS)]] for c in seconds}
        against = {clock: ratios(ours[clock], seconds[clock]) for clock in seconds}
        times = {clock: spread([1000 * s for s in side]) for clock, side in seconds.items()}
        compared = [] if who == OURS else [with_range(against[clock]) for clock in against]
        cells = [f"{_TITLES[network]}, {method}, {who}", *(with_range(t, 1) for t in times.values())]
        rows.append([*cells, *(compared or ["", ""]), *_phases(found[subject])])
        results[subject] = {"milliseconds": times, "ours_over_this": against, "rounds": raw(found[subject])}
    columns = ["", "ms", "CPU-ms", "ours ÷ this", "the same, CPU", *(f"{phase}, CPU-ms" for phase in PHASES)]
    title = f"Statistics, decomposition and one solve: median [range] of {plan.repeats}"
    tables = [Table(title, columns, rows)] + ([_agreement_table(agreements)] if agreements else [])
    return Report("engine", vars(plan), tables, {"timings": results, "agreement": agreements}, notes)


def _subjects(network: str, present: Sequence[str]) -> list[tuple[str, Method, str]]:
    methods: tuple[Method, ...] = ("kfac", "factored-kfac", "ekfac")
    who = {method: [OURS, *([IN_FULL] if _leaves_out(network, method) else []), *present] for method in methods}
    return [(network, m, engine) for m in methods for engine in who[m] if m in engines.methods_of(engine)]


def _leaves_out(network: str, method: Method) -> bool:
    # Convolutions have more rows than are kept; of a linear layer only EKFAC leaves something out, eigenvectors.
    return network == "atari" or method == "ekfac"


def _phases(timings: Sequence[Timing]) -> list[str]:
    each = [[1000 * t.phases.get(phase, (0.0, 0.0))[1] / t.work for t in timings] for phase in PHASES]
    return [f"{spread(values).median:,.1f}" for values in each]


def _agreement_table(agreements: Mapping[str, Mapping[str, float]]) -> Table:
    rows = [[name, f"{a['scale']:.6f}", f"{a['product']:.1e}", f"{a['solve']:.1e}"] for name, a in agreements.items()]
    columns = ["", "scale of F̂", "F̂v after the scale", "(F̂ + λ)⁻¹v"]
    return Table("Largest relative difference of a parameter from ours in full, exact Fisher", columns, rows)


def _difference(theirs: Tensors, ours: Tensors) -> float:
    return max(float((theirs[name] - ours[name]).norm() / ours[name].norm()) for name in ours)


def _dot(left: Tensors, right: Tensors) -> Any:
    return sum(float((left[name].double() * right[name].double()).sum()) for name in right)
