"""Natural-gradient optimisation of any `torch.nn.Module`, and the ACKTR agent built on it.

The engine needs torch alone. `ACKTR`, the Stable-Baselines3 algorithm, is imported when it is first asked
for, so that the engine runs where Stable-Baselines3 is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from acktr.combination import LayerCombination
from acktr.curvature import EKFAC, KFAC, BlockDiagonal, Diagonal, FactoredKFAC
from acktr.curvature.members import known_fisher
from acktr.fisher import EmpiricalFisher, ExactFisher, SampledFisher
from acktr.likelihood import Bernoulli, Categorical, DiagonalGaussian, Joint, ScalarGaussian
from acktr.optimizer import NaturalGradient
from acktr.step import StepReport, StepRule
from acktr.trust_region import BlockMetric, ExactMetric

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
    "EKFAC",
    "KFAC",
    "Bernoulli",
    "BlockDiagonal",
    "BlockMetric",
    "Categorical",
    "Diagonal",
    "DiagonalGaussian",
    "EmpiricalFisher",
    "ExactFisher",
    "ExactMetric",
    "FactoredKFAC",
    "Joint",
    "LayerCombination",
    "NaturalGradient",
    "SampledFisher",
    "ScalarGaussian",
    "StepReport",
    "StepRule",
    "known_fisher",
]
