"""What recording sees, what it refuses, and what it leaves alone."""

import weakref

import pytest
import torch
from torch import nn

from acktr.capture import Capture
from acktr.curvature import EKFAC, KFAC
from acktr.fisher import EmpiricalFisher
from acktr.layers import as_layer
from acktr.likelihood import Categorical, DiagonalGaussian
from acktr.optimizer import NaturalGradient


def hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in network.modules())


def watched(network):
    layers = [as_layer(name, module) for name, module in network.named_modules()]
    return Capture(network, [layer for layer in layers if layer is not None])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Hardtanh])
def test_activations_that_work_in_place_change_nothing(activation):
    inputs, seed = torch.randn(6, 4), torch.randn(6, 3)
    found = []
    for inplace in (False, True):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(4, 5), activation(inplace=inplace), nn.Linear(5, 3))
        capture = watched(network)
        with capture.recording():
            network(inputs)
        record = capture.last
        found.append(torch.autograd.grad(record.live_outputs, list(record.edges.values()), (seed,)))
    for separate, in_place in zip(*found, strict=True):
        assert torch.equal(separate, in_place)


def test_the_output_tensor_itself_would_have_been_wrong():
    network, kept = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), []
    network[0].register_forward_hook(lambda _m, _a, out: kept.append(out))
    out = network(torch.randn(6, 4))
    (found,) = torch.autograd.grad(out.sum(), kept)
    before_relu = network[2].weight.sum(0).expand_as(found)
    assert torch.allclose(found, before_relu)  # the gradient after the activation, not before it


def test_gradients_and_inputs_are_those_of_the_layer(oracle):
    network, inputs = oracle.mlp(4, 5, 3), torch.randn(6, 4)
    capture = watched(network)
    with capture.recording():
        network(inputs)
    record = capture.last
    assert record.examples == 6
    assert torch.equal(record.activations["0"], inputs)
    assert torch.equal(record.activations["2"], network[0](inputs).tanh())
    assert not record.activations["2"].requires_grad
    assert torch.equal(record.outputs[0], network(inputs))


def test_a_module_called_twice_is_refused_by_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(3, 3)

        def forward(self, x):
            return self.map(self.map(x))

    network = Twice()
    with pytest.raises(RuntimeError, match="layer 'map' was called twice"), watched(network).recording():
        network(torch.randn(2, 3))
    assert hooks(network) == 0


def test_a_network_called_twice_is_refused():
    network = nn.Sequential(nn.Flatten())
    with pytest.raises(RuntimeError, match="network was called twice"), Capture(network, []).recording():
        network(torch.randn(2, 3))
        network(torch.randn(2, 3))
    assert hooks(network) == 0


def test_a_network_never_called_is_refused(oracle):
    with pytest.raises(RuntimeError, match="call the network once"), watched(oracle.mlp(4, 3)).recording():
        pass
    with pytest.raises(RuntimeError, match="no pass was recorded"):
        _ = watched(oracle.mlp(4, 3)).last


def test_keywords_and_passes_without_gradients_are_refused():
    class Keyword(nn.Module):
        def forward(self, x):
            return x

    network = Keyword()
    with pytest.raises(RuntimeError, match=r"keywords \['x'\]"), Capture(network, []).recording():
        network(x=torch.ones(2))
    network = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="recorded without gradients"), watched(network).recording(), torch.no_grad():
        network(torch.ones(1, 3))


def test_hooks_live_inside_recording_only(oracle):
    network = oracle.mlp(4, 5, 3)
    optimizer = NaturalGradient(network, Categorical())
    assert hooks(network) == 0
    with torch.no_grad():  # a rollout
        network(torch.randn(2, 4))
    with optimizer.recording():
        assert hooks(network) == 4  # of two layers, and before and after the network
        network(torch.randn(2, 4))
    assert hooks(network) == 0
    with pytest.raises(ZeroDivisionError), optimizer.recording():
        raise ZeroDivisionError
    assert hooks(network) == 0


@pytest.mark.parametrize("factory", [EKFAC(), KFAC()])
def test_the_fisher_pass_touches_neither_gradients_nor_the_global_generator(factory, oracle):
    network, likelihood, inputs = oracle.case("joint")
    optimizer = NaturalGradient(network, likelihood, factory)
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in network.parameters()]
    state = torch.get_rng_state()
    with optimizer.recording():
        network(inputs)
    optimizer.update_curvature()
    assert all(torch.equal(p.grad, b) for p, b in zip(network.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    own = optimizer._generator.get_state()
    with optimizer.recording():
        network(inputs)
    optimizer.update_curvature()
    assert not torch.equal(optimizer._generator.get_state(), own)  # the draws came from somewhere


def test_frozen_layers_are_skipped_and_stay(oracle):
    network, likelihood, inputs = oracle.case("categorical")
    network[0].requires_grad_(False)
    optimizer = NaturalGradient(network, likelihood)
    assert [layer.name for layer in optimizer.curvature.layers] == ["2"]
    frozen, trained = network[0].weight.clone(), network[2].weight.clone()
    with optimizer.recording():
        logits = network(inputs)
    optimizer.update_curvature()
    logits[:, 0].mean().backward()
    optimizer.step()
    assert torch.equal(network[0].weight, frozen)
    assert not torch.equal(network[2].weight, trained)


class Spare(nn.Module):
    """A layer that is not called, or is called for nothing."""

    def __init__(self, called):
        super().__init__()
        self.used, self.spare, self.called = nn.Linear(3, 2), nn.Linear(3, 2), called

    def forward(self, x):
        if self.called:
            self.spare(x)
        return self.used(x)


@pytest.mark.parametrize("called", [False, True])
def test_a_layer_without_a_part_in_the_outputs_is_named(called):
    network = Spare(called)
    optimizer = NaturalGradient(network, Categorical())
    with optimizer.recording():
        network(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match=r"'spare'.*freeze it or leave it out"):
        optimizer.update_curvature()


def test_an_output_that_is_a_constant_costs_nothing():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Linear(3, 2)

        def forward(self, x):
            mean = self.mean(x)
            return mean, torch.zeros_like(mean)

    network = Fixed()
    optimizer = NaturalGradient(network, DiagonalGaussian())
    with optimizer.recording():
        mean, _ = network(torch.randn(4, 3))
    optimizer.update_curvature()
    mean.square().mean().backward()
    optimizer.step()
    assert optimizer.report.kl_measured == pytest.approx(1e-3, rel=0.11)


@pytest.mark.parametrize("gradient", [1.0, float("nan")])
def test_no_graph_outlives_the_step(oracle, gradient):
    network, likelihood, inputs = oracle.case("categorical")
    optimizer = NaturalGradient(network, likelihood)
    with optimizer.recording():
        logits = network(inputs)
    alive = weakref.ref(logits)
    optimizer.update_curvature()
    (gradient * logits[:, 0].mean()).backward()
    del logits
    assert alive() is not None
    optimizer.step()
    assert alive() is None


def test_a_pass_used_up_by_a_step_is_refused(oracle):
    network, likelihood, inputs = oracle.case("categorical")
    optimizer = NaturalGradient(network, likelihood)
    with optimizer.recording():
        logits = network(inputs)
    optimizer.update_curvature()
    logits[:, 0].mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="used up by a step"):
        optimizer.update_curvature()


def test_the_empirical_fisher_asks_for_targets(oracle):
    network, likelihood, inputs = oracle.case("categorical")
    optimizer = NaturalGradient(network, likelihood, fisher=EmpiricalFisher())
    with optimizer.recording():
        network(inputs)
    with pytest.raises(ValueError, match="needs the targets"):
        optimizer.update_curvature()
    optimizer.update_curvature((torch.zeros(len(inputs), dtype=torch.int64),))
    assert optimizer.curvature.ready
