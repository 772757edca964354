"""A finished rollout as flat tensors, and the terms of the objectives on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.utils import explained_variance
from torch import Generator, Tensor

from acktr.likelihood import Outputs, PolicyLikelihood
from acktr.ranks import Ranks
from acktr.sb3.networks import ActorNetwork, JointNetwork
from acktr.tree import map_tensors, take_rows


@dataclass(frozen=True)
class Rollout:
    """N = environments × steps transitions, time running fastest within each environment."""

    observations: Any
    """Tensor or dictionary of tensors, [N, ...]."""
    actions: Tensor
    """As drawn, before any clipping to the action space: [N] or [N, D]."""
    log_probs: Tensor
    """Of the actions under the policy that drew them, [N]."""
    advantages: Tensor
    """GAE, [N]; standardised if asked."""
    returns: Tensor
    """The critic's targets, GAE plus the old values, [N]."""
    values: Tensor
    """The critic's predictions when the actions were taken, [N]."""

    def __len__(self) -> int:
        return len(self.returns)

    def seen_by(self, network: ActorNetwork | JointNetwork) -> Rollout:
        """The same rollout with observations prepared once for all passes through a policy's networks.

        Args:
            network: one of them.

        Returns:
            A rollout of floating observations.
        """
        return replace(self, observations=network.prepared(self.observations))

    def rows(self, rows: Tensor | slice) -> Rollout:
        """A part of the rollout.

        Args:
            rows: indices, shape [M]; a slice of them makes no copy.

        Returns:
            A rollout of M transitions.
        """
        return Rollout(*(take_rows(getattr(self, name), rows) for name in self.__dataclass_fields__))

    def minibatches(
        self, n_epochs: int, n_minibatches: int, generator: Generator, groups: int = 1
    ) -> Iterator[Rollout]:
        """Shuffled parts, each transition once per epoch; the rollout itself if there is one part.

        Args:
            n_epochs: passes over the rollout.
            n_minibatches: parts per pass.
            generator: source of the shuffles.
            groups: as for `orders`.

        Yields:
            Parts of as equal size as can be.
        """
        for rows in self.orders(n_epochs, n_minibatches, generator, groups):
            yield self.rows(rows)

    def orders(
        self, n_epochs: int, n_minibatches: int, generator: Generator, groups: int = 1
    ) -> Iterator[Tensor | slice]:
        """The rows of `minibatches`, for who reads some of the fields only.

        Args:
            n_epochs: passes over the rollout.
            n_minibatches: parts per pass.
            generator: source of the shuffles.
            groups: equal parts of the rollout, one after the other (its environments), of which every minibatch holds
                as many rows each, in this order.

        Yields:
            Indices; a slice of everything if there is one part.
        """
        for _ in range(n_epochs):
            if n_minibatches == 1:
                yield slice(None)
            else:
                starts = torch.arange(groups)[:, None] * (len(self) // groups)
                for rows in torch.randperm(len(self) // groups, generator=generator).chunk(n_minibatches):
                    yield (rows if groups == 1 else (starts + rows).flatten()).to(self.returns.device)


def time_major(arrays: Any, device: torch.device) -> Any:
    """A buffer's array [steps, environments, ...], or a dictionary of them, as tensors [steps · environments, ...].

    Args:
        arrays: of an SB3 buffer.
        device: where they are wanted.

    Returns:
        The same nest of tensors; float64 becomes float32, which is what networks take.
    """
    if isinstance(arrays, dict):
        return {key: time_major(value, device) for key, value in arrays.items()}
    tensor = torch.as_tensor(arrays, device=device)
    return (tensor.float() if tensor.dtype == torch.float64 else tensor).flatten(0, 1)


def flatten_rollout(
    buffer: RolloutBuffer,
    device: torch.device,
    standardise: bool,
    generator: Generator | None = None,
    ranks: Ranks | None = None,
    take: Callable[[float], float] | None = None,
) -> Rollout:
    """Read a full SB3 buffer once, without its per-minibatch copies.

    Args:
        buffer: full, with advantages computed.
        device: where the update runs.
        standardise: whether advantages get mean 0 and variance 1 over the whole rollout.
        generator: source of a random order of the transitions; None leaves them as they followed each other.
        ranks: the processes whose rollouts are one for the mean and the variance; None for this one alone.
        take: told the standard deviation, says what to divide by at least; None for the standard deviation itself.

    Returns:
        The rollout.
    """
    order = None if generator is None else torch.randperm(buffer.returns.size, generator=generator)
    actions, advantages = _read(buffer.actions, device, order), _read(buffer.advantages, device, None)
    if standardise:
        least = 0.0 if take is None else take(float(mean_and_std(advantages, ranks or Ranks())[1]))
        advantages = standardised(advantages, ranks or Ranks(), least)
    return Rollout(
        observations=_read(buffer.observations, device, order),
        actions=actions.squeeze(-1).long() if not buffer.action_dim or _discrete(buffer) else actions,
        log_probs=_read(buffer.log_probs, device, order),
        advantages=advantages if order is None else advantages[order.to(device)],
        returns=_read(buffer.returns, device, order),
        values=_read(buffer.values, device, order),
    )


def standardised(advantages: Tensor, ranks: Ranks, least: float = 0.0) -> Tensor:
    """Advantages of mean 0 and variance 1, or less.

    Args:
        advantages: of a whole rollout, [N].
        ranks: the processes whose rollouts it is a part of.
        least: what they are divided by at least.

    Returns:
        Shape [N].
    """
    mean, std = mean_and_std(advantages, ranks)
    return (advantages - mean) / (std.clamp(min=least) + 1e-8)


def to_device(tree: Any, device: torch.device) -> Any:
    """Tensors elsewhere.

    Args:
        tree: a nest of them.
        device: where.

    Returns:
        The same nest; what is there already is not copied.
    """
    return map_tensors(lambda tensor: tensor.to(device), tree)


def mean_and_std(values: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (over n − 1) of everyone's values.

    Args:
        values: this process's, [N].
        ranks: the processes.

    Returns:
        Two scalars.
    """
    if ranks.size == 1:
        return values.mean(), values.std()
    mean = ranks.mean(values.mean(), len(values))
    count = ranks.total(len(values))
    variance = ranks.mean((values - mean).double().square().mean(), len(values)) * count / (count - 1)
    return mean, variance.sqrt().to(values)


def fit(rollout: Rollout, ranks: Ranks) -> tuple[float, float]:
    """How the critic's predictions and the policy's actions were, over everyone's transitions.

    Args:
        rollout: this process's.
        ranks: the processes.

    Returns:
        The share of the returns' variance that the values explain (NaN where there is none), and the mean of the
        actions' negative log-probabilities.
    """
    if ranks.size == 1:
        variance = explained_variance(rollout.values.cpu().numpy(), rollout.returns.cpu().numpy())
        return float(variance), float(-rollout.log_probs.mean())
    parts = torch.stack([rollout.returns, rollout.returns - rollout.values, -rollout.log_probs]).double()
    means = ranks.mean(parts.mean(1), len(rollout))
    total, left, _ = ranks.mean((parts - means[:, None]).square().mean(1), len(rollout)).tolist()
    return 1 - left / total if total > 0 else float("nan"), float(means[2])


def _read(arrays: Any, device: torch.device, order: Tensor | None) -> Any:
    """Transitions one environment after the other, or in an order that counts them so.

    Returns:
        Tensor or dictionary of tensors, [N, ...]; images are copied once.
    """
    if isinstance(arrays, dict):
        return {key: _read(value, device, order) for key, value in arrays.items()}
    if order is None:
        return time_major(arrays.swapaxes(0, 1), device)
    n_steps, n_envs = arrays.shape[:2]
    rows = order % n_steps * n_envs + order.div(n_steps, rounding_mode="floor")
    return take_rows(time_major(arrays, device), rows.to(device))


def _discrete(buffer: RolloutBuffer) -> bool:
    return hasattr(buffer.action_space, "n")


def check_finite(**arrays: Any) -> None:
    """Refuse a rollout that would poison the networks.

    Args:
        arrays: what was collected, by name; dictionaries of arrays too.

    Raises:
        FloatingPointError: if anything is NaN or infinite.
    """
    parts = {name: value.values() if isinstance(value, dict) else [value] for name, value in arrays.items()}
    broken = [name for name, values in parts.items() if not all(np.isfinite(value).all() for value in values)]
    if broken:
        raise FloatingPointError(f"the rollout's {' and '.join(broken)} are not finite")


def check_buffer(buffer: RolloutBuffer) -> None:
    """Refuse a full buffer that would poison the networks: numbers that are not finite, or whose squares are not.

    Args:
        buffer: of any of SB3's kinds.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(buffer.advantages)
    check_finite(
        observations=buffer.observations,
        rewards=buffer.rewards,
        returns=buffer.returns,
        **{"squared advantages": squares},
    )


def policy_loss(
    likelihood: PolicyLikelihood, outputs: Outputs, batch: Rollout, clip_range: float, ent_coef: float
) -> Tensor:
    """−E[min(r A, clip(r, 1 ± ε) A)] − c_H E[H], r = π(a)/π_old(a) (Schulman et al. 2017, equation 7).

    At a rollout's first step r = 1 and the gradient is the policy gradient −E[A ∇log π].

    Args:
        likelihood: of the actions.
        outputs: the actor's, on the batch's observations.
        batch: part of a rollout.
        clip_range: ε > 0.
        ent_coef: c_H ≥ 0.

    Returns:
        Scalar.
    """
    ratio = (likelihood.log_prob(outputs, (batch.actions,)) - batch.log_probs).exp()
    gain = torch.minimum(ratio * batch.advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * batch.advantages)
    return -gain.mean() - ent_coef * likelihood.entropy(outputs).mean()
