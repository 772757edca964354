"""A normaliser's moments, put together from what several processes have seen."""

from __future__ import annotations

import numpy as np
import torch
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

Moments = tuple[Tensor, Tensor, Tensor]
"""Mean, variance and count, in float64."""


def moments_of(normaliser: VecNormalize | None) -> dict[str, Moments]:
    """What a normaliser knows, by name.

    Args:
        normaliser: any VecNormalize, or None.

    Returns:
        Copies.
    """
    return {name: (_number(s.mean), _number(s.var), _number(s.count)) for name, s in _statistics(normaliser).items()}


def put_moments(
    normaliser: VecNormalize | None, before: dict[str, Moments], everyones: list[dict[str, Moments]]
) -> None:
    """Give a normaliser what all processes have seen.

    Args:
        normaliser: this process's.
        before: its moments when all were alike.
        everyones: moments of each process since.
    """
    for name, statistics in _statistics(normaliser).items():
        mean, var, count = merged(before[name], [each[name] for each in everyones])
        statistics.mean, statistics.var, statistics.count = mean.numpy(), var.numpy(), float(count)


def merged(before: Moments, after: list[Moments]) -> Moments:
    """Moments of everything that several have seen after the same beginning (Chan, Golub & LeVeque 1983).

    Args:
        before: of the beginning.
        after: of the beginning and what each has seen since.

    Returns:
        Of the beginning and what all have seen since.
    """
    mean, var, count = before
    for own in after:
        seen = _since(before, own)
        if seen is None:
            continue
        new_mean, new_var, new_count = seen
        total, apart = count + new_count, new_mean - mean
        var = (var * count + new_var * new_count + apart**2 * count * new_count / total) / total
        mean = mean + apart * new_count / total
        count = total
    return mean, var, count


def _since(before: Moments, now: Moments) -> Moments | None:
    """What was seen since, taken out of all that was; None for nothing."""
    count = now[2] - before[2]
    if not count > 0:
        return None
    mean = (now[0] * now[2] - before[0] * before[2]) / count
    square = now[1] * now[2] - before[1] * before[2] - (mean - before[0]) ** 2 * before[2] * count / now[2]
    return mean, (square / count).clamp(min=0), count


def _statistics(normaliser: VecNormalize | None) -> dict[str, RunningMeanStd]:
    if normaliser is None:
        return {}
    found = {"returns": normaliser.ret_rms}
    if normaliser.norm_obs:
        keyed = normaliser.obs_rms if isinstance(normaliser.obs_rms, dict) else {"": normaliser.obs_rms}
        found |= {f"observations:{key}": statistics for key, statistics in keyed.items()}
    return found


def _number(value: object) -> Tensor:
    return torch.tensor(np.asarray(value), dtype=torch.float64)
