"""Block-tridiagonal K-FAC against the explicit matrices of its chain."""

import logging
from itertools import pairwise

import pytest
import torch
from torch import nn

from acktr.capture import Capture
from acktr.chain import Links
from acktr.curvature import BlockDiagonal, BlockTridiagonal, FactoredKFAC, Tridiagonal
from acktr.curvature.base import MAX_FAILURES
from acktr.curvature.members import known_fisher
from acktr.fisher import ExactFisher, SampledFisher
from acktr.likelihood import Categorical, DiagonalGaussian, ScalarGaussian
from acktr.linalg import DecompositionError, split_damping
from acktr.moments import Moment

ROUNDING = 1e-9  # float64; regressions on factors whose smallest eigenvalues are about 1e-4 of the largest
DAMPING = 0.03


def built(network, likelihood, inputs, settings=None, rules=None, updates=1, seeds=None, kind=BlockTridiagonal):
    parameters = dict(network.named_parameters())
    settings = settings or (Tridiagonal() if kind is BlockTridiagonal else FactoredKFAC())
    curvature = kind(network, parameters, settings, rules)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        capture = Capture(network, curvature.layers)
        with capture.recording():
            network(inputs)
        outputs = capture.last.outputs
        seed_list = (seeds or ExactFisher())(likelihood, outputs, None, generator)
        assert curvature.update(capture.last, seed_list, refresh=True, generator=generator)
    return curvature


def three_layers(oracle, examples=200, depth=3):
    """Enough examples for moments of full rank, so that the undamped matrices have inverses."""
    network = oracle.mlp(3, *[4] * (depth - 1), 2)
    return network, Categorical(), torch.randn(examples, 3)


def dense_of(apply, curvature, network, oracle):
    """A linear map of steps as a matrix, entries in the order of the layers' matrices."""
    size = sum(p.numel() for p in network.parameters())
    columns = [oracle.flat(apply(oracle.unflat(unit, network))) for unit in torch.eye(size)]
    order = places(curvature, network, oracle)
    return torch.stack(columns, dim=1)[order][:, order]


def places(curvature, network, oracle):
    index = oracle.unflat(torch.arange(sum(p.numel() for p in network.parameters())), network)
    return torch.cat([member.pack(index).flatten() for member in curvature.members])


def block_slices(curvature):
    ends = torch.tensor([0, *(m.block.shape[0] * m.block.shape[1] for m in curvature.members)]).cumsum(0).tolist()
    return [slice(*pair) for pair in pairwise(ends)]


def factored_moments(curvature, damping=0.0):
    """F̃'s diagonal blocks and those above them, as kron matrices over row-major entries; damped on the diagonal."""
    (chain,) = curvature.chains
    diagonal = []
    for member in chain.members:
        A, G = member.block.input_moment.value, member.block.output_moment.value
        of_outputs, of_inputs = split_damping(G.diagonal().mean(), A.diagonal().mean(), damping)
        diagonal.append(torch.kron(G + of_outputs * torch.eye(len(G)), A + of_inputs * torch.eye(len(A))))
    return diagonal, [torch.kron(outputs.value, inputs.value) for inputs, outputs in chain._moments]


def gaussian_chain(diagonal, above):
    """The one matrix with these blocks whose inverse is block-tridiagonal, from the blocks' own regressions."""
    ends = torch.tensor([0, *map(len, diagonal)]).cumsum(0).tolist()
    out = torch.zeros(ends[-1], ends[-1])
    rows = [slice(*pair) for pair in pairwise(ends)]
    for k in reversed(range(len(diagonal))):
        out[rows[k], rows[k]] = diagonal[k]
        if k + 1 < len(diagonal):
            # A softmax does not feel a common shift of its logits, so that the last block is singular where undamped.
            psi = above[k] @ torch.linalg.pinv(diagonal[k + 1], rtol=1e-10, hermitian=True)
            for j in range(k + 1, len(diagonal)):
                out[rows[k], rows[j]] = psi @ out[rows[k + 1], rows[j]]
                out[rows[j], rows[k]] = out[rows[k], rows[j]].mT
    return out


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("damping", [DAMPING, 1.0])
def test_the_sweeps_are_the_explicit_inverse_of_the_damped_chain(depth, damping, oracle):
    network, likelihood, inputs = three_layers(oracle, depth=depth)
    curvature = built(network, likelihood, inputs)
    found = dense_of(lambda step: curvature.solve(step, damping), curvature, network, oracle)
    F = gaussian_chain(*factored_moments(curvature, damping))
    assert relative(found, torch.linalg.inv(F)) < ROUNDING
    assert torch.allclose(found, found.mT, atol=ROUNDING * float(found.abs().max()))
    assert torch.linalg.eigvalsh(found).min() > 0
    # Negative control: without what neighbours know of each other it is another matrix.
    diagonal, above = factored_moments(curvature, damping)
    assert relative(torch.linalg.inv(gaussian_chain(diagonal, [0 * a for a in above])), torch.linalg.inv(F)) > 1e-3


def test_the_inverse_has_three_diagonals_and_the_matrix_agrees_with_the_moments_on_them(oracle):
    network, likelihood, inputs = three_layers(oracle)
    curvature = built(network, likelihood, inputs)
    first, second, third = block_slices(curvature)
    inverse = dense_of(lambda step: curvature.solve(step, DAMPING), curvature, network, oracle)
    scale = float(inverse.abs().max())
    assert inverse[first, third].abs().max() < ROUNDING * scale
    assert inverse[first, second].abs().max() > 1e-3 * scale
    F, (diagonal, above) = torch.linalg.inv(inverse), factored_moments(curvature, DAMPING)
    for rows, expected in zip((first, second, third), diagonal, strict=True):
        assert relative(F[rows, rows], expected) < ROUNDING
    assert relative(F[first, second], above[0]) < ROUNDING
    assert relative(F[second, third], above[1]) < ROUNDING


def test_undamped_it_is_the_chain_of_the_undamped_moments(oracle):
    network, likelihood, inputs = three_layers(oracle)
    curvature = built(network, likelihood, inputs)
    F = dense_of(curvature.multiply, curvature, network, oracle)
    expected = gaussian_chain(*factored_moments(curvature))
    assert relative(F, expected) < 1e-8  # regressions are damped by ten roundings of the trace
    assert relative(F, gaussian_chain(*factored_moments(curvature, 1e-6))) > 1e-6
    assert torch.allclose(F, F.mT, atol=ROUNDING * float(F.abs().max()))
    assert torch.linalg.eigvalsh(F).min() > -ROUNDING * float(F.abs().max())
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    V = oracle.flat(step)[places(curvature, network, oracle)]
    assert float(curvature.quadratic(step)) == pytest.approx(float(V @ F @ V), rel=1e-9)
    solution, form = curvature.solve_with_form(step, DAMPING)
    assert float(form) == pytest.approx(float(curvature.quadratic(solution)))


def test_beside_a_batch_s_own_curvature_it_is_the_chain_still(oracle):
    network, likelihood, inputs = three_layers(oracle)
    curvature = built(network, likelihood, inputs)
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    alone = oracle.flat(curvature.solve(step, DAMPING))
    assert relative(oracle.flat(curvature.solver_with_batch(DAMPING, 0.0)(step)), alone) < ROUNDING
    # A second time as much of F̂ itself is twice F̂.
    twice = oracle.flat(curvature.solver_with_batch(DAMPING, 1.0)(step))
    assert relative(twice, oracle.flat(curvature.solve(step, DAMPING / 2)) / 2) < ROUNDING
    product = oracle.flat(curvature.multiply(step))
    assert relative(oracle.flat(curvature.multiply_batch(step)), product) < ROUNDING
    blocks = built(network, likelihood, inputs, kind=BlockDiagonal)
    assert relative(oracle.flat(blocks.multiply_batch(step)), product) > 1e-2


def test_with_two_layers_undamped_it_is_the_factored_fisher_itself(oracle):
    network, likelihood, inputs = three_layers(oracle, depth=2)
    curvature = built(network, likelihood, inputs)
    (A, B), (C,) = factored_moments(curvature)
    expected = torch.cat([torch.cat([A, C], 1), torch.cat([C.mT, B], 1)])
    assert relative(dense_of(curvature.multiply, curvature, network, oracle), expected) < 1e-8
    block_diagonal = torch.block_diag(A, B)
    assert relative(block_diagonal, expected) > 0.1


def test_moments_of_a_linear_network_are_the_fisher_s_own_blocks(oracle):
    # With linear layers and a constant metric K-FAC's factors are exact, and so are the pairs'.
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1), nn.Flatten(0))
    inputs, likelihood = torch.randn(50, 3), ScalarGaussian(0.7)
    curvature = built(network, likelihood, inputs)
    order = places(curvature, network, oracle)
    F = oracle.fisher(network, likelihood, inputs)[order][:, order]
    assert relative(dense_of(curvature.multiply, curvature, network, oracle), F) < 1e-7
    blocks = built(network, likelihood, inputs, kind=BlockDiagonal)
    assert relative(dense_of(blocks.multiply, blocks, network, oracle), F) > 0.1


def test_it_is_nearer_to_the_fisher_than_its_diagonal(oracle):
    network, likelihood, inputs = three_layers(oracle)
    curvature, blocks = built(network, likelihood, inputs), built(network, likelihood, inputs, kind=BlockDiagonal)
    order = places(curvature, network, oracle)
    F = oracle.fisher(network, likelihood, inputs)[order][:, order]
    tri, diagonal = (dense_of(c.multiply, c, network, oracle) for c in (curvature, blocks))
    assert relative(tri, F) < 0.8 * relative(diagonal, F)


def test_without_cross_moments_it_is_block_diagonal_k_fac(oracle):
    network, likelihood, inputs = three_layers(oracle)
    curvature, blocks = built(network, likelihood, inputs), built(network, likelihood, inputs, kind=BlockDiagonal)
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    expected, form = oracle.flat(blocks.solve(step, DAMPING)), blocks.quadratic(step)
    assert relative(oracle.flat(curvature.solve(step, DAMPING)), expected) > 0.02
    for pair in curvature.chains[0]._moments:
        for moment in pair:
            moment.replace(torch.zeros_like(moment.value))
    curvature.chains[0]._decomposed = curvature.chains[0]._undamped = None
    assert relative(oracle.flat(curvature.solve(step, DAMPING)), expected) < ROUNDING
    assert float(curvature.quadratic(step)) == pytest.approx(float(form))


def test_much_damping_leaves_the_gradient(oracle):
    network, likelihood, inputs = three_layers(oracle)
    curvature = built(network, likelihood, inputs)
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    assert relative(1e12 * oracle.flat(curvature.solve(step, 1e12)), oracle.flat(step)) < 1e-4
    assert relative(oracle.flat(curvature.solve(step, 1.0)), oracle.flat(step)) > 1e-2


def test_the_floor_holds_where_layers_foretell_each_other_perfectly(oracle):
    # One example: every moment has rank one, and each layer's gradient is a multiple of the next one's.
    network, likelihood, _ = three_layers(oracle)
    curvature = built(network, likelihood, torch.randn(1, 3))
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    largest = {}
    for damping in (1e-2, 1e-20):
        solved = curvature.solve(step, damping)
        assert all(torch.isfinite(t).all() for t in solved.values())
        assert float(oracle.flat(solved) @ oracle.flat(step)) > 0
        largest[damping] = max(float(residual.scaling.max()) for residual in curvature.chains[0]._decomposed[2])
    assert largest[1e-20] == pytest.approx(1e8), "the floor held"
    assert largest[1e-2] < 1e6, "where it was not needed it was not felt"
    assert float(curvature.quadratic(step)) >= 0


class Branching(nn.Module):
    """A trunk of three layers with two heads, a log standard deviation, and a convolution before it all."""

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(1, 2, 2)
        self.trunk = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 4), nn.Tanh())
        self.mean, self.spare = nn.Linear(4, 2), nn.Linear(4, 2)
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        features = self.trunk(self.look(x).tanh().flatten(1))
        mean = self.mean(features) + self.spare(features)
        return mean, self.log_std.expand_as(mean)


def test_a_trunk_is_a_chain_and_heads_convolutions_and_parameters_keep_their_blocks(oracle):
    network, inputs = Branching(), torch.randn(30, 1, 3, 3)
    rules = {"log_std": known_fisher(2.0)}
    curvature = built(network, DiagonalGaussian(), inputs, rules=rules)
    blocks = built(network, DiagonalGaussian(), inputs, rules=rules, kind=BlockDiagonal)
    assert [chain.names for chain in curvature.chains] == [["trunk.0", "trunk.2", "trunk.4"]]
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    tri, diagonal = curvature.solve(step, DAMPING), blocks.solve(step, DAMPING)
    assert tri.keys() == step.keys()
    same = {name for name in step if torch.equal(tri[name], diagonal[name])}
    assert same == {name for name in step if not name.startswith("trunk")}
    assert [set(piece) for piece in curvature.split(step)] == [set(piece) for piece in blocks.split(step)]
    assert not curvature.weighs(len(inputs))


class Calls(nn.Module):
    """A chain that only its code shows."""

    def __init__(self, linked=False):
        super().__init__()
        self.one, self.two, self.linked = nn.Linear(3, 4), nn.Linear(4, 2), linked

    def forward(self, x):
        return self.two(self.one(x).tanh())

    def links(self):
        return Links([self.one, nn.Tanh(), self.two]) if self.linked else None


def names_of(network, chains=None):
    curvature = BlockTridiagonal(network, dict(network.named_parameters()), Tridiagonal(chains=chains))
    return [chain.names for chain in curvature.chains]


def test_chains_are_found_where_a_network_shows_them(oracle, caplog):
    with caplog.at_level(logging.WARNING, logger="acktr"):
        assert names_of(Calls(linked=True)) == [["one", "two"]]
        assert not caplog.records
        assert names_of(Calls()) == []
    assert "block-diagonal" in caplog.text
    assert names_of(Calls(), (("one", "two"),)) == [["one", "two"]]
    nested = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert names_of(nested) == [["0.0", "1", "3"]]
    normed = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert names_of(normed) == [["0", "1"], ["3", "4"]]
    frozen = oracle.mlp(3, 4, 4, 4, 2)
    frozen[2].requires_grad_(False)
    trained = {name: p for name, p in frozen.named_parameters() if p.requires_grad}
    assert [c.names for c in BlockTridiagonal(frozen, trained, Tridiagonal()).chains] == [["4", "6"]]


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        ((("one", "three"),), "'three' is no trained linear layer of this network"),
        ((("one", "two"), ("two", "one")), "layer 'one' stands in the chains 2 times"),
        ((("one",),), "a chain has two layers or more"),
    ],
)
def test_chains_that_cannot_be_are_refused_by_name(chains, message):
    with pytest.raises(ValueError, match=message):
        names_of(Calls(), chains)


def test_neighbours_that_saw_other_rows_are_refused():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.two(self.one(x).tanh().mean(1))

    with pytest.raises(ValueError, match=r"layers 'one' and 'two' saw rows of shapes"):
        built(Places(), Categorical(), torch.randn(6, 5, 3), Tridiagonal(chains=(("one", "two"),)))


@pytest.mark.parametrize("seeds", [SampledFisher(1), SampledFisher(3)], ids=["one", "three"])
def test_cross_moments_are_those_of_the_same_examples_and_targets(seeds, oracle):
    network, likelihood, inputs = three_layers(oracle, examples=9)
    curvature = BlockTridiagonal(network, dict(network.named_parameters()), Tridiagonal(ema=0.0), max_rows=5)
    capture = Capture(network, curvature.layers)
    with capture.recording():
        network(inputs)
    generator = torch.Generator().manual_seed(3)
    assert curvature.update(capture.last, seeds(likelihood, capture.last.outputs, None, generator), True, generator)
    (chain,) = curvature.chains
    for k, (one, other) in enumerate(pairwise(curvature.members)):
        left, right = curvature._latest[one.name], curvature._latest[other.name]
        A = torch.einsum("nsi,nsj->ij", left.inputs, right.inputs) / 5
        G = torch.einsum("knsi,knsj->ij", left.output_grads, right.output_grads) / 5
        assert torch.allclose(chain._moments[k][0].value, A)
        assert torch.allclose(chain._moments[k][1].value, G)
        # The pair's joint moment is one: with other rows on one side it could not be positive semi-definite.
        joint = torch.cat([
            torch.cat([one.block.input_moment.value, A], 1),
            torch.cat([A.mT, other.block.input_moment.value], 1),
        ])
        assert torch.linalg.eigvalsh(joint).min() > -1e-12


def test_the_state_restores_every_bit_and_that_of_other_chains_is_refused(oracle):
    network, likelihood, inputs = three_layers(oracle)
    curvature = built(network, likelihood, inputs, updates=2)
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    curvature.solve(step, DAMPING)
    other = BlockTridiagonal(network, dict(network.named_parameters()), Tridiagonal())
    other.load_state_dict(curvature.state_dict())
    for c in (curvature, other):
        assert torch.equal(oracle.flat(c.multiply(step)), oracle.flat(curvature.multiply(step)))
        assert torch.equal(oracle.flat(c.solve(step, DAMPING)), oracle.flat(curvature.solve(step, DAMPING)))
        assert torch.equal(oracle.flat(c.solve(step, 0.5)), oracle.flat(curvature.solve(step, 0.5)))
    with pytest.raises(ValueError, match=r"curvature state is of the chains \[\['0', '2', '4'\]\]"):
        BlockTridiagonal(Calls(True), dict(Calls(True).named_parameters()), Tridiagonal()).load_state_dict(
            curvature.state_dict()
        )


def test_a_refresh_that_fails_keeps_the_last_good_one_and_is_an_error_at_last(oracle, monkeypatch):
    network, likelihood, inputs = three_layers(oracle)
    curvature = built(network, likelihood, inputs)
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    before = oracle.flat(curvature.solve(step, DAMPING))
    (chain,) = curvature.chains

    def broken(*_):
        raise DecompositionError("broken")

    monkeypatch.setattr("acktr.curvature.whole.tridiagonal.damped_cholesky", broken)
    for failures in range(1, MAX_FAILURES):
        chain.update(curvature._latest, refresh=True)
        assert chain.failures == failures
        assert torch.equal(oracle.flat(curvature.solve(step, DAMPING)), before)
    assert curvature.diagnostics()["skipped_refreshes"] == MAX_FAILURES - 1
    with pytest.raises(DecompositionError, match="broken"):
        chain.update(curvature._latest, refresh=True)
    monkeypatch.undo()
    chain.update(curvature._latest, refresh=True)
    assert chain.failures == 0


def test_between_refreshes_the_decomposition_stays(oracle):
    network, likelihood, inputs = three_layers(oracle)
    curvature = built(network, likelihood, inputs)
    step = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    before = oracle.flat(curvature.solve(step, DAMPING))
    for refresh in (False, True):
        capture = Capture(network, curvature.layers)
        with capture.recording():
            network(3 * inputs)
        seeds = ExactFisher()(likelihood, capture.last.outputs, None, None)
        assert curvature.update(capture.last, seeds, refresh)
        assert torch.equal(oracle.flat(curvature.solve(step, DAMPING)), before) == (not refresh)


def test_an_unfed_curvature_says_so(oracle):
    network = oracle.mlp(3, 4, 2)
    curvature = BlockTridiagonal(network, dict(network.named_parameters()), Tridiagonal())
    assert not curvature.ready
    with pytest.raises(RuntimeError, match="no statistics yet"):
        curvature.solve(oracle.parameters(network), DAMPING)
    assert isinstance(curvature.chains[0]._moments[0][0], Moment)
