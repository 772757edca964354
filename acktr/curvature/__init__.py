"""Approximations of the Fisher: one block per layer, and whole networks'."""

from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Place, Statistics
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.choice import Curvature, curvature_over
from acktr.curvature.diagonal import ConstantBlock, Diagonal, ParameterBlock
from acktr.curvature.ekfac import EKFAC
from acktr.curvature.kronecker import KFAC, FactoredKFAC
from acktr.curvature.network import NetworkCurvature, NetworkCurvatureFactory
from acktr.curvature.posterior import Posterior, matrix_gaussian_divergence
from acktr.curvature.sampling import SampledBlock

__all__ = [
    "EKFAC",
    "KFAC",
    "Block",
    "BlockDiagonal",
    "BlockRule",
    "ConstantBlock",
    "Curvature",
    "CurvatureFactory",
    "Diagonal",
    "FactoredKFAC",
    "NetworkCurvature",
    "NetworkCurvatureFactory",
    "ParameterBlock",
    "Place",
    "Posterior",
    "SampledBlock",
    "Statistics",
    "curvature_over",
    "matrix_gaussian_divergence",
]
