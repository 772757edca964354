"""One backward pass for both: the objective's gradient from the Fisher pass's own rows."""

import pytest
import torch
from torch import nn

from acktr import EKFAC, Categorical, ExactCG, ExactFisher, NaturalGradient, SampledFisher, ScalarGaussian
from acktr.fisher import EmpiricalFisher


class Value(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5), nn.Tanh())
        self.head = nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.layers(x)).flatten()


def _gradients(network):
    return [p.grad.clone() for p in network.parameters()]


def test_a_critics_gradient_is_its_residual_times_the_seeds_of_ones():
    network = Value().double()
    x, returns = torch.randn(7, 2, 8, 8, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    optimizer = NaturalGradient(network, ScalarGaussian(), EKFAC(), fisher=ExactFisher())
    with optimizer.recording():
        values = network(x)
    optimizer.update_curvature(weights=values.detach() - returns)
    from_rows = _gradients(network)
    optimizer.zero_grad()
    (0.5 * (network(x) - returns).square().mean()).backward()
    for a, b in zip(from_rows, _gradients(network), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)  # float64, one GEMM against another
    # Negative control: other weights are another gradient.
    with optimizer.recording():
        values = network(x)
    optimizer.update_curvature(weights=values.detach() + returns)
    assert not torch.allclose(network.head.weight.grad, from_rows[-2])


def test_an_actors_gradient_is_the_advantage_times_the_taken_actions_scores():
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, actions, advantages = torch.randn(9, 3).double(), torch.randint(0, 4, (9,)), torch.randn(9).double()
    optimizer = NaturalGradient(network, Categorical(), EKFAC(), fisher=EmpiricalFisher())
    with optimizer.recording():
        network(x)
    optimizer.update_curvature((actions,), weights=advantages)
    from_rows = _gradients(network)
    optimizer.zero_grad()
    (-(advantages * Categorical().log_prob((network(x),), (actions,))).mean()).backward()
    for a, b in zip(from_rows, _gradients(network), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_step_without_a_backward_pass_of_its_own_is_the_same_step():
    steps = {}
    for one_pass in (True, False):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).double()
        x, returns = torch.randn(20, 3).double(), torch.randn(20).double()
        optimizer = NaturalGradient(network, ScalarGaussian(), EKFAC(), fisher=ExactFisher(), radius=0.01)
        with optimizer.recording():
            values = network(x)
        optimizer.update_curvature(weights=values.detach() - returns if one_pass else None)
        if not one_pass:
            (0.5 * (values - returns).square().mean()).backward()
        optimizer.step()
        steps[one_pass] = torch.cat([p.detach().flatten() for p in network.parameters()])
    torch.testing.assert_close(steps[True], steps[False], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("held_back", ["rows", "layer", "all"])
def test_what_the_rows_do_not_hold_is_pulled_back_through_the_pass(held_back):
    layers = {"rows": [], "all": [], "layer": [nn.LayerNorm(4)]}[held_back]
    network = nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 1), nn.Flatten(0)).double()
    x, weights = torch.randn(9, 3).double(), torch.randn(9).double()
    curvature = ExactCG() if held_back == "all" else EKFAC()
    optimizer = NaturalGradient(network, ScalarGaussian(), curvature, fisher=ExactFisher())
    if held_back == "rows":
        optimizer.curvature.max_rows = 5
    with optimizer.recording():
        network(x)
    optimizer.update_curvature(weights=weights)
    found = _gradients(network)
    optimizer.zero_grad()
    (network(x) * weights).mean().backward()
    for a, b in zip(found, _gradients(network), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_weights_of_several_seeds_are_refused():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = NaturalGradient(network, Categorical(), fisher=SampledFisher(samples=2))
    with optimizer.recording():
        network(torch.randn(5, 3))
    with pytest.raises(ValueError, match="one seed"):
        optimizer.update_curvature(weights=torch.ones(5))
