"""One batch, one pass, curvature from a part of it: by autograd and by chains."""

import pytest
import torch
from torch import nn

from acktr import EKFAC, Categorical, EmpiricalFisher, NaturalGradient
from acktr.step import StepRule


def convnet():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)
    return nn.Sequential(*layers).double(), torch.randn(12, 1, 5, 5).double()


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(12, 4).double()


def moments(optimizer):
    members = optimizer.curvature.members
    return [m.value for member in members for m in (member.block.input_moment, member.block.output_moment)]


@pytest.mark.parametrize(("make", "rows"), [(convnet, slice(4)), (chain, slice(None, None, 3))], ids=["graph", "chain"])
def test_the_curvature_is_that_of_the_part_and_the_gradient_that_of_the_batch(make, rows):
    network, inputs = make()
    actions, grads = torch.randint(0, 3, (12,)), torch.randn(12, 3).double()
    optimizer = NaturalGradient(network, Categorical(), EKFAC(), fisher=EmpiricalFisher())
    passes = optimizer.observe(inputs, (actions,), examples=4)
    outputs = torch.cat([p.outputs[0] for p in passes])
    torch.testing.assert_close(outputs, network(inputs).detach())
    optimizer.pull_back((grads,), passes)
    found = [p.grad.clone() for p in network.parameters()]

    network.zero_grad()
    network(inputs).backward(grads)
    for grad, p in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-11, atol=1e-13)
    alone = NaturalGradient(network, Categorical(), EKFAC(), fisher=EmpiricalFisher())
    with alone.recording():
        network(inputs[rows])
    alone.update_curvature((actions[rows],))
    for of_part, expected in zip(moments(optimizer), moments(alone), strict=True):
        torch.testing.assert_close(of_part, expected, rtol=1e-11, atol=1e-13)
    # Negative control: the whole batch has other moments.
    whole = NaturalGradient(network, Categorical(), EKFAC(), fisher=EmpiricalFisher())
    whole.observe(inputs, (actions,))
    assert not any(torch.allclose(a, b) for a, b in zip(moments(whole), moments(alone), strict=True))


@pytest.mark.parametrize("make", [convnet, chain])
@pytest.mark.parametrize("examples", [12, 100, None])
def test_a_part_as_large_as_the_batch_is_the_batch(make, examples):
    network, inputs = make()
    optimizer = NaturalGradient(network, Categorical())
    assert [p.examples for p in optimizer.observe(inputs, examples=examples)] == [12]


@pytest.mark.parametrize("make", [convnet, chain])
def test_between_two_periods_the_batch_is_run_whole(make, monkeypatch):
    monkeypatch.setattr("acktr.optimizer.EAGER_PASSES", 1)
    network, inputs = make()
    optimizer = NaturalGradient(network, Categorical(), rule=StepRule(statistics_period=2))
    lengths, updates = [], []
    for _ in range(4):
        passes = optimizer.observe(inputs, examples=5)
        lengths.append(sum(p.examples for p in passes))
        updates.append((len(passes), optimizer._updates))
        optimizer.pull_back((torch.randn(12, 3).double(),), passes)
        optimizer.step()
    assert lengths == [12] * 4
    split = 2 if make is convnet else 1
    assert updates == [(split, 1), (1, 1), (split, 2), (1, 2)]
