"""Decompositions and running averages when the numbers are bad."""

import pytest
import torch

from acktr.curvature import EKFAC, KFAC, FactoredKFAC, Place
from acktr.curvature.base import MAX_FAILURES
from acktr.linalg import DecompositionError, damped_inverse, symmetric_eigen
from acktr.moments import Gram, Moment

REAL_EIGH = torch.linalg.eigh


def moment(size=5, rank=5, dtype=torch.float64):
    rows = torch.randn(rank, size, dtype=dtype)
    return rows.mT @ rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [5, 2, 0])
def test_values_and_vectors_rebuild_the_matrix_whatever_its_rank(rank, dtype):
    matrix = moment(rank=rank, dtype=dtype)
    values, vectors = symmetric_eigen(matrix)
    assert values.dtype == vectors.dtype == dtype
    assert (values >= 0).all()
    tolerance = 20 * torch.finfo(dtype).eps * max(1.0, float(matrix.norm()))
    assert torch.allclose(vectors * values @ vectors.mT, matrix, atol=tolerance)


def test_negative_rounding_is_clamped():
    rows = torch.randn(16, 64, dtype=torch.float32)
    matrix = rows.mT @ rows
    assert torch.linalg.eigvalsh(matrix).min() < 0
    assert symmetric_eigen(matrix)[0].min() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 3), (3, 0), (2, 2)], ids=["upper", "lower", "diagonal"])
@pytest.mark.parametrize(
    "decompose", [symmetric_eigen, lambda m: damped_inverse(m, torch.tensor(0.1))], ids=["eigen", "cholesky"]
)
def test_a_bad_entry_in_either_triangle_is_refused(decompose, place, bad):
    matrix = moment()
    decompose(matrix)
    matrix[place] = bad
    with pytest.raises(DecompositionError, match=r"\(5, 5\) moment is not finite"):
        decompose(matrix)


def test_torch_itself_does_not_see_the_upper_triangle():
    matrix = moment()
    matrix[0, 3] = float("nan")
    assert torch.isfinite(torch.linalg.eigh(matrix)[0]).all()


def failing(monkeypatch, times, how):
    """Make eigh fail its first calls; gives back the list of the types it was called with."""
    seen = []

    def eigh(matrix):
        seen.append(matrix.dtype)
        if len(seen) > times:
            return REAL_EIGH(matrix)
        if how == "raise":
            raise torch.linalg.LinAlgError("did not converge")
        return torch.full_like(matrix[0], float("nan")), torch.full_like(matrix, float("nan"))

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return seen


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_one_failure_climbs_to_double_precision(monkeypatch, how):
    seen = failing(monkeypatch, 1, how)
    matrix = moment(dtype=torch.float32)
    values, vectors = symmetric_eigen(matrix)
    assert seen == [torch.float32, torch.float64]
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.allclose(vectors * values @ vectors.mT, matrix, atol=1e-5)


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_a_ladder_without_a_good_rung_is_an_error(monkeypatch, how):
    seen = failing(monkeypatch, 100, how)
    with pytest.raises(DecompositionError, match="no eigendecomposition"):
        symmetric_eigen(moment())
    assert len(seen) == 3


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("factory", [EKFAC(), KFAC()], ids=["EKFAC", "KFAC"])
def test_a_block_keeps_its_last_good_bases_counts_and_gives_up_at_last(monkeypatch, oracle, factory, how):
    block, V = oracle.built(factory, oracle.statistics()), torch.randn(3, 4)
    before = block.solve(V, 0.1)
    failing(monkeypatch, 10**6, how)
    for failures in range(1, MAX_FAILURES):
        block.update(oracle.statistics())
        block.refresh()
        assert (block.failures, block.skipped_refreshes) == (failures, failures)
        assert torch.equal(block.solve(V, 0.1), before)
    with pytest.raises(DecompositionError):
        block.refresh()
    monkeypatch.setattr(torch.linalg, "eigh", REAL_EIGH)
    block.refresh()
    assert (block.failures, block.skipped_refreshes) == (0, MAX_FAILURES)
    assert not torch.equal(block.solve(V, 0.1), before)


@pytest.mark.parametrize("factory", [EKFAC(), KFAC()], ids=["EKFAC", "KFAC"])
def test_a_block_with_nothing_to_keep_waits_and_gives_up_at_last(monkeypatch, oracle, factory):
    failing(monkeypatch, 10**6, "raise")
    block = factory.build(Place((3, 4)))
    for failures in range(1, MAX_FAILURES):
        block.update(oracle.statistics())
        block.refresh()
        assert (block.failures, block.ready) == (failures, False)
    with pytest.raises(DecompositionError):
        block.refresh()


def test_a_factored_block_keeps_its_last_good_inverses(monkeypatch, oracle):
    block, V = oracle.built(FactoredKFAC(), oracle.statistics()), torch.randn(3, 4)
    before = block.solve(V, 0.1)
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: (m, torch.tensor(1)))
    block.update(oracle.statistics())
    block.refresh()
    assert (block.failures, block.skipped_refreshes) == (1, 1)
    assert torch.equal(block.solve(V, 0.1), before)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", real)
    block.refresh()
    assert block.failures == 0
    assert not torch.equal(block.solve(V, 0.1), before)


def test_inverses_are_inverses_and_grow_their_damping_when_they_must():
    matrix, identity = moment(), torch.eye(5)
    assert torch.allclose(damped_inverse(matrix, torch.tensor(0.1)) @ (matrix + 0.1 * identity), identity, atol=1e-9)
    indefinite = matrix - (REAL_EIGH(matrix)[0][0] + 0.5) * identity  # needs 0.5 to become definite
    found = damped_inverse(indefinite, torch.tensor(0.1))
    assert torch.allclose(found @ (indefinite + 1.0 * identity), identity, atol=1e-9)
    with pytest.raises(DecompositionError, match="not positive definite"):
        damped_inverse(-1e6 * identity, torch.tensor(0.1))


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.95, 0.999])
def test_the_average_is_the_closed_form(ema):
    batches, average = torch.randn(6, 3), Moment(ema)
    for k, batch in enumerate(batches, start=1):
        average.update(batch)
        weights = torch.tensor([ema ** (k - j) for j in range(1, k + 1)])
        assert torch.allclose(average.value, weights @ batches[:k] / weights.sum(), atol=1e-12)


@pytest.mark.parametrize("width", [3, 255, 257])
def test_rows_are_averaged_as_their_products(width):
    batches, average, expected = torch.randn(4, 6, width), Moment(0.8), Moment(0.8)
    for rows in batches:
        average.update(Gram(rows, 5))
        expected.update(rows.mT @ rows / 5)
    assert torch.allclose(average.value, expected.value, atol=1e-12)
    assert torch.allclose(average.value, average.value.mT, atol=1e-12)
    assert torch.allclose(Gram(batches[0], 5).value, batches[0].mT @ batches[0] / 5, atol=1e-12)
    expected.update(batches[0].mT @ batches[0] / 6)
    average.update(Gram(batches[0], 5))
    assert not torch.allclose(average.value, expected.value, atol=1e-3)


def test_the_first_batch_counts_whole():
    average, batch = Moment(0.99), torch.randn(3, 3)
    average.update(batch)
    assert torch.allclose(average.value, batch, rtol=1e-12)
    assert not torch.allclose((1 - 0.99) * batch, batch)  # what a zero start would leave


def test_an_average_keeps_no_hold_on_its_batch():
    average, batch = Moment(0.0), torch.ones(3)
    average.update(batch)
    batch.mul_(5)
    assert torch.equal(average.value, torch.ones(3))


def test_replacing_the_value_keeps_its_weight():
    average = Moment(0.9)
    average.update(torch.ones(2))
    average.replace(3 * torch.ones(2))
    assert torch.allclose(average.value, 3 * torch.ones(2))
    average.update(torch.zeros(2))
    assert torch.allclose(average.value, torch.full((2,), 3 * 0.09 / 0.19))


def test_the_average_s_state_restores_every_bit():
    average, other = Moment(0.9), Moment(0.9)
    other.load_state_dict(average.state_dict())
    assert other.empty
    average.update(torch.randn(3))
    other.load_state_dict(average.state_dict())
    for _ in range(3):
        batch = torch.randn(3)
        average.update(batch)
        other.update(batch)
    assert torch.equal(average.value, other.value)


def test_an_empty_average_and_a_bad_weight_are_refused():
    with pytest.raises(RuntimeError, match="no statistics yet"):
        _ = Moment(0.9).value
    for ema in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"got {ema}"):
            Moment(ema)
