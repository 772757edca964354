"""Groups of rows with weights of their own: what each network by itself would find, in one pass."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from acktr import EKFAC, DiagonalGaussian, ExactFisher, NaturalGradient
from acktr.chain import Chain, Links
from acktr.curvature.members import known_fisher
from acktr.ensemble import Ensemble
from acktr.step import StepRule

GROUPS, EACH = 3, 4
EXACT = {"rtol": 1e-11, "atol": 1e-13}  # float64, the same products in another order


class Actor(nn.Module):
    """A mean that is a chain and a log standard deviation that is a parameter."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU())
        self.mean, self.log_std = nn.Linear(4, 2), nn.Parameter(torch.randn(2))

    def forward(self, x):
        mean = self.mean(self.body(x))
        return mean, self.log_std.expand_as(mean)

    def links(self):
        return Links([self.body, self.mean], [self.log_std])


@pytest.fixture
def crowd():
    network, x = Actor(), torch.randn(GROUPS * EACH, 3, 2)
    chain = Chain.of(network, dict(network.named_parameters()))
    named = {n: p.detach() for n, p in network.named_parameters() if n != "log_std"}
    deviations = {name: 0.3 * torch.randn(GROUPS, *p.shape) for name, p in named.items()}
    return network, x, chain, Ensemble.around(chain, deviations), deviations


def one_by_one(network, x, deviations, function):
    """Apply a function of (parameters, rows) to each group's own network."""
    out = []
    for k, rows in enumerate(x.chunk(GROUPS)):
        moved = {n: p + deviations[n][k] if n in deviations else p for n, p in network.named_parameters()}
        out.append(function(moved, rows))
    return out


def test_every_group_is_seen_by_its_own_network(crowd):
    network, x, chain, ensemble, deviations = crowd
    with torch.no_grad():
        expected = torch.cat(one_by_one(network, x, deviations, lambda p, r: functional_call(network, p, (r,))[0]))
        for found in (ensemble.outputs(x), ensemble.fixed().outputs(x), ensemble.run(x).outputs):
            torch.testing.assert_close(found[0], expected, **EXACT)
            torch.testing.assert_close(found[1], network.log_std.detach().expand(len(x), 2), **EXACT)
        assert not torch.allclose(chain.outputs(x)[0], expected)
        network.mean.bias += 1
        torch.testing.assert_close(ensemble.outputs(x)[0], expected + 1, **EXACT)


def test_gradients_and_changes_along_a_step_are_autograds(crowd):
    network, x, chain, ensemble, deviations = crowd
    seed = torch.randn(len(x), 2), torch.randn(len(x), 2)
    seeds = list(zip(*(s.chunk(GROUPS) for s in seed), strict=True))

    def loss(parameters, rows, own):
        return sum((o * s).sum() for o, s in zip(functional_call(network, parameters, (rows,)), own, strict=True))

    gradients = []
    for own in one_by_one(network, x, deviations, lambda p, r: (p, r)):
        parameters, rows = own
        gradients.append(torch.func.grad(loss)(parameters, rows, seeds[len(gradients)]))
    with torch.no_grad():
        ensemble.run(x).accumulate(seed, dict(network.named_parameters()))
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.grad, sum(g[name] for g in gradients), **EXACT)
        plain = {name: p.grad.clone() for name, p in network.named_parameters()}
        network.zero_grad()
        chain.run(x).accumulate(seed, dict(network.named_parameters()))
        assert not torch.allclose(network.mean.weight.grad, plain["mean.weight"])
        step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
        for some in (step, {"body.1.weight": step["body.1.weight"]}, {"mean.bias": step["mean.bias"]}):
            record = ensemble.run(x)
            found = record.chain.along(record.values, some)

            def along(p, r, some=some):
                whole = {n: some.get(n, torch.zeros_like(t)) for n, t in p.items()}
                return torch.func.jvp(lambda q: functional_call(network, q, (r,)), (p,), (whole,))[1]

            expected = zip(*one_by_one(network, x, deviations, along), strict=True)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, torch.cat(theirs), **EXACT)


@pytest.mark.parametrize(("examples", "left"), [(None, 12), (12, 12), (6, 6), (5, 6), (3, 3), (1, 3)])
def test_a_part_keeps_the_groups_equal(crowd, examples, left):
    _, x, _, ensemble, _ = crowd
    with torch.no_grad():
        record = ensemble.run(x)
        part = record.part(examples, torch.Generator())
        assert part.examples == left
        rows = x[record.spread(examples)]
        torch.testing.assert_close(part.outputs[0], ensemble.outputs(rows)[0], **EXACT)
        seed = (torch.randn(left, 2), torch.zeros(left, 2))
        found = part.pull_back(seed, ["body.1"], {})["body.1"]
        wanted = ensemble.run(rows).pull_back(seed, ["body.1"], {})["body.1"]
        torch.testing.assert_close(found, wanted, **EXACT)


def test_a_step_is_measured_at_every_groups_own_weights(crowd):
    """Curvature, forms and KL are the ensemble's, and the step meets the radius there."""
    network, x, _, ensemble, deviations = crowd
    optimizer = NaturalGradient(
        network,
        DiagonalGaussian(),
        EKFAC(),
        radius=1e-3,
        fisher=ExactFisher(),
        rule=StepRule(),
        blocks={"log_std": known_fisher(2.0)},
    )
    with torch.no_grad():
        before = one_by_one(
            network, x, deviations, lambda p, r: tuple(o.clone() for o in functional_call(network, p, (r,)))
        )
        plain_before = tuple(o.clone() for o in network(x))
        with optimizer.through(ensemble):
            optimizer.observe(x)
            optimizer.pull_back((torch.randn(len(x), 2), torch.randn(len(x), 2)))
            optimizer.descend()
        assert optimizer.chain is not ensemble
        after = one_by_one(network, x, deviations, lambda p, r: functional_call(network, p, (r,)))
        measured = (
            sum(optimizer.likelihood.divergence(b, a).mean() for b, a in zip(before, after, strict=True)) / GROUPS
        )
        assert optimizer.report.kl_measured == pytest.approx(float(measured), rel=1e-9)
        assert optimizer.report.kl_measured == pytest.approx(1e-3, rel=0.11)
        assert optimizer.report.kl_predicted == pytest.approx(1e-3, rel=0.3)
        plain = float(optimizer.likelihood.divergence(plain_before, network(x)).mean())
        assert abs(plain - float(measured)) > 1e-3 * float(measured)


def test_the_curvature_is_that_of_every_groups_own_pass(crowd):
    network, x, _, ensemble, deviations = crowd

    def moment(parameters, rows):
        body = {name[5:]: t for name, t in parameters.items() if name.startswith("body.")}
        a = torch.cat([functional_call(network.body, body, (rows,)), torch.ones(len(rows), 1)], dim=1)
        return a.mT @ a / len(x)

    expected = sum(one_by_one(network, x, deviations, moment))
    found = []
    for drawn in (True, False):
        optimizer = NaturalGradient(network, DiagonalGaussian(), EKFAC(), blocks={"log_std": known_fisher(2.0)})
        with torch.no_grad(), optimizer.through(ensemble if drawn else optimizer.chain):
            optimizer.observe(x)
        (member,) = (m for m in optimizer.curvature.members if m.name == "mean")
        found.append(member.block.input_moment.value)
    torch.testing.assert_close(found[0], expected.detach(), **EXACT)
    assert not torch.allclose(found[1], expected)
