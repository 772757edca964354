"""Where a run stands beside its networks: its environments, its running episodes, and what is not yet in the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

import envs
from acktr.ranks import Ranks
from acktr.sb3 import ACKTR

_FRESH = "the checkpoint is of an older version, which did not save them"


def save(agent: OnPolicyAlgorithm) -> dict[str, Any]:
    """Write down the environments and what the agent sees of them.

    Args:
        agent: Between two rollouts.

    Returns:
        The ``layers`` of the environments, the ``observations`` and ``starts`` of the coming step; or, where the
        environments cannot be saved, the ``reason``.
    """
    if agent._last_obs is None:
        return {"reason": "none was under way between two rollouts"}
    try:
        layers = envs.save_stack(cast(VecEnv, agent.env))
    except envs.UnsavedError as error:
        return {"reason": str(error)}
    return {"layers": layers, "observations": agent._last_obs, "starts": agent._last_episode_starts}


def restore(agent: OnPolicyAlgorithm, state: Mapping[str, Any], timesteps: int) -> str | None:
    """Put the environments where they stood, or leave them to begin new episodes with seeds of their own.

    Args:
        agent: With its environments, built anew.
        state: What ``save`` returned, as read from a checkpoint; empty if it has none.
        timesteps: Where the run stands.

    Returns:
        None if the episodes go on; else why they begin again, without a full stop.
    """
    reason = str(state.get("reason", _FRESH))
    if "layers" in state:
        content = _arrays(state)
        try:
            envs.load_stack(cast(VecEnv, agent.env), content["layers"])
        except envs.WorldError as error:
            reason = str(error)
        else:
            agent._last_obs, agent._last_episode_starts = content["observations"], content["starts"]
            return None
    agent._last_obs = None
    # A resumed run must not meet its first episodes again.
    seed = np.random.SeedSequence([agent.seed or 0, timesteps]).generate_state(1)
    before = agent.part.first if isinstance(agent, ACKTR) else 0
    cast(VecEnv, agent.env).seed(int(seed[0] % 2**30) + before)
    return reason


def of_others(known: Sequence[object], ranks: Ranks) -> dict[str, Any]:
    """Say why environments that other processes left do not go on.

    Args:
        known: One for each process that there was.
        ranks: The processes that there are.

    Returns:
        What ``restore`` takes for it.
    """
    return {"reason": f"they were shared out over {len(known)} processes, and now over {ranks.size}"}


def save_log(agent: OnPolicyAlgorithm) -> dict[str, Any]:
    """Write down what was recorded since the last row of the log.

    Args:
        agent: Whose logger it is.

    Returns:
        The ``values`` by name, over how many records each is a mean, and from which outputs it is hidden.
    """
    logger: Logger | None = getattr(agent, "_logger", None)
    if logger is None:
        return {"values": {}, "counts": {}, "hidden": {}}
    numbers = {k: v for k, v in logger.name_to_value.items() if isinstance(v, (int, float, np.number))}
    return {
        # Arrays without axes keep their number's type, and so the digits it is written with.
        "values": {k: np.asarray(v) if isinstance(v, np.generic) else v for k, v in numbers.items()},
        "counts": {k: logger.name_to_count[k] for k in numbers if k in logger.name_to_count},
        "hidden": {k: list(logger.name_to_excluded.get(k) or ()) for k in numbers},
    }


def restore_log(logger: Logger, state: Mapping[str, Any]) -> None:
    """Put back what waits for the next row of the log.

    Args:
        logger: The run's.
        state: What ``save_log`` returned, as read from a checkpoint; empty if it has none.
    """
    values: dict[str, Any] = _arrays(state.get("values", {}))
    for name, value in values.items():
        logger.name_to_value[name] = cast(float, value[()] if isinstance(value, np.ndarray) else value)
        logger.name_to_excluded[name] = tuple(state["hidden"][name])
    logger.name_to_count.update(state.get("counts", {}))


def _arrays(value: Any) -> Any:
    """Turn a checkpoint's tensors into numpy's arrays.

    Args:
        value: Plain containers of tensors and others.

    Returns:
        The same containers; arrays that nobody else holds.
    """
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if isinstance(value, Mapping):
        return {key: _arrays(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_arrays, value))
    return value
