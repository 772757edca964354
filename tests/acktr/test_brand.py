"""B-KFAC: eigenpairs that follow the batches' rows, against the averages that are never formed."""

import copy
import io

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acktr.curvature import BKFAC, BKFACC, BRKFAC, KFAC, SREKFAC, FactoredKFAC, Place, SplitDamping
from acktr.curvature.base import MAX_FAILURES
from acktr.curvature.lowrank.brand import BrandFactor, Correction, Overwrite, brand_update
from acktr.curvature.lowrank.factors import DenseFactor, Sketch, SketchedFactor
from acktr.curvature.lowrank.pair import FactorPairBlock
from acktr.linalg import DecompositionError, ritz_pairs
from acktr.moments import Gram, Moment

WIDTH, EMA = 40, 0.8
SHAPE = (20, 30)
LIMIT = 5  # standard errors
ROUNDING = 1e-9  # float64, some tens of updates of matrices of at most 40 rows and entries of order one
FACTORIES = [
    BKFAC(rank=4, columns=8),
    BRKFAC(rank=4, columns=8, overwrite_period=2),
    BKFACC(rank=4, columns=8, share=0.5),
]
every_factory = pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: type(f).__name__)


def counting():
    """Torch's own counter, taught the product that adds in place."""
    product = {torch.ops.aten.addmm_: lambda _, left, right, *rest, **more: 2 * left[0] * left[1] * right[1]}
    return FlopCounterMode(display=False, custom_mapping=product)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def batches(count, rows=6, width=WIDTH, dtype=None):
    """Rows with a few strong directions, as a layer's inputs have them."""
    scales = (0.8 ** torch.arange(float(width))).to(dtype or torch.get_default_dtype())
    return [Gram(torch.randn(rows, width, dtype=dtype) * scales, rows) for _ in range(count)]


def fed(factor, grams):
    for gram in grams:
        factor.update(gram)
        factor.refresh()
    return factor


def average(grams, ema=EMA):
    moment = Moment(ema)
    for gram in grams:
        moment.update(gram)
    return moment.value


def low_rank_part(spectrum):
    return spectrum.basis * spectrum.values @ spectrum.basis.mT


def model(spectrum):
    return spectrum.multiply(torch.eye(spectrum.width))


def misfit(basis):
    return float((basis.mT @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)).abs().max())


def wide(oracle, examples=8, **sizes):
    return oracle.statistics(examples=examples, outputs=SHAPE[0], inputs=SHAPE[1], seeds=1, **sizes)


@pytest.mark.parametrize("overlap", [0, 2, 6])
def test_an_update_is_exact_wherever_the_columns_lie(overlap):
    basis, values = torch.linalg.qr(torch.randn(WIDTH, 6)).Q, torch.rand(6)
    columns = torch.cat([basis[:, :overlap] @ torch.randn(overlap, overlap), torch.randn(WIDTH, 6 - overlap)], dim=1)
    vectors, found = brand_update(basis, values, columns)
    expected = basis * values @ basis.mT + columns @ columns.mT
    assert torch.allclose(vectors * found @ vectors.mT, expected, atol=ROUNDING)
    assert misfit(vectors) < ROUNDING
    assert relative(basis * values @ basis.mT, expected) > 0.1
    assert (found.diff() >= 0).all()


def test_columns_inside_the_basis_leave_qr_nothing_to_find():
    """The negative control: without the second look, the frame is not orthonormal."""
    basis = torch.linalg.qr(torch.randn(WIDTH, 6)).Q
    outside = torch.zeros(WIDTH, 2)  # what is left of columns inside
    assert misfit(torch.cat([basis, torch.linalg.qr(outside).Q], dim=1)) > 1e-2


def test_without_truncation_the_average_is_the_moment_s():
    grams = batches(5)
    factor = fed(BrandFactor(WIDTH, EMA, rank=33, columns=6), grams)
    K = average(grams)
    assert torch.allclose(low_rank_part(factor.spectrum), K, atol=ROUNDING)
    assert float(factor.gap) < ROUNDING
    assert relative(low_rank_part(fed(BrandFactor(WIDTH, EMA, rank=5, columns=6), grams).spectrum), K) > 1e-3
    assert relative(average(grams, 0.5), K) > 1e-2


def test_without_truncation_brand_is_k_fac_with_the_same_damping(oracle):
    # Fourteen rows in all, and both factors hold them without truncation.
    brand = FactorPairBlock(SHAPE, BrandFactor(20, EMA, 12, 7), BrandFactor(30, EMA, 20, 7), SplitDamping())
    short = FactorPairBlock(SHAPE, BrandFactor(20, EMA, 2, 7), BrandFactor(30, EMA, 2, 7), SplitDamping())
    blocks = [brand, FactoredKFAC(EMA).build(Place(SHAPE)), KFAC(EMA).build(Place(SHAPE)), short]
    for batch in [wide(oracle, examples=7) for _ in range(2)]:
        for block in blocks:
            block.update(batch)
            block.refresh()
    V = torch.randn(SHAPE)
    found, factored, exact, truncated = (block.solve(V, 0.01) for block in blocks)
    assert torch.allclose(found, factored, rtol=1e-7, atol=ROUNDING)
    assert relative(exact, factored) > 1e-2, "exact Tikhonov damping is another matrix"
    assert relative(truncated, factored) > 1e-2


def test_the_gap_is_the_error_and_the_average_is_never_exceeded():
    factor, grams, K = BrandFactor(WIDTH, EMA, rank=5, columns=6), batches(12), Moment(EMA)
    for gram in grams:
        factor.update(gram)
        K.update(gram)
        error = K.value - low_rank_part(factor.spectrum)
        assert torch.linalg.eigvalsh(error).min() > -ROUNDING
        assert float(factor.gap) == pytest.approx(float(torch.linalg.matrix_norm(error, "nuc")), abs=ROUNDING)
        assert float(factor.spectrum.trace) == pytest.approx(float(K.value.trace()))
    assert float(factor.gap) > 1e-3
    # As the tail it gives the model the average's trace.
    assert float(model(factor.spectrum).trace()) == pytest.approx(float(K.value.trace()))
    assert float(low_rank_part(factor.spectrum).trace()) < 0.99 * float(K.value.trace())
    # Negative control: the meter read before it forgets is another number.
    before = fed(BrandFactor(WIDTH, EMA, rank=5, columns=6), grams[:-1])
    discarded = before.gap + before.spectrum.values[:-5].sum()
    assert float(factor.gap) != pytest.approx(float(discarded), rel=1e-2)


def test_a_random_subset_of_a_large_batch_is_unbiased():
    gram = batches(1, rows=20)[0]
    gram.rows[0] *= 4  # one row that matters shows whether it is drawn as often as it should
    factor, draws = BrandFactor(WIDTH, 0.0, rank=1, columns=5), []
    for _ in range(1000):
        factor.update(gram)
        draws.append(low_rank_part(factor.spectrum)[:3, :3])
    draws = torch.stack(draws)
    error = draws.std(0) / 1000**0.5
    assert ((draws.mean(0) - gram.value[:3, :3]).abs() / error).max() < LIMIT
    assert ((draws.mean(0) / 4 - gram.value[:3, :3]).abs() / error).max() > LIMIT  # as without the factor 20 / 5


def test_the_basis_stays_orthonormal_in_single_precision(monkeypatch):
    factor, grams = BrandFactor(WIDTH, EMA, rank=8, columns=6), batches(800, dtype=torch.float32)
    assert misfit(fed(factor, grams).spectrum.basis) < 2e-5  # what is let pass, 1.2e-5, and one update's rounding
    # Negative control: a basis that is off by a thousandth is put right, and without the check it is not.
    spoiled = copy.deepcopy(factor)
    spoiled.spectrum.basis.mul_(1.001)
    assert misfit(fed(copy.deepcopy(spoiled), grams[:2]).spectrum.basis) < 2e-5
    monkeypatch.setattr("acktr.curvature.lowrank.brand.DRIFT", float("inf"))
    assert misfit(fed(spoiled, grams[:2]).spectrum.basis) > 1e-3


def test_a_basis_that_has_drifted_is_made_orthonormal_and_keeps_its_matrix():
    basis, values, columns = torch.linalg.qr(torch.randn(WIDTH, 6)).Q, torch.rand(6), torch.randn(WIDTH, 4)
    basis = basis + 1e-3 * torch.randn(WIDTH, 6)
    vectors, found = brand_update(basis, values, columns)
    assert misfit(basis) > 1e-4
    assert misfit(vectors) < ROUNDING
    assert torch.allclose(vectors * found @ vectors.mT, basis * values @ basis.mT + columns @ columns.mT, atol=ROUNDING)


def test_an_overwrite_is_a_sketch_of_the_moment_when_it_is_due():
    grams = batches(6)
    repair = Overwrite(3, 5, Sketch(ritz_pairs, 4, 4, 4))
    factor, plain = BrandFactor(WIDTH, EMA, 5, 6, repair), BrandFactor(WIDTH, EMA, 5, 6)
    for k, gram in enumerate(grams):
        fed(factor, [gram])
        fed(plain, [gram])
        error, other = (relative(low_rank_part(f.spectrum), average(grams[: k + 1])) for f in (factor, plain))
        if k % 3 == 2:
            K = average(grams[: k + 1])
            values = torch.linalg.eigvalsh(K)
            assert error == pytest.approx(float(values[:-5].norm() / values.norm()), rel=1e-2)
            assert factor.spectrum.rank == 5
            assert float(factor.gap) == pytest.approx(float(K.trace() - factor.spectrum.values.sum()))
        elif k < 2:
            assert error == other
    assert relative(low_rank_part(plain.spectrum), K) != pytest.approx(error, rel=1e-2)


def test_a_correction_of_all_columns_is_one_rayleigh_ritz_step():
    grams = batches(6)
    K = average(grams)

    def corrected(share):
        factor = fed(BrandFactor(WIDTH, EMA, 5, 6), grams)
        basis = factor.spectrum.basis
        return basis, *Correction(1, share)(K, basis, factor.spectrum.values, 7)

    before, vectors, values = corrected(1.0)
    inside, turn = torch.linalg.eigh(before.mT @ K @ before)
    assert torch.allclose(values, inside, atol=ROUNDING)
    assert torch.allclose(vectors * values @ vectors.mT, (before @ turn) * inside @ (before @ turn).mT, atol=ROUNDING)
    before, part, some = corrected(0.4)
    assert not torch.allclose(some, inside, atol=1e-6)
    assert (some.diff() >= 0).all()
    for basis in (vectors, part):  # turned inside their own space, nothing else
        assert misfit(basis) < ROUNDING
        assert torch.allclose(basis @ basis.mT, before @ before.mT, atol=ROUNDING)
    errors = [relative(b * v @ b.mT, K) for b, v in ((vectors, values), (part, some))]
    untouched = fed(BrandFactor(WIDTH, EMA, 5, 6), grams).spectrum
    assert errors[0] < errors[1] < relative(low_rank_part(untouched), K)


def test_corrections_come_when_they_are_due_and_read_the_meter_anew():
    grams = batches(4)
    plain, factor = BrandFactor(WIDTH, EMA, 5, 6), BrandFactor(WIDTH, EMA, 5, 6, Correction(4, 1.0))
    for k, gram in enumerate(grams):
        fed(plain, [gram])
        fed(factor, [gram])
        assert torch.equal(plain.spectrum.values, factor.spectrum.values) == (k < 3)
    assert float(factor.gap) == pytest.approx(float(average(grams).trace() - factor.spectrum.values.sum()))


def test_a_width_that_does_not_hold_rank_and_columns_is_refused_or_sketched():
    with pytest.raises(ValueError, match=r"less than the width 40, got 30 \+ 10"):
        BrandFactor(40, EMA, 30, 10)
    factory = BKFAC(rank=8, columns=32)
    assert type(factory.factor(41)) is BrandFactor
    assert type(factory.factor(40)) is SketchedFactor
    assert type(factory.factor(36)) is DenseFactor
    assert [type(f) for f in (factory.build(Place((64, 41))).outputs, factory.build(Place((30, 41))).outputs)] == [
        BrandFactor,
        DenseFactor,
    ]
    assert type(factory.build(Place((64, 201), offsets=4)).inputs) is SketchedFactor
    assert BKFAC(rank=8).factor(25).columns == 16
    assert BKFAC(rank=100).factor(400).columns == 128
    assert BKFAC().factor(400).moment is None
    assert BRKFAC().factor(400).moment is not None


@every_factory
@pytest.mark.parametrize("positions", [1, 3])
def test_the_operator_contract(factory, positions, oracle):
    block = factory.build(Place(SHAPE))
    for _ in range(3):
        block.update(wide(oracle, positions=positions))
        block.refresh()
    assert type(block.inputs) is type(block.outputs) is BrandFactor
    V, dense = torch.randn(SHAPE), block.dense()
    assert torch.allclose(dense, dense.mT, atol=ROUNDING)
    assert torch.linalg.eigvalsh(dense).min() > -ROUNDING
    assert torch.allclose((dense @ V.flatten()).view_as(V), block.multiply(V), atol=ROUNDING)
    assert float(block.quadratic(V)) == pytest.approx(float(V.flatten() @ dense @ V.flatten()), rel=ROUNDING)
    assert block.condition() >= 1
    X = block.solve(V, 0.1)
    assert torch.allclose(block.solve(3 * V, 0.1), 3 * X, atol=ROUNDING)
    assert relative(block.multiply(X) + 0.1 * X, V) > 1e-2  # the damping is split between the factors
    outputs, inputs = block.outputs.spectrum, block.inputs.spectrum
    d_G, d_A = SplitDamping()(outputs, inputs, 0.1)
    damped = torch.kron(model(outputs) + d_G * torch.eye(20), model(inputs) + d_A * torch.eye(30))
    assert torch.allclose((damped @ X.flatten()).view_as(V), V, atol=1e-7)
    rows = torch.randn(7, 20), torch.randn(7, 30)
    assert torch.allclose(block.solve_rows(*rows, 0.1), block.solve(rows[0].mT @ rows[1], 0.1), atol=ROUNDING)


@every_factory
def test_the_state_restores_every_bit(factory, oracle):
    blocks = [factory.build(Place(SHAPE)) for _ in range(3)]
    rest = [wide(oracle, examples=20) for _ in range(6)]  # more than the columns: subsets are drawn

    def go_on(block, several):
        for statistics in several:
            block.update(statistics)
            block.refresh()
        return block

    block, other, cold = blocks
    buffer = io.BytesIO()
    torch.save(go_on(block, rest[:3]).state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    V = torch.randn(SHAPE)
    solved = [go_on(b, rest[3:]).solve(V, 0.1) for b in (block, other, cold)]
    assert torch.equal(solved[0], solved[1])
    assert not torch.equal(solved[0], solved[2])


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
    block.update(statistics)
    assert block.quadratic(V) > 0


@every_factory
def test_rows_that_overflow_are_left_out_and_counted(factory, oracle):
    block, V = oracle.built(factory, wide(oracle)), torch.randn(SHAPE)
    before, huge = block.solve(V, 0.1), wide(oracle)
    huge = type(huge)(1e200 * huge.inputs, huge.output_grads)
    block.update(huge)
    block.refresh()
    assert block.failures == block.skipped_refreshes == 1
    good, state = wide(oracle), copy.deepcopy(block.inputs.state_dict())
    if block.inputs.repair is None:  # a moment that holds an infinity is no help to anyone
        block.update(good)
        block.refresh()
        assert block.failures == 0
        assert not torch.equal(block.solve(V, 0.1), before)
    block.inputs.load_state_dict(state)
    with pytest.raises(DecompositionError, match="no finite update"):
        for _ in range(MAX_FAILURES):
            block.update(huge)
            block.refresh()


def test_an_update_costs_its_width_and_forms_no_moment():
    def cost(factor, width):
        fed(factor, batches(1, rows=16, width=width))
        with counting() as counter:
            fed(factor, batches(1, rows=16, width=width))
        return counter.get_total_flops()

    costs = [cost(BKFAC(rank=8, columns=16).factor(width), width) for width in (400, 800)]
    assert costs[1] < 2.1 * costs[0]
    costs = [cost(SREKFAC(rank=8).factor(width), width) for width in (400, 800)]
    assert costs[1] > 3.8 * costs[0]
    factor = fed(BKFAC(rank=8, columns=16).factor(400), batches(1, rows=16, width=400))
    assert factor.moment is None
    assert max(t.numel() for t in factor.state_dict()["spectrum"].values()) == 16 * 400


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BKFAC(rank=0), "rank must be at least 1, got 0"),
        (lambda: BKFAC(columns=0), "columns must be at least 1.* got 0"),
        (lambda: BRKFAC(overwrite_period=0), "overwrite_period must be at least 1, got 0"),
        (lambda: BKFACC(correction_period=0), "correction_period must be at least 1, got 0"),
        (lambda: BKFACC(share=0.0), r"share must be in \(0, 1\], got 0\.0"),
        (lambda: BKFAC(ema=1.0).factor(1000), r"ema must be in \[0, 1\), got 1\.0"),
    ],
)
def test_settings_out_of_range_are_named_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
