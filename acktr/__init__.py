"""Natural-gradient optimisation of any `torch.nn.Module`, and the ACKTR agent built on it.

The engine needs torch alone. `ACKTR`, the Stable-Baselines3 algorithm, is imported when it is first asked
for, so that the engine runs where Stable-Baselines3 is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from acktr.bayesbybackprop import BayesByBackprop
from acktr.combination import LayerCombination, WholeDirection
from acktr.conjugate import Stop
from acktr.curvature import (
    BKFAC,
    BKFACC,
    BRKFAC,
    CGFAC,
    EKFAC,
    KFAC,
    RSKFAC,
    SENG,
    SREKFAC,
    SUA,
    SUAEKFAC,
    AdaptiveRank,
    BlockDiagonal,
    ByName,
    ByWidth,
    ColumnSketch,
    DenseBlocks,
    DenseFisher,
    Diagonal,
    EigenAdagrad,
    EigenAdam,
    EigenRMSProp,
    ExactCG,
    FactoredKFAC,
    FactoredTikhonov,
    KFCReduce,
    Kronecker,
    MeanSUA,
    PerCoordinate,
    PerExample,
    RunningEKFAC,
    Tikhonov,
    Tridiagonal,
    WholeGram,
)
from acktr.curvature.members import known_fisher
from acktr.damping import GreedyDamping, LevenbergMarquardt
from acktr.draws import Evidence
from acktr.fisher import EmpiricalFisher, ExactFisher, SampledFisher
from acktr.likelihood import Bernoulli, Categorical, DiagonalGaussian, GammaPrecision, Joint, ScalarGaussian
from acktr.noisy import NoisyNaturalGradient
from acktr.optimizer import NaturalGradient
from acktr.step import Backtracking, StepReport, StepRule
from acktr.trust_region import BlockMetric, ExactMetric
from acktr.wake import WakeQ, WakeQE, WakeSO

if TYPE_CHECKING:
    from acktr.sb3 import ACKTR as ACKTR
else:  # type checkers must not see it: to them a package with a __getattr__ has every name

    def __getattr__(name: str) -> Any:
        if name != "ACKTR":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            import_module("stable_baselines3")
        except ModuleNotFoundError as missing:
            remedy = "pip install 'acktr[sb3]'"
            raise ImportError(f"ACKTR needs {missing.name}, which is not installed: {remedy}") from missing
        return import_module("acktr.sb3").ACKTR


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
    "Backtracking",
    "BayesByBackprop",
    "Bernoulli",
    "BlockDiagonal",
    "BlockMetric",
    "ByName",
    "ByWidth",
    "Categorical",
    "ColumnSketch",
    "DenseBlocks",
    "DenseFisher",
    "Diagonal",
    "DiagonalGaussian",
    "EigenAdagrad",
    "EigenAdam",
    "EigenRMSProp",
    "EmpiricalFisher",
    "Evidence",
    "ExactCG",
    "ExactFisher",
    "ExactMetric",
    "FactoredKFAC",
    "FactoredTikhonov",
    "GammaPrecision",
    "GreedyDamping",
    "Joint",
    "KFCReduce",
    "Kronecker",
    "LayerCombination",
    "LevenbergMarquardt",
    "MeanSUA",
    "NaturalGradient",
    "NoisyNaturalGradient",
    "PerCoordinate",
    "PerExample",
    "RunningEKFAC",
    "SampledFisher",
    "ScalarGaussian",
    "StepReport",
    "StepRule",
    "Stop",
    "Tikhonov",
    "Tridiagonal",
    "WakeQ",
    "WakeQE",
    "WakeSO",
    "WholeDirection",
    "WholeGram",
    "known_fisher",
]
