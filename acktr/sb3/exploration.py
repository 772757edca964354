"""Exploration by drawn policies: for a rollout, each environment's actor has weights of its own.

They come from the noisy natural gradient's posterior (Zhang et al. 2018), N(θ, κ (F̂ + λ)⁻¹): away from θ where the
actions hardly depend on the weights, close to it where they do. A reinforcement learner has no number of data to set κ
by, so a budget does: E KL(π_θ ‖ π_w) ≈ ½ κ tr F̂ (F̂ + λ)⁻¹. Weights of a pair of environments lie opposite each other,
so that what the noise does to the gradient cancels to first order. Gradients, curvature and trust region are taken at
every environment's own weights, which keeps them on-policy; the step is θ's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3.common.preprocessing import get_action_dim
from torch import Tensor

from acktr.chain import Chain
from acktr.curvature import Posterior
from acktr.ensemble import Ensemble
from acktr.optimizer import NaturalGradient
from acktr.sb3.schedules import at
from acktr.tree import Tensors

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR

REMEDY = "set exploration_kl to 0"


class Exploration:
    """The policies of the running rollout, one per environment.

    Args:
        agent: whose actor's curvature is the precision.

    Raises:
        ValueError: if the actor takes no natural-gradient steps, is no plain chain of layers, or its curvature cannot
            be drawn from.
    """

    def __init__(self, agent: ACKTR) -> None:
        optimizer = agent.actor_optimizer
        if not isinstance(optimizer, NaturalGradient):
            raise ValueError(f"exploration_kl draws from the actor's curvature, and Adam has none; {REMEDY}")
        self._chain = _plain(optimizer.chain, optimizer)
        layers = [f"{name}.{part}" for name in self._chain.layers if name for part in ("weight", "bias")]
        self._agent, self._optimizer = agent, optimizer
        # A log standard deviation is exploration already, and its own.
        self._posterior = Posterior(optimizer.curvature, optimizer.parameters, layers)
        self.ensemble: Ensemble | None = None
        """The drawn policies; None where every environment has θ."""

    def draw(self) -> None:
        """Draw policies for the coming rollout; before the first update there is nothing to draw from."""
        self.ensemble, damping = None, self._optimizer.param_groups[0]["damping"]
        kl = self.target
        dimension = self._posterior.effective_dimension(damping) if self._posterior.ready else 0.0
        if kl > 0 and dimension > 0:
            self.ensemble = Ensemble.around(self._chain, self._pairs(2 * kl / dimension, damping))

    @property
    def target(self) -> float:
        """Expected KL(π_θ ‖ π_w) of the coming draws in nats."""
        progress = max(self._agent._current_progress_remaining, 0.0)
        return at(self._agent.actor.exploration_kl, progress) * get_action_dim(self._agent.action_space)

    def _pairs(self, scale: float, damping: float) -> Tensors:
        n_envs, generator = self._agent.n_envs, self._optimizer._generator
        half = [self._posterior.sample(scale, damping, generator) for _ in range((n_envs + 1) // 2)]
        out = {name: torch.stack([draw[name] for draw in half]) for name in half[0]}
        return {name: torch.stack([d, -d], dim=1).flatten(0, 1)[:n_envs] for name, d in out.items()}

    @torch.no_grad()
    def distance(self, observations: Tensor) -> float:
        """What the drawn policies' KL came out as.

        Args:
            observations: of the rollout, environment after environment.

        Returns:
            Mean KL(π_θ ‖ π_w) in nats; 0 if none were drawn.
        """
        if self.ensemble is None:
            return 0.0
        mean, drawn = self._chain.outputs(observations), self.ensemble.outputs(observations)
        return float(self._optimizer.likelihood.divergence(mean, drawn).mean())


def is_drawn(exploration: Exploration | None) -> bool:
    """Whether the rollout at hand was acted by drawn policies.

    Args:
        exploration: the agent's.

    Returns:
        False also where it has none.
    """
    return exploration is not None and exploration.ensemble is not None


@contextmanager
def explored(
    exploration: Exploration | None, observations: Tensor, record: Callable[[str, Any], None]
) -> Generator[int]:
    """Step inside from the gradients, curvature and forms at every environment's own weights, if it had any.

    Args:
        exploration: the agent's.
        observations: of the rollout, environment after environment.
        record: where to log how far from the policy the rollout was acted.

    Yields:
        In how many groups, one after the other, the rollout's rows have to stay.

    Raises:
        RuntimeError: if something in the actor listens to calls of its modules, which drawn policies do not make.
    """
    if exploration is None or exploration.ensemble is None:
        yield 1
        return
    if not exploration.ensemble.takes((observations,)):
        raise RuntimeError(
            f"exploration_kl calls no modules, but a hook in the actor waits for it: remove it, or {REMEDY}"
        )
    record("train/exploration_kl", exploration.distance(observations))
    with exploration._optimizer.through(exploration.ensemble):
        yield exploration.ensemble.groups
    exploration.ensemble = None


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
