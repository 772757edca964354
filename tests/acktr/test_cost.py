"""The cost model against a case computed by hand, and against what the traffic's own model says is sent."""

from dataclasses import replace

import pytest

from acktr.distributed import CommOpt, Grid, HybridOpt, MemOpt
from acktr.distributed.cost import Machine, Task, update_seconds
from acktr.distributed.traffic import LayerSize, traffic

LAYERS = [LayerSize(2, 3, cost=100.0), LayerSize(4, 5, cost=60.0), LayerSize(1, 5, cost=30.0)]
TASK = Task(LAYERS, [7, 1, 1], parameters=31, examples=10, decisions=3, refresh_period=2)
MACHINE = Machine(products=1000.0, decompositions=50.0, bandwidth=100.0, latency=0.01, overhead=0.5)


def test_one_rank_by_hand() -> None:
    # Rows times four passes and both moments: 7 (6·4 + 4 + 9) + (20·4 + 16 + 25) + (5·4 + 1 + 25).
    assert TASK.multiplications == 7 * 37 + 121 + 46 == 426
    found = update_seconds(TASK, MACHINE, Grid(1, 1))
    assert found.passes == pytest.approx(0.5 + 10 * 426 / 1000)
    assert found.decompositions == pytest.approx(190 / 50 / 2)
    # G⁻¹ V A⁻¹ by bases: 2 o i (o + i) each.
    assert found.solves == pytest.approx(2 * (6 * 5 + 20 * 9 + 5 * 6) / 1000)
    assert found.traffic == 0
    assert found.whole == pytest.approx(found.passes + found.decompositions + found.solves)


def test_two_ranks_by_hand() -> None:
    found = update_seconds(TASK, MACHINE, MemOpt().grid(2))
    # The layers of cost 60 and 30 are one rank's; ten examples are five on each.
    assert found.passes == pytest.approx(0.5 + 5 * 426 / 1000)
    assert found.decompositions == pytest.approx(100 / 50 / 2)
    assert found.solves == pytest.approx(2 * (20 * 9 + 5 * 6) / 1000)
    triangles, solutions = (3 + 6) + (10 + 15) + (1 + 15), 6 + 20 + 5
    carried = 4 * (triangles + 31) * 2 * 1 / 2 + 4 * solutions
    # Sums of gradients, statistics and three decisions take two latencies each, solutions of two columns one.
    assert found.traffic == pytest.approx(carried / 100 + 0.01 * (2 * 5 + 2))


@pytest.mark.parametrize("placement", [CommOpt(), MemOpt(), HybridOpt()])
@pytest.mark.parametrize("size", [2, 4, 64])
def test_without_latency_the_traffic_is_what_the_fullest_rank_exchanges(placement, size) -> None:
    layers = [replace(layer, scalings=True) for layer in LAYERS]
    task, grid = replace(TASK, layers=layers), placement.grid(size)
    each = [traffic(layers, 31, grid, rank) for rank in range(size)]
    carried = [(t.gradients + t.statistics) * 2 * (size - 1) / size + t.lent + t.solutions + t.bases / 2 for t in each]
    found = update_seconds(task, replace(MACHINE, latency=0.0), grid)
    assert found.traffic == pytest.approx(max(carried) / 100)


def test_cores_that_are_shared_compute_slower_and_carry_as_before() -> None:
    free, shared = (update_seconds(TASK, replace(MACHINE, cores=n), MemOpt().grid(4)) for n in (None, 2))
    assert shared.passes == pytest.approx(2 * free.passes)
    assert shared.decompositions == pytest.approx(2 * free.decompositions)
    assert shared.traffic == free.traffic


def test_seldom_statistics_cost_less() -> None:
    often = update_seconds(TASK, MACHINE, CommOpt().grid(4))
    seldom = update_seconds(replace(TASK, statistics_period=8), MACHINE, CommOpt().grid(4))
    assert seldom.decompositions == pytest.approx(often.decompositions / 8)
    assert seldom.traffic < often.traffic and seldom.passes < often.passes


def test_in_the_background_the_longer_counts() -> None:
    found = update_seconds(replace(TASK, background=True), MACHINE, Grid(1, 1))
    rest = found.passes + found.solves
    assert found.whole == pytest.approx(max(rest, found.decompositions)) == pytest.approx(rest)
    slow = update_seconds(replace(TASK, background=True), replace(MACHINE, decompositions=1.0), Grid(1, 1))
    assert slow.whole == pytest.approx(190 / 2)
