"""EKFAC's relatives: scalings from mean gradients, damping per coordinate, and what frozen bases cost."""

import pytest
import torch

from acktr.curvature import (
    EKFAC,
    KFAC,
    FactoredKFAC,
    FactoredTikhonov,
    PerCoordinate,
    Place,
    RunningEKFAC,
    Statistics,
    Tikhonov,
)

SHAPE = (3, 4)
ROUNDING = 1e-10  # float64, matrices of at most 100 rows and entries of order one
LIMIT = 5  # standard errors; tens of entries each, so chance alone would fail about one seed in 10⁵


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def flat_solve(dense, V):
    return torch.linalg.solve(dense, V.flatten()).view_as(V)


# ------------------------------------------------------------------------------------------------------------- damping


def eigen(statistics):
    """d_G, U_G, d_A, U_A."""
    moments = statistics.output_moment().value, statistics.input_moment().value
    return [part for moment in moments for part in torch.linalg.eigh(moment)]


@pytest.mark.parametrize("factory", [EKFAC, RunningEKFAC])
def test_damping_per_coordinate_is_the_explicit_matrix(factory, oracle):
    statistics, damping = oracle.statistics(), 0.3
    block = oracle.built(factory(damping=PerCoordinate()), statistics)
    d_G, _, d_A, _ = eigen(statistics)
    turn = torch.kron(block.output_basis, block.input_basis)
    extra = damping + damping**0.5 * (d_G[:, None] + d_A)
    dense = turn @ torch.diag((block.scaling + extra).flatten()) @ turn.mT
    V = torch.randn(SHAPE)
    assert torch.allclose(block.solve(V, damping), flat_solve(dense, V), atol=ROUNDING)
    assert relative(oracle.built(factory(), statistics).solve(V, damping), flat_solve(dense, V)) > 1e-2
    X, form = block.solve_with_form(V, damping)
    assert torch.allclose(X, block.solve(V, damping), atol=ROUNDING)
    assert float(form) == pytest.approx(float(block.quadratic(X)))


def test_kfac_damped_per_coordinate_is_factored_damping_with_an_even_split(oracle):
    statistics, damping = oracle.statistics(), 0.3
    A, G = statistics.input_moment().value, statistics.output_moment().value
    root = damping**0.5
    V = torch.randn(SHAPE)
    expected = torch.linalg.solve(G + root * torch.eye(3), V) @ torch.linalg.inv(A + root * torch.eye(4))
    even = oracle.built(KFAC(damping=PerCoordinate()), statistics).solve(V, damping)
    assert torch.allclose(even, expected, atol=ROUNDING)
    split = oracle.built(KFAC(damping=FactoredTikhonov()), statistics).solve(V, damping)
    assert torch.allclose(split, oracle.built(FactoredKFAC(), statistics).solve(V, damping), atol=ROUNDING)
    assert relative(split, even) > 1e-2


@pytest.mark.parametrize(
    ("rule", "indifferent"), [(Tikhonov(), True), (FactoredTikhonov(), True), (PerCoordinate(), False)]
)
def test_only_the_even_split_depends_on_where_a_block_s_scale_stands(rule, indifferent, oracle):
    statistics, V = oracle.statistics(), torch.randn(SHAPE)
    moved = Statistics(3 * statistics.inputs, statistics.output_grads / 3)
    first, second = (oracle.built(EKFAC(damping=rule), s).solve(V, 0.3) for s in (statistics, moved))
    assert (relative(first, second) < ROUNDING) == indifferent


def test_leading_eigenvectors_do_not_know_every_coordinate_s_damping():
    with pytest.raises(ValueError, match=r"PerCoordinate\(\) needs the eigenvalue of every direction, rank=4"):
        EKFAC(rank=4, damping=PerCoordinate())


# ------------------------------------------------------------------------------------------------------ mean gradients


@pytest.mark.parametrize("positions", [1, 3])
def test_a_squared_mean_is_an_unbiased_estimate_of_the_scalings(positions, oracle):
    statistics = oracle.statistics(positions=positions)
    statistics = Statistics(statistics.inputs + 1, statistics.output_grads + 1)  # rows that do not have mean zero
    block = oracle.built(RunningEKFAC(scaling_ema=0.0), statistics)
    draws = []
    for _ in range(2000):
        block.rescale(statistics)
        draws.append(block.squares.value.clone())
    draws = torch.stack(draws)
    bases = block.output_basis, block.input_basis
    expected = statistics.squares(*bases)
    assert oracle.z_scores(draws, expected).max() < LIMIT
    assert oracle.z_scores(draws / statistics.examples, expected).max() > LIMIT, "without N it is another matrix"
    unsigned = [g.flatten(0, 1).mT @ statistics.inputs.flatten(0, 1) for g in statistics.output_grads]
    turned = [bases[0].mT @ mean @ bases[1] for mean in unsigned]
    biased = sum(t.square() for t in turned) / statistics.examples
    assert relative(biased, expected) > 1, "without signs the examples add up"


def test_a_long_average_of_squared_means_is_ekfac(oracle):
    statistics = oracle.statistics(examples=40)
    block, ekfac = oracle.built(RunningEKFAC(scaling_ema=0.999), statistics), oracle.built(EKFAC(), statistics)
    first = relative(block.dense(), ekfac.dense())
    for _ in range(4000):
        block.rescale(statistics)
    # The start has a weight of e⁻⁴; of 2 × 1000 effective draws with two seeds each the noise is about a twentieth.
    assert relative(block.dense(), ekfac.dense()) < 0.1 < first
    assert float(block.dense().trace()) == pytest.approx(float(ekfac.dense().trace()), rel=0.1)


def test_scalings_start_at_kfac_s_and_are_carried_over_from_there(oracle):
    first, second = oracle.statistics(examples=40), oracle.statistics(examples=40)
    block, kfac = RunningEKFAC(0.9, 0.8).build(Place(SHAPE)), KFAC(ema=0.9).build(Place(SHAPE))
    for b in (block, kfac):
        b.update(first)
        b.refresh()
    assert torch.allclose(block.scaling, kfac.scaling, atol=ROUNDING)
    block.rescale(first)
    old, trace = (block.output_basis, block.input_basis), float(block.scaling.sum())
    before = block.dense()
    for b in (block, kfac):
        b.update(second)
        b.refresh()
    turn = torch.kron(block.output_basis, block.input_basis)
    assert torch.allclose(block.scaling.flatten(), (turn.mT @ before @ turn).diagonal(), atol=ROUNDING)
    assert float(block.scaling.sum()) == pytest.approx(trace)
    assert relative(block.scaling, kfac.scaling) > 1e-2
    assert relative(block.output_basis, old[0]) > 1e-3, "the bases did change"


# -------------------------------------------------------------------------------------------------------- frozen bases


def test_frozen_bases_keep_ekfac_s_spectrum_nearer_to_the_fisher_s_than_kfac_s(oracle):
    """The analogue of figure 5c of George et al.: the network moves on, bases and K-FAC's eigenvalues stay."""
    network, likelihood, inputs = oracle.case("categorical", examples=60)
    curvatures = {name: oracle.curvature(network, likelihood, f, inputs) for name, f in METHODS.items()}
    gaps = {name: [] for name in METHODS}
    for _ in range(4):
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(1.25)
        dense = oracle.fisher(network, likelihood, inputs)
        for name, curvature in curvatures.items():
            rows = oracle.recorded(network, likelihood, curvature, inputs)
            for member in curvature.members:
                block = member.block
                block.update(rows[member.name])
                block.rescale(rows[member.name])  # no refresh: K-FAC's eigenvalues are as old as its bases
                true = torch.linalg.eigvalsh(oracle.block_of(dense, member, network))
                gaps[name].append(float((block.scaling.flatten().sort().values - true).norm() / true.norm()))
    assert sum(gaps["ekfac"]) < 0.75 * sum(gaps["kfac"])
    # Control: K-FAC's eigenvalues of the day are not so far off, so it is the freezing that costs.
    fresh = oracle.curvature(network, likelihood, KFAC(), inputs).members[0]
    true = torch.linalg.eigvalsh(oracle.block_of(dense, fresh, network))
    assert float((fresh.block.scaling.flatten().sort().values - true).norm() / true.norm()) < 0.5 * gaps["kfac"][-2]


METHODS = {"ekfac": EKFAC(ema=0.0), "kfac": KFAC(ema=0.0)}
