"""EKFAC in leading eigenvectors: exact on what it keeps, right on average on what it does not."""

from itertools import pairwise

import pytest
import torch

from acktr.curvature import EKFAC, Place
from acktr.curvature.kronecker.ekfac import EKFACBlock
from acktr.curvature.lowrank.ekfac import LowRankEKFACBlock
from acktr.linalg import DecompositionError, leading_eigenvectors

SHAPE = (3, 4)
RANKS = {"both low": (2, 2), "inputs low": (3, 2), "outputs low": (1, 4), "none": (3, 4)}
ROUNDING = 1e-10  # float64, matrices of at most 100 rows and entries of order one


def fed(block, *batches):
    for statistics in batches:
        block.update(statistics)
        block.refresh()
        block.rescale(statistics)
    return block


@pytest.fixture(params=RANKS)
def ranks(request):
    return RANKS[request.param]


def complete(basis):
    """The basis with an orthonormal complement behind it."""
    return torch.cat([basis, torch.linalg.svd(basis, full_matrices=True).U[:, basis.shape[1] :]], dim=1)


def averaged(turned, ranks):
    """A matrix of scalings with each of its four parts replaced by what the model keeps of it."""
    (p, r), out = ranks, turned.clone()
    out[:p, r:] = turned[:p, r:].mean(1, keepdim=True)
    out[p:, :r] = turned[p:, :r].mean(0, keepdim=True)
    out[p:, r:] = turned[p:, r:].mean()
    return out


@pytest.mark.parametrize("positions", [1, 3])
def test_the_model_is_the_fishers_diagonal_averaged_over_the_complements(ranks, positions, oracle):
    statistics = oracle.statistics(positions=positions)
    block = fed(LowRankEKFACBlock(SHAPE, 0.9, ranks), statistics)
    U_G, U_A = complete(block.output_basis), complete(block.input_basis)
    turn = torch.kron(U_G, U_A)
    squares = statistics.squares(U_G, U_A)
    expected = turn @ torch.diag(averaged(squares, ranks).flatten()) @ turn.mT
    assert torch.allclose(block.dense(), expected, atol=ROUNDING)
    assert float(block.dense().trace()) == pytest.approx(float(squares.sum()))
    if ranks != SHAPE:
        assert not torch.allclose(block.dense(), turn @ torch.diag(squares.flatten()) @ turn.mT, atol=1e-3)


@pytest.mark.parametrize("positions", [1, 3])
def test_the_operator_contract(ranks, positions, oracle):
    block = fed(LowRankEKFACBlock(SHAPE, 0.9, ranks), oracle.statistics(positions=positions))
    V, dense = torch.randn(SHAPE), block.dense()
    assert torch.allclose(dense, dense.mT, atol=ROUNDING)
    assert torch.linalg.eigvalsh(dense).min() > -ROUNDING
    assert float(block.quadratic(V)) == pytest.approx(float(V.flatten() @ dense @ V.flatten()), rel=1e-9)
    X = block.solve(V, 0.1)
    assert torch.allclose(block.multiply(X) + 0.1 * X, V, atol=ROUNDING)
    assert not torch.allclose(block.multiply(X) + 0.2 * X, V, atol=1e-3)
    assert block.condition() >= 1


def test_all_eigenvectors_give_ekfac(oracle):
    batches = [oracle.statistics(examples=20) for _ in range(3)]
    low, full = fed(LowRankEKFACBlock(SHAPE, 0.9, SHAPE), *batches), fed(EKFACBlock(SHAPE, 0.9), *batches)
    assert torch.allclose(low.dense(), full.dense(), atol=ROUNDING)
    less = fed(LowRankEKFACBlock(SHAPE, 0.9, (2, 3)), *batches)
    assert not torch.allclose(less.dense(), full.dense(), atol=1e-3)


def test_one_example_is_solved_exactly_with_one_eigenvector(oracle):
    statistics = oracle.statistics(examples=1, seeds=1)
    block = fed(LowRankEKFACBlock(SHAPE, 0.9, (1, 1)), statistics)
    gradient = (statistics.output_grads[0, 0].mT @ statistics.inputs[0]).flatten()
    assert torch.allclose(block.dense(), torch.outer(gradient, gradient), atol=ROUNDING)


def test_a_refresh_carries_the_average_into_the_new_bases(ranks, oracle):
    """What the old F̂ shows on the diagonal of the new bases, averaged over their complements."""
    block = fed(LowRankEKFACBlock(SHAPE, 0.9, ranks), oracle.statistics(examples=40))
    before, old = block.dense(), (block.output_basis, block.input_basis)
    block.update(oracle.statistics(examples=40))
    block.refresh()
    U_G, U_A = complete(block.output_basis), complete(block.input_basis)
    turn = torch.kron(U_G, U_A)
    diagonal = (turn.mT @ before @ turn).diagonal().view(SHAPE)
    expected = turn @ torch.diag(averaged(diagonal, ranks).flatten()) @ turn.mT
    assert torch.allclose(block.dense(), expected, atol=ROUNDING)
    # Negative control: the same numbers kept for the new bases would be another matrix.
    block.output_basis, block.input_basis = old
    assert not torch.allclose(block.dense(), expected, atol=1e-3)


def test_the_state_restores_every_bit(ranks, oracle):
    first, second = oracle.statistics(), oracle.statistics()
    block, other = fed(LowRankEKFACBlock(SHAPE, 0.9, ranks), first), LowRankEKFACBlock(SHAPE, 0.9, ranks)
    other.load_state_dict(block.state_dict())
    V = torch.randn(SHAPE)
    solved = [fed(b, second).solve(V, 0.1) for b in (block, other)]
    assert torch.equal(*solved)


def test_only_wide_factors_lose_eigenvectors():
    factory = EKFAC(rank=2)
    assert isinstance(factory.build(Place((8, 8))), EKFACBlock)
    assert factory.build(Place((8, 9))).ranks == (8, 2)
    assert factory.build(Place((9, 3))).ranks == (2, 3)
    assert isinstance(EKFAC().build(Place((9, 9))), EKFACBlock)
    with pytest.raises(ValueError, match=r"rank must be at least 1.* got 0"):
        EKFAC(rank=0)


def test_leading_eigenvectors_are_found_and_followed():
    values = torch.tensor([1e-3, 1e-2, 0.1, 1.0, 10.0])
    vectors = torch.linalg.qr(torch.randn(5, 5)).Q
    matrix = vectors @ torch.diag(values) @ vectors.mT
    leading = vectors[:, -2:]
    found = leading_eigenvectors(matrix, 2)  # as many as two in five are found by decomposing the whole
    assert torch.allclose((leading.mT @ found).abs(), torch.eye(2), atol=1e-8)
    start = torch.linalg.qr(leading + 0.1 * torch.randn(5, 2)).Q
    gaps = [float((leading @ leading.mT - start @ start.mT).norm())]
    for _ in range(3):
        start = leading_eigenvectors(matrix, 2, start)
        gaps.append(float((leading @ leading.mT - start @ start.mT).norm()))
    # The third eigenvalue is a tenth of the second: each pass gains a digit.
    assert all(after < 0.3 * before for before, after in pairwise(gaps))
    assert torch.allclose(start.mT @ start, torch.eye(2), atol=ROUNDING)


def test_a_few_of_many_eigenvectors_are_found_from_a_random_start():
    vectors = torch.linalg.qr(torch.randn(60, 60)).Q
    values = 0.5 ** torch.arange(60.0)
    matrix = vectors @ torch.diag(values) @ vectors.mT
    found = leading_eigenvectors(matrix, 6)
    assert torch.allclose(found.mT @ found, torch.eye(6), atol=ROUNDING)
    held = float((found.mT @ matrix @ found).trace() / values[:6].sum())
    # Four steps: what is outside weighs 2⁻⁶ at most, its part shrinks by the ratio of eigenvalues at every one.
    assert held > 1 - 1e-4
    drawn = torch.linalg.qr(torch.randn(60, 6)).Q
    assert float((drawn.mT @ matrix @ drawn).trace() / values[:6].sum()) < 0.9
    assert torch.equal(found, leading_eigenvectors(matrix, 6)), "runs repeat"


@pytest.mark.parametrize("start", [None, torch.eye(3)[:, :2]])
def test_a_moment_that_is_not_finite_is_refused(start):
    matrix = torch.eye(3)
    matrix[0, 2] = float("nan")
    with pytest.raises(DecompositionError, match="not finite"):
        leading_eigenvectors(matrix, 2, start)
