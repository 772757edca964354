"""Draws from a block have the covariance they claim, and cost the KL they are scaled to."""

from dataclasses import dataclass

import pytest
import torch

from acktr.curvature import (
    EKFAC,
    KFAC,
    BlockDiagonal,
    ConstantBlock,
    CurvatureFactory,
    Diagonal,
    FactoredKFAC,
    FactoredTikhonov,
    ParameterBlock,
    PerCoordinate,
    Place,
    Posterior,
    Tikhonov,
    matrix_gaussian_divergence,
)
from acktr.curvature.base import Block, Statistics
from acktr.curvature.lowrank.ekfac import LowRankEKFACBlock

ROUNDING = 1e-10  # float64, matrices of at most 20 rows and entries of order one


@dataclass(frozen=True)
class LowRank:
    """EKFAC in two eigenvectors of three outputs and of four inputs, or of one factor alone."""

    ranks: tuple[int, int] = (2, 2)

    def build(self, place: Place) -> Block:
        return LowRankEKFACBlock(place.shape, 0.9, self.ranks)


EXACT: list[CurvatureFactory] = [KFAC(), EKFAC(), Diagonal(), LowRank(), LowRank((3, 2)), LowRank((2, 4))]
every_exact_block = pytest.mark.parametrize("factory", EXACT, ids=str)
every_block = pytest.mark.parametrize("factory", [*EXACT, FactoredKFAC()], ids=str)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def covariance(block, damping):
    """R Rᵀ, with R read off by unit noise."""
    o, i = block.shape
    units = torch.eye(o * i).reshape(-1, o, i)
    R = torch.stack([block.spread(unit, damping).flatten() for unit in units], dim=1)
    return R @ R.mT


def damped_inverse(block, damping):
    """The columns of `solve`."""
    o, i = block.shape
    units = torch.eye(o * i).reshape(-1, o, i)
    return torch.stack([block.solve(unit, damping).flatten() for unit in units], dim=1)


@every_block
def test_the_covariance_is_that_of_the_solve(factory, oracle):
    block = oracle.built(factory, oracle.statistics())
    found = covariance(block, 0.1)
    assert relative(found, damped_inverse(block, 0.1)) < ROUNDING
    assert relative(found, damped_inverse(block, 0.2)) > 1e-2


@every_exact_block
def test_exact_damping_draws_from_the_damped_inverse_and_factored_does_not(factory, oracle):
    statistics = oracle.statistics()
    block, factored = oracle.built(factory, statistics), oracle.built(FactoredKFAC(), statistics)
    expected = torch.linalg.inv(block.dense() + 0.1 * torch.eye(12))
    assert relative(covariance(block, 0.1), expected) < ROUNDING
    assert relative(covariance(factored, 0.1), torch.linalg.inv(factored.dense() + 0.1 * torch.eye(12))) > 0.05


@pytest.mark.parametrize(
    "block", [ConstantBlock((1, 5), 2.0), ParameterBlock((1, 5), 0.9)], ids=lambda b: type(b).__name__
)
def test_blocks_without_a_layer_can_be_drawn_from_too(block):
    if isinstance(block, ParameterBlock):
        for _ in range(3):
            block.update_from_sums(torch.randn(2, 5), 4)
    dense = torch.stack([block.multiply(unit[None]).flatten() for unit in torch.eye(5)])
    assert relative(covariance(block, 0.1), torch.linalg.inv(dense + 0.1 * torch.eye(5))) < ROUNDING
    assert block.sample(0.5, 0.1, torch.Generator().manual_seed(0)).shape == (1, 5)
    assert float(block.effective_dimension(0.1)) == pytest.approx(
        float((dense / (dense + 0.1 * torch.eye(5))).diagonal().sum())
    )


@every_block
def test_many_noises_are_spread_at_once(factory, oracle):
    block, noise = oracle.built(factory, oracle.statistics()), torch.randn(5, 3, 4)
    expected = torch.stack([block.spread(one, 0.1) for one in noise])
    assert torch.allclose(block.spread(noise, 0.1), expected, atol=ROUNDING)
    assert relative(expected[0], expected[1]) > 1e-2


@every_block
def test_the_sample_covariance_meets_the_dense_one(factory, oracle):
    block, generator = oracle.built(factory, oracle.statistics()), torch.Generator().manual_seed(1)
    draws = torch.stack([block.sample(0.5, 0.1, generator).flatten() for _ in range(4000)])
    products = draws[:, :, None] * draws[:, None]
    # 144 entries, half of them the others' mirror images: a largest z-score beyond 4.5 has a chance below 1 in 1000.
    assert oracle.z_scores(products, 0.5 * damped_inverse(block, 0.1)).max() < 4.5
    assert oracle.z_scores(products, 0.6 * damped_inverse(block, 0.1)).max() > 4.5


@every_block
def test_the_spectrum_is_the_precision_s(factory, oracle):
    block = oracle.built(factory, oracle.statistics())
    found = block.spectrum(0.1).flatten().sort().values
    expected = torch.linalg.eigvalsh(torch.linalg.inv(damped_inverse(block, 0.1)))
    assert torch.allclose(found, expected, rtol=1e-8)
    trace = torch.trace(block.dense() @ damped_inverse(block, 0.1))
    assert float(block.effective_dimension(0.1)) == pytest.approx(float(trace), rel=1e-8)
    assert float(block.effective_dimension(0.3)) < 0.99 * float(trace)


@pytest.mark.parametrize("rule", [FactoredTikhonov(), PerCoordinate(), Tikhonov()], ids=lambda r: type(r).__name__)
def test_the_effective_dimension_counts_what_the_curvature_decides_alone(rule, oracle):
    block = oracle.built(KFAC(damping=rule), oracle.statistics())
    trace = float(torch.trace(block.dense() @ damped_inverse(block, 0.5)))
    assert float(block.effective_dimension(0.5)) == pytest.approx(trace, rel=1e-8)
    with_cross_terms = float((1 - 0.5 / block.spectrum(0.5)).sum())
    assert (with_cross_terms > 1.05 * trace) == (not isinstance(rule, Tikhonov))


@every_block
def test_the_same_generator_draws_the_same_and_no_scale_draws_nothing(factory, oracle):
    block = oracle.built(factory, oracle.statistics())
    first, again, other = (block.sample(0.5, 0.1, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not block.sample(0.0, 0.1, torch.Generator()).any()


@every_block
def test_a_restored_block_draws_the_same(factory, oracle):
    block, other = oracle.built(factory, oracle.statistics()), factory.build(Place((3, 4)))
    block.sample(0.5, 0.1, torch.Generator())  # factored roots are those of the last refresh, and belong to the state
    later = oracle.statistics()
    block.update(later)
    other.load_state_dict(block.state_dict())
    draws = [b.sample(0.5, 0.1, torch.Generator().manual_seed(1)) for b in (block, other)]
    assert torch.equal(*draws)
    block.update(oracle.statistics())
    block.refresh()
    block.rescale(later)
    assert not torch.equal(block.sample(0.5, 0.1, torch.Generator().manual_seed(1)), draws[0])


@every_block
def test_all_zero_statistics_leave_the_damping_s_noise(factory, oracle):
    statistics = oracle.statistics()
    zero = Statistics(torch.zeros_like(statistics.inputs), torch.zeros_like(statistics.output_grads))
    block = oracle.built(factory, zero)
    assert relative(covariance(block, 0.25), 4 * torch.eye(12)) < ROUNDING
    assert float(block.effective_dimension(0.25)) == pytest.approx(0, abs=ROUNDING)


@every_block
def test_an_unfed_block_draws_nothing(factory):
    with pytest.raises(RuntimeError, match=r"no (statistics|bases) yet"):
        factory.build(Place((3, 4))).sample(1.0, 0.1, torch.Generator())


def dense_divergence(shift, new, old):
    """KL between two Gaussians by their covariance matrices."""
    inverse = torch.linalg.inv(old)
    volumes = torch.logdet(old) - torch.logdet(new)
    return 0.5 * (torch.trace(inverse @ new) + shift @ inverse @ shift - len(shift) + volumes)


def spd(size):
    root = torch.randn(size, 2 * size)
    return root @ root.mT / size


def test_the_divergence_of_matrix_gaussians_is_that_of_dense_ones():
    shift, new, old = torch.randn(3, 4), (spd(3), spd(4)), (spd(3), spd(4))
    found = float(matrix_gaussian_divergence(shift, new, old))
    assert found == pytest.approx(
        float(dense_divergence(shift.flatten(), torch.kron(*new), torch.kron(*old))), rel=1e-9
    )
    # Covariances in the place of precisions in the mean's term, an error found in the wild.
    swapped = tuple(torch.linalg.inv(c) for c in old)
    wrong = found + 0.5 * float(((old[0] @ shift @ old[1] - swapped[0] @ shift @ swapped[1]) * shift).sum())
    assert abs(wrong - found) > 1e-2 * found
    assert float(matrix_gaussian_divergence(torch.zeros(3, 4), new, new)) == pytest.approx(0, abs=1e-9)


@every_block
def test_the_divergence_to_the_prior_is_the_dense_one(factory, oracle):
    network, likelihood, inputs = oracle.case("categorical", examples=20)
    factory = LowRank() if isinstance(factory, LowRank) else factory  # this network's layers have other widths
    curvature = oracle.curvature(network, likelihood, factory, inputs)
    posterior = Posterior(curvature, dict(network.named_parameters()))
    expected = 0.0
    for member in curvature.members:
        mean = member.pack(oracle.parameters(network)).flatten()
        prior, q = 2.0 * torch.eye(len(mean)), 0.05 * damped_inverse(member.block, 0.025)
        expected += float(dense_divergence(mean, (q + q.mT) / 2, prior))
    assert posterior.divergence(0.05, 0.025, 2.0) == pytest.approx(expected, rel=1e-8)
    assert abs(posterior.divergence(0.05, 0.025, 0.5) - expected) > 1e-2 * expected


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "conv"])
def test_a_budget_of_kl_is_met_by_draws(kind, oracle):
    network, likelihood, inputs = oracle.case(kind, examples=40)
    curvature = oracle.curvature(network, likelihood, EKFAC(), inputs)
    parameters = dict(network.named_parameters())
    posterior, generator = Posterior(curvature, parameters), torch.Generator().manual_seed(0)
    budget, damping = 1e-3, 0.05
    dimension = posterior.effective_dimension(damping)
    assert 0 < dimension < sum(p.numel() for p in parameters.values())
    scale = 2 * budget / dimension
    found = {
        factor: mean_kl(network, likelihood, inputs, posterior, factor * scale, damping, generator) for factor in (1, 2)
    }
    # EKFAC's diagonal in its basis is the Fisher's, so that only the KL's higher orders and 600 draws' noise are left.
    assert found[1] == pytest.approx(budget, rel=0.1)
    assert found[2] > 1.5 * budget


def mean_kl(network, likelihood, inputs, posterior, scale, damping, generator, draws=600):
    total = 0.0
    with torch.no_grad():
        before = tuple(o.clone() for o in as_tuple(network(inputs)))
        for _ in range(draws):
            deviation = posterior.sample(scale, damping, generator)
            moved = {name: p + deviation[name] for name, p in network.named_parameters()}
            after = as_tuple(torch.func.functional_call(network, moved, (inputs,)))
            total += float(likelihood.divergence(before, after).mean()) / draws
    return total


def as_tuple(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def test_a_posterior_over_some_layers_leaves_the_others_alone(oracle):
    network, likelihood, inputs = oracle.case("categorical")
    curvature = oracle.curvature(network, likelihood, EKFAC(), inputs)
    some = Posterior(curvature, dict(network.named_parameters()), ["0.weight", "0.bias"])
    whole = Posterior(curvature, dict(network.named_parameters()))
    assert set(some.sample(1.0, 0.1, torch.Generator())) == {"0.weight", "0.bias"}
    assert some.effective_dimension(0.1) < whole.effective_dimension(0.1)


class Unrooted(Block):
    """A block that cannot be drawn from."""

    ready, shape, _like = True, (3, 5), {}

    def __init__(self):
        pass

    def update(self, statistics): ...
    def _decompose(self): ...
    def solve(self, matrix, damping): ...
    def multiply(self, matrix): ...
    def state_dict(self): ...
    def load_state_dict(self, state): ...
    def condition(self): ...


def test_what_cannot_be_drawn_from_says_so():
    @dataclass(frozen=True)
    class Choice:
        def build(self, _place):
            return Unrooted()

    network = torch.nn.Sequential(torch.nn.Linear(4, 3))
    curvature = BlockDiagonal(network, dict(network.named_parameters()), Choice())
    with pytest.raises(ValueError, match=r"Unrooted of '0' has no square root .* choose EKFAC"):
        Posterior(curvature, dict(network.named_parameters()))
    with pytest.raises(ValueError, match=r"object has no square root .* EKFAC"):
        Posterior(object(), dict(network.named_parameters()))  # type: ignore[arg-type]
    Posterior(BlockDiagonal(network, dict(network.named_parameters()), KFAC()), dict(network.named_parameters()))
