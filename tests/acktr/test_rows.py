"""Curvature of kept rows: CG-FAC and SENG against the dense block of the examples, and K-FAC's product of the batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from acktr import NaturalGradient, ScalarGaussian, StepRule
from acktr.conjugate import Stop, conjugate_gradient
from acktr.curvature import CGFAC, KFAC, SENG, ColumnSketch, Kronecker, PerExample, Place, Statistics, WholeGram
from acktr.curvature.base import MAX_FAILURES
from acktr.curvature.rows.examples import ExampleGradients, ExampleRows
from acktr.curvature.rows.operators import RowMemory
from acktr.fisher import ExactFisher, SampledFisher
from acktr.linalg import DecompositionError
from acktr.trust_region import BlockMetric, ExactMetric

ROUNDING = 1e-10  # float64, matrices of at most 100 rows and entries of order one
TIGHT = Stop(1e-13, 200)
EXAMPLE_CHOICES = {
    "CG-FAC-E": CGFAC(operator=PerExample(), stop=TIGHT),
    "SENG": SENG(),
    "SENG, sketched": SENG(solver=ColumnSketch(5, TIGHT)),
}
every_choice = pytest.mark.parametrize("choice", EXAMPLE_CHOICES.values(), ids=list(EXAMPLE_CHOICES))


def block_of(statistics):
    """Σ_kn ∇ ∇ᵀ / N by one example and one seed after the other."""
    dense = 0
    for grads in statistics.output_grads:
        for g, a in zip(grads, statistics.inputs, strict=True):
            gradient = sum(torch.outer(g_s, a_s) for g_s, a_s in zip(g, a, strict=True)).flatten()
            dense = dense + torch.outer(gradient, gradient)
    return dense / len(statistics.inputs)


def damped_solution(dense, V, damping):
    return torch.linalg.solve(dense + damping * torch.eye(len(dense)), V.flatten()).view_as(V)


@every_choice
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("positions", [1, 4])
def test_the_block_is_the_dense_one_of_the_examples(choice, seeds, positions, oracle):
    statistics = oracle.statistics(examples=5, seeds=seeds, positions=positions)
    block, dense, V = oracle.built(choice, statistics), block_of(statistics), torch.randn(3, 4)
    assert torch.allclose(block.dense(), dense, atol=ROUNDING)
    assert torch.allclose(block.solve(V, 0.1), damped_solution(dense, V, 0.1), atol=1e-9)
    diagonal = dense.diagonal()
    assert block.condition() == pytest.approx(float(diagonal.max() / diagonal.mean()))
    product = oracle.built(CGFAC(stop=TIGHT), statistics).dense()
    assert not torch.allclose(product, dense, atol=1e-2)


def test_the_direct_system_is_the_smaller_one(oracle):
    few, many, V = oracle.statistics(examples=4, seeds=1), oracle.statistics(examples=20, seeds=1), torch.randn(3, 4)
    for statistics, side in ((few, 4), (many, 12)):
        block = oracle.built(SENG(), statistics)
        assert len(block.solver.gram(block.operator, 1)) == side
        assert torch.allclose(block.solve(V, 0.1), damped_solution(block_of(statistics), V, 0.1), atol=ROUNDING)


@every_choice
@pytest.mark.parametrize("fisher", [ExactFisher(), SampledFisher(2)], ids=repr)
@pytest.mark.parametrize("kind", ["categorical", "conv"])
def test_the_block_of_a_network_is_its_fishers(choice, fisher, kind, oracle):
    network, likelihood, inputs = oracle.case(kind)
    mine = oracle.curvature(network, likelihood, choice, inputs, fisher)
    dense = oracle.fisher(network, likelihood, inputs)
    # Sampled seeds give the block of the sample: the same one as any other choice that sees the same draw.
    other = oracle.curvature(network, likelihood, CGFAC(operator=PerExample()), inputs, fisher)
    for member, same in zip(mine.members, other.members, strict=True):
        true = oracle.block_of(dense, member, network)
        exact = torch.allclose(member.block.dense(), true, atol=ROUNDING)
        assert exact == isinstance(fisher, ExactFisher)
        assert torch.allclose(member.block.dense(), same.block.dense(), atol=ROUNDING)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("examples", [2, 3, 30])
def test_the_kronecker_operator_converged_is_kfac_on_one_batch(examples, positions, oracle):
    """Two examples are kept as rows, thirty as moments, three as rows on the wider side alone."""
    statistics = oracle.statistics(examples=examples, positions=positions, seeds=1)
    block, kfac = oracle.built(CGFAC(ema=0.0, stop=TIGHT), statistics), oracle.built(KFAC(ema=0.0), statistics)
    V = torch.randn(3, 4)
    assert torch.allclose(block.dense(), kfac.dense(), atol=ROUNDING)
    assert torch.allclose(block.solve(V, 0.1), kfac.solve(V, 0.1), atol=1e-9)
    truncated = oracle.built(CGFAC(ema=0.0, stop=Stop(1e-13, 1)), statistics)
    assert not torch.allclose(truncated.solve(V, 0.1), kfac.solve(V, 0.1), atol=1e-3)


@pytest.mark.parametrize(("examples", "seeds"), [(5, 1), (2, 3)])
def test_the_exact_operator_is_solved_in_one_step_more_than_its_rank(examples, seeds, oracle):
    statistics = oracle.statistics(examples=examples, seeds=seeds, outputs=6, inputs=8)
    operator = oracle.built(CGFAC(operator=PerExample()), statistics).operator
    V, rank = torch.randn(6, 8), examples * seeds
    found = conjugate_gradient(lambda x: operator.multiply(x) + 0.1 * x, V, Stop(1e-9, 100))
    assert found.iterations <= rank + 1
    product = oracle.built(CGFAC(), statistics).operator
    assert conjugate_gradient(lambda x: product.multiply(x) + 0.1 * x, V, Stop(1e-9, 100)).iterations > rank + 1


@pytest.mark.parametrize("memory", [1, 3])
@pytest.mark.parametrize("operator", [Kronecker(), PerExample()], ids=repr)
def test_several_batches_are_averaged_with_falling_weights(memory, operator, oracle):
    batches = [oracle.statistics(examples=n, seeds=1) for n in (6, 4, 5, 8)]
    block = CGFAC(ema=0.5, memory=memory, operator=operator, stop=TIGHT).build(Place((3, 4)))
    for statistics in batches:
        block.update(statistics)
    weights = {1: [1.0], 3: [1 / 7, 2 / 7, 4 / 7]}[memory]
    kept = list(zip(weights, batches[-memory:], strict=True))
    if isinstance(operator, PerExample):
        expected = sum(w * block_of(statistics) for w, statistics in kept)
    else:
        A = sum(w * s.input_moment().value for w, s in kept)
        expected = torch.kron(sum(w * s.output_moment().value for w, s in kept), A)
    assert torch.allclose(block.dense(), expected, atol=ROUNDING)
    block.update(batches[0])
    assert not torch.allclose(block.dense(), expected, atol=1e-3)


def test_thin_rows_of_several_batches_stay_rows(oracle):
    batches = [oracle.statistics(examples=2, seeds=1, outputs=9, inputs=8) for _ in range(3)]
    block = CGFAC(ema=0.5, memory=3).build(Place((9, 8)))
    for statistics in batches:
        block.update(statistics)
    assert block.operator.inputs.shape == (6, 8)
    weights = (1 / 7, 2 / 7, 4 / 7)
    A, G = (
        sum(w * moment(s).value for w, s in zip(weights, batches, strict=True))
        for moment in (Statistics.input_moment, Statistics.output_moment)
    )
    assert torch.allclose(block.dense(), torch.kron(G, A), atol=ROUNDING)
    V = torch.randn(9, 8)
    assert block.condition() == pytest.approx(
        float(G.diagonal().max() * A.diagonal().max() / (G.diagonal().mean() * A.diagonal().mean()))
    )
    assert torch.allclose(block.multiply(V), G @ V @ A, atol=ROUNDING)


@pytest.mark.parametrize("choice", [SENG(memory=1, examples=3), CGFAC(memory=1, examples=3, stop=TIGHT)], ids=repr)
def test_a_part_of_a_batch_is_unbiased(choice, oracle):
    statistics = oracle.statistics(examples=10, seeds=1)
    # What is linear in the rows is unbiased: the exact block of one choice, a factor of the other.
    block, expected = choice.build(Place((3, 4))), statistics.input_moment().value
    draws = []
    for _ in range(600):
        block.update(statistics)
        if isinstance(choice, SENG):
            block.refresh()
            draws.append(block.dense())
        else:
            a = block.operator.inputs
            draws.append(a if a.shape == (4, 4) else a.mT @ a)
    if isinstance(choice, SENG):
        expected = block_of(statistics)
        assert block.operator.size[0] == 3
    assert oracle.z_scores(torch.stack(draws), expected).max() < 5
    assert oracle.z_scores(torch.stack(draws), expected * 1.2).max() > 5
    again = choice.build(Place((3, 4)))
    again.load_state_dict(block.state_dict())
    for twin in (block, again):
        twin.update(statistics)
        twin.refresh()
    assert torch.equal(block.dense(), again.dense()), "the next part is the same after a restart"
    assert not torch.equal(block.dense(), first_part(choice, statistics))


def first_part(choice, statistics):
    block = choice.build(Place((3, 4)))
    block.update(statistics)
    block.refresh()
    return block.dense()


def test_images_of_two_sizes_are_kept_side_by_side(oracle):
    small, large = oracle.statistics(positions=2, examples=4), oracle.statistics(positions=5, examples=4)
    block = CGFAC(ema=0.5, memory=2, operator=PerExample()).build(Place((3, 4)))
    block.update(small)
    block.update(large)
    assert torch.allclose(block.dense(), block_of(small) / 3 + 2 * block_of(large) / 3, atol=ROUNDING)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("positions", [1, 4])
def test_rows_and_gradients_are_the_same_operator(seeds, positions, oracle):
    statistics = oracle.statistics(examples=5, seeds=seeds, positions=positions)
    rows = ExampleRows(statistics.inputs, statistics.output_grads)
    whole = ExampleGradients(torch.cat(list(statistics.gradients())))
    V, c, places = torch.randn(3, 4), torch.randn(5 * seeds), torch.tensor([7, 0, 11])
    for mine, other in (
        (rows.along(V), whole.along(V)),
        (rows.back(c), whole.back(c)),
        (rows.gram(), whole.gram()),
        (rows.explicit(), whole.explicit()),
        (rows.columns(places), whole.columns(places)),
        (rows.diagonal(), whole.diagonal()),
    ):
        assert torch.allclose(mine, other, atol=ROUNDING)
    assert rows.size == whole.size == (5 * seeds, 12)
    flat = whole.gradients.flatten(1)
    assert torch.allclose(rows.gram(), flat @ flat.mT, atol=ROUNDING)
    if positions > 1:  # the Gram matrix of summed rows is another one
        summed = ExampleRows(statistics.inputs.sum(1, keepdim=True), statistics.output_grads.sum(2, keepdim=True))
        assert not torch.allclose(summed.gram(), whole.gram(), atol=1e-2)


def test_shared_weights_are_kept_as_what_takes_less_work():
    few, many = torch.randn(2, 3, 50), torch.randn(1, 2, 3, 40)
    assert len(PerExample().keep(Statistics(few, many))) == 2, "three rows of 90 are less than a gradient of 2000"
    assert len(PerExample().keep(Statistics(torch.randn(2, 30, 5), torch.randn(1, 2, 30, 4)))) == 1
    assert len(PerExample().keep(Statistics(few[:, :1], many[:, :, :1]))) == 2


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_low_rank_gradients_are_the_best_ones_and_full_rank_exact(shape, oracle):
    statistics = oracle.statistics(examples=3, outputs=shape[0], inputs=shape[1], positions=9)
    gradients = torch.cat(list(statistics.gradients()))
    left, values, right = torch.linalg.svd(gradients, full_matrices=False)
    best = (left[..., :2] * values[:, None, :2]) @ right[:, :2]
    inputs, output_grads = PerExample(rank=2).keep(statistics)
    assert inputs.shape == (6, 2, shape[1])
    found = torch.cat(list(Statistics(inputs, output_grads).gradients())) * 3**0.5
    assert torch.allclose(found, best, atol=1e-8)  # a product's eigenvectors hold half of the digits
    assert not torch.allclose(found, gradients, atol=1e-2)
    V = torch.randn(shape)
    exact = oracle.built(SENG(), statistics).solve(V, 0.1)
    assert torch.equal(oracle.built(SENG(rank=4), statistics).solve(V, 0.1), exact)
    low = oracle.built(SENG(rank=3), statistics)
    assert torch.allclose(low.multiply(low.solve(V, 0.1)) + 0.1 * low.solve(V, 0.1), V, atol=1e-9)
    assert not torch.allclose(low.solve(V, 0.1), exact, atol=1e-3)


@pytest.mark.parametrize("positions", [1, 4])
def test_the_sketched_gram_matrix_is_unbiased_and_whole_where_nothing_is_left_out(positions, oracle):
    statistics = oracle.statistics(examples=4, seeds=1, positions=positions)
    operator = oracle.built(SENG(), statistics).operator
    true, sketch = operator.gram(), ColumnSketch(5)
    draws = torch.stack([sketch.gram(operator, draw) for draw in range(2000)])
    assert oracle.z_scores(draws, true).max() < 5  # ten numbers
    # The reference implementation's n/k on each side is not.
    assert oracle.z_scores(draws * 12 / 5, true).max() > 5
    assert torch.equal(ColumnSketch(12).gram(operator, 1), true)
    assert torch.equal(sketch.gram(operator, 3), draws[3])


def test_a_sketched_direction_descends_after_any_number_of_steps(oracle):
    statistics = oracle.statistics(examples=30, outputs=6, inputs=8, seeds=1)
    gradient = torch.randn(6, 8)
    slopes, errors = [], []
    exact = oracle.built(SENG(), statistics).solve(gradient, 1e-3)
    for steps in (1, 3, 400):
        block = oracle.built(SENG(solver=ColumnSketch(4, Stop(1e-12, steps))), statistics)
        direction = block.solve(gradient, 1e-3)
        slopes.append(float((gradient * direction).sum()))
        errors.append(float((direction - exact).norm() / exact.norm()))
    assert min(slopes) > 0
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6
    # The sketch in the Gram matrix's place, as the paper has it, goes uphill here.
    J = torch.cat(list(statistics.gradients())).flatten(1) / 30**0.5
    system = ColumnSketch(4).gram(block.operator, 1) + 1e-3 * torch.eye(30)
    plain = gradient.flatten() - J.mT @ torch.linalg.solve(system, J @ gradient.flatten())
    assert float(gradient.flatten() @ plain) < 0


def test_woodbury_s_identity_holds_in_single_precision(oracle):
    """Curvature of 10⁴ times the damping: what cancels in V − Jᵀ(…) is made good by the refinement."""
    statistics = oracle.statistics(examples=40, outputs=8, inputs=9, seeds=1)
    single = Statistics(statistics.inputs.float() * 10, statistics.output_grads.float())
    V = torch.randn(8, 9)
    exact = damped_solution(block_of(Statistics(single.inputs.double(), single.output_grads.double())), V, 1e-2)
    block = oracle.built(SENG(), single)
    error = float((block.solve(V.float(), 1e-2) - exact).norm() / exact.norm())
    assert error < 1e-5
    inside = block.operator.back(block.operator.along(V.float()))
    residual = block.multiply(block.solve(inside, 1e-2)) + 1e-2 * block.solve(inside, 1e-2) - inside
    assert float(residual.norm() / inside.norm()) < 1e-4


@pytest.mark.parametrize("scale", [1.0, 30.0, 255.0])
@pytest.mark.parametrize("metric", [BlockMetric(), ExactMetric()], ids=lambda m: type(m).__name__)
def test_single_precision_descends_on_inputs_as_large_as_pixels(metric, scale):
    """Curvature of up to 10¹⁰ times the damping; what the rows' type alone would give here is a loss that rises."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(300, 1), nn.Flatten(0)).float()
    nn.init.zeros_(network[0].weight)
    inputs, targets = torch.rand(64, 300).float() * scale, torch.randn(64).float()
    rule = StepRule(None, metric, corrections=0)
    optimizer = NaturalGradient(network, ScalarGaussian(), SENG(), radius=1e-2, damping=1e-3, rule=rule)
    losses = []
    for _ in range(10):
        with optimizer.recording():
            loss = F.mse_loss(network(inputs), targets)
        optimizer.update_curvature()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3
    falling = losses[: next(k for k, loss in enumerate(losses) if loss < 1e-3)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("positions", [1, 4])
def test_a_restored_system_is_the_same_to_the_last_bit(positions, oracle):
    statistics, V = oracle.statistics(examples=2, seeds=1, positions=positions), torch.randn(3, 4).float()
    block = oracle.built(SENG(), Statistics(statistics.inputs.float(), statistics.output_grads.float()))
    restored = SENG().build(Place((3, 4)))
    expected = block.solve(V, 0.1)
    restored.load_state_dict(block.state_dict())
    assert expected.dtype == torch.float32
    assert torch.equal(restored.solve(V, 0.1), expected)


def test_rows_in_use_are_those_of_the_latest_refresh(oracle):
    first, second, V = oracle.statistics(), oracle.statistics(), torch.randn(3, 4)
    block = oracle.built(SENG(memory=1), first)
    before = block.solve(V, 0.1)
    block.update(second)
    assert torch.equal(block.solve(V, 0.1), before)
    block.refresh()
    assert not torch.allclose(block.solve(V, 0.1), before, atol=1e-3)
    assert torch.equal(block.solve(V, 0.1), oracle.built(SENG(), second).solve(V, 0.1))


def test_rows_that_overflow_leave_the_last_good_ones_in_use(oracle):
    block, V = oracle.built(SENG(memory=1), oracle.statistics()), torch.randn(3, 4)
    before = block.solve(V, 0.1)
    bad = Statistics(torch.full((2, 1, 4), 1e200), torch.full((1, 2, 1, 3), 1e200))
    for failures in range(1, MAX_FAILURES):
        block.update(bad)
        block.refresh()
        assert block.failures == block.skipped_refreshes == failures
        assert torch.equal(block.solve(V, 0.1), before)
    with pytest.raises(DecompositionError, match="Gram matrix of 2 examples is not finite"):
        block.refresh()


def test_the_last_solution_starts_the_next_and_nan_does_not(oracle):
    statistics, V = oracle.statistics(examples=40), torch.randn(3, 4)
    block = oracle.built(CGFAC(stop=Stop(1e-13, 2)), statistics)
    exact = damped_solution(block.dense(), V, 0.01)
    errors = [float((block.solve(V, 0.01) - exact).norm()) for _ in range(6)]
    assert errors[-1] < 0.1 * errors[0]
    kept = block.previous
    assert not torch.isfinite(block.solve(V * float("nan"), 0.01)).any()
    assert not block.solve(torch.zeros(3, 4), 0.01).any()
    assert torch.equal(block.previous, kept)


def test_tiny_and_huge_gradients_are_solved_alike(oracle):
    statistics, V = oracle.statistics(), torch.randn(3, 4).float()
    single = Statistics(statistics.inputs.float(), statistics.output_grads.float())
    block = oracle.built(CGFAC(), single)
    plain = oracle.built(CGFAC(), single).solve(V, 0.1)
    for size in (2.0**-90, 2.0**90):  # squares of either leave single precision
        block.previous = None
        assert torch.equal(block.solve(V * size, 0.1) / size, plain)


@pytest.mark.parametrize("choice", [CGFAC(memory=2), SENG(memory=2), CGFAC(operator=PerExample())], ids=repr)
def test_kept_rows_are_copies(choice, oracle):
    statistics, V = oracle.statistics(), torch.randn(3, 4)
    block = oracle.built(choice, statistics)
    before = block.multiply(V)
    statistics.inputs.zero_()
    statistics.output_grads.zero_()
    assert torch.equal(block.multiply(V), before)
    restored = choice.build(Place((3, 4)))
    restored.load_state_dict(block.state_dict())
    assert torch.equal(restored.multiply(V), before)
    assert before.any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CGFAC(memory=0), "memory must be at least 1 batch, got 0"),
        (lambda: CGFAC(ema=1.0), r"ema must be in \[0, 1\), got 1\.0"),
        (lambda: SENG(memory=-1), "memory must be at least 1 batch, got -1"),
        (lambda: SENG(ema=-0.5), r"ema must be in \[0, 1\), got -0\.5"),
        (lambda: SENG(examples=0), "examples must be at least 1.*got 0"),
        (lambda: SENG(rank=0), "rank must be at least 1.*got 0"),
        (lambda: ColumnSketch(0), "columns must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_named_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_no_weight_for_the_past_keeps_none_of_it():
    memory = RowMemory(5, 0.0)
    memory.batches.extend([(torch.ones(1),)] * 3)
    assert len(memory.batches) == 1
    assert memory.weights() == [1.0]
    assert isinstance(SENG().solver, WholeGram)
