"""The coefficients minimise the exact quadratic model over the layers' directions."""

import pytest
import torch

from acktr.combination import LayerCombination, solve_coefficients
from acktr.curvature import EKFAC, KFAC
from acktr.curvature.members import known_fisher
from acktr.exact import Linearisation
from acktr.likelihood import Categorical, DiagonalGaussian

DAMPING = 1e-2
RIDGE = 1e-6
"""Relative ridge of the system: what solutions may differ by."""


def problem(kind, oracle, previous_step=False):
    """Everything `combine` is called with, and the dense Fisher and columns beside it."""
    if kind == "actor":
        network, likelihood, inputs = oracle.GaussianActor((4, 5, 2)), DiagonalGaussian(), torch.randn(9, 4)
        rules = {"log_std": known_fisher(2.0)}
    else:
        (network, likelihood, inputs), rules = oracle.case(kind, examples=9), None
    curvature = oracle.curvature(network, likelihood, EKFAC(), inputs, rules=rules)
    gradient = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    pieces = curvature.split({name: -t for name, t in curvature.solve(gradient, DAMPING).items()})
    if previous_step:
        pieces.append({name: 0.1 * torch.randn_like(p) for name, p in network.named_parameters()})
    linearisation = Linearisation(network, dict(network.named_parameters()), (inputs,), likelihood)
    zeros = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    P = torch.stack([oracle.flat(zeros | piece) for piece in pieces], dim=1)
    return pieces, gradient, linearisation, P, oracle.fisher(network, likelihood, inputs)


def decrease(step, fisher, gradient):
    """How far the damped quadratic model goes down."""
    return -float(gradient @ step + 0.5 * step @ fisher @ step + 0.5 * DAMPING * step @ step)


KINDS = ["actor", "categorical", "joint", "conv"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("previous_step", [False, True])
def test_coefficients_are_the_dense_solution(kind, previous_step, oracle):
    pieces, gradient, linearisation, P, F = problem(kind, oracle, previous_step)
    combined, quadratic = LayerCombination().combine(pieces, gradient, DAMPING, linearisation)
    g, step = oracle.flat(gradient), oracle.flat(combined)
    alpha = torch.linalg.solve(P.mT @ F @ P + DAMPING * P.mT @ P, -P.mT @ g)
    assert torch.allclose(step, P @ alpha, rtol=1e-3, atol=1e-4 * float(step.norm()))
    # A trust region holds policy and value apart: its form is not their sum.
    if kind != "joint":
        assert float(quadratic) == pytest.approx(float(step @ F @ step), rel=1e-9)
    else:
        assert 0 < float(quadratic) < float(step @ F @ step)
    assert float((step - P.sum(1)).norm() / step.norm()) > 1e-2  # the coefficients are not 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_goes_down_at_least_as_far_as_with_any_other_coefficients(kind, oracle):
    pieces, gradient, linearisation, P, F = problem(kind, oracle)
    combined, _ = LayerCombination().combine(pieces, gradient, DAMPING, linearisation)
    g = oracle.flat(gradient)
    best = decrease(oracle.flat(combined), F, g)
    assert best > 0
    ones = decrease(P.sum(1), F, g)
    assert best > ones
    for _ in range(20):
        assert best >= decrease(P @ torch.randn(P.shape[1]), F, g)


def test_one_column_gives_the_exact_rescaling_of_kfac(oracle):
    # With a single layer, α = −∇ᵀΔ / Δᵀ(F + λ)Δ (Martens & Grosse 2015, section 6.4).
    network, inputs = oracle.mlp(4, 3), torch.randn(9, 4)
    curvature = oracle.curvature(network, Categorical(), KFAC(), inputs)
    gradient = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    descent = {name: -t for name, t in curvature.solve(gradient, DAMPING).items()}
    linearisation = Linearisation(network, dict(network.named_parameters()), (inputs,), Categorical())
    combined, _ = LayerCombination().combine([descent], gradient, DAMPING, linearisation)
    F, d, g = oracle.fisher(network, Categorical(), inputs), oracle.flat(descent), oracle.flat(gradient)
    alpha = -(g @ d) / (d @ F @ d + DAMPING * d @ d)
    assert torch.allclose(oracle.flat(combined), alpha * d, rtol=10 * RIDGE)
    assert abs(float(alpha) - 1) > 1e-3


def test_columns_that_span_the_space_give_the_natural_gradient(oracle):
    network, inputs = oracle.mlp(2, 2), torch.randn(9, 2)
    gradient = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    pieces = [oracle.unflat(unit, network) for unit in torch.eye(6)]
    linearisation = Linearisation(network, dict(network.named_parameters()), (inputs,), Categorical())
    combined, _ = LayerCombination(ridge=1e-12).combine(pieces, gradient, DAMPING, linearisation)
    F, g = oracle.fisher(network, Categorical(), inputs), oracle.flat(gradient)
    assert torch.allclose(oracle.flat(combined), torch.linalg.solve(F + DAMPING * torch.eye(6), -g), rtol=1e-8)


def test_a_log_std_of_its_own_keeps_its_solution(oracle):
    pieces, gradient, linearisation, _, _ = problem("actor", oracle)
    combined, _ = LayerCombination().combine(pieces, gradient, DAMPING, linearisation)
    own = next(piece for piece in pieces if "log_std" in piece)
    assert torch.allclose(combined["log_std"], own["log_std"], rtol=10 * RIDGE)
    other = next(piece for piece in pieces if "mean.0.weight" in piece)
    assert not torch.allclose(combined["mean.0.weight"], other["mean.0.weight"], rtol=1e-2)


def test_a_column_of_zeros_changes_nothing(oracle):
    pieces, gradient, linearisation, _, _ = problem("categorical", oracle)
    zeros = {name: torch.zeros_like(t) for name, t in gradient.items()}
    without, quadratic = LayerCombination().combine(pieces, gradient, DAMPING, linearisation)
    with_zeros, same = LayerCombination().combine([*pieces, zeros], gradient, DAMPING, linearisation)
    assert torch.allclose(oracle.flat(without), oracle.flat(with_zeros), rtol=1e-12)
    assert float(quadratic) == pytest.approx(float(same))
    assert torch.equal(solve_coefficients(torch.zeros(2, 2), torch.zeros(2), RIDGE), torch.zeros(2))


def test_dependent_columns_stay_bounded(oracle):
    pieces, gradient, linearisation, _, _ = problem("categorical", oracle)
    twice = [*pieces, dict(pieces[0])]
    combined, _ = LayerCombination().combine(pieces, gradient, DAMPING, linearisation)
    doubled, _ = LayerCombination().combine(twice, gradient, DAMPING, linearisation)
    assert torch.allclose(oracle.flat(combined), oracle.flat(doubled), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_a_dead_column_needs_no_ridge(ridge):
    system = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    alone = solve_coefficients(system, torch.tensor([1.0, 2.0]), ridge)
    with_dead = solve_coefficients(torch.block_diag(system, torch.zeros(1, 1)), torch.tensor([1.0, 2.0, 0.0]), ridge)
    assert torch.allclose(with_dead[:2], alone, rtol=1e-12)
    assert not with_dead[2]


def test_columns_of_very_different_size_are_solved_alike():
    system = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    right = torch.tensor([1.0, -1.0])
    units = torch.tensor([1e-8, 1e8])
    scaled = solve_coefficients(units[:, None] * system * units, units * right, RIDGE)
    expected = torch.linalg.solve(system, right)
    assert torch.allclose(units * scaled, expected, rtol=10 * RIDGE)
    plain_ridge = units[:, None] * system * units + RIDGE * torch.eye(2)
    assert not torch.allclose(units * torch.linalg.solve(plain_ridge, units * right), expected, rtol=1e-2)
