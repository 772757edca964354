"""Conjugate gradients, and the exact Fisher solved by them."""

from itertools import pairwise

import pytest
import torch

from acktr.conjugate import Stop
from acktr.curvature import EKFAC, KFAC, ExactCG, curvature_over
from acktr.exact import Linearisation
from acktr.fisher import ExactFisher
from acktr.likelihood import Categorical
from acktr.optimizer import NaturalGradient

DAMPING = 0.1
LONG = Stop(1e-13, 500)
"""More than there are parameters, which in exact arithmetic are enough."""


def exact(kind, oracle, settings, examples=7):
    """A curvature, the network around its parameters, and a gradient."""
    network, likelihood, inputs = oracle.case(kind, examples)
    parameters = dict(network.named_parameters())
    curvature = curvature_over(settings, network, parameters)
    optimizer = NaturalGradient(network, likelihood, settings)
    record = optimizer.run(inputs)
    seeds = ExactFisher()(likelihood, record.outputs, None, None)
    assert curvature.update(record, seeds, True)
    linearisation = Linearisation(network, parameters, (inputs,), likelihood, record)
    gradient = {name: torch.randn_like(p) for name, p in parameters.items()}
    return curvature, linearisation, gradient, oracle.fisher(network, likelihood, inputs)


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "scalar", "joint", "conv"])
@pytest.mark.parametrize("preconditioner", [None, EKFAC()], ids=["plain", "preconditioned"])
def test_converged_it_is_the_dense_solve(kind, preconditioner, oracle):
    curvature, linearisation, gradient, F = exact(kind, oracle, ExactCG(LONG, preconditioner=preconditioner))
    g, damped = oracle.flat(gradient), F + DAMPING * torch.eye(len(F))
    found = curvature.solve(gradient, DAMPING, linearisation)
    expected = torch.linalg.solve(damped, g)
    assert torch.allclose(oracle.flat(found), expected, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(
        oracle.flat(found), torch.linalg.solve(damped + DAMPING * torch.eye(len(F)), g), rtol=1e-2
    )
    V = oracle.flat(found)
    assert torch.allclose(oracle.flat(curvature.multiply(found, linearisation)), F @ V, atol=1e-9)
    assert float(curvature.quadratic(found, linearisation)) == pytest.approx(float(V @ F @ V))
    assert curvature.ready


def test_a_preconditioner_saves_iterations(oracle):
    spent = []
    for inner in (None, KFAC(), EKFAC()):
        settings = ExactCG(Stop(1e-6, 200), 0.0, inner)
        # With few examples F has few eigenvalues that are not zero, and plain iterations profit from it.
        curvature, linearisation, gradient, _ = exact("categorical", oracle, settings, examples=300)
        curvature.solve(gradient, 1e-4, linearisation)
        assert curvature.last.residual <= 1e-6
        spent.append(curvature.last.iterations)
    assert max(spent[1:]) < 0.8 * spent[0]


def test_a_warm_start_begins_where_the_last_solve_ended(oracle):
    settings = ExactCG(Stop(1e-12, 4), warm_start=1.0)
    curvature, linearisation, gradient, F = exact("categorical", oracle, settings)
    g, damped = oracle.flat(gradient), F + DAMPING * torch.eye(len(F))
    exact_solution = torch.linalg.solve(damped, g)
    errors = [
        float((oracle.flat(curvature.solve(gradient, DAMPING, linearisation)) - exact_solution).norm())
        for _ in range(4)
    ]
    assert all(after < before for before, after in pairwise(errors))
    cold, *_ = exact("categorical", oracle, ExactCG(Stop(1e-12, 4)))
    repeated = [oracle.flat(cold.solve(gradient, DAMPING, linearisation)) for _ in range(2)]
    assert torch.equal(*repeated)


@pytest.mark.parametrize("warm_start", [0.0, 0.9])
def test_tiny_and_huge_gradients_are_solved_alike(warm_start, oracle):
    network, inputs = oracle.mlp(3, 4, 2).float(), torch.randn(20, 3).float()
    parameters = dict(network.named_parameters())
    around = Linearisation(network, parameters, (inputs,), Categorical())
    gradient = {name: torch.randn_like(p) for name, p in parameters.items()}
    found, iterations = [], []
    for size in (1.0, 2.0**-90, 2.0**80):  # squares of the others leave single precision
        curvature = ExactCG(warm_start=warm_start).over(network, parameters, {})
        for _ in range(2):
            solution = curvature.solve({name: size * t for name, t in gradient.items()}, 0.1, around)
            iterations.append(curvature.last.iterations)
        found.append(oracle.flat(solution) / size)
    assert iterations[0] > 0
    assert iterations == 3 * iterations[:2]
    assert torch.allclose(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert torch.allclose(found[2], found[0], rtol=1e-4, atol=1e-6)
    nothing = curvature.solve({name: 0 * t for name, t in gradient.items()}, 0.1, around)
    assert not oracle.flat(nothing).any()
    assert curvature.last.iterations == 0


def test_the_warm_start_is_the_state(oracle):
    settings = ExactCG(Stop(0.0, 3), warm_start=0.9, preconditioner=KFAC())
    curvature, linearisation, gradient, _ = exact("categorical", oracle, settings)
    curvature.solve(gradient, DAMPING, linearisation)
    other, *_ = exact("categorical", oracle, settings)
    fresh = oracle.flat(other.solve(gradient, DAMPING, linearisation))
    other.load_state_dict(curvature.state_dict())
    after = [oracle.flat(c.solve(gradient, DAMPING, linearisation)) for c in (curvature, other)]
    assert torch.equal(*after)
    assert not torch.equal(fresh, after[0])
    with pytest.raises(ValueError, match="not of conjugate gradients"):
        other.load_state_dict({"dense": None})


def test_without_a_network_around_it_there_is_no_exact_fisher(oracle):
    curvature, _, gradient, _ = exact("categorical", oracle, ExactCG())
    for verb in (curvature.multiply, curvature.quadratic, lambda g: curvature.solve(g, DAMPING)):
        with pytest.raises(ValueError, match="pass its linearisation"):
            verb(gradient)
    with pytest.raises(ValueError, match="keeps no rows"):
        curvature.weighted_gradient(torch.ones(7))


def test_the_direction_is_one_piece_and_its_diagnostics_are_the_solve_s(oracle):
    curvature, linearisation, gradient, _ = exact("categorical", oracle, ExactCG(Stop(0.0, 2)))
    assert curvature.diagnostics() == {"cg_iterations": 0.0, "cg_residual": 0.0}
    curvature.solve(gradient, DAMPING, linearisation)
    assert curvature.diagnostics()["cg_iterations"] == 2
    assert curvature.diagnostics()["cg_residual"] > 0
    assert curvature.split(gradient) == [gradient]
    assert not curvature.weighs(len(gradient))
    assert curvature.layers == []


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExactCG(warm_start=2.0), r"warm_start must be in \[0, 1\], got 2\.0"),
    ],
)
def test_settings_out_of_range_are_named_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_optimizer_steps_along_the_dense_natural_gradient(oracle):
    network, inputs = oracle.mlp(4, 5, 3), torch.randn(20, 4)
    optimizer = NaturalGradient(network, Categorical(), ExactCG(LONG), lr=1e-3, radius=float("inf"), damping=DAMPING)
    optimizer.rule = type(optimizer.rule)(combination=None)
    F = oracle.fisher(network, Categorical(), inputs)
    record, before = optimizer.run(inputs), oracle.flat(oracle.parameters(network)).clone()
    optimizer.update_curvature()
    optimizer.pull_back((torch.randn_like(record.outputs[0]),))
    g = torch.cat([p.grad.flatten() for p in network.parameters()])
    optimizer.step()
    step = (oracle.flat(oracle.parameters(network)) - before) / 1e-3
    assert torch.allclose(step, -torch.linalg.solve(F + DAMPING * torch.eye(len(F)), g), rtol=1e-7, atol=1e-8)
    assert float(torch.nn.functional.cosine_similarity(step, -g, 0)) < 0.99
