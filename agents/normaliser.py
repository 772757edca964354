"""The running statistics of a normaliser, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize


def save(normaliser: VecNormalize | None) -> dict[str, Any]:
    """Read the statistics.

    Args:
        normaliser: None if nothing is normalised.

    Returns:
        Means, variances and counts as arrays and numbers; empty without a normaliser.
    """
    if normaliser is None:
        return {}
    state: dict[str, Any] = {"ret_rms": _moments(normaliser.ret_rms)}
    if normaliser.norm_obs:
        rms = normaliser.obs_rms
        state["obs_rms"] = {k: _moments(v) for k, v in rms.items()} if isinstance(rms, dict) else _moments(rms)
    return state


def restore(normaliser: VecNormalize | None, state: Mapping[str, Any]) -> None:
    """Put the statistics back.

    Args:
        normaliser: None if nothing is normalised.
        state: What `save` returned, its arrays as tensors.
    """
    if normaliser is None:
        return
    _set_moments(normaliser.ret_rms, state["ret_rms"])
    if normaliser.norm_obs:
        rms, saved = normaliser.obs_rms, state["obs_rms"]
        for target, moments in [(rms[k], saved[k]) for k in rms] if isinstance(rms, dict) else [(rms, saved)]:
            _set_moments(target, moments)


def _moments(rms: RunningMeanStd) -> dict[str, Any]:
    return {"mean": np.asarray(rms.mean), "var": np.asarray(rms.var), "count": float(rms.count)}


def _set_moments(rms: RunningMeanStd, moments: Mapping[str, Any]) -> None:
    rms.mean, rms.var, rms.count = moments["mean"].numpy(), moments["var"].numpy(), moments["count"]
