"""A layer's rows, multiplied, are the gradients that autograd gives one example at a time."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from acktr.curvature import EKFAC, KFAC, Statistics
from acktr.layers import Conv2dLayer, as_layer
from acktr.likelihood import Categorical

EXAMPLES = 4
ROUNDING = 1e-10  # float64, sums of at most a hundred products
CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": 2},
    "uneven stride": {"kernel_size": (2, 3), "stride": (1, 2)},
    "zeros": {"kernel_size": 3, "padding": 1},
    "uneven zeros": {"kernel_size": 3, "padding": (2, 1), "stride": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
    "same": {"kernel_size": (2, 3), "padding": "same"},
    "same circular": {"kernel_size": 2, "padding": "same", "padding_mode": "circular"},
    "same dilated": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilation": {"kernel_size": 2, "dilation": (2, 3), "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False},
}


def module_and_inputs(kind):
    if kind == "linear":
        return nn.Linear(4, 3), torch.randn(EXAMPLES, 4)
    if kind == "linear over positions":
        return nn.Linear(4, 3), torch.randn(EXAMPLES, 2, 5, 4)
    return nn.Conv2d(2, 3, **CONVOLUTIONS[kind]), torch.randn(EXAMPLES, 2, 6, 7)


KINDS = ["linear", "linear over positions", *CONVOLUTIONS]


def per_example(module, inputs, grads):
    """Each example's own parameter gradients by vmap(grad), the engine's rows not involved."""
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def loss(moving, x, g):
        return (functional_call(module, moving, (x.unsqueeze(0),))[0] * g).sum()

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, grads)


def rows(kind):
    module, inputs = module_and_inputs(kind)
    layer = as_layer("layer", module)
    grads = torch.randn_like(module(inputs))
    expected = per_example(module, inputs, grads)
    expected = torch.stack([layer.pack([g[n] for g in expected.values()]) for n in range(EXAMPLES)])
    return layer.inputs(inputs), layer.output_grads(grads), expected, layer


@pytest.mark.parametrize("kind", KINDS)
def test_output_gradients_times_inputs_are_the_example_s_weight_gradient(kind):
    a, g, expected, layer = rows(kind)
    assert expected.shape[1:] == layer.shape
    assert torch.allclose(g.mT @ a, expected, atol=ROUNDING)
    assert not torch.allclose(g.mT @ a.flip(2), expected, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("based", [False, True])
def test_squares_are_those_of_the_examples_gradients(kind, based):
    a, g, expected, layer = rows(kind)
    o, i = layer.shape
    output_basis, input_basis = (torch.linalg.qr(torch.randn(n, n)).Q for n in (o, i)) if based else (None, None)
    found = Statistics(a, g.unsqueeze(0)).squares(output_basis, input_basis)
    turned = output_basis.mT @ expected @ input_basis if based else expected
    assert torch.allclose(found, turned.square().mean(0), atol=ROUNDING)
    assert not torch.allclose(found, turned.mean(0).square(), atol=1e-2)


def test_squares_take_bases_one_at_a_time_and_sum_over_seeds(oracle):
    for positions in (1, 3):
        statistics = oracle.statistics(positions=positions)
        gradients = torch.einsum("knso,nsi->knoi", statistics.output_grads, statistics.inputs)
        U, V = (torch.linalg.qr(torch.randn(n, n)).Q for n in (3, 4))
        for bases, turned in (((U, None), U.mT @ gradients), ((None, V), gradients @ V)):
            expected = turned.square().sum(0).mean(0)
            assert torch.allclose(statistics.squares(*bases), expected, atol=ROUNDING)


def test_squares_in_chunks_are_squares_at_once(oracle):
    statistics = oracle.statistics(positions=3, examples=5)
    whole = statistics.squares()
    wide = Statistics(statistics.inputs.repeat(1, 1, 2**16), statistics.output_grads)  # five at once is too many
    assert torch.allclose(wide.squares()[:, :4], whole, atol=ROUNDING)


def test_moments_are_those_of_the_convolution_s_paper():
    a, g, _, _ = rows("stride")
    statistics = Statistics(a, g.unsqueeze(0))
    A = sum(torch.outer(a[n, s], a[n, s]) for n in range(EXAMPLES) for s in range(a.shape[1])) / EXAMPLES
    G = sum(torch.outer(g[n, s], g[n, s]) for n in range(EXAMPLES) for s in range(a.shape[1])) / EXAMPLES / a.shape[1]
    assert torch.allclose(statistics.input_moment().value, A, atol=ROUNDING)
    assert torch.allclose(statistics.output_moment().value, G, atol=ROUNDING)


def test_uncorrelated_positions_make_the_convolution_s_product_exact():
    # With output gradients independent of the inputs and white over positions, the Fisher is Ω ⊗ Γ in expectation.
    a = torch.randn(EXAMPLES, 3, 2)
    generator, square_root = torch.Generator().manual_seed(0), torch.tensor([[1.0, 0.0], [0.7, 0.5]])
    noise = torch.randn(40_000, EXAMPLES, 3, 2, generator=generator)
    g = noise @ square_root.mT
    gradients = torch.einsum("mnso,nsi->mnoi", g, a).flatten(2)
    fisher = torch.einsum("mnp,mnq->pq", gradients, gradients) / len(g) / EXAMPLES
    statistics = Statistics(a, g[:1])
    product = torch.kron(square_root @ square_root.mT, statistics.input_moment().value)
    # 160,000 examples: entries of order 3 within 1 %.
    assert torch.allclose(fisher, product, atol=0.05)
    assert not torch.allclose(fisher, product / 3, atol=0.05)


@pytest.mark.parametrize("factory", [EKFAC(), KFAC()])
def test_a_convolution_with_one_output_position_is_a_linear_layer_on_the_patch(factory, oracle):
    convolution = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten())
    linear = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    linear[1].weight.data = convolution[0].weight.data.flatten(1)
    linear[1].bias.data = convolution[0].bias.data
    inputs = torch.randn(6, 2, 3, 3)
    blocks = [oracle.curvature(n, Categorical(), factory, inputs).members[0].block for n in (convolution, linear)]
    V = torch.randn(4, 19)
    assert torch.allclose(blocks[0].multiply(V), blocks[1].multiply(V), atol=ROUNDING)
    assert torch.allclose(blocks[0].solve(V, 0.1), blocks[1].solve(V, 0.1), atol=1e-8)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("module", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(2, 3, 2)], ids=["linear", "conv"])
def test_partly_frozen_layers_have_rows_for_what_is_trained(module, frozen, oracle):
    module = module()
    getattr(module, frozen).requires_grad_(False)
    layer = as_layer("layer", module)
    inputs = torch.randn(EXAMPLES, 4) if isinstance(module, nn.Linear) else torch.randn(EXAMPLES, 2, 3, 3)
    grads = torch.randn_like(module(inputs))
    (expected,) = per_example(module, inputs, grads).values()
    found = layer.output_grads(grads).mT @ layer.inputs(inputs)
    assert found.shape[1:] == layer.shape
    assert torch.allclose(found, expected.reshape(found.shape), atol=ROUNDING)
    (unpacked,) = layer.unpack(found[0])
    assert torch.allclose(unpacked, expected[0], atol=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_unpacking_undoes_packing(kind):
    layer = rows(kind)[3]
    tensors = [torch.randn_like(p) for p in layer.parameters]
    matrix = layer.pack(tensors)
    assert matrix.shape == layer.shape
    assert all(torch.equal(a, b) for a, b in zip(layer.unpack(matrix), tensors, strict=True))


def test_groups_are_refused_by_name():
    with pytest.raises(ValueError, match=r"layer 'trunk\.2' has groups=2.*freeze the layer"):
        Conv2dLayer("trunk.2", nn.Conv2d(4, 4, 3, groups=2))


def test_only_exact_types_are_layers():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert as_layer("x", Scaled(2, 2)) is None
    assert as_layer("x", nn.LayerNorm(2)) is None
    assert as_layer("x", nn.Linear(2, 2)) is not None
