"""The exact Fisher's products against the dense matrix."""

import pytest
import torch
from torch import nn

from acktr.exact import Linearisation
from acktr.likelihood import Categorical, DiagonalGaussian, Likelihood
from acktr.optimizer import NaturalGradient

KINDS = ["categorical", "gaussian", "scalar", "joint", "conv"]
ROUNDING = 1e-10  # float64, sums of some hundred terms of order one


def around(network, likelihood, inputs, by_chain=False):
    parameters = dict(network.named_parameters())
    record = NaturalGradient(network, likelihood).run(inputs) if by_chain else None
    return Linearisation(network, parameters, (inputs,), likelihood, record)


def random_step(network):
    return {name: torch.randn_like(p) for name, p in network.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_the_dense_fisher_s(kind, oracle):
    network, likelihood, inputs = oracle.case(kind)
    step, F = random_step(network), oracle.fisher(network, likelihood, inputs)
    linearisation = around(network, likelihood, inputs)
    expected = F @ oracle.flat(step)
    assert torch.allclose(oracle.flat(linearisation.multiply(step)), expected, atol=ROUNDING)
    assert float(linearisation.fisher_form(step)) == pytest.approx(float(oracle.flat(step) @ expected))
    # Negative control: another batch has another Fisher.
    other = around(network, likelihood, inputs[:3]).multiply(step)
    assert not torch.allclose(oracle.flat(other), expected, atol=1e-2 * float(expected.abs().max()))


def test_a_chain_s_product_is_autograd_s(oracle):
    network, inputs = oracle.mlp(4, 5, 3), torch.randn(7, 4)
    step = random_step(network)
    by_chain, by_graph = around(network, Categorical(), inputs, True), around(network, Categorical(), inputs)
    assert by_chain._pass is not None
    assert by_graph._pass is None
    found, expected = by_chain.multiply(step), by_graph.multiply(step)
    assert found.keys() == expected.keys()
    assert torch.allclose(oracle.flat(found), oracle.flat(expected), atol=1e-14)


def test_layers_without_biases_have_products_too(oracle):
    network = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    inputs, F = torch.randn(7, 4), None
    step, F = random_step(network), oracle.fisher(network, Categorical(), inputs)
    found = around(network, Categorical(), inputs, True).multiply(step)
    assert torch.allclose(oracle.flat(found), F @ oracle.flat(step), atol=ROUNDING)


def test_a_log_std_has_its_own_product(oracle):
    network, inputs = oracle.GaussianActor((4, 5, 2)), torch.randn(7, 4)
    found = around(network, DiagonalGaussian(), inputs).multiply(random_step(network) | {"log_std": torch.ones(2)})
    assert torch.allclose(found["log_std"], torch.full((2,), 2.0))


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "scalar", "joint"])
def test_a_likelihood_s_product_is_that_of_its_bilinear_form(kind, oracle):
    network, likelihood, inputs = oracle.case(kind)
    with torch.no_grad():
        outputs = oracle.outputs(network, inputs)
    left, right = (tuple(torch.randn_like(o) for o in outputs) for _ in range(2))
    product = likelihood.multiply(outputs, right)
    form = sum((a * b).reshape(len(inputs), -1).sum(1) for a, b in zip(left, product, strict=True))
    assert torch.allclose(form, likelihood.inner(outputs, left, right), atol=ROUNDING)
    assert not torch.allclose(form, likelihood.inner(outputs, right, right), atol=0.1)
    # What a likelihood without a closed form falls back on.
    for closed, differentiated in zip(product, Likelihood.multiply(likelihood, outputs, right), strict=True):
        assert torch.allclose(closed, differentiated, atol=ROUNDING)


def test_the_model_along_a_step_is_the_quadratic_one(oracle):
    network, likelihood, inputs = oracle.case("joint")
    gradient, step = random_step(network), random_step(network)
    F, g, d = oracle.fisher(network, likelihood, inputs), oracle.flat(gradient), oracle.flat(step)
    model = around(network, likelihood, inputs).model(gradient, step, 0.3)
    for scale in (0.5, 2.0):
        expected = scale * g @ d + 0.5 * scale**2 * (d @ F @ d + 0.3 * d @ d)
        assert model.reduction(scale) == pytest.approx(float(expected))
        assert model.reduction(scale) != pytest.approx(float(scale * g @ d + 0.5 * scale**2 * d @ F @ d), rel=1e-3)
