"""Factors of convolutions: KFC, its reduced rows, and SUA's channels, each where it is exact and where it is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from acktr.curvature import (
    CGFAC,
    EKFAC,
    KFAC,
    SENG,
    SUA,
    SUAEKFAC,
    Diagonal,
    FactoredKFAC,
    KFCReduce,
    MeanSUA,
    PerExample,
    Place,
    Statistics,
)
from acktr.curvature.convolutions.sua import MeanSUABlock, SUABlock, SUAEKFACBlock
from acktr.curvature.kronecker.ekfac import EKFACBlock
from acktr.curvature.kronecker.kfac import EigenBlock
from acktr.likelihood import Categorical, DiagonalGaussian
from acktr.optimizer import NaturalGradient

ROUNDING = 1e-10  # float64, matrices of at most 100 rows and entries of order one
CHANNELS, OFFSETS, OUTPUTS = 2, 4, 3
SUA_BLOCKS = [SUABlock, MeanSUABlock, SUAEKFACBlock]
every_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def patches(bias=True, examples=40, positions=3, offsets=OFFSETS, mean=1.0):
    """Rows of a convolution whose inputs have a mean and depend on each other."""
    body = torch.randn(examples, positions, CHANNELS, offsets) + mean
    body[:, :, 1] += 0.5 * body[:, :, 0]
    rows = body.flatten(2)
    a = torch.cat([rows, torch.ones(examples, positions, 1)], dim=2) if bias else rows
    return Statistics(a, torch.randn(2, examples, positions, OUTPUTS) * a[..., :1].abs())


def fed(block, *batches):
    for statistics in batches:
        block.update(statistics)
        block.refresh()
        block.rescale(statistics)
    return block


def place(statistics, offsets=OFFSETS, bias=True):
    return Place((OUTPUTS, statistics.inputs.shape[-1]), bias, offsets)


# ---------------------------------------------------------------------------------------------------- KFC


@pytest.mark.parametrize("factory", [KFAC(), FactoredKFAC(), EKFAC(), KFCReduce(), CGFAC(), SENG()], ids=repr)
def test_one_position_is_a_linear_layer_on_the_flattened_patch(factory, oracle):
    conv, linear = nn.Conv2d(2, 3, 4), nn.Linear(32, 3)
    linear.load_state_dict({"weight": conv.weight.data.flatten(1), "bias": conv.bias.data})
    images = torch.randn(6, 2, 4, 4)
    whole = oracle.curvature(nn.Sequential(conv, nn.Flatten()), Categorical(), factory, images)
    flat = oracle.curvature(nn.Sequential(linear), Categorical(), factory, images.flatten(1))
    V = torch.randn(3, 33)
    mine, other = whole.members[0].block, flat.members[0].block
    assert torch.allclose(mine.multiply(V), other.multiply(V), atol=ROUNDING)
    assert torch.allclose(mine.solve(V, 0.1), other.solve(V, 0.1), atol=ROUNDING)
    turned = oracle.curvature(nn.Sequential(linear), Categorical(), factory, images.mT.flatten(1))
    assert not torch.allclose(turned.members[0].block.multiply(V), mine.multiply(V), atol=1e-3)


def expected_block(a, draw, draws=4000):
    """Mean over draws of output gradients [draws, N, S, o] of the examples' dense block, one draw per row."""
    g = draw(draws)
    gradients = torch.einsum("dnso,nsi->dnoi", g, a).flatten(2)
    return torch.einsum("dnp,dnq->dpq", gradients, gradients) / len(a)


def test_output_gradients_without_correlation_in_space_have_kfc_s_product(oracle):
    """KFC's assumptions, drawn: the dense Fisher's mean is Ω ⊗ Γ."""
    a, spread = torch.randn(3, 4, 2), torch.tensor([[1.0, 0.0], [0.7, 0.5]])
    product = torch.kron(spread @ spread.mT, Statistics(a, torch.zeros(1, 3, 4, 2)).input_moment().value)
    independent = expected_block(a, lambda n: torch.randn(n, 3, 4, 2) @ spread.mT)
    assert oracle.z_scores(independent, product).max() < 5  # sixteen entries
    # Negative controls: a mean over positions in place of the sum, and gradients that are the same at each of them.
    assert oracle.z_scores(independent, product / 4).max() > 5
    alike = expected_block(a, lambda n: (torch.randn(n, 3, 1, 2) @ spread.mT).expand(-1, -1, 4, -1))
    assert oracle.z_scores(alike, product).max() > 5
    # Those have the reduced product: (Σ_s g)(mean_s a)ᵀ.
    reduced = torch.kron(16 * spread @ spread.mT, a.mean(1).mT @ a.mean(1) / 3)
    assert oracle.z_scores(alike, reduced).max() < 5


# ---------------------------------------------------------------------------------------------------- reduce


class Pooled(nn.Module):
    """A convolution and a mean over the image: all positions have one output gradient."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x):
        mean = self.conv(x).mean((2, 3))
        return mean, torch.tensor([0.2, -0.4, 0.1]).expand_as(mean)


def test_reduced_factors_are_exact_under_a_mean_over_the_image(oracle):
    network, images = Pooled(), torch.randn(9, 2, 5, 5)
    dense = oracle.fisher(network, DiagonalGaussian(), images)
    errors = {}
    for name, factory in {"reduce": KFCReduce(), "kfc": KFAC(), "ekfac": KFCReduce(EKFAC())}.items():
        (member,) = oracle.curvature(network, DiagonalGaussian(), factory, images).members
        errors[name] = relative(member.block.dense(), oracle.block_of(dense, member, network))
    assert errors["reduce"] < ROUNDING
    assert errors["ekfac"] < ROUNDING
    assert errors["kfc"] > 0.5


def test_ekfac_in_the_reduced_bases_has_the_examples_own_diagonal(oracle):
    network, likelihood, inputs = oracle.case("conv")
    dense = oracle.fisher(network, likelihood, inputs)
    ekfac = oracle.curvature(network, likelihood, KFCReduce(EKFAC()), inputs).members
    kfac = oracle.curvature(network, likelihood, KFCReduce(), inputs).members
    for mine, other in zip(ekfac, kfac, strict=True):
        true = oracle.block_of(dense, mine, network)
        assert float(mine.block.dense().trace()) == pytest.approx(float(true.trace()))
        assert relative(mine.block.dense(), true) <= relative(other.block.dense(), true) * (1 + 1e-9)
    assert float(kfac[0].block.dense().trace()) != pytest.approx(float(ekfac[0].block.dense().trace()), rel=0.05)


def test_a_layer_without_shared_weights_has_nothing_to_reduce(oracle):
    statistics = oracle.statistics()
    V = torch.randn(3, 4)
    for of in (KFAC(), FactoredKFAC(), EKFAC()):
        mine, other = oracle.built(KFCReduce(of), statistics), oracle.built(of, statistics)
        assert torch.equal(mine.solve(V, 0.1), other.solve(V, 0.1))
        shared = oracle.statistics(positions=3)
        mine, other = oracle.built(KFCReduce(of), shared), oracle.built(of, shared)
        assert not torch.allclose(mine.solve(V, 0.1), other.solve(V, 0.1), atol=1e-3)


@pytest.mark.parametrize("of", [KFAC(ema=0.0), FactoredKFAC(ema=0.0)], ids=lambda of: type(of).__name__)
def test_a_batch_by_itself_is_reduced_as_the_average_is(of, oracle):
    statistics, V = oracle.statistics(positions=6), torch.randn(3, 4)
    block = oracle.built(KFCReduce(of), statistics)
    assert torch.allclose(block.multiply_batch(V, statistics), block.multiply(V), atol=ROUNDING)
    X = block.solver_with_batch(1e-12, 1.0, statistics)(V)
    assert relative(2 * block.multiply(X), V) < 1e-4
    plain = oracle.built(of, statistics)
    assert relative(plain.multiply_batch(V, statistics), block.multiply(V)) > 0.1


def test_a_choice_without_factors_cannot_be_reduced():
    with pytest.raises(ValueError, match=r"KFCReduce needs a choice with Kronecker factors.*got Diagonal"):
        KFCReduce(Diagonal()).build(Place((3, 4)))


# ---------------------------------------------------------------------------------------------------- SUA


def channel_rows(statistics, offset):
    body = statistics.inputs[..., : CHANNELS * OFFSETS].unflatten(-1, (CHANNELS, OFFSETS))
    return body[..., offset].flatten(0, 1)


def sua_input_moment(statistics, mean, bias):
    """Ω by hand, from the place of a 2 × 2 kernel in the second row and column."""
    c, examples = channel_rows(statistics, 3), len(statistics.inputs)
    positions, raw = len(c) / examples, c.mT @ c / examples
    ones = torch.ones(OFFSETS)
    if mean:
        direction = torch.cat([torch.kron(c.mean(0), ones), torch.ones(1)])
        covariance = raw - positions * torch.outer(c.mean(0), c.mean(0))
        omega = torch.block_diag(torch.kron(covariance, torch.diag(ones)), torch.zeros(1, 1))
        omega = omega + positions * torch.outer(direction, direction)
    else:
        omega = torch.block_diag(torch.kron(raw, torch.diag(ones)), torch.tensor([[positions]]))
    return omega if bias else omega[:-1, :-1]


@every_bias
@pytest.mark.parametrize("mean", [False, True], ids=["raw", "mean"])
def test_sua_is_its_explicit_matrix(mean, bias):
    statistics = patches(bias)
    kind = MeanSUABlock if mean else SUABlock
    block = fed(kind(place(statistics, bias=bias), 0.9), statistics)
    expected = torch.kron(statistics.output_moment().value, sua_input_moment(statistics, mean, bias))
    V = torch.randn(block.shape)
    assert torch.allclose(block.dense(), expected, atol=ROUNDING)
    damped = expected + 0.1 * torch.eye(len(expected))
    assert torch.allclose(block.solve(V, 0.1), torch.linalg.solve(damped, V.flatten()).view_as(V), atol=ROUNDING)
    other = torch.kron(statistics.output_moment().value, sua_input_moment(statistics, not mean, bias))
    assert relative(other, expected) > 0.1
    assert block.condition() > 1


@every_bias
def test_a_kernel_of_one_place_is_kfc(bias):
    statistics = patches(bias, offsets=1)
    here, V = place(statistics, offsets=1, bias=bias), torch.randn(OUTPUTS, CHANNELS + bias)
    kfc, ekfac = fed(EigenBlock(here.shape, 0.9), statistics), fed(EKFACBlock(here.shape, 0.9), statistics)
    mean = fed(MeanSUABlock(here, 0.9), statistics)
    raw, raw_ekfac = fed(SUABlock(here, 0.9), statistics), fed(SUAEKFACBlock(here, 0.9), statistics)
    if bias:
        # The mean's direction holds bias and channels together, as KFC's moment does; a bias by itself is less.
        assert torch.allclose(mean.multiply(V), kfc.multiply(V), atol=ROUNDING)
        assert torch.allclose(mean.solve(V, 0.1), kfc.solve(V, 0.1), atol=ROUNDING)
        assert relative(raw.solve(V, 0.1), kfc.solve(V, 0.1)) > 0.1
    else:
        for block in (mean, raw):
            assert torch.allclose(block.solve(V, 0.1), kfc.solve(V, 0.1), atol=ROUNDING)
        assert torch.allclose(raw_ekfac.solve(V, 0.1), ekfac.solve(V, 0.1), atol=ROUNDING)
        assert relative(kfc.solve(V, 0.1), ekfac.solve(V, 0.1)) > 1e-2


def test_layers_of_one_place_are_left_to_another_choice():
    one, four = Place((3, 5), True, 1), Place((3, 9), True, 4)
    assert isinstance(SUA().build(one), EigenBlock)
    assert isinstance(MeanSUA().build(one), EigenBlock)
    assert isinstance(SUAEKFAC().build(one), EKFACBlock)
    assert isinstance(SUA(elsewhere=EKFAC()).build(one), EKFACBlock)
    assert [type(choice().build(four)) for choice in (SUA, MeanSUA, SUAEKFAC)] == SUA_BLOCKS


def test_the_channels_are_those_under_the_kernel_s_centre(oracle):
    conv, images = nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.randn(6, 2, 5, 5)
    network = nn.Sequential(conv, nn.Flatten(), nn.Linear(27, 2))
    block = oracle.curvature(network, Categorical(), SUA(), images).members[0].block
    under = images[:, :, ::2, ::2].permute(0, 2, 3, 1).reshape(-1, 2)
    assert torch.allclose(block.channel_moment.value[:2, :2], under.mT @ under / 6, atol=ROUNDING)
    corner = F.pad(images, (1, 1, 1, 1))[:, :, ::2, ::2][:, :, :3, :3].permute(0, 2, 3, 1).reshape(-1, 2)
    assert not torch.allclose(block.channel_moment.value[:2, :2], corner.mT @ corner / 6, atol=1e-2)


def test_uncorrelated_inputs_with_a_mean_have_the_mean_version_s_moment():
    """SUA's assumption, drawn: KFC's own moment of many patches."""
    statistics = patches(examples=20000, positions=2)
    omega = statistics.input_moment().value
    # Entries are means over 40000 rows: half a percent each, and the central place's for all the others.
    assert relative(sua_input_moment(statistics, True, True), omega) < 0.02
    assert relative(sua_input_moment(statistics, False, True), omega) > 0.2


@every_bias
def test_sua_ekfac_has_the_fisher_s_diagonal_in_its_basis(bias):
    statistics = patches(bias)
    ekfac, sua = (fed(kind(place(statistics, bias=bias), 0.9), statistics) for kind in (SUAEKFACBlock, SUABlock))
    gradients = torch.cat(list(statistics.gradients())).flatten(1)
    dense = gradients.mT @ gradients / len(statistics.inputs)
    assert float(ekfac.dense().trace()) == pytest.approx(float(dense.trace()))
    assert relative(ekfac.dense(), dense) < relative(sua.dense(), dense)
    basis = explicit_basis(ekfac, bias)
    expected = basis @ torch.diag((basis.mT @ dense @ basis).diagonal()) @ basis.mT
    assert torch.allclose(ekfac.dense(), expected, atol=ROUNDING)


def explicit_basis(block, bias=True):
    inputs = torch.kron(block.channel_basis.contiguous(), torch.eye(OFFSETS))
    return torch.kron(block.output_basis.contiguous(), torch.block_diag(inputs, torch.eye(1)) if bias else inputs)


def test_a_refresh_carries_sua_ekfac_s_average_into_the_new_bases():
    block = fed(SUAEKFACBlock(place(patches()), 0.9), patches())
    before, old = block.dense(), explicit_basis(block)
    block.update(patches(mean=-2.0))
    block.refresh()
    basis = explicit_basis(block)
    expected = basis @ torch.diag((basis.mT @ before @ basis).diagonal()) @ basis.mT
    assert torch.allclose(block.dense(), expected, atol=ROUNDING)
    assert relative(old @ torch.diag(block.scaling.flatten()) @ old.mT, expected) > 1e-3


# ---------------------------------------------------------------------------------------------------- invariance


def function_change_differs(build, shift):
    """Relative change of ΔW a when the inputs' channels c become C c + d in every place, at next to no damping."""
    statistics, V = patches(), torch.randn(OUTPUTS, CHANNELS * OFFSETS + 1)
    C = torch.tensor([[1.5, -0.7], [0.4, 2.0]])
    width = CHANNELS * OFFSETS
    M = torch.block_diag(torch.kron(C, torch.eye(OFFSETS)), torch.eye(1))
    M[:width, -1] = torch.kron(torch.tensor([0.8, -1.2]) * shift, torch.ones(OFFSETS))
    moved = Statistics(statistics.inputs @ M.mT, statistics.output_grads)
    X = fed(build(place(statistics)), statistics).solve(V, 1e-12)
    moved_X = fed(build(place(statistics)), moved).solve(V @ M.mT, 1e-12)
    return relative(moved_X @ M, X)


@pytest.mark.parametrize("factory", [KFAC(), KFCReduce(), MeanSUA()], ids=repr)
def test_an_affine_change_of_the_inputs_leaves_the_function_s_change(factory):
    assert function_change_differs(factory.build, shift=1.0) < 1e-6


def test_raw_channel_moments_follow_linear_changes_only():
    assert function_change_differs(SUA().build, shift=0.0) < 1e-6
    assert function_change_differs(SUA().build, shift=1.0) > 0.05
    assert function_change_differs(Diagonal().build, shift=0.0) > 0.05


# ---------------------------------------------------------------------------------------------------- learning


LEARNERS = [
    KFCReduce(),
    KFCReduce(EKFAC()),
    KFCReduce(FactoredKFAC()),
    SUA(),
    MeanSUA(),
    SUAEKFAC(),
    CGFAC(),
    CGFAC(operator=PerExample()),
    SENG(),
    SENG(rank=2),
]


@pytest.mark.parametrize("factory", LEARNERS, ids=repr)
def test_a_small_image_network_learns(factory, oracle):
    """Which quarter of the image is bright."""
    network, classes = oracle.convnet(), torch.arange(48) % 3
    images = 0.3 * torch.randn(48, 2, 5, 5)
    for image, label in zip(images, classes.tolist(), strict=True):
        image[:, 2 * (label // 2) : 2 * (label // 2) + 2, 2 * (label % 2) : 2 * (label % 2) + 2] += 1.0
    optimizer = NaturalGradient(network, Categorical(), factory, radius=0.03)
    losses = []
    for _ in range(20):
        with optimizer.recording():
            logits = network(images)
        optimizer.update_curvature()
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, classes)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.skipped == 0
    assert losses[-1] < 0.3 * losses[0]
