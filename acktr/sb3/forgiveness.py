"""How much noise an environment forgives, tried out before training.

An ant that does nothing stands until its time is up; with actions of standard deviation 0.5 it lies on its back after a
hundred steps, and what it learns under that noise is to brace itself. A hopper falls in any case, and with little noise
it only learns to stand. So where rest survives and noise does not, the noise is what is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Generator

from acktr.ranks import Ranks
from acktr.sb3.ranks import everyones

_MOST_DEATHS = 1 / 16
"""Share of the episodes that may end early under a noise that counts as forgiven."""


@dataclass(frozen=True)
class Forgiveness:
    """How to try out what noise an environment forgives."""

    rung: float = 0.4
    """Nats of the log standard deviation between two noises tried."""
    rungs: int = 4
    """Most noises tried below the first."""
    margin: float = 0.4
    """Nats below the largest noise that is forgiven at rest: whoever has learned to walk falls more easily."""
    longest: int = 500
    """Steps after which an episode counts as survived."""
    share: float = 0.1
    """Largest share of training that trying out may take; what cannot be afforded is not tried."""

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if not 0 <= number < math.inf or (number == 0 and name != "margin"):
                raise ValueError(f"{name} must be positive and finite, got {number}")


@dataclass(frozen=True)
class Trial:
    """What trying out came to."""

    shift: float
    """Nats by which the noise has to be lower; at most 0."""
    steps: int
    """Environment steps it took, over all environments."""


def try_noise(
    env: VecEnv, log_std: float, how: Forgiveness, total: int, generator: Generator, ranks: Ranks | None = None
) -> Trial:
    """Find the largest noise around rest that ends no more episodes than rest itself, and stay a margin below.

    Rest is the action 0, around which new policies act. Where episodes end early under the first noise but not at
    rest, lower ones are tried; where they end at rest too, or under every noise tried, the first one stays.

    Args:
        env: with actions in a Box; reset before each try, and to be reset after the last.
        log_std: natural logarithm of the first standard deviation.
        how: what to try.
        total: environment steps of the whole training.
        generator: of the noise.
        ranks: the processes that try together, each in its own environments; None for this one alone.

    Returns:
        The shift and the price.
    """
    tries = _Tries(env, how.longest, how.share * total, generator, ranks or Ranks())
    with _Frozen(env):
        # Rest comes second: it says whether what the first noise ended would have gone on.
        if tries.survives(math.exp(log_std)) is False and tries.survives(0.0):
            for shift in (-number * how.rung for number in range(1, how.rungs + 1)):
                if tries.survives(math.exp(log_std + shift)):
                    return Trial(shift - how.margin, tries.steps)
    return Trial(0.0, tries.steps)


class _Tries:
    """Episodes played to see how they end, and what they cost.

    Args:
        env: The environments.
        longest: Steps after which an episode counts as survived.
        most: Environment steps that all tries together may take.
        generator: Of the noise.
        ranks: The processes that try together.
    """

    def __init__(self, env: VecEnv, longest: int, most: float, generator: Generator, ranks: Ranks) -> None:
        self._env, self._longest, self._most, self._generator = env, longest, most, generator
        self._ranks, self._count = ranks, int(ranks.total(env.num_envs))
        self.steps = 0

    def survives(self, std: float) -> bool | None:
        """Whether nearly all environments' first episodes last; None if it cannot be afforded to know."""
        if self.steps + self._longest * self._count > self._most:
            return None
        told = everyones(self._ranks, lambda: self._play(std))
        self.steps += sum(steps for _, steps in told)
        return bool(sum(deaths for deaths, _ in told) <= _MOST_DEATHS * self._count)

    def _play(self, std: float) -> tuple[int, int]:
        """Play until nothing more is to be learned.

        Returns:
            How many first episodes ended early, and the steps it took.
        """
        count = self._env.num_envs
        self._env.reset()
        under_way, deaths, steps = np.ones(count, dtype=bool), 0, 0
        for _ in range(self._longest):
            dones, infos = self._step(std)
            steps += count
            for index in np.flatnonzero(dones & under_way):
                under_way[index] = False
                deaths += not infos[index].get("TimeLimit.truncated", False)
            if deaths > _MOST_DEATHS * self._count or not under_way.any():
                break
        return deaths, steps

    def _step(self, std: float) -> tuple[NDArray[np.bool_], list[dict[str, Any]]]:
        space, count = self._env.action_space, self._env.num_envs
        assert isinstance(space, spaces.Box)
        noise = torch.randn(count, *space.shape, generator=self._generator).numpy()
        _, _, dones, infos = self._env.step(np.clip(std * noise, space.low, space.high).astype(space.dtype))
        return dones, infos


class _Frozen:
    """Keeps a normaliser from learning: what is tried out is nothing that a policy will see."""

    def __init__(self, env: VecEnv) -> None:
        self._normalisers: list[VecNormalize] = []
        while hasattr(env, "venv"):
            if isinstance(env, VecNormalize) and env.training:
                self._normalisers.append(env)
            env = env.venv

    def __enter__(self) -> None:
        self._set(training=False)

    def __exit__(self, *exception: object) -> None:
        self._set(training=True)

    def _set(self, training: bool) -> None:
        for normaliser in self._normalisers:
            normaliser.training = training
