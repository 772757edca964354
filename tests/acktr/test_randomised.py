"""RS-KFAC and SRE-KFAC: what a sketch finds, what stands for the rest, and the block that two factors make."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acktr.curvature import (
    KFAC,
    RSKFAC,
    SREKFAC,
    AdaptiveRank,
    FactoredKFAC,
    LastKept,
    MeanOfRest,
    Place,
    RelativeDamping,
    SplitDamping,
    ZeroTail,
)
from acktr.curvature.lowrank.factors import DenseFactor, FixedRank, Sketch, SketchedFactor
from acktr.curvature.lowrank.pair import FactorPairBlock
from acktr.linalg import random_columns, ritz_pairs, sharpened, singular_pairs
from acktr.moments import Gram

ROUNDING = 1e-9  # float64, matrices of at most 40 rows and entries of order one, conditions of at most 1e4
SHAPE = (20, 30)
PAIRS = {"rs": singular_pairs, "sre": ritz_pairs}
FACTORIES = [RSKFAC(rank=4, oversampling=3), SREKFAC(rank=4, oversampling=3)]
every_factory = pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: type(f).__name__)
every_pairs = pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)


def counting():
    """Torch's own counter, taught the product that adds in place."""
    product = {torch.ops.aten.addmm_: lambda _, left, right, *rest, **more: 2 * left[0] * left[1] * right[1]}
    return FlopCounterMode(display=False, custom_mapping=product)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def decaying(size=40, ratio=0.7, seed=0):
    """A positive definite matrix whose eigenvalues fall by a ratio."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return vectors * ratio ** torch.arange(float(size)) @ vectors.mT


def factor_of(matrix, rank, pairs=ritz_pairs, tail=None, oversampling=3, power_steps=4, follow_steps=1):
    """A sketched factor that has seen a moment."""
    rank = FixedRank(rank) if isinstance(rank, int) else rank
    factor = SketchedFactor(0.0, rank, Sketch(pairs, oversampling, power_steps, follow_steps), tail or MeanOfRest())
    see(factor, matrix)
    return factor


def see(factor, matrix):
    factor.update(Gram(torch.linalg.cholesky(matrix + 1e-14 * torch.eye(len(matrix))).mT, 1))
    factor.refresh()


def model(spectrum):
    return spectrum.multiply(torch.eye(spectrum.width))


def low_rank_part(spectrum):
    return spectrum.basis * spectrum.values @ spectrum.basis.mT


def wide(oracle, **sizes):
    return oracle.statistics(examples=60, outputs=SHAPE[0], inputs=SHAPE[1], **sizes)


@every_pairs
def test_all_eigenvectors_give_factored_kfac(pairs, oracle):
    batches = [wide(oracle) for _ in range(3)]

    def fed(block):
        for batch in batches:
            block.update(batch)
            block.refresh()
        return block

    def pair(ranks):
        sketch = Sketch(pairs, 0, 4, 1)
        outputs, inputs = (SketchedFactor(0.9, FixedRank(rank), sketch, MeanOfRest()) for rank in ranks)
        return fed(FactorPairBlock(SHAPE, outputs, inputs, SplitDamping()))

    factored, full, V = fed(FactoredKFAC(0.9).build(Place(SHAPE))), pair(SHAPE), torch.randn(SHAPE)
    for damping in (1e-3, 0.1, 10.0):
        assert torch.allclose(full.solve(V, damping), factored.solve(V, damping), rtol=ROUNDING, atol=ROUNDING)
    assert torch.allclose(full.multiply(V), factored.multiply(V), atol=ROUNDING)
    # One eigenvector less is another matrix; and K-FAC with exact damping is none of these.
    assert relative(pair((19, 30)).multiply(V), factored.multiply(V)) > 1e-4
    assert relative(fed(KFAC(0.9).build(Place(SHAPE))).solve(V, 0.1), full.solve(V, 0.1)) > 1e-2


@pytest.mark.parametrize("factory", [RSKFAC(), SREKFAC()], ids=["rs", "sre"])
def test_narrow_factors_are_decomposed_whole_and_give_factored_kfac(factory, oracle):
    statistics, V = oracle.statistics(), torch.randn(3, 4)
    block = oracle.built(factory, statistics)
    assert isinstance(block.inputs, DenseFactor)
    assert block.ranks == (3, 4)
    expected = oracle.built(FactoredKFAC(), statistics).solve(V, 0.1)
    assert torch.allclose(block.solve(V, 0.1), expected, atol=ROUNDING)
    lower = oracle.built(type(factory)(rank=1, oversampling=0), statistics)
    assert lower.ranks == (1, 1)
    assert relative(lower.solve(V, 0.1), expected) > 1e-2


@every_pairs
@pytest.mark.parametrize("tail", [MeanOfRest(), ZeroTail()], ids=["mean", "zero"])
def test_a_moment_of_low_rank_is_found_exactly(tail, pairs):
    rows = torch.randn(5, 40)
    K = rows.mT @ rows
    assert torch.allclose(model(factor_of(K, 5, pairs, tail).spectrum), K, atol=1e-6)  # √(the Cholesky jitter's 1e-14)
    assert relative(model(factor_of(K, 4, pairs, tail).spectrum), K) > 1e-2


@every_pairs
def test_the_error_is_near_the_least_that_any_matrix_of_this_rank_can_have(pairs):
    K, rank = decaying(), 6
    least = float((0.7 ** torch.arange(6.0, 40)).norm())

    def error(factor):
        return float((K - low_rank_part(factor.spectrum)).norm())

    assert least * (1 - 1e-12) <= error(factor_of(K, rank, pairs)) < 1.01 * least
    assert error(factor_of(K, rank, pairs, oversampling=0, power_steps=1)) > 1.01 * least


def test_singular_values_are_closer_than_ritz_values_and_neither_is_too_large():
    K = decaying()
    true = torch.linalg.eigvalsh(K)[-8:]
    space = sharpened(K, random_columns(K, 8), 1)
    ritz, singular = ritz_pairs(K, space)[0], singular_pairs(K, space)[0]
    assert (ritz < singular).all()
    assert (singular < true).all()
    for _, vectors in (ritz_pairs(K, space), singular_pairs(K, space)):
        assert torch.allclose(vectors.mT @ vectors, torch.eye(8), atol=ROUNDING)
    # Ritz vectors of a space make its matrix diagonal; any other basis of it does not.
    vectors = ritz_pairs(K, space)[1]
    assert torch.allclose(vectors.mT @ K @ vectors, torch.diag(ritz), atol=ROUNDING)
    assert not torch.allclose(space.mT @ K @ space, torch.diag(ritz), atol=1e-3)


def test_power_steps_that_orthonormalise_keep_the_weak_modes_in_single_precision():
    # Sharpened four times, the sixth mode has (1e-2)^(5 · 4) of the first one's size: nothing, in float32.
    vectors = torch.linalg.qr(torch.randn(30, 30)).Q
    values = torch.cat([1e-2 ** torch.arange(6.0), torch.zeros(24)])
    K, start = (vectors * values @ vectors.mT).float(), random_columns(torch.empty(30, dtype=torch.float32), 6)
    K = K.double()
    raw = torch.linalg.qr(torch.linalg.matrix_power(K.float(), 4) @ start)[0].double()
    space = sharpened(K.float(), start, 4).double()
    found, lost = (float((s.mT @ vectors[:, :4]).square().sum()) for s in (space, raw))
    assert found > 4 - 1e-2  # the first four, down to 1e-6 of the first
    assert lost < 3.5


@pytest.mark.parametrize("tail", [MeanOfRest(), LastKept(), ZeroTail()], ids=["mean", "last", "zero"])
def test_the_tail_is_the_eigenvalue_of_everything_outside_of_the_basis(tail):
    K, M, damping = decaying(), torch.randn(40, 3), torch.tensor(0.01)
    spectrum = factor_of(K, 6, tail=tail).spectrum
    U, D = spectrum.basis, spectrum.values
    expected = {
        MeanOfRest: (K.trace() - D.sum()) / 34,
        LastKept: D.min(),
        ZeroTail: torch.tensor(0.0),
    }
    outside = torch.eye(40) - U @ U.mT

    def dense(t):
        return U * D @ U.mT + t * outside

    mine = dense(expected[type(tail)])
    assert torch.allclose(spectrum.multiply(M), mine @ M, atol=ROUNDING)
    assert torch.allclose(spectrum.solve(M, damping), torch.linalg.solve(mine + 0.01 * torch.eye(40), M), atol=1e-7)
    for other in expected.keys() - {type(tail)}:
        assert relative(dense(expected[other]) @ M, mine @ M) > 1e-4
    trace = float(model(spectrum).trace())
    assert (trace == pytest.approx(float(K.trace()))) == isinstance(tail, MeanOfRest)


@every_pairs
def test_a_sketch_that_starts_from_the_last_one_is_closer_than_one_that_starts_at_random(pairs):
    before, now = decaying(), decaying() + 0.05 * decaying(seed=1)
    errors = {}
    for follow in (1, None):
        factor = factor_of(before, 6, pairs, oversampling=0, power_steps=1, follow_steps=follow)
        for _ in range(4):  # as training does; the one that starts at random forgets them all
            see(factor, before)
        see(factor, now)
        errors[follow] = relative(low_rank_part(factor.spectrum), now)
    values = torch.linalg.eigvalsh(now)
    least = float(values[:-6].norm() / values.norm())
    assert least <= errors[1] < 1.05 * least
    assert errors[None] > 1.2 * errors[1]


def test_an_adaptive_rank_keeps_what_its_error_asks_for():
    # Of eigenvalues 0.7^k the first r leave out 0.7^r of the trace: r = 10 is the first within 3.3 %.
    K, rank = decaying(), AdaptiveRank(error=0.033, least=2, most=18, growth=3)
    factor = factor_of(K, rank)
    assert len(factor.spectrum.values) == factor.wanted == 10
    steep, flat = decaying(ratio=0.2), decaying(ratio=0.97)
    see(factor, steep)
    assert len(factor.spectrum.values) == 3
    kept = []
    for _ in range(6):
        see(factor, flat)
        kept.append(len(factor.spectrum.values))
    # Each refresh asks for three more than it found too few, oversampling included, up to the most.
    assert kept == [6, 12, 18, 18, 18, 18]
    factor.update(Gram(torch.zeros(1, 40), 1))
    factor.refresh()
    assert len(factor.spectrum.values) == 2
    assert len(factor_of(K, 18).spectrum.values) == 18, "a fixed rank stays"


@every_factory
@pytest.mark.parametrize("positions", [1, 3])
def test_the_operator_contract(factory, positions, oracle):
    block = oracle.built(factory, wide(oracle, positions=positions))
    assert block.ranks == (4, 4)
    V, dense = torch.randn(SHAPE), block.dense()
    assert torch.allclose(dense, dense.mT, atol=ROUNDING)
    assert torch.linalg.eigvalsh(dense).min() > -ROUNDING
    assert torch.allclose((dense @ V.flatten()).view_as(V), block.multiply(V), atol=ROUNDING)
    assert float(block.quadratic(V)) == pytest.approx(float(V.flatten() @ dense @ V.flatten()), rel=ROUNDING)
    assert block.condition() >= 1
    X = block.solve(V, 0.1)
    assert torch.allclose(block.solve(3 * V, 0.1), 3 * X, atol=ROUNDING)
    # The damping is split between the factors, so F + λ is another matrix; the split one is solved exactly.
    assert relative(block.multiply(X) + 0.1 * X, V) > 1e-2
    outputs, inputs = block.outputs.spectrum, block.inputs.spectrum
    d_G, d_A = SplitDamping()(outputs, inputs, 0.1)
    assert float(d_G * d_A) == pytest.approx(0.1)
    damped = torch.kron(model(outputs) + d_G * torch.eye(20), model(inputs) + d_A * torch.eye(30))
    assert torch.allclose((damped @ X.flatten()).view_as(V), V, atol=1e-7)


def test_relative_damping_is_a_share_of_the_largest_eigenvalue_and_never_less_than_the_split(oracle):
    statistics, V = wide(oracle), torch.randn(SHAPE)
    block = oracle.built(SREKFAC(rank=4, oversampling=3, damping=RelativeDamping(0.1)), statistics)
    G, A = model(block.outputs.spectrum), model(block.inputs.spectrum)
    largest = [float(torch.linalg.eigvalsh(matrix)[-1]) for matrix in (G, A)]
    damped = torch.kron(G + 0.1 * largest[0] * torch.eye(20), A + 0.1 * largest[1] * torch.eye(30))
    expected = torch.linalg.solve(damped, V.flatten()).view_as(V)
    assert torch.allclose(block.solve(V, 1e-9), expected, atol=ROUNDING)
    split = oracle.built(SREKFAC(rank=4, oversampling=3), statistics)
    assert relative(split.solve(V, 1e-9), expected) > 0.1
    assert torch.allclose(block.solve(V, 1e6), split.solve(V, 1e6), atol=ROUNDING)


@every_factory
def test_copies_of_the_batch_change_nothing(factory, oracle):
    statistics = wide(oracle)
    thrice = type(statistics)(statistics.inputs.repeat(3, 1, 1), statistics.output_grads.repeat(1, 3, 1, 1))
    part = type(statistics)(statistics.inputs[:20], statistics.output_grads[:, :20])
    once = oracle.built(factory, statistics).dense()
    assert torch.allclose(oracle.built(factory, thrice).dense(), once, atol=ROUNDING)
    assert relative(oracle.built(factory, part).dense(), once) > 1e-2


@pytest.mark.parametrize("rank", [4, AdaptiveRank(least=2, most=4)], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("kind", [RSKFAC, SREKFAC])
def test_the_state_restores_every_bit(kind, rank, oracle):
    factory, first, second = kind(rank=rank, oversampling=3), wide(oracle), wide(oracle)
    block, other, cold = (factory.build(Place(SHAPE)) for _ in range(3))
    block.update(first)
    block.refresh()
    other.load_state_dict(block.state_dict())
    V = torch.randn(SHAPE)
    for b in (block, other, cold):
        b.update(second)
        b.refresh()
    assert torch.equal(block.solve(V, 0.1), other.solve(V, 0.1))
    assert not torch.equal(block.solve(V, 0.1), cold.solve(V, 0.1))


@every_factory
def test_zeros_leave_damping_alone_in_charge_and_an_unfed_block_says_so(factory, oracle):
    block, V = factory.build(Place(SHAPE)), torch.randn(SHAPE)
    assert not block.ready
    with pytest.raises(RuntimeError, match="no bases yet"):
        block.solve(V, 0.1)
    statistics = wide(oracle)
    zero = type(statistics)(torch.zeros_like(statistics.inputs), torch.zeros_like(statistics.output_grads))
    block = oracle.built(factory, zero)
    assert torch.allclose(block.solve(V, 0.5), V / 0.5, atol=ROUNDING)
    assert not block.quadratic(V)
    assert block.quadratic(V).shape == oracle.built(factory, statistics).quadratic(V).shape == ()
    assert oracle.built(factory, statistics).quadratic(V) > 0


@every_factory
def test_a_moment_that_overflows_keeps_the_last_good_spectrum(factory, oracle):
    block, V = oracle.built(factory, wide(oracle)), torch.randn(SHAPE)
    before = block.solve(V, 0.1)
    huge = wide(oracle)
    block.update(type(huge)(1e200 * huge.inputs, huge.output_grads))
    block.refresh()
    assert block.skipped_refreshes == block.failures == 1
    assert torch.equal(block.solve(V, 0.1), before)
    fresh = factory.build(Place(SHAPE))
    fresh.update(type(huge)(1e200 * huge.inputs, huge.output_grads))
    fresh.refresh()
    assert (fresh.ready, fresh.failures) == (False, 1)


@every_factory
def test_a_solve_costs_its_ranks_times_the_matrix(factory, oracle):
    block, V = oracle.built(factory, wide(oracle)), torch.randn(SHAPE)
    with counting() as counter:
        block.solve(V, 0.1)
    # Four products, there and back on either side; each multiplication counts as two operations.
    assert counter.get_total_flops() == 4 * (4 + 4) * SHAPE[0] * SHAPE[1]
    with counting() as counter:
        oracle.built(KFAC(), wide(oracle)).solve(V, 0.1)
    assert counter.get_total_flops() > 4 * (4 + 4) * SHAPE[0] * SHAPE[1]


def test_a_gradient_given_by_its_rows_is_solved_without_forming_it(oracle):
    statistics = wide(oracle)
    block, weights = oracle.built(SREKFAC(rank=4, oversampling=3), statistics), torch.randn(60)
    V = statistics.weighted_sum(weights)
    rows = statistics.output_grads[0, :, 0] * weights[:, None] / 60, statistics.inputs[:, 0]
    assert torch.allclose(block.solve_rows(*rows, 0.1), block.solve(V, 0.1), atol=ROUNDING)
    assert relative(block.solve_rows(*rows, 0.2), block.solve(V, 0.1)) > 1e-2
    few = tuple(part[:7] for part in rows)
    with counting() as thin:
        block.solve_rows(*few, 0.1)
    assert thin.get_total_flops() == 4 * 7 * (4 * 20 + 4 * 30) + 2 * 7 * 20 * 30
    with counting() as thick:
        block.solve(few[0].mT @ few[1], 0.1)
    assert thin.get_total_flops() < thick.get_total_flops()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SREKFAC(rank=0), "rank must be at least 1, got 0"),
        (lambda: RSKFAC(oversampling=-1), "oversampling must be at least 0, got -1"),
        (lambda: SREKFAC(power_steps=0), "power_steps must be at least 1, got 0"),
        (lambda: SREKFAC(follow_steps=0), "follow_steps must be at least 1.* got 0"),
        (lambda: AdaptiveRank(error=1.0), r"error must be in \(0, 1\).* got 1\.0"),
        (lambda: AdaptiveRank(least=9, most=8), "got 9 and 8"),
        (lambda: AdaptiveRank(growth=0), "growth must be at least 1, got 0"),
        (lambda: RelativeDamping(0.0), r"share must be positive, got 0\.0"),
        (lambda: SREKFAC(ema=1.0).build(Place((2, 2))), r"ema must be in \[0, 1\), got 1\.0"),
    ],
)
def test_settings_out_of_range_are_named_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_each_factor_decides_by_its_own_width():
    build = SREKFAC(rank=8, oversampling=2).build
    assert [type(f) for f in (build(Place((20, 21))).outputs, build(Place((20, 21))).inputs)] == [
        DenseFactor,
        SketchedFactor,
    ]
    adaptive = SREKFAC(rank=AdaptiveRank(least=2, most=16), oversampling=2)
    assert type(adaptive.factor(36)) is DenseFactor
    assert type(adaptive.factor(37)) is SketchedFactor
