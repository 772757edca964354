"""Approximations of the Fisher: one block per layer, and whole networks'."""

from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Place, Statistics
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.blocktridiagonal import BlockTridiagonal, Tridiagonal
from acktr.curvature.choice import Curvature, curvature_over
from acktr.curvature.dense import DenseBlocks
from acktr.curvature.densefisher import DenseFisher
from acktr.curvature.diagonal import ConstantBlock, Diagonal, ParameterBlock
from acktr.curvature.ekfac import EKFAC
from acktr.curvature.exactcg import ExactCG
from acktr.curvature.kronecker import KFAC, FactoredKFAC
from acktr.curvature.network import NetworkCurvature, NetworkCurvatureFactory

__all__ = [
    "EKFAC",
    "KFAC",
    "Block",
    "BlockDiagonal",
    "BlockRule",
    "BlockTridiagonal",
    "ConstantBlock",
    "Curvature",
    "CurvatureFactory",
    "DenseBlocks",
    "DenseFisher",
    "Diagonal",
    "ExactCG",
    "FactoredKFAC",
    "NetworkCurvature",
    "NetworkCurvatureFactory",
    "ParameterBlock",
    "Place",
    "Statistics",
    "Tridiagonal",
    "curvature_over",
]
