"""Which rank decomposes which layer: longest first, each to whoever has least to do (Graham 1969)."""

from __future__ import annotations

from collections.abc import Sequence


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """Give each task to a rank; the busiest one then has no more than 4/3 − 1/(3 ranks) times what it must have.

    Ties go to the task that comes first and to the lowest rank, so that every process finds the same answer.

    Args:
        costs: of each task, ≥ 0, in any unit.
        ranks: how many there are.

    Returns:
        Each task's rank.

    Raises:
        ValueError: if there is no rank, or a cost is negative.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if any(not cost >= 0 for cost in costs):
        raise ValueError(f"costs must be at least 0, got {min(costs)}")
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda t: -costs[t]):
        owner = loads.index(min(loads))
        owners[task] = owner
        loads[owner] += costs[task]
    return owners
