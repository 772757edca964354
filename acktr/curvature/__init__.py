"""Approximations of the Fisher: one block per layer, and whole networks'."""

from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Place, Statistics
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.choice import Curvature, curvature_over
from acktr.curvature.damping import FactoredTikhonov, PerCoordinate, Tikhonov
from acktr.curvature.diagonal import ConstantBlock, Diagonal, ParameterBlock
from acktr.curvature.eigenbasis import EigenAdagrad, EigenAdam, EigenRMSProp
from acktr.curvature.ekfac import EKFAC
from acktr.curvature.kronecker import KFAC, FactoredKFAC
from acktr.curvature.network import NetworkCurvature, NetworkCurvatureFactory
from acktr.curvature.running import RunningEKFAC

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
    "EigenAdagrad",
    "EigenAdam",
    "EigenRMSProp",
    "FactoredKFAC",
    "FactoredTikhonov",
    "NetworkCurvature",
    "NetworkCurvatureFactory",
    "ParameterBlock",
    "PerCoordinate",
    "Place",
    "RunningEKFAC",
    "Statistics",
    "Tikhonov",
    "curvature_over",
]
