"""What a network's outputs mean: the distribution they describe, its scores, its Fisher metric, its divergence.

Everything is closed form and per example. `Outputs` are the network's outputs as a tuple, N examples each:

    Bernoulli          (log-odds [N, D],)
    Categorical        (logits [N, C],)
    DiagonalGaussian   (mean [N, D], log_std [N, D])
    ScalarGaussian     (value [N],)
    Joint              the outputs of its parts, one after the other

F_out denotes the Fisher information of the distribution with respect to these outputs. Because scores are
written down, a Fisher pass needs no loss graph and no `torch.distributions`, and its scale is never in doubt.
"""

from acktr.likelihood.base import Likelihood, Outputs, Part, PolicyLikelihood, check_outputs, outputs_of
from acktr.likelihood.bernoulli import Bernoulli
from acktr.likelihood.categorical import Categorical
from acktr.likelihood.gaussian import DiagonalGaussian, ScalarGaussian
from acktr.likelihood.joint import Joint
from acktr.likelihood.precision import GammaPrecision

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiagonalGaussian",
    "GammaPrecision",
    "Joint",
    "Likelihood",
    "Outputs",
    "Part",
    "PolicyLikelihood",
    "ScalarGaussian",
    "check_outputs",
    "outputs_of",
]
