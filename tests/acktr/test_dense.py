"""The dense Fisher of layers and of whole networks against the one from Jacobians."""

import pytest
import torch
from torch import nn

from acktr.capture import Capture
from acktr.curvature import EKFAC, DenseBlocks, DenseFisher, Place, curvature_over
from acktr.curvature.base import MAX_FAILURES
from acktr.curvature.members import known_fisher
from acktr.fisher import ExactFisher, SampledFisher
from acktr.likelihood import Categorical, DiagonalGaussian, ScalarGaussian
from acktr.linalg import DecompositionError

ROUNDING = 1e-10  # float64, at most a hundred parameters with gradients of order one
DAMPING = 0.1


def over(network, settings=None, rules=None):
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    return curvature_over(settings or DenseFisher(), network, trained, rules)


def fed(curvature, network, likelihood, inputs, seeds=None, refresh=True):
    capture = Capture(network, curvature.layers)
    with capture.recording():
        network(inputs)
    generator = torch.Generator().manual_seed(0)
    seed_list = (seeds or ExactFisher())(likelihood, capture.last.outputs, None, generator)
    assert curvature.update(capture.last, seed_list, refresh, generator)
    return curvature


def random_step(network):
    return {name: torch.randn_like(p) for name, p in network.named_parameters()}


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "scalar", "joint", "conv"])
def test_it_is_the_fisher(kind, oracle):
    network, likelihood, inputs = oracle.case(kind)
    F, step = oracle.fisher(network, likelihood, inputs), random_step(network)
    curvature = fed(over(network), network, likelihood, inputs)
    V = oracle.flat(step)
    assert torch.allclose(oracle.flat(curvature.multiply(step)), F @ V, atol=ROUNDING)
    assert float(curvature.quadratic(step)) == pytest.approx(float(V @ F @ V))
    expected = torch.linalg.solve(F + DAMPING * torch.eye(len(F)), V)
    assert torch.allclose(oracle.flat(curvature.solve(step, DAMPING)), expected, atol=1e-8)
    # Negative control: layer by layer it is another matrix.
    layers = fed(over(network, DenseBlocks()), network, likelihood, inputs)
    assert float((oracle.flat(layers.multiply(step)) - F @ V).norm() / (F @ V).norm()) > 1e-2


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "scalar", "joint", "conv"])
def test_its_blocks_are_the_fisher_s(kind, oracle):
    network, likelihood, inputs = oracle.case(kind)
    F = oracle.fisher(network, likelihood, inputs)
    for member in oracle.curvature(network, likelihood, DenseBlocks(), inputs).members:
        assert torch.allclose(member.block.dense(), oracle.block_of(F, member, network), atol=ROUNDING)
    ekfac = oracle.curvature(network, likelihood, EKFAC(), inputs).members[0]
    true = oracle.block_of(F, ekfac, network)
    assert float((ekfac.block.dense() - true).norm() / true.norm()) > 1e-2


def test_batches_are_averaged_like_everywhere(oracle):
    network, likelihood, inputs = oracle.case("categorical", examples=14)
    curvature = over(network, DenseFisher(ema=0.9))
    for part in (inputs[:7], inputs[7:]):
        fed(curvature, network, likelihood, part)
    first, second = (oracle.fisher(network, likelihood, part) for part in (inputs[:7], inputs[7:]))
    step = random_step(network)
    expected = (0.09 * first + 0.1 * second) / 0.19 @ oracle.flat(step)
    assert torch.allclose(oracle.flat(curvature.multiply(step)), expected, atol=ROUNDING)
    assert not torch.allclose(oracle.flat(curvature.multiply(step)), second @ oracle.flat(step), atol=1e-3)


def test_parameters_with_a_rule_or_without_a_layer_keep_their_own_blocks(oracle):
    network, inputs = oracle.GaussianActor((4, 5, 2)), torch.randn(7, 4)
    curvature = fed(over(network, rules={"log_std": known_fisher(2.0)}), network, DiagonalGaussian(), inputs)
    step = random_step(network)
    solved = curvature.solve(step, DAMPING)
    assert torch.allclose(solved["log_std"], step["log_std"] / 2.1)
    F = oracle.fisher(network, DiagonalGaussian(), inputs)  # its log-std couples with nothing
    assert torch.allclose(oracle.flat(curvature.multiply(step)), F @ oracle.flat(step), atol=ROUNDING)
    assert float(curvature.quadratic(step)) == pytest.approx(float(oracle.flat(step) @ F @ oracle.flat(step)))
    assert [sorted(piece) for piece in curvature.split(step)] == [sorted(set(step) - {"log_std"}), ["log_std"]]
    assert not curvature.weighs(7)
    normed = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    curvature = fed(over(normed), normed, Categorical(), inputs)
    assert [len(piece) for piece in curvature.split(random_step(normed))] == [4, 1, 1]
    assert curvature.ready


def test_subsets_of_examples_and_sampled_targets_are_unbiased(oracle):
    network, likelihood, inputs = oracle.case("categorical", examples=12)
    F, step = oracle.fisher(network, likelihood, inputs), random_step(network)
    curvature = over(network, DenseFisher(ema=0.0))
    curvature._max_rows = 5
    capture = Capture(network, curvature.layers)
    with capture.recording():
        network(inputs)
    generator, draws = torch.Generator().manual_seed(1), []
    for _ in range(400):
        seeds = SampledFisher()(likelihood, capture.last.outputs, None, generator)
        assert curvature.update(capture.last, seeds, False, generator)
        draws.append(oracle.flat(curvature.multiply(step)))
    draws = torch.stack(draws)
    assert oracle.z_scores(draws, F @ oracle.flat(step)).max() < 5
    assert oracle.z_scores(draws, 1.5 * F @ oracle.flat(step)).max() > 5


def test_a_critic_s_gradient_comes_from_its_rows(oracle):
    network, inputs = nn.Sequential(oracle.mlp(4, 5, 1), nn.Flatten(0)), torch.randn(7, 4)
    curvature = fed(over(network), network, ScalarGaussian(), inputs)
    assert curvature.weighs(7)
    assert not curvature.weighs(8)
    weights = torch.randn(7)
    expected = torch.autograd.grad((network(inputs) * weights).mean(), list(network.parameters()))
    found = curvature.weighted_gradient(weights)
    for (name, _), grad in zip(network.named_parameters(), expected, strict=True):
        assert torch.allclose(found[name], grad, atol=ROUNDING)
    curvature.release()
    with pytest.raises(ValueError, match="run the loss's own backward"):
        curvature.weighted_gradient(weights)


def test_large_networks_and_layers_are_refused_in_one_line(oracle):
    with pytest.raises(ValueError, match=r"the network has 43 parameters.*raise max_parameters=42") as refusal:
        over(oracle.mlp(4, 5, 3), DenseFisher(max_parameters=42))
    assert "\n" not in str(refusal.value)
    assert over(oracle.mlp(4, 5, 3), DenseFisher(max_parameters=43))
    with pytest.raises(ValueError, match="layer 'x' has 12 parameters"):
        DenseBlocks(max_parameters=11).build(Place((3, 4), name="x"))


def test_what_is_not_finite_is_not_taken_in(oracle):
    network, likelihood, inputs = oracle.case("categorical")
    curvature = fed(over(network), network, likelihood, inputs)
    step = random_step(network)
    before = oracle.flat(curvature.solve(step, DAMPING))
    capture = Capture(network, curvature.layers)
    with capture.recording():
        network(inputs)
    seeds = ExactFisher()(likelihood, capture.last.outputs, None, None)
    bad = [tuple(torch.full_like(s, float("nan")) for s in seed) for seed in seeds]
    assert not curvature.update(capture.last, bad, True)
    assert torch.equal(oracle.flat(curvature.solve(step, DAMPING)), before)


def test_failed_refreshes_keep_the_last_eigenvectors_and_are_an_error_at_last(oracle, monkeypatch):
    network, likelihood, inputs = oracle.case("categorical")
    curvature = fed(over(network), network, likelihood, inputs)
    step = random_step(network)
    before = oracle.flat(curvature.solve(step, DAMPING))

    def broken(_):
        raise DecompositionError("broken")

    monkeypatch.setattr("acktr.curvature.dense.symmetric_eigen", broken)
    for _ in range(MAX_FAILURES - 1):
        fed(curvature, network, likelihood, inputs * 2)
        assert torch.equal(oracle.flat(curvature.solve(step, DAMPING)), before)
    assert curvature.diagnostics()["skipped_refreshes"] == MAX_FAILURES - 1
    with pytest.raises(DecompositionError, match="broken"):
        fed(curvature, network, likelihood, inputs)


def test_the_state_restores_every_bit_and_that_of_others_is_refused(oracle):
    network, likelihood, inputs = oracle.case("categorical")
    curvature, other = fed(over(network), network, likelihood, inputs), over(network)
    with pytest.raises(RuntimeError, match="no bases yet"):
        other.solve(random_step(network), DAMPING)
    other.load_state_dict(curvature.state_dict())
    step = random_step(network)
    for c in (curvature, other):
        fed(c, network, likelihood, 2 * inputs, refresh=False)
    assert torch.equal(oracle.flat(curvature.solve(step, DAMPING)), oracle.flat(other.solve(step, DAMPING)))
    assert torch.equal(oracle.flat(curvature.multiply(step)), oracle.flat(other.multiply(step)))
    with pytest.raises(ValueError, match="not of a dense Fisher"):
        other.load_state_dict({"chains": []})
