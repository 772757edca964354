"""Several processes with a share of the batch each take the steps of one process with all of it: real ones, over gloo.

Runs are in float64, because in float32 rounding grows to some 1e-6 of the parameters' way within a few updates; one
case in float32 says how far.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from acktr import SENG, Categorical, EigenAdam, ExactCG, NaturalGradient, RunningEKFAC
from acktr.curvature import BKFAC, EKFAC, BlockDiagonal, Place
from acktr.distributed import Background, CommOpt, Distributed, Grid, HybridOpt, MemOpt, assign
from acktr.distributed.packing import buckets, joined, symmetric, taken_apart, triangle
from acktr.distributed.traffic import LayerSize, traffic

WORKER = Path(__file__).with_name("ranks_worker.py")
TOLERANCE = 1e-5
PATIENCE = 600
"""Seconds; on two cores by themselves all processes together take a tenth of it."""
pytestmark = pytest.mark.timeout(3 * PATIENCE)


def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ranks_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranks_worker"] = module
    spec.loader.exec_module(module)
    return module


CASES = worker()
Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    """What every case left on every rank of 4, of 2 and of 1; 4 come first, whose state the others go on from."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for sizes in ((4,), (2, 1)):
        ranks = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(folder), str(rank), str(size)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for size in sizes
            for rank in range(size)
        ]
        told = list(_finished(ranks))
        assert not any(rank.returncode for rank in ranks), told
    names = {size: [folder / f"found-{size}-{rank}.pt" for rank in range(size)] for size in (1, 2, 4)}
    return {size: [torch.load(name, weights_only=False) for name in each] for size, each in names.items()}


def _finished(ranks: list[subprocess.Popen[str]]) -> Iterator[str]:
    try:
        for rank in ranks:
            yield rank.communicate(timeout=PATIENCE)[1][-2000:]
    finally:
        for rank in ranks:
            rank.kill()


def relative(run: dict[str, Any], oracle: dict[str, Any]) -> float:
    """Largest distance between two runs' parameters, as a share of how far the parameters went."""
    went = (oracle["path"] - oracle["path"][0]).norm(dim=1).max()
    return float((run["path"] - oracle["path"]).norm(dim=1).max() / went)


def alike(runs: list[dict[str, Any]]) -> bool:
    """Whether all ranks hold the same parameters and tell the same of every step, to the last bit."""
    told = [(run["path"], run["reports"].nan_to_num(-1)) for run in runs]
    return all(torch.equal(mine, first) for each in told for mine, first in zip(each, told[0], strict=True))


# ---------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in (2, 4) for name in CASES.of(size)])
def test_ranks_with_a_share_of_the_batch_equal_one_process_with_all_of_it(found, size, name):
    case = CASES.CASES[name]
    oracle, runs = found[1][0][f"{case.network} {case.curvature} comm"], [each[name] for each in found[size]]
    assert len(oracle["path"]) == 20
    assert relative(runs[0], oracle) < TOLERANCE
    assert torch.allclose(runs[0]["reports"], oracle["reports"], rtol=TOLERANCE, atol=1e-12, equal_nan=True)
    assert alike(runs)


@pytest.mark.parametrize("name", [name for name in CASES.FEW if name != "float32"])
def test_every_kind_of_step_is_decided_alike(found, name):
    oracle, runs = found[1][0][name], [each[name] for each in found[2]]
    assert relative(runs[0], oracle) < TOLERANCE
    assert alike(runs)
    assert runs[0]["damping"] == pytest.approx(oracle["damping"])
    assert runs[0]["skipped"] == runs[1]["skipped"] == oracle["skipped"]


def test_in_float32_rounding_stays_within_the_tolerance_for_eight_updates(found):
    assert 1e-9 < relative(found[2][0]["float32"], found[1][0]["float32"]) < TOLERANCE
    assert alike([each["float32"] for each in found[2]])


def test_gradients_that_the_wrapper_has_averaged_are_not_sent_again(found):
    assert "gradients" not in found[2][0]["wrapped"]["traffic"]
    assert "gradients" in found[2][0]["synchronous"]["traffic"]


def test_what_is_not_finite_on_one_rank_is_skipped_by_all(found):
    assert found[2][0]["bad input"]["skipped"] == {"output": 1, "statistics": 1}


@pytest.mark.parametrize("name", CASES.LOST)
def test_a_reduction_that_is_left_out_is_seen(found, name):
    assert relative(found[2][0][name], found[1][0]["synchronous"]) > 1e-2


def test_damping_that_follows_the_loss_and_a_search_that_asks_for_it_had_something_to_do(found):
    assert abs(found[1][0]["Levenberg-Marquardt"]["damping"] - 0.1) > 1e-3
    assert (found[1][0]["line search"]["reports"][:, 2] < 0.02).all()


def test_ranks_that_were_set_up_otherwise_are_refused_on_every_rank(found):
    for rank in found[2]:
        assert "ranks [1] were set up otherwise than rank 0" in rank["refused"]
        assert "'damping': 0.1" in rank["refused"]


def test_an_owner_whose_decompositions_fail_is_counted_by_all_and_holds_nobody_up(found):
    runs = [each["failing"] for each in found[2]]
    assert alike(runs)
    assert runs[0]["diagnostics"]["skipped_refreshes"] == runs[1]["diagnostics"]["skipped_refreshes"] > 0
    assert (
        relative(runs[0], found[1][0]["linear ekfac comm"] | {"path": found[1][0]["linear ekfac comm"]["path"][:8]})
        > 1e-5
    )


# ---------------------------------------------------------------------------------------------------- placement


def test_a_layer_is_kept_by_its_column_alone(found):
    def counts(name):
        return [len(each[name]["ready"]) for each in found[4]]

    assert counts("conv ekfac comm") == counts("conv sre comm") == [4, 4, 4, 4]
    assert counts("conv ekfac mem") == counts("conv sre mem") == [1, 1, 1, 1]
    assert counts("conv ekfac hybrid") == counts("conv sre hybrid") == [2, 2, 2, 2]
    kept = [set(each["conv ekfac hybrid"]["ready"]) for each in found[4]]
    assert kept[0] == kept[2] and kept[1] == kept[3] and not kept[0] & kept[1]


def test_a_grid_has_rows_and_columns():
    grid = HybridOpt(0.5).grid(6)
    assert (grid.rows, grid.columns) == (3, 2)
    assert [grid.in_column(c) for c in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [grid.in_row(r) for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert all(rank in grid.in_column(grid.column_of(rank)) for rank in range(6))
    assert all(rank in grid.in_row(grid.row_of(rank)) for rank in range(6))
    assert (CommOpt().grid(6), MemOpt().grid(6)) == (Grid(6, 6), Grid(6, 1))
    assert HybridOpt(0.5).grid(2) == MemOpt().grid(2)  # of 2 ranks it is the same run


@pytest.mark.parametrize(("share", "size"), [(0.5, 3), (0.3, 4), (0.1, 4)])
def test_a_share_that_makes_no_grid_is_refused_with_those_that_do(share, size):
    with pytest.raises(ValueError, match=rf"share {share} of {size} ranks makes no grid; take one of 1/{size}"):
        HybridOpt(share).grid(size)
    with pytest.raises(ValueError, match="share must be in"):
        HybridOpt(0.0)


# ---------------------------------------------------------------------------------------------------- assignment


def test_decompositions_are_assigned_longest_first():
    # By hand: 7 to 0; 5 to 1; 4 to 1 (5 < 7); 3 to 0 (7 < 9); 3 to 1 (9 < 10). The best would be 11, this is 12.
    assert assign([3, 5, 4, 7, 3], 2) == [0, 1, 1, 0, 1]
    assert assign([1, 1, 1, 1], 4) == [0, 1, 2, 3]
    assert assign([2], 3) == [0]
    assert assign([], 3) == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_no_rank_has_more_to_do_than_the_bound_allows(ranks):
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        costs = (torch.rand(7, generator=generator) ** 3).tolist()
        best = min(longest(costs, owners, ranks) for owners in itertools.product(range(ranks), repeat=7))
        assert longest(costs, assign(costs, ranks), ranks) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-12


def longest(costs, owners, ranks):
    return max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks))


def test_bad_costs_are_refused():
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        assign([1], 0)
    with pytest.raises(ValueError, match="costs must be at least 0, got -1"):
        assign([1, -1], 2)


# ---------------------------------------------------------------------------------------------------- refresh


def test_in_the_background_at_age_0_is_synchronous_to_the_last_bit(found):
    for rank in found[2]:
        assert torch.equal(rank["age 0"]["path"], rank["synchronous"]["path"])


def test_a_stated_age_repeats_itself_and_is_another_run(found):
    for rank in found[2]:
        assert torch.equal(rank["age 2"]["path"], rank["age 2 again"]["path"])
    assert relative(found[2][0]["age 2"], found[2][0]["synchronous"]) > 1e-3


def test_no_basis_is_older_than_the_period_and_the_age(found):
    # Refreshes begin at updates 1, 4 and 7 of 8 and come into use two later.
    assert [each["age 2"]["diagnostics"]["basis_age"] for each in found[2]] == [4.0, 4.0]
    assert [each["synchronous"]["diagnostics"]["basis_age"] for each in found[2]] == [1.0, 1.0]


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_of_four_ranks_goes_on_with_fewer_and_with_a_refresh_under_way(found, size):
    whole = found[1][0]["uninterrupted"]
    rest = {"path": whole["path"][CASES.HALF :]}
    assert relative(found[size][0]["resumed"], rest) < TOLERANCE


def test_one_process_in_the_background_swaps_where_it_should(oracle):
    network, _, inputs = oracle.case("categorical")
    optimizer = NaturalGradient(network, Categorical(), Distributed(EKFAC(), refresh=Background(3)))
    ages = []
    for _ in range(7):
        with optimizer.recording():
            loss = optimizer.likelihood.divergence((network(inputs),), (torch.zeros(7, 3),)).mean()
        optimizer.update_curvature()
        loss.backward()
        optimizer.step()
        ages.append(optimizer.curvature.diagnostics()["basis_age"])
    # The first basis at once; the next begins at the second update and comes into use three later, three updates old.
    assert ages == [0, 1, 2, 3, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------- traffic

SHAPES = [(24, 19), (48, 217), (3, 49)]
KEPT = {"ekfac": [None, None, None], "sre wide": [None, (16, 16), (3, 16)]}


def sizes(curvature):
    """The wide network's layers."""
    costs = [CASES.CURVATURES[curvature].build(Place(shape)).decomposition_cost for shape in SHAPES]
    return [
        LayerSize(*shape, cost, kept, scalings=curvature == "ekfac")
        for shape, cost, kept in zip(SHAPES, costs, KEPT[curvature], strict=True)
    ]


@pytest.mark.parametrize("name", CASES.WIDE)
def test_traffic_is_what_the_model_foretells(found, name):
    case = CASES.WIDE[name]
    layers = sizes(case.curvature)
    grid = CASES.PLACEMENTS[case.placement].grid(4)
    for rank, each in enumerate(found[4]):
        counted = each["wide"][name]
        expected = traffic(layers, sum(layer.matrix for layer in layers), grid, rank).over(4, 2, 4, 4)
        for kind, size in expected.items():
            assert counted.get(kind, 0) == pytest.approx(size, rel=0.05, abs=0), (kind, rank)
        assert expected["statistics"] > 0 and expected["gradients"] > 0
        assert (expected["solutions"] > 0) == (case.placement != "comm")


def test_what_is_foretold_by_hand():
    layers = [LayerSize(2, 3, 35.0, scalings=True), LayerSize(4, 5, 189.0)]
    everywhere = traffic(layers, 26, Grid(2, 2), 0, item=8)
    # 3 + 6 + 6 scalings, 10 + 15; bases 4 + 9 + 5 values, 16 + 25 + 9 values
    assert (everywhere.statistics, everywhere.bases) == (8 * (15 + 25), 8 * (18 + 50))
    assert (everywhere.lent, everywhere.solutions, everywhere.gradients) == (0, 0, 8 * 26)
    in_one_place = traffic(layers, 26, Grid(2, 1), 0, item=8)
    assert (in_one_place.lent, in_one_place.bases, in_one_place.solutions) == (8 * 13, 0, 8 * 26)
    assert everywhere.sent(Grid(2, 2), 1, 1, 1, 1) == pytest.approx(8 * (40 + 26) + 8 * 68 / 2)
    assert in_one_place.sent(Grid(2, 1), 1, 1, 1, 1) == pytest.approx(8 * (40 + 26) + 8 * (13 + 26) / 2)


# ---------------------------------------------------------------------------------------------------- packing


def test_a_symmetric_matrix_travels_as_its_triangle():
    matrix = torch.randn(5, 5)
    matrix = matrix + matrix.mT
    assert triangle(matrix).numel() == 15
    assert torch.equal(symmetric(triangle(matrix), 5), matrix)


def test_tensors_travel_in_a_row_and_half_precision_in_float32():
    tensors = [torch.randn(2, 3).half(), torch.randn(()).half(), torch.randn(4).half()]
    flat = joined(tensors)
    assert flat.dtype == torch.float32
    back = taken_apart(flat, tensors)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, back, strict=True))
    assert [len(bucket) for bucket in buckets(flat, 16)] == [4, 4, 3]


# ---------------------------------------------------------------------------------------------------- one process


def test_without_a_process_group_a_shared_choice_is_the_choice_itself(oracle):
    network, _, _ = oracle.case("categorical")
    parameters = dict(network.named_parameters())
    for placement in (CommOpt(), MemOpt(), HybridOpt()):
        curvature = Distributed(EKFAC(), placement).over(network, parameters, {})
        assert type(curvature) is BlockDiagonal


@pytest.mark.parametrize("choice", [RunningEKFAC(), EigenAdam(), BKFAC(rank=1, columns=1), SENG()], ids=repr)
def test_what_ranks_cannot_share_is_refused(oracle, choice):
    network, likelihood, _ = oracle.case("categorical")
    with pytest.raises(ValueError, match=r"'0' has a \w+, which ranks cannot share; take KFAC"):
        NaturalGradient(network, likelihood, Distributed(choice, refresh=Background()))
    with pytest.raises(ValueError, match="ranks share curvatures by layer"):
        NaturalGradient(network, likelihood, Distributed(ExactCG()))
