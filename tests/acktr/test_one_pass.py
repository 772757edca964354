"""One backward pass for both: the objective's gradient from the Fisher pass's own rows."""

import pytest
import torch
from torch import nn

from acktr import EKFAC, Categorical, ExactFisher, NaturalGradient, SampledFisher, ScalarGaussian
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


def test_what_has_no_rows_for_every_example_is_refused():
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1), nn.Flatten(0))
    optimizer = NaturalGradient(network, ScalarGaussian(), fisher=ExactFisher())
    with optimizer.recording():
        values = network(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"'1\.weight' has no rows to weigh"):
        optimizer.update_curvature(weights=values.detach())

    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = NaturalGradient(network, Categorical(), fisher=SampledFisher(samples=2))
    with optimizer.recording():
        network(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"5 weights for rows of shape \(2, 5\)"):
        optimizer.update_curvature(weights=torch.ones(5))
