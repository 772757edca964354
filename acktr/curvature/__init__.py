"""Approximations of the Fisher: one block per layer, and whole networks'."""

from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Place, Statistics
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.cgfac import CGFAC
from acktr.curvature.choice import Curvature, curvature_over
from acktr.curvature.diagonal import ConstantBlock, Diagonal, ParameterBlock
from acktr.curvature.ekfac import EKFAC
from acktr.curvature.examples import PerExample
from acktr.curvature.kronecker import KFAC, FactoredKFAC
from acktr.curvature.network import NetworkCurvature, NetworkCurvatureFactory
from acktr.curvature.reduce import KFCReduce
from acktr.curvature.rows import Kronecker
from acktr.curvature.seng import SENG, ColumnSketch, WholeGram
from acktr.curvature.sua import SUA, SUAEKFAC, MeanSUA

__all__ = [
    "CGFAC",
    "EKFAC",
    "KFAC",
    "SENG",
    "SUA",
    "SUAEKFAC",
    "Block",
    "BlockDiagonal",
    "BlockRule",
    "ColumnSketch",
    "ConstantBlock",
    "Curvature",
    "CurvatureFactory",
    "Diagonal",
    "FactoredKFAC",
    "KFCReduce",
    "Kronecker",
    "MeanSUA",
    "NetworkCurvature",
    "NetworkCurvatureFactory",
    "ParameterBlock",
    "PerExample",
    "Place",
    "Statistics",
    "WholeGram",
    "curvature_over",
]
