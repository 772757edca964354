"""How much noise an environment forgives, tried out before training.

An ant that does nothing stands until its time is up; with actions of standard deviation 0.5 it lies on its back after a
hundred steps, and what it learns under that noise is to brace itself. A hopper falls in any case, and with little noise
it only learns to stand. So where rest survives and noise does not, the noise is what is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Generator

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


def try_noise(env: VecEnv, log_std: float, how: Forgiveness, total: int, generator: Generator) -> Trial:
    """Find the largest noise around rest that ends no more episodes than rest itself, and stay a margin below.

    Rest is the action 0, around which new policies act. Where episodes end early under the first noise but not at
    rest, lower ones are tried; where they end at rest too, or under every noise tried, the first one stays.

    Args:
        env: with actions in a Box; reset before each try, and to be reset after the last.
        log_std: natural logarithm of the first standard deviation.
        how: what to try.
        total: environment steps of the whole training.
        generator: of the noise.

    Returns:
        The shift and the price.
    """
    steps, dearest = 0, how.longest * env.num_envs

    def survives(std: float) -> bool | None:
        nonlocal steps
        if steps + dearest > how.share * total:
            return None
        survived, more = _survives(env, std, how.longest, generator)
        steps += more
        return survived

    with _Frozen(env):
        # Rest comes second: it says whether what the first noise ended would have gone on.
        if survives(math.exp(log_std)) is False and survives(0.0):
            for shift in (-number * how.rung for number in range(1, how.rungs + 1)):
                if survives(math.exp(log_std + shift)):
                    return Trial(shift - how.margin, steps)
    return Trial(0.0, steps)


def _survives(env: VecEnv, std: float, longest: int, generator: Generator) -> tuple[bool, int]:
    """Whether most environments' first episodes last, and the steps it took to know."""
    space = env.action_space
    assert isinstance(space, spaces.Box)
    env.reset()
    under_way, deaths = np.ones(env.num_envs, dtype=bool), 0
    for step in range(1, longest + 1):
        noise = torch.randn(env.num_envs, *space.shape, generator=generator).numpy()
        _, _, dones, infos = env.step(np.clip(std * noise, space.low, space.high).astype(space.dtype))
        for index in np.flatnonzero(dones & under_way):
            under_way[index] = False
            deaths += not infos[index].get("TimeLimit.truncated", False)
        if deaths > _MOST_DEATHS * env.num_envs:
            return False, step * env.num_envs
        if not under_way.any():
            return True, step * env.num_envs
    return True, longest * env.num_envs


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
