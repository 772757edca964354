"""Mixtures: which layer gets which curvature, and that the whole still learns."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from acktr.curvature import BKFAC, EKFAC, KFAC, SREKFAC, BlockDiagonal, ByName, ByWidth, Diagonal, Place, curvature_over
from acktr.curvature.diagonal import DiagonalBlock
from acktr.curvature.kronecker.ekfac import EKFACBlock
from acktr.curvature.kronecker.kfac import EigenBlock
from acktr.curvature.lowrank.brand import BrandFactor
from acktr.curvature.lowrank.factors import DenseFactor, SketchedFactor
from acktr.curvature.lowrank.pair import FactorPairBlock
from acktr.likelihood import Categorical
from acktr.optimizer import NaturalGradient

WIDE = ByWidth(wide=SREKFAC(rank=4, oversampling=2), narrow=EKFAC(0.9), width=17)


def blocks(choice, network):
    curvature = curvature_over(choice, network, dict(network.named_parameters()))
    return {member.name: member.block for member in curvature.members}


def test_wide_layers_get_one_choice_and_narrow_ones_the_other(oracle):
    found = blocks(WIDE, oracle.mlp(4, 8, 16, 3))
    assert [type(block) for block in found.values()] == [EKFACBlock, EKFACBlock, FactorPairBlock]
    assert isinstance(WIDE.build(Place((17, 2))), FactorPairBlock), "outputs count as much as inputs"


def test_the_two_factors_of_a_wide_layer_are_treated_each_by_its_width():
    block = WIDE.build(Place((3, 17)))
    assert [type(block.outputs), type(block.inputs)] == [DenseFactor, SketchedFactor]
    block = ByWidth(BKFAC(rank=4, columns=8), width=17).build(Place((3, 17)))
    assert [type(block.outputs), type(block.inputs)] == [DenseFactor, BrandFactor]


def test_names_choose_and_the_first_pattern_that_fits_counts(oracle):
    network = oracle.ActorCritic()  # trunk.0, logits, value
    choices = {"trunk.*": KFAC(), "value": Diagonal(), "*": SREKFAC()}
    found = blocks(ByName(choices), network)
    assert {name: type(block) for name, block in found.items()} == {
        "trunk.0": EigenBlock,
        "value": DiagonalBlock,
        "logits": FactorPairBlock,
    }
    assert type(blocks(ByName({"value": Diagonal()}), network)["logits"]) is EKFACBlock
    assert type(blocks(ByName({"*": SREKFAC(), **choices}), network)["value"]) is FactorPairBlock


def test_a_pattern_that_fits_no_layer_is_refused_with_the_nearest_name(oracle):
    with pytest.raises(ValueError, match=r"no layer is called 'valeu'; the nearest is 'value'"):
        blocks(ByName({"valeu": Diagonal()}), oracle.ActorCritic())


def test_free_parameters_average_like_the_layers_that_nothing_was_said_of():
    network = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    for choice in (WIDE, ByName({"0": KFAC(0.5)}, otherwise=EKFAC(0.9))):
        assert blocks(choice, network)["1.weight"].squares.ema == pytest.approx(0.9)
    assert blocks(KFAC(0.5), network)["1.weight"].squares.ema == pytest.approx(0.5)


@pytest.mark.parametrize(
    "choice",
    [WIDE, ByName({"0": BKFAC(rank=2, columns=2), "2": SREKFAC(rank=2, oversampling=1)})],
    ids=["width", "name"],
)
def test_a_mixture_is_the_block_diagonal_of_its_parts_and_learns(choice, oracle):
    network, inputs = oracle.mlp(4, 16, 3), torch.randn(32, 4)
    classes = inputs[:, :3].argmax(-1)
    optimizer = NaturalGradient(network, Categorical(), choice, radius=0.02)
    assert isinstance(optimizer.curvature, BlockDiagonal)
    losses = []
    for _ in range(25):
        with optimizer.recording():
            logits = network(inputs)
        optimizer.update_curvature()
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, classes)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    V = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    solved = optimizer.curvature.solve(V, 0.1)
    for member in optimizer.curvature.members:
        alone = member.unpack(member.block.solve(member.pack(V), 0.1), V)
        assert all(torch.equal(solved[name], alone[name]) for name in member.names)
        other = member.unpack(member.block.solve(member.pack(V), 0.2), V)
        assert not any(torch.allclose(solved[name], other[name]) for name in member.names)


def test_a_width_of_nothing_is_refused():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ByWidth(width=0)
