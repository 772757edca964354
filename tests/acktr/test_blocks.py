"""What every block promises, and the settings in which blocks are exact."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acktr.conjugate import Stop
from acktr.curvature import (
    BKFAC,
    CGFAC,
    EKFAC,
    KFAC,
    SENG,
    SREKFAC,
    SUA,
    SUAEKFAC,
    ColumnSketch,
    ConstantBlock,
    DenseBlocks,
    Diagonal,
    EigenAdagrad,
    EigenAdam,
    EigenRMSProp,
    FactoredKFAC,
    KFCReduce,
    MeanSUA,
    ParameterBlock,
    PerCoordinate,
    PerExample,
    Place,
    RunningEKFAC,
    Tikhonov,
)
from acktr.curvature.kronecker.ekfac import EKFACBlock, carry_scaling
from acktr.fisher import SampledFisher
from acktr.likelihood import DiagonalGaussian, ScalarGaussian

FACTORIES = [EKFAC(), KFAC(), FactoredKFAC(), Diagonal(), SREKFAC(), BKFAC()]  # the last two whole: layers are narrow
KRONECKER = [EKFAC(), KFAC(), FactoredKFAC(), SREKFAC(), BKFAC()]


@dataclass(frozen=True)
class OfConvolution:
    """A choice as it is built for a convolution of one channel, whose last column is the bias's."""

    of: Any

    def build(self, place):
        return self.of.build(replace(place, bias=True, offsets=place.shape[1] - 1))


# Truncated, conjugate gradients are no linear map of the gradient; to the last digit they are.
TIGHT = Stop(1e-14, 100)
FACTORIES += [
    DenseBlocks(),
    CGFAC(stop=TIGHT),
    CGFAC(operator=PerExample(), stop=TIGHT),
    SENG(),
    SENG(memory=3, rank=1),
]
FACTORIES += [SENG(solver=ColumnSketch(3, TIGHT)), KFCReduce(), KFCReduce(EKFAC())]
FACTORIES += [OfConvolution(SUA()), OfConvolution(MeanSUA()), OfConvolution(SUAEKFAC())]
EIGEN_METHODS = [EigenRMSProp(), EigenAdagrad(), EigenAdam()]
DAMPED_PER_COORDINATE = EKFAC(damping=PerCoordinate())
FACTORIES += [RunningEKFAC(), DAMPED_PER_COORDINATE, *EIGEN_METHODS]
# One squared mean of a batch is a random draw, and no function of the examples' moments.
NOT_DRAWN = [factory for factory in FACTORIES if not isinstance(factory, RunningEKFAC)]
ROUNDING = 1e-10  # float64, matrices of at most 100 rows and entries of order one
every_block = pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: type(f).__name__)
every_kronecker_block = pytest.mark.parametrize("factory", KRONECKER, ids=lambda f: type(f).__name__)
SEARCH = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def damped_exactly(factory):
    """Whether `solve` inverts F + λ; factored damping and the like add cross terms of order √λ."""
    return not isinstance(factory, FactoredKFAC) and isinstance(getattr(factory, "damping", Tikhonov()), Tikhonov)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@every_block
@pytest.mark.parametrize("positions", [1, 3])
def test_the_operator_contract(factory, positions, oracle):
    block = oracle.built(factory, oracle.statistics(positions=positions))
    V = torch.randn(block.shape)
    dense = block.dense()
    assert torch.allclose(dense, dense.mT, atol=ROUNDING)
    assert torch.linalg.eigvalsh(dense).min() > -ROUNDING
    assert torch.allclose((dense @ V.flatten()).view_as(V), block.multiply(V), atol=ROUNDING)
    assert float(block.quadratic(V)) == pytest.approx(float(V.flatten() @ dense @ V.flatten()), rel=ROUNDING)
    assert block.condition() >= 1
    X = block.solve(V, 0.1)
    assert torch.allclose(block.solve(3 * V, 0.1), 3 * X, atol=ROUNDING)
    residual = relative(block.multiply(X) + 0.1 * X, V)
    # Other dampings are another matrix than F + λ: their residual shows that the check can fail.
    assert residual < ROUNDING if damped_exactly(factory) else residual > 1e-2


@pytest.mark.parametrize("block", [ConstantBlock((1, 5), 2.0), ParameterBlock((1, 5), 0.9)])
def test_the_contract_of_blocks_without_a_layer(block):
    if isinstance(block, ParameterBlock):
        for _ in range(3):
            block.update_from_sums(torch.randn(2, 5), 4)
    V = torch.randn(1, 5)
    X = block.solve(V, 0.1)
    assert torch.allclose(block.multiply(X) + 0.1 * X, V, atol=ROUNDING)
    assert float(block.quadratic(V)) == pytest.approx(float((V * block.multiply(V)).sum()))
    assert block.ready
    assert block.condition() >= 1


def test_factored_damping_is_the_explicit_inverse(oracle):
    statistics = oracle.statistics()
    block, damping = oracle.built(FactoredKFAC(), statistics), 0.3
    A, G = statistics.input_moment().value, statistics.output_moment().value
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
    damped = torch.kron(G + damping**0.5 / pi * torch.eye(len(G)), A + damping**0.5 * pi * torch.eye(len(A)))
    V = torch.randn(block.shape)
    expected = torch.linalg.solve(damped, V.flatten()).view_as(V)
    assert torch.allclose(block.solve(V, damping), expected, atol=ROUNDING)
    swapped = torch.kron(G + damping**0.5 * pi * torch.eye(len(G)), A + damping**0.5 / pi * torch.eye(len(A)))
    assert relative(torch.linalg.solve(swapped, V.flatten()).view_as(V), expected) > 1e-2


@every_block
def test_much_damping_leaves_the_gradient(factory, oracle):
    block, V = oracle.built(factory, oracle.statistics()), torch.randn(3, 4)
    # Cross terms of order √(F/λ) beside the identity come slower.
    assert relative(1e12 * block.solve(V, 1e12), V) < (1e-10 if damped_exactly(factory) else 1e-4)
    assert relative(block.solve(V, 1.0), V) > 1e-2


@SEARCH
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["categorical", "gaussian", "joint", "conv"]))
def test_ekfac_is_never_further_from_the_fisher_than_kfac_and_keeps_its_trace(seed, kind, oracle):
    torch.manual_seed(seed)
    network, likelihood, inputs = oracle.case(kind)
    dense = oracle.fisher(network, likelihood, inputs)
    ekfac = oracle.curvature(network, likelihood, EKFAC(), inputs)
    kfac = oracle.curvature(network, likelihood, KFAC(), inputs)
    for mine, other in zip(ekfac.members, kfac.members, strict=True):
        true = oracle.block_of(dense, mine, network)
        error, kfac_error = relative(mine.block.dense(), true), relative(other.block.dense(), true)
        assert error <= kfac_error * (1 + 1e-9) + 1e-12
        assert float(mine.block.dense().trace()) == pytest.approx(float(true.trace()), rel=1e-9)


def test_kfac_s_trace_is_not_the_fisher_s(oracle):
    network, likelihood, inputs = oracle.case("conv")
    dense = oracle.fisher(network, likelihood, inputs)
    members = oracle.curvature(network, likelihood, KFAC(), inputs).members
    ratios = [float(m.block.dense().trace() / oracle.block_of(dense, m, network).trace()) for m in members]
    assert max(abs(ratio - 1) for ratio in ratios) > 0.05


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "scalar", "joint", "conv"])
def test_the_diagonal_block_is_the_dense_fisher_s_diagonal(kind, oracle):
    network, likelihood, inputs = oracle.case(kind)
    dense = oracle.fisher(network, likelihood, inputs)
    for member in oracle.curvature(network, likelihood, Diagonal(), inputs).members:
        true = oracle.block_of(dense, member, network)
        assert torch.allclose(member.block.dense(), torch.diag(true.diagonal()), atol=ROUNDING)
        assert relative(member.block.dense(), true) > 0.1


def test_ekfac_with_frozen_product_scalings_is_kfac(oracle):
    statistics = oracle.statistics()
    ekfac, kfac = EKFAC().build(Place((3, 4))), oracle.built(KFAC(), statistics)
    ekfac.update(statistics)
    ekfac.refresh()
    V = torch.randn(3, 4)
    assert torch.allclose(ekfac.multiply(V), kfac.multiply(V), atol=ROUNDING)
    assert torch.allclose(ekfac.solve(V, 0.1), kfac.solve(V, 0.1), atol=ROUNDING)
    ekfac.rescale(statistics)
    assert relative(ekfac.multiply(V), kfac.multiply(V)) > 1e-2


@pytest.mark.parametrize("positions", [1, 3])
def test_diagonal_is_ekfac_in_identity_bases(positions, oracle):
    statistics = oracle.statistics(positions=positions)
    ekfac, diagonal = EKFAC().build(Place((3, 4))), oracle.built(Diagonal(), statistics)
    ekfac.update(statistics)
    ekfac.refresh()
    ekfac.output_basis, ekfac.input_basis = torch.eye(3), torch.eye(4)
    ekfac.rescale(statistics)
    assert torch.allclose(ekfac.dense(), diagonal.dense(), atol=ROUNDING)
    assert relative(oracle.built(EKFAC(), statistics).dense(), diagonal.dense()) > 1e-2


@every_kronecker_block
@pytest.mark.parametrize("kind", ["categorical", "gaussian", "scalar", "joint"])
def test_one_example_is_solved_exactly(kind, factory, oracle):
    network, likelihood, inputs = oracle.case(kind, examples=1)
    dense = oracle.fisher(network, likelihood, inputs)
    for member in oracle.curvature(network, likelihood, factory, inputs).members:
        true = oracle.block_of(dense, member, network)
        assert torch.allclose(member.block.dense(), true, atol=ROUNDING)
        if damped_exactly(factory):
            V = torch.randn(member.block.shape)
            expected = torch.linalg.solve(true + 0.1 * torch.eye(len(true)), V.flatten()).view_as(V)
            assert torch.allclose(member.block.solve(V, 0.1), expected, atol=ROUNDING)


def test_several_examples_are_not_solved_exactly(oracle):
    network, likelihood, inputs = oracle.case("categorical")
    dense = oracle.fisher(network, likelihood, inputs)
    for factory in FACTORIES:
        first = oracle.curvature(network, likelihood, factory, inputs).members[0]
        error = relative(first.block.dense(), oracle.block_of(dense, first, network))
        # These are the layer's Fisher itself, and show that the others could have been.
        exact = isinstance(factory, (SENG, DenseBlocks)) or PerExample() == getattr(factory, "operator", None)
        assert error < ROUNDING if exact else error > 1e-2


@pytest.mark.parametrize("factory", NOT_DRAWN, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("kind", ["categorical", "conv"])
def test_copies_of_the_batch_change_nothing(kind, factory, oracle):
    network, likelihood, inputs = oracle.case(kind)
    once = oracle.curvature(network, likelihood, factory, inputs)
    thrice = oracle.curvature(network, likelihood, factory, inputs.repeat(3, 1, *[1] * (inputs.dim() - 2)))
    other = oracle.curvature(network, likelihood, factory, inputs[:4])
    for a, b, c in zip(once.members, thrice.members, other.members, strict=True):
        if kind == "conv" and factory == KFCReduce(EKFAC()):
            # Seven reduced rows leave eigenvectors open, along which the examples' own squares are not 0.
            assert float(a.block.dense().trace()) == pytest.approx(float(b.block.dense().trace()))
            continue
        assert torch.allclose(a.block.dense(), b.block.dense(), atol=ROUNDING)
        assert relative(c.block.dense(), a.block.dense()) > 1e-2


@every_kronecker_block
@pytest.mark.parametrize("depth", [1, 3])
def test_a_linear_network_with_a_constant_metric_has_product_blocks(depth, factory, oracle):
    layers = [torch.nn.Linear(4, 4, bias=True) for _ in range(depth - 1)] + [torch.nn.Linear(4, 1)]
    network, inputs = torch.nn.Sequential(*layers, torch.nn.Flatten(0)), torch.randn(11, 4)
    likelihood = ScalarGaussian(0.7)
    dense = oracle.fisher(network, likelihood, inputs)
    for member in oracle.curvature(network, likelihood, factory, inputs).members:
        assert torch.allclose(member.block.dense(), oracle.block_of(dense, member, network), atol=ROUNDING)
    a = torch.cat([inputs, torch.ones(11, 1)], dim=1)
    if depth == 1:  # the textbook case, A ⊗ I/variance
        assert torch.allclose(dense, a.mT @ a / 11 / 0.7, atol=ROUNDING)


class FixedNoise(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Linear(3, 2)

    def forward(self, x):
        mean = self.mean(x)
        return mean, torch.tensor([0.2, -0.4]).expand_as(mean)


def test_a_single_layer_under_a_gaussian_of_fixed_width_is_inputs_times_precision(oracle):
    network, inputs = FixedNoise(), torch.randn(13, 3)
    a = torch.cat([inputs, torch.ones(13, 1)], dim=1)
    expected = torch.kron(torch.diag(torch.tensor([-0.4, 0.8]).exp()), a.mT @ a / 13)
    for factory in KRONECKER:
        (member,) = oracle.curvature(network, DiagonalGaussian(), factory, inputs).members
        assert torch.allclose(member.block.dense(), expected, atol=ROUNDING)


@pytest.mark.parametrize("factory", [EKFAC(ema=0.0), KFAC(ema=0.0)], ids=["EKFAC", "KFAC"])
def test_sampled_seeds_meet_the_exact_ones_on_average(factory, oracle):
    network, likelihood, inputs = oracle.case("categorical")
    exact = oracle.curvature(network, likelihood, Diagonal(), inputs).members[0].block.dense().diagonal()
    sampled = Diagonal(ema=0.999)
    block = oracle.curvature(network, likelihood, sampled, inputs, SampledFisher(2000)).members[0].block
    # 2000 draws for each of 7 examples: a relative error of a few in √14000, or 5 %.
    assert relative(block.dense().diagonal(), exact) < 0.05


def rotation(size):
    return torch.linalg.qr(torch.randn(size, size)).Q


def test_carried_scalings_are_the_diagonal_of_the_turned_matrix():
    S, R_G, R_A = torch.rand(3, 4), rotation(3), rotation(4)
    turn = torch.kron(R_G, R_A)
    expected = (turn.mT @ torch.diag(S.flatten()) @ turn).diagonal().view(3, 4)
    carried = carry_scaling(S, R_G, R_A)
    assert torch.allclose(carried, expected, atol=ROUNDING)
    assert float(carried.sum()) == pytest.approx(float(S.sum()))
    assert relative(carry_scaling(S, R_G.mT, R_A.mT), expected) > 1e-2


def test_a_refresh_carries_the_average_into_the_new_bases(oracle):
    first, second = oracle.statistics(examples=40), oracle.statistics(examples=40)
    second = type(second)(second.inputs @ rotation(4), second.output_grads @ rotation(3))
    block = EKFACBlock((3, 4), ema=0.9)
    for statistics in (first, second):
        block.update(statistics)
        block.refresh()
        block.rescale(statistics)
    # The ideal: every batch's squares in the bases of today; carrying knows the first batch's diagonal part alone.
    bases = block.output_basis, block.input_basis
    ideal = (0.09 * first.squares(*bases) + 0.1 * second.squares(*bases)) / 0.19
    fresh = EKFACBlock((3, 4), ema=0.9)
    fresh.update(first)
    fresh.refresh()
    fresh.rescale(first)
    stale = (0.09 * fresh.squares.value + 0.1 * second.squares(*bases)) / 0.19
    assert relative(block.scaling, ideal) < 0.5 * relative(stale, ideal)
    assert float(block.scaling.sum()) == pytest.approx(float(ideal.sum()), rel=1e-9)


@every_block
def test_a_block_s_state_restores_every_bit(factory, oracle):
    first, second = oracle.statistics(), oracle.statistics()
    block, other = oracle.built(factory, first), factory.build(Place((3, 4)))
    V = torch.randn(3, 4)
    block.solve(V, 0.1)
    other.load_state_dict(block.state_dict())
    for b in (block, other):
        b.update(second)
        b.refresh()
        b.rescale(second)
    assert torch.equal(block.follow(V), other.follow(V))
    assert torch.equal(block.solve(V, 0.1), other.solve(V, 0.1))
    assert torch.equal(block.multiply(V), other.multiply(V))


@every_block
def test_an_unfed_block_says_so(factory):
    block = factory.build(Place((3, 4)))
    assert not block.ready
    with pytest.raises(RuntimeError, match=r"no (statistics|bases) yet"):
        block.solve(torch.ones(3, 4), 0.1)


@every_block
def test_all_zero_statistics_leave_damping_alone_in_charge(factory, oracle):
    statistics = oracle.statistics()
    zero = type(statistics)(torch.zeros_like(statistics.inputs), torch.zeros_like(statistics.output_grads))
    block, V = oracle.built(factory, zero), torch.randn(3, 4)
    assert torch.allclose(block.solve(V, 0.5), V / 0.5, atol=ROUNDING)
    assert not block.quadratic(V)


@pytest.mark.parametrize("changes", [False, True])
def test_an_inverse_found_for_another_damping_is_not_taken_for_this_one(changes, oracle):
    block, V = oracle.built(FactoredKFAC(), oracle.statistics()), torch.randn(3, 4)
    block.solve(V, 0.1)
    job = block.decomposing()
    now = 1.0 if changes else 0.1
    expected = block.solve(V, now)
    block.adopt(job())
    taken = block._inverses
    assert torch.allclose(block.solve(V, now), expected, rtol=1e-12)
    assert (block._inverses is taken) != changes  # the control: where the damping stayed, nothing is inverted again
