"""The ranges of a configuration's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from agents.config import RunConfig
from agents.errors import UsageError
from agents.schema import leaves, value_at


def check(config: RunConfig) -> None:
    """Hold every number against its range.

    Args:
        config: The configuration to check.

    Raises:
        UsageError: If the environment is not named or a number is out of its range.
    """
    if not config.env_id:
        raise UsageError("no environment was named; give its id, for example HalfCheetah-v5")
    for name in leaves(RunConfig):
        value = value_at(config, name)
        if name.startswith("env.options.") or value is None or isinstance(value, (str, bool)):
            continue
        _check_value(name, value)


def _check_value(name: str, value: Any) -> None:
    # Ranges go by the last part of the name: a field means the same wherever it stands.
    last = name.rsplit(".", 1)[-1]
    allowed, text = _RANGES.get(last, _POSITIVE)
    for number in value if isinstance(value, tuple) else (value,):
        if math.isnan(number) or not allowed(number):
            raise UsageError(f"{name} must be {text}, got {number}")


_Range = tuple[Callable[[float], bool], str]
_POSITIVE: _Range = (lambda x: 0 < x < math.inf, "positive")
_NON_NEGATIVE: _Range = (lambda x: 0 <= x < math.inf, "at least 0")
_FINITE: _Range = (math.isfinite, "finite")
_SHARE: _Range = (lambda x: 0 <= x <= 1, "between 0 and 1")
_SHARE_BELOW_1: _Range = (lambda x: 0 <= x < 1, "at least 0 and below 1")
_SOME_SHARE: _Range = (lambda x: 0 < x <= 1, "above 0 and at most 1")
_OPEN_SHARE: _Range = (lambda x: 0 < x < 1, "between 0 and 1, and neither")
_RANGES: dict[str, _Range] = {
    "seed": (lambda x: 0 <= x < 2**31, "between 0 and 2147483647"),
    "torch_threads": _NON_NEGATIVE,
    "log_std_init": _FINITE,
    "log_std_final": _FINITE,
    "noise_min": _NON_NEGATIVE,
    "exploration_kl": _NON_NEGATIVE,
    "reused_rollouts": _NON_NEGATIVE,
    "period": _NON_NEGATIVE,
    "ema": _SHARE_BELOW_1,
    "wake_decay": _SHARE_BELOW_1,
    "averaged": _SHARE,
    "renewed_at": _SOME_SHARE,
    # Infinite damping is a meaning of its own: a plain gradient step.
    "damping": (lambda x: x > 0, "positive"),
    "momentum": _SHARE_BELOW_1,
    "scale_decay": _SHARE_BELOW_1,
    "corrections": _NON_NEGATIVE,
    "refresh_age": _NON_NEGATIVE,
    "cold_start": _NON_NEGATIVE,
    "gamma": _SHARE,
    "gae_lambda": _SHARE,
    "gamma_init": _SHARE,
    "gae_lambda_init": _SHARE,
    "horizon_share": _SOME_SHARE,
    "ent_coef": _NON_NEGATIVE,
    "cg_damping": _NON_NEGATIVE,
    "line_search_shrinking_factor": _OPEN_SHARE,
}
