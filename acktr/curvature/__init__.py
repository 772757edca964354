"""Approximations of the Fisher: one block per layer, and the network's as their block diagonal."""

from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Statistics
from acktr.curvature.diagonal import ConstantBlock, Diagonal, ParameterBlock
from acktr.curvature.ekfac import EKFAC
from acktr.curvature.kronecker import KFAC, FactoredKFAC
from acktr.curvature.network import BlockDiagonal

__all__ = [
    "EKFAC",
    "KFAC",
    "Block",
    "BlockDiagonal",
    "BlockRule",
    "ConstantBlock",
    "CurvatureFactory",
    "Diagonal",
    "FactoredKFAC",
    "ParameterBlock",
    "Statistics",
]
