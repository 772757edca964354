"""Exploration by drawn policies: for a rollout, each environment's actor has weights of its own.

They come from the noisy natural gradient's posterior (Zhang et al. 2018), N(θ, κ (F̂ + λ)⁻¹): away from θ where the
actions hardly depend on the weights, close to it where they do. A reinforcement learner has no number of data to set κ
by, so a budget does: E KL(π_θ ‖ π_w) ≈ ½ κ tr F̂ (F̂ + λ)⁻¹. Weights of a pair of environments lie opposite each other,
so that what the noise does to the gradient cancels to first order. Gradients, curvature and trust region are taken at
every environment's own weights, which keeps them on-policy; the step is θ's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from acktr.chain import Chain
from acktr.curvature import Posterior
from acktr.ensemble import Ensemble
from acktr.likelihood import Outputs, PolicyLikelihood
from acktr.optimizer import NaturalGradient
from acktr.tree import Tensors

if TYPE_CHECKING:
    from acktr.sb3.steps import Stepper

REMEDY = "set exploration_kl to 0"


class Exploration:
    """The policies of the running rollout, one per environment.

    Args:
        optimizer: the actor's; its curvature is the precision.
        n_envs: policies to draw.
        generator: source of randomness.

    Raises:
        ValueError: if the actor takes no natural-gradient steps, is no plain chain of layers, or its curvature cannot
            be drawn from.
    """

    def __init__(self, optimizer: Stepper, n_envs: int, generator: Generator) -> None:
        if not isinstance(optimizer, NaturalGradient):
            raise ValueError(f"exploration_kl draws from the actor's curvature, and Adam has none; {REMEDY}")
        self._chain = _plain(optimizer.chain, optimizer)
        layers = [f"{name}.{part}" for name in self._chain.layers if name for part in ("weight", "bias")]
        self._optimizer, self._n_envs, self._generator = optimizer, n_envs, generator
        # A log standard deviation is exploration already, and its own.
        self._posterior = Posterior(optimizer.curvature, optimizer.parameters, layers)
        self.ensemble: Ensemble | None = None
        """The drawn policies; None where every environment has θ."""

    def draw(self, kl: float) -> None:
        """Draw policies for a rollout; before the first update there is nothing to draw from.

        Args:
            kl: expected KL(π_θ ‖ π_w) in nats.
        """
        self.forget()
        damping = self._optimizer.param_groups[0]["damping"]
        dimension = self._posterior.effective_dimension(damping) if self._posterior.ready else 0.0
        if kl <= 0 or not dimension > 0:
            return
        self.ensemble = Ensemble.around(self._chain, self._pairs(2 * kl / dimension, damping))

    def _pairs(self, scale: float, damping: float) -> Tensors:
        half = [self._posterior.sample(scale, damping, self._generator) for _ in range((self._n_envs + 1) // 2)]
        out = {name: torch.stack([draw[name] for draw in half]) for name in half[0]}
        return {name: torch.stack([d, -d], dim=1).flatten(0, 1)[: self._n_envs] for name, d in out.items()}

    @torch.no_grad()
    def distance(self, observations: Tensor, likelihood: PolicyLikelihood) -> float:
        """What the drawn policies' KL came out as.

        Args:
            observations: of the rollout, environment after environment.
            likelihood: of the actions.

        Returns:
            Mean KL(π_θ ‖ π_w) in nats; 0 if none were drawn.
        """
        if self.ensemble is None:
            return 0.0
        mean: Outputs = self._chain.outputs(observations)
        return float(likelihood.divergence(mean, self.ensemble.outputs(observations)).mean())

    def forget(self) -> None:
        """Let go of the rollout's policies."""
        self.ensemble = None


def _plain(chain: Chain | None, optimizer: NaturalGradient) -> Chain:
    if chain is None:
        raise ValueError(
            "exploration_kl needs an MlpPolicy of tanh, sigmoid or ReLU layers on vectors, with a trunk of its own; "
            f"{REMEDY}"
        )
    layers = [name for name in chain.layers if name]
    frozen = [f"{n}.{p}" for n in layers for p in ("weight", "bias") if f"{n}.{p}" not in optimizer.parameters]
    if frozen:
        raise ValueError(
            f"exploration_kl needs a weight and a bias trained in every layer, not so {frozen[0]}; {REMEDY}"
        )
    return chain
