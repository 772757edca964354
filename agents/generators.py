"""The states of a process's random generators, as tensors, numbers and text."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm


def save(agent: OnPolicyAlgorithm) -> dict[str, Any]:
    """Write down where the generators stand.

    Args:
        agent: Whose space of actions has one; those of its optimizers are part of their states.

    Returns:
        Python's, numpy's and PyTorch's, and the space's.
    """
    version, words, gauss = random.getstate()
    legacy: tuple[Any, ...] = np.random.get_state(legacy=True)  # type: ignore[assignment]
    kind, keys, position, has_gauss, cached = legacy
    return {
        "python": json.dumps([version, list(words), gauss]),
        "numpy": {"kind": kind, "keys": keys.astype(np.int64), "rest": [int(position), int(has_gauss), float(cached)]},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "actions": json.dumps(agent.action_space.np_random.bit_generator.state, default=_as_list),
    }


def restore(agent: OnPolicyAlgorithm, state: Mapping[str, Any]) -> None:
    """Put the generators back.

    Args:
        agent: Whose space of actions has one.
        state: What ``save`` returned, as read from a checkpoint.
    """
    version, words, gauss = json.loads(state["python"])
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    np.random.set_state((saved["kind"], saved["keys"].numpy().astype(np.uint32), *saved["rest"]))
    torch.set_rng_state(state["torch"])
    # A run may go on with fewer GPUs than it began with, or with none.
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, index)
    agent.action_space.np_random.bit_generator.state = json.loads(state["actions"])


def begin(seed: int, timesteps: int, rank: int) -> None:
    """Seed the generators of a process that was not there when a run was saved.

    Args:
        seed: The run's.
        timesteps: Where it stands.
        rank: Which process.
    """
    python, legacy, own = np.random.SeedSequence([seed, timesteps, rank]).generate_state(3)
    random.seed(int(python))
    np.random.seed(int(legacy))
    torch.manual_seed(int(own))


def _as_list(value: object) -> object:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)
