"""Approximations of the Fisher: one block per layer, and whole networks'."""

from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Place, Statistics
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.choice import Curvature, curvature_over
from acktr.curvature.convolutions.reduce import KFCReduce
from acktr.curvature.convolutions.sua import SUA, SUAEKFAC, MeanSUA
from acktr.curvature.damping import FactoredTikhonov, PerCoordinate, Tikhonov
from acktr.curvature.dense import DenseBlocks
from acktr.curvature.diagonal import ConstantBlock, Diagonal, ParameterBlock
from acktr.curvature.kronecker.eigenbasis import EigenAdagrad, EigenAdam, EigenRMSProp
from acktr.curvature.kronecker.ekfac import EKFAC
from acktr.curvature.kronecker.kfac import KFAC, FactoredKFAC
from acktr.curvature.kronecker.running import RunningEKFAC
from acktr.curvature.lowrank.bkfac import BKFAC, BKFACC, BRKFAC
from acktr.curvature.lowrank.factors import AdaptiveRank
from acktr.curvature.lowrank.pair import RelativeDamping, SplitDamping
from acktr.curvature.lowrank.randomised import RSKFAC, SREKFAC
from acktr.curvature.lowrank.spectrum import LastKept, MeanOfRest, ZeroTail
from acktr.curvature.mixture import ByName, ByWidth
from acktr.curvature.network import NetworkCurvature, NetworkCurvatureFactory
from acktr.curvature.posterior import Posterior, matrix_gaussian_divergence
from acktr.curvature.rows.cgfac import CGFAC
from acktr.curvature.rows.examples import PerExample
from acktr.curvature.rows.operators import Kronecker
from acktr.curvature.rows.seng import SENG, ColumnSketch, WholeGram
from acktr.curvature.sampling import SampledBlock
from acktr.curvature.whole.blocktridiagonal import BlockTridiagonal, Tridiagonal
from acktr.curvature.whole.densefisher import DenseFisher
from acktr.curvature.whole.exactcg import ExactCG

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
