"""Networks that draw or learn as they run are measured as the same function twice, and trained like any other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from acktr import EKFAC, KFAC, Categorical, NaturalGradient, StepRule
from acktr.trust_region import BlockMetric
from acktr.wake import WakeQ, WakeQE

PLAIN = StepRule(combination=None, metric=BlockMetric())


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(24, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.last(self.layer(self.first(x.view(len(x), 3, 2))).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.LSTM(2, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.layer(x.view(len(x), 3, 2))[0][:, -1])


NETWORKS = {
    "dropout": lambda: nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)),
    "attention": Attentive,
}


def data():
    x = torch.randn(256, 6)
    return x, x[:, :3].argmax(1)


def step(optimizer, x, y):
    with optimizer.recording():
        logits = optimizer.network(x)
    optimizer.update_curvature()
    optimizer.zero_grad()
    F.cross_entropy(logits, y).backward()
    optimizer.step()


@pytest.mark.parametrize("rule", [None, PLAIN], ids=["exact", "blocks"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_draws_or_learns_is_trained(kind, rule):
    network, (x, y) = NETWORKS[kind]().double(), data()
    optimizer = NaturalGradient(network, Categorical(), EKFAC(), radius=1e-2, rule=rule)
    for _ in range(40):
        step(optimizer, x, y)
    network.eval()
    assert float(F.cross_entropy(network(x), y)) < 0.5  # 1.1 at the start
    assert not optimizer.skipped


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_a_network_that_stays_is_no_distance_away(kind):
    network, (x, y) = NETWORKS[kind]().double(), data()
    optimizer = NaturalGradient(network, Categorical(), EKFAC(), radius=1e-2, lr=0.0)
    step(optimizer, x, y)
    assert not optimizer.report.kl_measured
    # The control: by itself it answers otherwise a second time, or in evaluation.
    first = network(x)
    assert not torch.equal(first, (network if kind == "dropout" else network.eval())(x))


def test_a_step_draws_once_and_learns_once():
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = data()
    optimizer = NaturalGradient(network, Categorical(), EKFAC(), radius=1e-2)
    torch.manual_seed(3)
    network(x)
    state, mean = torch.get_rng_state(), network[1].running_mean.clone()
    network[1].reset_running_stats()
    torch.manual_seed(3)
    step(optimizer, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert network[1].num_batches_tracked == 1
    assert torch.equal(network[1].running_mean, mean)
    assert network[1].track_running_stats


@pytest.mark.parametrize("examples", [None, 64])
def test_a_wake_with_exact_divergences_draws_once_and_learns_once(examples):
    x, y = data()
    ends = []
    for wake in (WakeQ(), WakeQE()):
        torch.manual_seed(1)
        norm = nn.BatchNorm1d(8, affine=False)
        network = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
        optimizer = NaturalGradient(network, Categorical(), KFAC(), rule=StepRule(wake=wake, examples=examples))
        for count in range(1, 4):
            step(optimizer, x, y)
            assert norm.num_batches_tracked == count
        ends.append((torch.get_rng_state(), network[0].weight.detach().clone()))
    if examples is None:  # a part of the batch has no masks of its own to repeat, and each exact form draws some
        assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1]), "the inner steps were taken"


def test_what_cannot_be_differentiated_forwards_says_what_can_be_done():
    network, (x, y) = Recurrent().float(), data()  # in double precision torch has another way
    x = x.float()
    with pytest.raises(RuntimeError, match=r"forwards, and \w+ cannot be; take StepRule\(combination=None"):
        step(NaturalGradient(network, Categorical(), EKFAC()), x, y)
    step(NaturalGradient(network, Categorical(), EKFAC(), rule=PLAIN), x, y)
