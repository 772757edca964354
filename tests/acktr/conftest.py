"""Oracles: the engine's quantities written the slow and obvious way, in float64."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from acktr.capture import Capture
from acktr.curvature import BlockDiagonal, Place, Statistics
from acktr.fisher import ExactFisher
from acktr.likelihood import Categorical, DiagonalGaussian, Joint, ScalarGaussian

EXAMPLES = 7


@pytest.fixture(autouse=True)
def _double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class GaussianActor(nn.Module):
    """A mean from an MLP, a log standard deviation that no state changes."""

    def __init__(self, sizes, init=-0.3):
        super().__init__()
        self.mean = mlp(*sizes)
        self.log_std = nn.Parameter(torch.full((sizes[-1],), init))

    def forward(self, x):
        mean = self.mean(x)
        return mean, self.log_std.expand_as(mean)


class GaussianHeads(nn.Module):
    """Mean and log standard deviation both from the input."""

    def __init__(self):
        super().__init__()
        self.trunk, self.mean, self.log_std = mlp(4, 5), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x):
        features = self.trunk(x).tanh()
        return self.mean(features), self.log_std(features)


class ActorCritic(nn.Module):
    """A shared trunk with logits and a value."""

    def __init__(self):
        super().__init__()
        self.trunk, self.logits, self.value = mlp(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x):
        features = self.trunk(x).tanh()
        return self.logits(features), self.value(features).squeeze(-1)


def mlp(*sizes):
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


CASES = {
    "categorical": lambda: (mlp(4, 5, 3), Categorical()),
    "gaussian": lambda: (GaussianHeads(), DiagonalGaussian()),
    "scalar": lambda: (nn.Sequential(mlp(4, 5, 1), nn.Flatten(0)), ScalarGaussian(2.5)),
    "joint": lambda: (ActorCritic(), Joint(Categorical(), ScalarGaussian(0.5))),
    "conv": lambda: (convnet(), Categorical()),
}


class Oracle:
    """Reference implementations; one instance for the whole run, without state."""

    mlp = staticmethod(mlp)
    convnet = staticmethod(convnet)
    GaussianActor = GaussianActor
    ActorCritic = ActorCritic

    def case(self, kind, examples=EXAMPLES):
        """Network, likelihood and inputs of one kind; scaled up so that nothing is near-linear by accident."""
        network, likelihood = CASES[kind]()
        shape = (2, 5, 5) if kind == "conv" else (4,)
        for parameter in network.parameters():
            parameter.data.mul_(1.5)
        return network, likelihood, torch.randn(examples, *shape)

    def outputs(self, network, inputs):
        out = network(inputs)
        return (out,) if isinstance(out, torch.Tensor) else tuple(out)

    def parameters(self, network):
        return {name: p.detach() for name, p in network.named_parameters()}

    def flat(self, tensors):
        return torch.cat([t.flatten() for t in tensors.values()])

    def unflat(self, vector, network):
        pieces = vector.split([p.numel() for p in network.parameters()])
        return {name: v.view_as(p) for (name, p), v in zip(network.named_parameters(), pieces, strict=True)}

    def jacobian(self, network, inputs):
        """Shape [N, D, P]: every output of every example by every parameter, by reverse mode."""

        def outputs(parameters):
            out = functional_call(network, parameters, (inputs,))
            out = (out,) if isinstance(out, torch.Tensor) else out
            return torch.cat([o.reshape(len(inputs), -1) for o in out], dim=1)

        by_name = jacrev(outputs)(self.parameters(network))
        return torch.cat([j.flatten(2) for j in by_name.values()], dim=2)

    def units(self, outputs):
        """Unit tangents of the outputs, [D, N, ...] for each."""
        sizes = [o[0].numel() for o in outputs]
        eye = torch.eye(sum(sizes)).split(sizes, dim=1)
        return [
            tuple(e[d].view(o[0].shape).expand_as(o) for e, o in zip(eye, outputs, strict=True))
            for d in range(sum(sizes))
        ]

    def output_fisher(self, likelihood, outputs):
        """F_out by the likelihood's bilinear form, shape [N, D, D]."""
        units = self.units(outputs)
        rows = [torch.stack([likelihood.inner(outputs, u, v) for v in units], dim=1) for u in units]
        return torch.stack(rows, dim=1)

    def fisher(self, network, likelihood, inputs):
        """E_n[J_nᵀ F_out J_n], shape [P, P], parameters in the network's order."""
        J = self.jacobian(network, inputs)
        with torch.no_grad():
            F_out = self.output_fisher(likelihood, self.outputs(network, inputs))
        return torch.einsum("ndp,nde,neq->pq", J, F_out, J) / len(inputs)

    def block_of(self, fisher, member, network):
        """The dense Fisher's rows and columns of one block, in the order of its matrix's row-major entries."""
        index = self.unflat(torch.arange(len(fisher)), network)
        places = member.pack(index).flatten()
        return fisher[places][:, places]

    def curvature(self, network, likelihood, factory, inputs, seeds=None, rules=None, updates=1):
        """A `BlockDiagonal` that has seen the batch."""
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        curvature = BlockDiagonal(network, trained, factory, rules)
        for _ in range(updates):
            capture = Capture(network, curvature.layers)
            with capture.recording():
                network(inputs)
            outputs = capture.last.outputs
            seed_list = (seeds or ExactFisher())(likelihood, outputs, None, torch.Generator().manual_seed(0))
            assert curvature.update(capture.last, seed_list, refresh=True, generator=torch.Generator().manual_seed(0))
        return curvature

    def recorded(self, network, likelihood, curvature, inputs):
        """The rows of every layer by its name, with the exact Fisher's seeds."""
        capture = Capture(network, curvature.layers)
        with capture.recording():
            network(inputs)
        record = capture.last
        seeds = ExactFisher()(likelihood, record.outputs, None, None)
        grads = [record.pull_back(seed, [layer.name for layer in curvature.layers], {}) for seed in seeds]
        return {
            layer.name: Statistics(
                layer.inputs(record.inputs_of(layer.name)),
                torch.stack([layer.output_grads(g[layer.name]) for g in grads]),
            )
            for layer in curvature.layers
        }

    def statistics(self, examples=9, outputs=3, inputs=4, seeds=2, positions=1):
        """Random rows whose inputs and output gradients depend on each other, unlike K-FAC's assumption."""
        a = torch.randn(examples, positions, inputs)
        g = torch.randn(seeds, examples, positions, outputs) * a[..., :1].abs()
        return Statistics(a, g)

    def built(self, factory, statistics):
        """One block that has seen these rows once."""
        block = factory.build(Place((statistics.output_grads.shape[-1], statistics.inputs.shape[-1])))
        block.update(statistics)
        block.refresh()
        block.rescale(statistics)
        block.follow(statistics.weighted_sum(torch.linspace(-1, 2, statistics.examples).to(statistics.inputs)))
        return block

    def z_scores(self, draws, expected):
        """How many standard errors the mean of draws [M, ...] lies from what is expected; exact agreement is 0."""
        error = draws.std(0) / len(draws) ** 0.5
        gap = (draws.mean(0) - expected).abs()
        return torch.where(gap < 1e-12, 0.0, gap / error.clamp_min(1e-15))


@pytest.fixture(scope="session")
def oracle():
    return Oracle()
