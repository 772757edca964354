"""The whole network's curvature: parameters without a layer, subsets of rows, and what is refused."""

import logging

import pytest
import torch
from torch import nn

from acktr.capture import Capture
from acktr.curvature import EKFAC, KFAC, BlockDiagonal, DenseFisher, Diagonal
from acktr.curvature.members import known_fisher
from acktr.fisher import ExactFisher, SampledFisher
from acktr.likelihood import Categorical, DiagonalGaussian
from acktr.optimizer import NaturalGradient

LIMIT = 5  # standard errors; tens of entries each, so chance alone would fail about one seed in 10⁵


def normed():
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def diagonal_of(network, factory, rules=None):
    return BlockDiagonal(network, dict(network.named_parameters()), factory, rules)


def recorded(network, layers, inputs):
    capture = Capture(network, layers)
    with capture.recording():
        network(inputs)
    return capture.last


@pytest.mark.parametrize("seeds", [SampledFisher(1), SampledFisher(3), ExactFisher()], ids=["one", "three", "exact"])
def test_the_fallback_s_diagonal_is_unbiased(seeds, oracle):
    network, likelihood, inputs = normed(), Categorical(), torch.randn(6, 4)
    with torch.no_grad():
        network[1].weight.uniform_(0.5, 2)
        network[3].weight.mul_(3)
    diagonal = oracle.unflat(oracle.fisher(network, likelihood, inputs).diagonal(), network)
    curvature = BlockDiagonal(network, dict(network.named_parameters()), Diagonal(ema=0.0))
    blocks = {m.name: m.block for m in curvature.members if m.layer is None}
    assert set(blocks) == {"1.weight", "1.bias"}
    generator = torch.Generator().manual_seed(5)
    record = recorded(network, curvature.layers, inputs)
    draws = {name: [] for name in blocks}
    for _ in range(600):
        curvature.update(record, seeds(likelihood, record.outputs, None, generator), True, generator)
        for name, block in blocks.items():
            draws[name].append(block.squares.value[0])
    for name, values in draws.items():
        values = torch.stack(values)
        assert oracle.z_scores(values, diagonal[name]).max() < LIMIT
        assert oracle.z_scores(values / 3, diagonal[name]).max() > LIMIT


def test_the_fallback_starts_from_the_parameter_s_mean_and_forgets_it():
    block = diagonal_of(normed(), EKFAC(ema=0.9)).members[-1].block
    sums = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    block.update_from_sums(sums, 1)
    ones = torch.ones(1, 5)
    assert torch.allclose(block.multiply(ones), torch.full((1, 5), 6.0))
    for _ in range(999):
        block.update_from_sums(sums, 1)
    assert torch.allclose(block.multiply(ones), sums.square(), atol=0.01)


def test_a_parameter_without_a_layer_is_named_once_in_the_log(caplog):
    with caplog.at_level(logging.WARNING, logger="acktr"):
        diagonal_of(normed(), EKFAC())
    assert [r.getMessage().split("'")[1] for r in caplog.records] == ["1.weight", "1.bias"]
    caplog.clear()
    rules = {"1.weight": known_fisher(1.0), "1.bias": known_fisher(1.0)}
    diagonal_of(normed(), EKFAC(), rules)
    assert not caplog.records


def test_rows_are_refused_by_a_block_without_a_layer(oracle):
    block = diagonal_of(normed(), EKFAC()).members[-1].block
    with pytest.raises(TypeError, match="5 free parameters"):
        block.update(oracle.statistics())


def test_a_known_fisher_stands_in_the_dense_one(oracle):
    network, inputs = oracle.GaussianActor((4, 2)), torch.randn(6, 4)
    dense = oracle.fisher(network, DiagonalGaussian(), inputs)
    mine = oracle.unflat(torch.arange(len(dense)), network)["log_std"]
    assert torch.allclose(dense[mine][:, mine], 2 * torch.eye(2))
    rules = {"log_std": known_fisher(2.0)}
    curvature = oracle.curvature(network, DiagonalGaussian(), EKFAC(), inputs, rules=rules)
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    assert torch.allclose(curvature.multiply(step)["log_std"], 2 * step["log_std"])
    assert torch.allclose(curvature.solve(step, 0.5)["log_std"], step["log_std"] / 2.5)


@pytest.mark.parametrize("kind", ["categorical", "conv"])
def test_subsets_of_rows_are_unbiased(kind, oracle):
    network, likelihood, inputs = oracle.case(kind, examples=12)
    with torch.no_grad():
        inputs[0] *= 5  # one example that matters shows whether it is drawn as often as it should
    whole = oracle.curvature(network, likelihood, KFAC(ema=0.0), inputs)
    parameters = dict(network.named_parameters())
    part = BlockDiagonal(network, parameters, KFAC(ema=0.0), max_rows=45 if kind == "conv" else 5)
    record = recorded(network, part.layers, inputs)
    seeds = ExactFisher()(likelihood, record.outputs, None, None)
    generator = torch.Generator().manual_seed(6)
    draws = []
    for _ in range(300):
        part.update(record, seeds, refresh=False, generator=generator)
        block = part.members[0].block
        draws.append((block.input_moment.value, block.output_moment.value))
    first = whole.members[0].block
    for side, moment in enumerate((first.input_moment, first.output_moment)):
        values = torch.stack([draw[side] for draw in draws])
        assert values.std(0).max() > 0.01 * moment.value.abs().max()  # subsets differ, or this test would prove nothing
        assert oracle.z_scores(values, moment.value).max() < LIMIT
        assert oracle.z_scores(values, 1.3 * moment.value).max() > LIMIT


def test_a_batch_with_few_rows_is_taken_whole(oracle):
    network, likelihood, inputs = oracle.case("categorical", examples=12)
    whole = oracle.curvature(network, likelihood, KFAC(), inputs).members[0].block
    part = BlockDiagonal(network, dict(network.named_parameters()), KFAC(), max_rows=12)
    record = recorded(network, part.layers, inputs)
    part.update(record, ExactFisher()(likelihood, record.outputs, None, None), refresh=True)
    assert torch.equal(part.members[0].block.input_moment.value, whole.input_moment.value)


@pytest.mark.parametrize("factory", [EKFAC(), KFAC(), Diagonal()])
@pytest.mark.parametrize("network", [lambda: nn.Linear(4, 3), normed], ids=["layers", "free"])
def test_statistics_that_are_not_finite_are_not_taken_in(factory, network, oracle):
    network = network()
    if isinstance(network, nn.Linear):
        parameters = dict(network.named_parameters())
    else:
        parameters = {name: p for name, p in network.named_parameters() if name.startswith("1")}
        network[0].requires_grad_(False)
        network[3].requires_grad_(False)
    curvature = BlockDiagonal(network, parameters, factory)
    good = recorded(network, curvature.layers, torch.randn(6, 4))
    seeds = ExactFisher()(Categorical(), good.outputs, None, None)
    assert curvature.update(good, seeds, True, torch.Generator())
    before = curvature.solve(dict(parameters), 0.1)
    bad = recorded(network, curvature.layers, torch.full((6, 4), float("nan")))
    assert not curvature.update(bad, seeds, True, torch.Generator())
    after = curvature.solve(dict(parameters), 0.1)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pieces_join_to_the_whole(oracle):
    network, likelihood, inputs = oracle.case("joint")
    curvature = oracle.curvature(network, likelihood, EKFAC(), inputs)
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    pieces = curvature.split(step)
    assert len(pieces) == len(curvature.members) == 3
    joined = {name: t for piece in pieces for name, t in piece.items()}
    assert set(joined) == set(step)
    assert all(torch.equal(joined[name], step[name]) for name in step)
    total = sum(float((step[name] * curvature.multiply(step)[name]).sum()) for name in step)
    assert float(curvature.quadratic(step)) == pytest.approx(total)


def test_a_shared_trunk_adds_the_fishers_of_both_heads(oracle):
    network, likelihood, inputs = oracle.case("joint")
    both = oracle.curvature(network, likelihood, EKFAC(), inputs).members[0].block.output_moment.value

    def alone(part, pick):
        capture = Capture(network, curvature.layers)
        with capture.recording():
            network(inputs)
        outputs = capture.last.outputs
        seeds = part.factors(outputs[pick])
        silent = [torch.zeros_like(o) for o in outputs]
        filled = []
        for seed in seeds:
            row = list(silent)
            row[pick] = seed
            filled.append(tuple(row))
        curvature.update(capture.last, filled, True)
        return curvature.members[0].block.output_moment.value

    curvature = BlockDiagonal(network, dict(network.named_parameters()), KFAC(ema=0.0))
    policy = alone(likelihood.policy, slice(0, 1))
    value = alone(likelihood.value, slice(1, 2))
    assert torch.allclose(policy + value, both)
    assert not torch.allclose(policy, both)


class Tied(nn.Module):
    """Classes read by the matrix that embeds them."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)))


@pytest.mark.parametrize("curvature", [EKFAC(), DenseFisher()], ids=lambda c: type(c).__name__)
def test_a_layer_that_shares_its_matrix_with_another_module_is_refused(curvature):
    message = r"layers 'embedding' and 'head' share the parameter 'embedding\.weight'.*give each its own, or freeze it"
    with pytest.raises(ValueError, match=message):
        NaturalGradient(Tied().double(), Categorical(), curvature)
    NaturalGradient(Tied(tied=False).double(), Categorical(), curvature)


def test_two_layers_with_one_weight_are_refused_by_name():
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    with pytest.raises(ValueError, match=r"layers '0' and '2' share the parameter '0\.weight'"):
        diagonal_of(network, EKFAC())


def test_the_state_of_another_network_is_refused(oracle):
    network, likelihood, inputs = oracle.case("joint")
    state = oracle.curvature(network, likelihood, EKFAC(), inputs).state_dict()
    other = diagonal_of(oracle.mlp(4, 3), EKFAC())
    with pytest.raises(ValueError, match="curvature state is of blocks"):
        other.load_state_dict(state)


def test_diagnostics_count_conditions_and_skips(oracle):
    network, likelihood, inputs = oracle.case("joint")
    curvature = oracle.curvature(network, likelihood, EKFAC(), inputs)
    diagnostics = curvature.diagnostics()
    assert diagnostics["condition"] > 1
    assert diagnostics["skipped_refreshes"] == 0
