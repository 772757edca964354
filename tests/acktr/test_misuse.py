"""Calls in the wrong order and things in the wrong place: one line that says what is right."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from acktr import EKFAC, KFAC, Bernoulli, Categorical, DiagonalGaussian, Joint, NaturalGradient, ScalarGaussian
from acktr.curvature import DenseFisher, Diagonal, ExactCG


def built(*sizes, curvature=None):
    sizes = sizes or (3, 8, 4)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return NaturalGradient(nn.Sequential(*layers[:-1]).double(), Categorical(), curvature or EKFAC())


def recorded(optimizer, size=3):
    with optimizer.recording():
        return optimizer.network(torch.randn(16, size))


def stepped(optimizer):
    logits = recorded(optimizer)
    optimizer.update_curvature()
    optimizer.zero_grad()
    F.cross_entropy(logits, torch.zeros(16, dtype=torch.long)).backward()
    optimizer.step()
    return optimizer


def test_a_step_needs_a_recorded_pass_of_its_own():
    optimizer = stepped(built())
    with pytest.raises(RuntimeError, match="nothing was recorded since the last step"):
        optimizer.step()
    stepped(optimizer)


def test_the_curvature_comes_before_the_loss():
    optimizer = built()
    recorded(optimizer).sum().backward()
    with pytest.raises(RuntimeError, match=r"update_curvature\(\) before the loss's backward\(\)"):
        optimizer.update_curvature()


class Heads(nn.Module):
    """Two outputs of one input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 1)

    def forward(self, rows):
        return self.first(rows), self.second(rows).squeeze(-1)


MLP = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("network", "likelihood", "message"),
    [
        (MLP, ScalarGaussian(), r"a ScalarGaussian reads value \[N\], and .* \[16, 1\]; end it in nn\.Flatten\(0\)$"),
        (nn.Linear(3, 2), ScalarGaussian(), r"reads value \[N\], and the network returned \[16, 2\]$"),
        (nn.Sequential(*MLP, nn.Flatten(0)), Categorical(), r"a Categorical reads logits \[N, C\], .* \[16\]$"),
        (MLP, DiagonalGaussian(), r"reads mean \[N, D\] and log_std \[N, D\], and the network returned \[16, 1\]$"),
        (Heads(), Categorical(), r"reads logits \[N, C\], and the network returned \[16, 2\] and \[16\]$"),
        (MLP, Joint(Categorical(), ScalarGaussian()), r"reads logits \[N, C\] and value \[N\], and .* \[16, 1\]$"),
        (nn.Sequential(*MLP, nn.Flatten(0)), Bernoulli(), r"a Bernoulli reads log-odds \[N, D\], .* \[16\]$"),
    ],
)
def test_outputs_that_a_likelihood_cannot_read(network, likelihood, message):
    optimizer = NaturalGradient(network.double(), likelihood, EKFAC())
    with optimizer.recording():
        network(torch.randn(16, 3))
    with pytest.raises(ValueError, match=message):
        optimizer.update_curvature()


def test_outputs_that_it_can_read():
    optimizer = NaturalGradient(Heads().double(), Joint(Categorical(), ScalarGaussian()), EKFAC())
    with optimizer.recording():
        optimizer.network(torch.randn(16, 3))
    optimizer.update_curvature()


class Sequences(nn.Module):
    """A layer over [N, T, 3] whose call the argument arranges, and a mean over T before the head."""

    def __init__(self, there=lambda x: x, back=lambda x: x):
        super().__init__()
        self.first, self.head, self.there, self.back = nn.Linear(3, 5), nn.Linear(5, 4), there, back

    def forward(self, x):
        return self.head(torch.tanh(self.back(self.first(self.there(x)))).mean(1))


BATCH_FIRST = {
    "sequences": Sequences(),
    "images": nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 4)),
    "flattened": nn.Sequential(nn.Flatten(), nn.Linear(12, 4)),
}
NOT_BATCH_FIRST = {
    "time first": (Sequences(lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)), r"\[4, 16, 3\]"),
    "flattened": (Sequences(lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, (16, 4))), r"\[64, 3\]"),
}


def recorded_statistics(network, curvature, shape=(16, 4, 3)):
    optimizer = NaturalGradient(network.double(), Categorical(), curvature)
    with optimizer.recording():
        network(torch.randn(*shape))
    optimizer.update_curvature()
    return optimizer.curvature


CURVATURES = [EKFAC(), Diagonal(), DenseFisher(), ExactCG(preconditioner=KFAC())]


@pytest.mark.parametrize("arrangement", NOT_BATCH_FIRST)
@pytest.mark.parametrize("curvature", CURVATURES, ids=lambda c: type(c).__name__)
def test_a_layer_whose_first_axis_is_not_the_batch_is_named(curvature, arrangement):
    network, shape = NOT_BATCH_FIRST[arrangement]
    message = (
        rf"layer 'first' was called with shape {shape}, .* of the 16 examples; give it \[16, \.\.\.\], batch first"
    )
    with pytest.raises(ValueError, match=message):
        recorded_statistics(network, curvature)


@pytest.mark.parametrize("arrangement", BATCH_FIRST)
@pytest.mark.parametrize("curvature", CURVATURES, ids=lambda c: type(c).__name__)
def test_layers_with_more_axes_behind_the_batch_s_are_taken(curvature, arrangement):
    shape = (16, 1, 3, 3) if arrangement == "images" else (16, 4, 3)
    assert recorded_statistics(BATCH_FIRST[arrangement], curvature, shape).ready


@pytest.mark.parametrize("curvature", CURVATURES, ids=lambda c: type(c).__name__)
def test_an_empty_batch_is_refused(curvature):
    with pytest.raises(ValueError, match="the recorded batch is empty"):
        recorded_statistics(Sequences(), curvature, (0, 4, 3))


def test_a_dense_fisher_needs_a_layer():
    with pytest.raises(ValueError, match=r"trains no Linear or Conv2d layer.* take Diagonal\(\)"):
        NaturalGradient(nn.Embedding(6, 3), Categorical(), DenseFisher())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_by_the_parameter_s_name(dtype):
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4).to(dtype)).float()
    network[1].weight.data = network[1].weight.data.to(dtype)
    with pytest.raises(ValueError, match=rf"'1\.weight' is in {dtype}, .* parameters in float32.*torch\.autocast"):
        NaturalGradient(network, Categorical(), KFAC())
    network[1].weight.requires_grad_(False)
    NaturalGradient(network, Categorical(), KFAC())
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)).float()
    optimizer = NaturalGradient(network, Categorical(), KFAC())
    with torch.autocast("cpu", dtype), optimizer.recording():  # the remedy
        logits = network(torch.randn(16, 3).float())
    optimizer.update_curvature()
    F.cross_entropy(logits.float(), torch.zeros(16, dtype=torch.long)).backward()
    optimizer.step()
    assert optimizer.report.scale > 0


def test_a_parameter_that_is_frozen_later_is_named():
    optimizer = stepped(built())
    optimizer.network[2].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'2\.bias' was frozen after"):
        recorded(optimizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda network: (network.parameters(), Categorical()), "the network itself, not its parameters"),
        (lambda network: (network, Categorical), r"an object such as Categorical\(\)"),
        (lambda network: (network, F.cross_entropy), r"an object such as Categorical\(\)"),
        (lambda network: (network, Categorical(), EKFAC), r"write EKFAC\(\)"),
    ],
)
def test_things_in_the_wrong_place_are_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        NaturalGradient(*arguments(nn.Linear(3, 2)))


OTHERS = {
    "curvature": (lambda: stepped(built(curvature=KFAC())).state_dict(), "the state of a KFAC, .* has a EKFAC"),
    "network": (lambda: stepped(built(3, 5, 4)).state_dict(), r"'0\.weight' has shape \[5, 3\], not \[8, 3\]"),
    "optimizer": (
        lambda: torch.optim.Adam(built().network.parameters()).state_dict(),
        "of another kind of optimizer",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_something_else_is_refused_and_changes_nothing(other):
    make, message = OTHERS[other]
    optimizer = stepped(built())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["natural"]["counters"] == before["natural"]["counters"]
    fresh = built()
    fresh.load_state_dict(before)  # the control
    del before["natural"]["identity"]
    fresh.load_state_dict(before)  # an older one
