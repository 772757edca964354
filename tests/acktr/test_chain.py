"""Chains of layers: what autograd would find, without autograd; and what is no chain goes by autograd."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from acktr import EKFAC, Categorical, DiagonalGaussian, ExactFisher, NaturalGradient, ScalarGaussian
from acktr.chain import Chain, Links
from acktr.combination import LayerCombination
from acktr.curvature.members import known_fisher
from acktr.step import StepRule

EXACT = {"rtol": 1e-11, "atol": 1e-13}  # float64, the same products in another order


class Actor(nn.Module):
    """A mean that is a chain and a log standard deviation that is a parameter."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 4), nn.ReLU())
        self.mean = nn.Linear(4, 2, bias=False)
        self.log_std = nn.Parameter(torch.randn(2))

    def forward(self, x):
        mean = self.mean(self.body(x))
        return mean, self.log_std.expand_as(mean)

    def links(self):
        return Links([self.body, self.mean], [self.log_std])


def actor():
    return Actor().double(), torch.randn(7, 3, 2).double()


def chain_of(network):
    return Chain.of(network, dict(network.named_parameters()))


def test_gradients_at_every_layers_output_are_autograds():
    network, x = actor()
    optimizer = NaturalGradient(network, DiagonalGaussian(), EKFAC(), blocks={"log_std": known_fisher(2.0)})
    seed = (torch.randn(7, 2).double(), torch.randn(7, 2).double())
    layers = [layer.name for layer in optimizer.curvature.layers]
    free = {"log_std": network.log_std}
    with optimizer.recording():
        network(x)
    wanted = optimizer._capture.last.pull_back(seed, layers, free)
    record = optimizer.run(x)
    assert type(record).__name__ == "ChainPass"
    found = record.pull_back(seed, layers, free)
    assert found.keys() == wanted.keys() == {"body.1.0", "body.2", "mean", "log_std"}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **EXACT)
    # Negative control: another seed gives others.
    other = record.pull_back((seed[0] + 1, seed[1]), layers, free)
    assert not torch.allclose(other["mean"], wanted["mean"])


def test_the_parameters_gradient_is_autograds_in_parts_too():
    network, x = actor()
    optimizer = NaturalGradient(network, DiagonalGaussian(), EKFAC(), blocks={"log_std": known_fisher(2.0)})
    seed = (torch.randn(7, 2).double(), torch.randn(7, 2).double())
    torch.autograd.backward(list(network(x)), list(seed))
    wanted = [p.grad.clone() for p in network.parameters()]
    optimizer.run(x)
    optimizer.pull_back(seed)
    for p, grad in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, **EXACT)
    passes = [optimizer.run(x[:3]), optimizer.run(x[3:])]
    optimizer.pull_back(seed, passes)
    for p, grad in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid])
@torch.no_grad()
def test_links_apply_the_function_of_their_module(activation, dtype):
    network = nn.Sequential(nn.Linear(3, 50), activation()).to(dtype)
    x = 5 * torch.randn(200, 3).to(dtype)
    (found,) = chain_of(network).outputs(x)
    assert found.dtype == dtype
    # In float32 a tanh goes by the sigmoid, whose last digit at 1 is near 0 all there is.
    torch.testing.assert_close(found, network(x), rtol=0, atol=2e-7 if dtype == torch.float32 else 0)


def test_a_chain_that_is_run_with_gradients_on_has_them():
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(6, 3).double()
    (found,) = chain_of(network).outputs(x)
    wanted = torch.autograd.grad(network(x).square().sum(), network.parameters())
    for one, other in zip(torch.autograd.grad(found.square().sum(), network.parameters()), wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid])
@pytest.mark.parametrize("moving", [None, "0.weight", "2.bias", "4.weight"])
def test_the_outputs_change_along_a_step_as_forward_mode_says(activation, moving):
    network = nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3).double()
    step = {n: torch.randn_like(p) for n, p in network.named_parameters() if moving in (None, n)}
    primal = {n: p.detach() for n, p in network.named_parameters() if n in step}
    _, wanted = jvp(lambda moved: functional_call(network, moved, (x,)), (primal,), (step,))
    chain = chain_of(network)
    (found,) = chain.along(chain.run(x).values, step)
    torch.testing.assert_close(found, wanted, **EXACT)
    assert float(found.abs().max()) > 1e-3


@pytest.mark.parametrize("moving", [{"2.bias"}, {"0.weight", "0.bias", "2.bias"}], ids=["alone", "with others"])
def test_a_bias_behind_a_weight_that_stays_moves_through_what_follows(moving):
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    x = torch.randn(6, 3).double()
    step = {n: torch.randn_like(p) for n, p in network.named_parameters() if n in moving}
    primal = {n: p.detach() for n, p in network.named_parameters() if n in step}
    _, wanted = jvp(lambda moved: functional_call(network, moved, (x,)), (primal,), (step,))
    chain = chain_of(network)
    (found,) = chain.along(chain.run(x).values, step)
    torch.testing.assert_close(found, wanted, **EXACT)


def test_an_expanded_parameter_moves_its_own_output_alone():
    network, x = actor()
    chain = chain_of(network)
    values = chain.run(x).values
    mean, log_std = chain.along(values, {"log_std": torch.tensor([1.0, 2.0]).double()})
    assert not mean.any()
    assert torch.equal(log_std, torch.tensor([1.0, 2.0]).double().expand(7, 2))


@pytest.mark.parametrize("combination", [None, LayerCombination()])
def test_an_optimizer_takes_the_same_steps_with_and_without_the_chain(combination):
    found = {}
    for by_chain in (True, False):
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).double()
        rule = StepRule(combination, corrections=2, statistics_period=2)
        optimizer = NaturalGradient(network, ScalarGaussian(), EKFAC(), fisher=ExactFisher(), radius=0.05, rule=rule)
        if not by_chain:
            optimizer._chain = None
        for _ in range(5):
            x, returns = torch.randn(20, 3).double(), torch.randn(20).double()
            record = optimizer.run(x)
            assert (type(record).__name__ == "ChainPass") == by_chain
            residual = record.outputs[0] - returns
            optimizer.update_curvature()
            optimizer.pull_back((residual / 20,))
            optimizer.step()
        found[by_chain] = torch.cat([p.detach().flatten() for p in network.parameters()])
    torch.testing.assert_close(found[True], found[False], rtol=1e-8, atol=1e-10)


def test_outputs_kept_from_before_a_step_do_not_follow_the_parameter():
    network, x = actor()
    chain = chain_of(network)
    _, before = chain.run(x).outputs
    kept = before.clone()
    with torch.no_grad():
        network.log_std.add_(1)
    assert torch.equal(before, kept)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def shared():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied():
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    network[2].weight = network[0].weight
    return network


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
        nn.Sequential(nn.Linear(3, 3), nn.Dropout()),
        nn.Sequential(Doubled(3, 3), nn.Tanh()),
        nn.Sequential(nn.Tanh()),
        shared(),
        tied(),
    ],
    ids=["layer norm", "dropout", "subclass", "no layer", "layer called twice", "two layers of one weight"],
)
def test_what_is_more_than_a_chain_is_none(network):
    assert chain_of(network) is None


def test_a_parameter_outside_of_the_chain_makes_it_none():
    network, _ = actor()
    network.scale = nn.Parameter(torch.ones(1))
    assert chain_of(network) is None


def test_who_listens_to_a_module_is_heard():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, heard = NaturalGradient(network, Categorical()), []
    assert type(optimizer.run(torch.randn(5, 3))).__name__ == "ChainPass"
    network[0].register_forward_hook(lambda *_: heard.append(1))
    assert type(optimizer.run(torch.randn(5, 3))).__name__ == "GraphPass"
    assert heard


def test_who_listens_to_the_whole_network_is_heard():
    network = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2))
    optimizer = NaturalGradient(network, Categorical())
    network.register_forward_hook(lambda *_: None)
    assert type(optimizer.run(torch.randn(5, 3))).__name__ == "GraphPass"


def test_layers_shared_over_places_go_by_autograd():
    optimizer = NaturalGradient(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), Categorical())
    assert type(optimizer.run(torch.randn(5, 7, 3))).__name__ == "GraphPass"


@pytest.mark.parametrize("flatten", [nn.Flatten(2), nn.Flatten(1, 2), nn.Flatten(), nn.Flatten(1, -1)], ids=repr)
def test_only_a_flatten_that_leaves_two_axes_begins_a_chain(flatten):
    x, classes = torch.randn(10, 3, 2, 3).double(), torch.randint(0, 3, (10,))
    width = flatten(x).shape[-1]
    places = flatten(x)[0].numel() // width
    head = nn.Linear(4 * places, 3)
    network = nn.Sequential(flatten, nn.Linear(width, 4), nn.Tanh(), nn.Flatten(), head).double()
    optimizer = NaturalGradient(network, Categorical(), EKFAC(), fisher=ExactFisher())
    assert optimizer.chain.takes((x,)) == (places == 1)
    record = optimizer.run(x)
    grads = record.outputs[0].softmax(-1) - nn.functional.one_hot(classes, 3)
    optimizer.pull_back((grads / 10,))
    wanted = torch.autograd.grad(nn.functional.cross_entropy(network(x), classes), list(network.parameters()))
    for p, grad in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, **EXACT)


def test_a_used_pass_is_refused():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = NaturalGradient(network, Categorical())
    record = optimizer.run(torch.randn(5, 3))
    optimizer.update_curvature()
    optimizer.pull_back((torch.randn(5, 2),))
    optimizer.step()
    with pytest.raises(RuntimeError, match="used up by a step"):
        record.pull_back((torch.randn(5, 2),), ["0"], {})
