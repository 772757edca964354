"""Approximations of the Fisher: one block per layer, and whole networks'."""

from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Place, Statistics
from acktr.curvature.bkfac import BKFAC, BKFACC, BRKFAC
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.blocktridiagonal import BlockTridiagonal, Tridiagonal
from acktr.curvature.cgfac import CGFAC
from acktr.curvature.choice import Curvature, curvature_over
from acktr.curvature.damping import FactoredTikhonov, PerCoordinate, Tikhonov
from acktr.curvature.dense import DenseBlocks
from acktr.curvature.densefisher import DenseFisher
from acktr.curvature.diagonal import ConstantBlock, Diagonal, ParameterBlock
from acktr.curvature.eigenbasis import EigenAdagrad, EigenAdam, EigenRMSProp
from acktr.curvature.ekfac import EKFAC
from acktr.curvature.exactcg import ExactCG
from acktr.curvature.examples import PerExample
from acktr.curvature.factors import AdaptiveRank
from acktr.curvature.kronecker import KFAC, FactoredKFAC
from acktr.curvature.mixture import ByName, ByWidth
from acktr.curvature.network import NetworkCurvature, NetworkCurvatureFactory
from acktr.curvature.pair import RelativeDamping, SplitDamping
from acktr.curvature.posterior import Posterior, matrix_gaussian_divergence
from acktr.curvature.randomised import RSKFAC, SREKFAC
from acktr.curvature.reduce import KFCReduce
from acktr.curvature.rows import Kronecker
from acktr.curvature.running import RunningEKFAC
from acktr.curvature.sampling import SampledBlock
from acktr.curvature.seng import SENG, ColumnSketch, WholeGram
from acktr.curvature.spectrum import LastKept, MeanOfRest, ZeroTail
from acktr.curvature.sua import SUA, SUAEKFAC, MeanSUA

__all__ = [
    "BKFAC",
    "BKFACC",
    "BRKFAC",
    "CGFAC",
    "EKFAC",
    "KFAC",
    "RSKFAC",
    "SENG",
    "SREKFAC",
    "SUA",
    "SUAEKFAC",
    "AdaptiveRank",
    "Block",
    "BlockDiagonal",
    "BlockRule",
    "BlockTridiagonal",
    "ByName",
    "ByWidth",
    "ColumnSketch",
    "ConstantBlock",
    "Curvature",
    "CurvatureFactory",
    "DenseBlocks",
    "DenseFisher",
    "Diagonal",
    "EigenAdagrad",
    "EigenAdam",
    "EigenRMSProp",
    "ExactCG",
    "FactoredKFAC",
    "FactoredTikhonov",
    "KFCReduce",
    "Kronecker",
    "LastKept",
    "MeanOfRest",
    "MeanSUA",
    "NetworkCurvature",
    "NetworkCurvatureFactory",
    "ParameterBlock",
    "PerCoordinate",
    "PerExample",
    "Place",
    "Posterior",
    "RelativeDamping",
    "RunningEKFAC",
    "SampledBlock",
    "SplitDamping",
    "Statistics",
    "Tikhonov",
    "Tridiagonal",
    "WholeGram",
    "ZeroTail",
    "curvature_over",
    "matrix_gaussian_divergence",
]
