"""Conjugate gradients: the textbook's promises, and a warm start that cannot harm."""

from itertools import pairwise

import pytest
import torch

from acktr.conjugate import Stop, conjugate_gradient

EXACT = Stop(1e-12, 100)
ROUNDING = 1e-10  # float64, 12 unknowns, conditions of at most 10⁴


def system(values):
    """A matrix with these eigenvalues, a right-hand side, and the solution."""
    basis = torch.linalg.qr(torch.randn(len(values), len(values))).Q
    matrix, right = basis @ torch.diag(values) @ basis.mT, torch.randn(len(values))
    return matrix, right, torch.linalg.solve(matrix, right)


def energy(matrix, error):
    return float((error @ matrix @ error).sqrt())


def test_the_solution_is_the_dense_one_and_the_residual_the_true_one():
    matrix, right, exact = system(torch.logspace(-2, 2, 12))
    found = conjugate_gradient(lambda x: matrix @ x, right, EXACT)
    assert torch.allclose(found.tensor, exact, atol=1e-8)  # a residual of 1e-12 over an eigenvalue of 1e-2
    early = conjugate_gradient(lambda x: matrix @ x, right, Stop(1e-12, 3))
    assert early.iterations == 3
    true = float((right - matrix @ early.tensor).norm() / right.norm())
    assert early.residual == pytest.approx(true, rel=1e-6)
    assert true > 1e-3


def test_the_error_falls_in_the_energy_norm_at_every_step():
    matrix, right, exact = system(torch.logspace(-2, 2, 12))
    solutions = [conjugate_gradient(lambda x: matrix @ x, right, Stop(0.0, k)).tensor for k in range(1, 12)]
    errors = [energy(matrix, x - exact) for x in [torch.zeros(12), *solutions]]
    assert all(after < before for before, after in pairwise(errors))
    # Negative control: in the norm of the residual it does not.
    residuals = [float((matrix @ x - right).norm()) for x in solutions]
    assert any(after > before for before, after in pairwise(residuals))


@pytest.mark.parametrize("distinct", [1, 3, 5])
def test_as_many_steps_as_there_are_eigenvalues(distinct):
    values = torch.tensor([1.0, 3.0, 7.0, 20.0, 0.2])[torch.arange(12) % distinct]
    matrix, right, _ = system(values)
    assert conjugate_gradient(lambda x: matrix @ x, right, Stop(1e-9, 50)).iterations == distinct


def test_a_good_start_saves_steps_and_a_bad_one_harms_nothing():
    matrix, right, exact = system(torch.logspace(-2, 2, 12))
    stop = Stop(1e-6, 100)
    cold = conjugate_gradient(lambda x: matrix @ x, right, stop)
    # Any multiple of the solution is as good as the solution.
    assert conjugate_gradient(lambda x: matrix @ x, right, stop, start=-1000 * exact).iterations == 0
    near = exact + 1e-4 * torch.randn(12)
    assert conjugate_gradient(lambda x: matrix @ x, right, stop, start=near).iterations < cold.iterations
    for bad in (1e6 * torch.randn(12), torch.zeros(12), torch.full((12,), float("nan"))):
        warm = conjugate_gradient(lambda x: matrix @ x, right, Stop(0.0, 1), start=bad)
        assert energy(matrix, warm.tensor - exact) < energy(matrix, exact)
    # Negative control: the bad start as it is would be far worse than no start.
    assert energy(matrix, 1e6 * torch.randn(12) - exact) > 1e3 * energy(matrix, exact)


def test_the_matrix_itself_preconditions_to_one_step():
    matrix, right, exact = system(torch.logspace(-2, 2, 12))
    inverse = torch.linalg.inv(matrix)
    found = conjugate_gradient(lambda x: matrix @ x, right, Stop(1e-8, 50), precondition=lambda r: inverse @ r)
    assert found.iterations == 1
    assert torch.allclose(found.tensor, exact, atol=1e-6)
    assert conjugate_gradient(lambda x: matrix @ x, right, Stop(1e-8, 50)).iterations > 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_solution(bad):
    right = torch.ones(4)
    right[2] = bad
    assert not torch.isfinite(conjugate_gradient(lambda x: 2 * x, right, EXACT).tensor).all()
    assert torch.isfinite(conjugate_gradient(lambda x: 2 * x, torch.ones(4), EXACT).tensor).all()


def test_a_product_that_is_not_finite_leaves_the_solution_before_it():
    matrix, right, _ = system(torch.logspace(-2, 2, 12))
    calls = []

    def product(vector):
        calls.append(1)
        return matrix @ vector if len(calls) < 4 else torch.full_like(vector, float("nan"))

    found = conjugate_gradient(product, right, Stop(0.0, 10))
    assert found.iterations == 3
    assert torch.equal(found.tensor, conjugate_gradient(lambda x: matrix @ x, right, Stop(0.0, 3)).tensor)


def test_stalled_progress_stops_before_the_last_step():
    matrix, right, exact = system(torch.logspace(0, 3, 60))
    stalled = conjugate_gradient(lambda x: matrix @ x, right, Stop(0.0, 1000, progress=5e-4))
    assert 10 < stalled.iterations < 60
    assert energy(matrix, stalled.tensor - exact) > 1e-3 * energy(matrix, exact)
    assert conjugate_gradient(lambda x: matrix @ x, right, Stop(0.0, 60)).iterations == 60


def test_nothing_to_solve_takes_no_step():
    found = conjugate_gradient(lambda x: 2 * x, torch.zeros(4), EXACT, start=torch.ones(4))
    assert found.iterations == 0
    assert not found.tensor.any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Stop(tolerance=-0.1), r"tolerance must be in \[0, 1\), got -0\.1"),
        (lambda: Stop(tolerance=1.0), r"tolerance must be in \[0, 1\), got 1\.0"),
        (lambda: Stop(progress=-1.0), r"progress must be in \[0, 1\), got -1\.0"),
        (lambda: Stop(iterations=0), "iterations must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_named_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
