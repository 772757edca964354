"""Decompositions over every kind of spectrum: what comes out is finite and right, or it is an error that says so."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from acktr import EKFAC, KFAC, Diagonal
from acktr.curvature import DenseBlocks, Place, Statistics
from acktr.linalg import DecompositionError, damped_inverse, leading_eigenvectors, split_damping, symmetric_eigen
from acktr.tree import products_finite

DTYPES = st.sampled_from([torch.float32, torch.float64])
EXPONENTS = st.lists(st.none() | st.floats(-30, 15), min_size=1, max_size=8)
"""Powers of ten of the eigenvalues; None is an eigenvalue of zero, so that ranks from 0 to full come up."""
SEEDS = st.integers(0, 2**31 - 1)


def matrix_of(exponents: list[float | None], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with a spectrum, and the spectrum, ascending."""
    values = torch.tensor([0.0 if e is None else 10.0**e for e in exponents], dtype=torch.float64).sort().values
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    return ((turn * values) @ turn.mT).to(dtype), values


@settings(max_examples=150, deadline=None)
@given(EXPONENTS, DTYPES, SEEDS)
def test_every_spectrum_is_decomposed(exponents, dtype, seed):
    matrix, values = matrix_of(exponents, dtype, seed)
    found, vectors = symmetric_eigen(matrix)
    assert found.dtype == vectors.dtype == dtype
    assert torch.isfinite(found).all() and torch.isfinite(vectors).all() and (found >= 0).all()
    tolerance = 50 * torch.finfo(dtype).eps
    assert torch.allclose(found.double(), values, atol=tolerance * float(values.max()), rtol=0)
    assert torch.allclose(vectors.mT @ vectors, torch.eye(len(values), dtype=dtype), atol=tolerance)
    assert torch.allclose((vectors * found) @ vectors.mT, matrix, atol=tolerance * max(float(values.max()), 1e-300))


@settings(max_examples=100, deadline=None)
@given(EXPONENTS, DTYPES, SEEDS, st.floats(-8, 0))
def test_every_damped_inverse_is_finite_or_an_error(exponents, dtype, seed, power):
    matrix, values = matrix_of(exponents, dtype, seed)
    damping = 10.0**power
    try:
        inverse = damped_inverse(matrix, torch.tensor(damping, dtype=dtype))
    except DecompositionError as error:
        assert "\n" not in str(error)
        # Rounding alone may stand against the damping, where the spectrum reaches that far above it.
        assert float(values.max()) * torch.finfo(dtype).eps * len(values) > damping / 10
        return
    assert torch.isfinite(inverse).all()


@settings(max_examples=60, deadline=None)
@given(EXPONENTS, SEEDS, st.data())
def test_leading_eigenvectors_of_every_spectrum_are_orthonormal(exponents, seed, data):
    matrix, _ = matrix_of(exponents, torch.float32, seed)
    count = data.draw(st.integers(1, len(matrix)))
    vectors = leading_eigenvectors(matrix, count)
    assert torch.allclose(vectors.mT @ vectors, torch.eye(count, dtype=torch.float32), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(EXPONENTS, st.sampled_from([math.nan, math.inf, -math.inf]), SEEDS, st.data())
def test_one_bad_entry_anywhere_is_refused(exponents, bad, seed, data):
    matrix, _ = matrix_of(exponents, torch.float64, seed)
    place = data.draw(st.tuples(*[st.integers(0, len(matrix) - 1)] * 2))
    matrix[place] = bad
    for decompose in (
        symmetric_eigen,
        lambda m: damped_inverse(m, torch.tensor(0.1)),
        lambda m: leading_eigenvectors(m, 1),
    ):
        with pytest.raises(DecompositionError, match="not finite"):
            decompose(matrix)


@given(st.floats(0, 1e30), st.floats(0, 1e30), st.floats(-12, 3))
def test_damping_is_shared_out_between_any_two_factors(output_mean, input_mean, power):
    damping = 10.0**power
    shares = split_damping(torch.tensor(output_mean), torch.tensor(input_mean), damping)
    assert all(math.isfinite(float(share)) and float(share) > 0 for share in shares)
    assert float(shares[0]) * float(shares[1]) == pytest.approx(damping, rel=1e-4)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([EKFAC, KFAC, Diagonal]),
    st.lists(st.floats(-18, 18), min_size=2, max_size=4),
    st.lists(st.floats(-18, 18), min_size=2, max_size=4),
    st.integers(1, 6),
    SEEDS,
)
@example(KFAC, [0.0, 0.0, 0.0], [0.0, 0.0, 18.0], 1, 0)
def test_what_the_gate_lets_in_can_be_solved_with(factory, input_powers, grad_powers, examples, seed):
    """Zero, rank-deficient and badly scaled factors: the direction and its form are finite, whatever is averaged."""
    generator = torch.Generator().manual_seed(seed)
    single = {"dtype": torch.float32}
    rows = torch.randn(examples, 1, len(input_powers), generator=generator, **single)
    grads = torch.randn(1, examples, 1, len(grad_powers), generator=generator, **single)
    inputs = rows * torch.tensor([10.0**p for p in input_powers], **single)
    outputs = grads * torch.tensor([10.0**p for p in grad_powers], **single)
    assume(products_finite([(inputs, outputs)]))
    shape = len(grad_powers), len(input_powers)
    block = factory().build(Place(shape))
    for scale in (1.0, 0.0, 1.0):
        statistics = Statistics(inputs * scale, outputs)
        block.update(statistics)
        block.refresh()
        block.rescale(statistics)
    solution, form = block.solve_with_form(torch.randn(shape, generator=generator, **single), 0.01)
    assert torch.isfinite(solution).all()
    assert math.isfinite(float(form))


@pytest.mark.parametrize("factory", [KFAC(), DenseBlocks()], ids=lambda f: type(f).__name__)
def test_rounding_leaves_no_form_less_than_nothing(factory):
    """A direction along what the statistics never saw: its form is all but nothing beside their eigenvalues."""
    forms, plain = [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        single = {"generator": generator, "dtype": torch.float32}
        block = factory.build(Place((4, 64)))
        for _ in range(2):  # moments that moved since the bases were found
            block.update(Statistics(3 * torch.randn(8, 1, 64, **single), torch.randn(1, 8, 1, 4, **single)))
            if not block.ready:
                block.refresh()
        solution, form = block.solve_with_form(torch.randn(4, 64, **single), 1e-4)
        forms.append(float(form))
        plain.append(float(block.quadratic(solution)))
    assert min(forms) > 0
    assert all(form == other for form, other in zip(forms, plain, strict=True) if other > 0)
    block = factory.build(Place((4, 64)))
    rows, grads = 1e3 * torch.randn(1, 1, 64, **single), torch.randn(1, 1, 1, 4, **single)
    block.update(Statistics(rows, grads))
    block.refresh()
    gradients = torch.randn(40, 4, 64, **single)
    assert min(float(block.solve_with_form(V, 1e-4)[1]) for V in gradients) > 0
    assert min(float(block.quadratic(block.solve(V, 1e-4))) for V in gradients) < 0, "the control: rounding does that"


def test_the_gate_is_what_keeps_infinity_out():
    rows, grads = torch.full((2, 1, 3), 1e25, dtype=torch.float32), torch.ones(1, 2, 1, 3, dtype=torch.float32)
    assert torch.isfinite(rows).all() and not products_finite([(rows, grads)])
    block = EKFAC().build(Place((3, 3)))
    block.update(Statistics(rows, grads))
    assert not torch.isfinite(block.input_moment.value).all()
