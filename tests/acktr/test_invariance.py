"""Natural-gradient steps do not depend on the coordinates of activations (Martens & Grosse 2015, theorem 1)."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from acktr.capture import Capture
from acktr.curvature import EKFAC, KFAC, Diagonal, FactoredKFAC, Tridiagonal, curvature_over
from acktr.fisher import ExactFisher
from acktr.likelihood import DiagonalGaussian

DAMPING = 1e-13
"""Nothing beside the factors' smallest eigenvalue products here (about 1e-5), yet > 0."""
SAME, DIFFERENT = 1e-5, 0.2
"""Relative change of the function's change: rounding times the factors' condition numbers, against real change."""


class Dressed(nn.Module):
    """Two layers with fixed affine maps before and after each: x → W₂ M₂ tanh(P₁ W₁ M₁ x)."""

    def __init__(self, maps=None):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.before_first, self.after_first, self.before_second = maps or (plain(3), plain(4), plain(4))

    def forward(self, x):
        (A, a), (B, b), (C, c) = self.before_first, self.after_first, self.before_second
        hidden = torch.tanh(self.first(x @ A.mT + a) @ B.mT + b)
        mean = self.second(hidden @ C.mT + c)
        return mean, torch.zeros_like(mean)


def plain(size):
    return torch.eye(size), torch.zeros(size)


def sheared(size):
    return torch.randn(size, size) + 2 * torch.eye(size), torch.randn(size)


def turned(size):
    return torch.linalg.qr(torch.randn(size, size)).Q, torch.zeros(size)


def undo(layer, dressed, before, after):
    """Weights with which the dressed layer computes what `layer` computes."""
    (A, a), (B, b) = before, after
    weight = torch.linalg.solve(B, layer.weight.data) @ torch.linalg.inv(A)
    dressed.weight.data = weight
    dressed.bias.data = torch.linalg.solve(B, layer.bias.data - b) - weight @ a


def twin(network, maps):
    other = Dressed(maps)
    undo(network.first, other.first, maps[0], maps[1])
    undo(network.second, other.second, maps[2], plain(2))
    return other


def chained(network, inputs, factory):
    curvature = curvature_over(factory, network, dict(network.named_parameters()))
    capture = Capture(network, curvature.layers)
    with capture.recording():
        network(inputs)
    seeds = ExactFisher()(DiagonalGaussian(), capture.last.outputs, None, None)
    assert curvature.update(capture.last, seeds, refresh=True)
    return curvature


def change(network, inputs, factory, oracle, targets, damping=DAMPING):
    """How the function changes along the method's step; None is the plain gradient."""
    parameters = dict(network.named_parameters())
    loss = (network(inputs)[0] - targets).square().mean()
    gradient = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    if factory is not None:
        curvature = (
            chained(network, inputs, factory)
            if isinstance(factory, Tridiagonal)
            else oracle.curvature(network, DiagonalGaussian(), factory, inputs)
        )
        gradient = curvature.solve(gradient, damping)
    at_rest = oracle.parameters(network)

    def outputs(step):
        return functional_call(network, {name: at_rest[name] - step[name] for name in step}, (inputs,))[0]

    zero = {name: torch.zeros_like(g) for name, g in gradient.items()}
    return torch.func.jvp(outputs, (zero,), (gradient,))[1].detach()


def difference(factory, map_of, oracle, damping=DAMPING):
    network, inputs, targets = Dressed(), torch.randn(60, 3), torch.randn(60, 2)
    maps = map_of(3), map_of(4), map_of(4)
    other = twin(network, maps)
    assert torch.allclose(network(inputs)[0], other(inputs)[0], atol=1e-10)
    mine, theirs = (change(n, inputs, factory, oracle, targets, damping) for n in (network, other))
    return float((mine - theirs).norm() / mine.norm())


@pytest.mark.parametrize("factory", [KFAC(), FactoredKFAC()], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("map_of", [sheared, turned])
def test_kfac_s_step_is_the_same_function_change_in_any_affine_coordinates(factory, map_of, oracle):
    # Factored damping is √λ = 3e-7 on each factor, which is felt a little.
    assert difference(factory, map_of, oracle) < (1e-3 if isinstance(factory, FactoredKFAC) else SAME)


@pytest.mark.parametrize("map_of", [sheared, turned])
def test_the_tridiagonal_step_is_the_same_function_change_in_any_affine_coordinates(map_of, oracle):
    # The maps stand between activations and layers, so that no sequence shows the chain.
    factory = Tridiagonal(chains=(("first", "second"),))
    assert difference(factory, map_of, oracle) < 1e-3
    # Damping is what sees coordinates.
    if map_of is sheared:
        assert difference(factory, map_of, oracle, damping=1.0) > 0.1


@pytest.mark.parametrize("factory", [None, Diagonal()], ids=["gradient", "Diagonal"])
def test_the_plain_gradient_s_and_the_diagonal_s_steps_are_not(factory, oracle):
    assert difference(factory, sheared, oracle) > DIFFERENT


def test_ekfac_s_step_is_the_same_in_turned_coordinates_only(oracle):
    # Its scalings are the Fisher's diagonal in eigenbases, and eigenvectors turn with rotations but not with shears.
    assert difference(EKFAC(), turned, oracle) < SAME
    assert difference(EKFAC(), sheared, oracle) > 1e-2
    assert difference(Diagonal(), turned, oracle) > 0.1
