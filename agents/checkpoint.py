"""Checkpoints: one file of tensors, numbers and text that holds no code.

They are written by ``torch.save`` and read with ``weights_only=True``, which builds tensors and plain
containers and refuses everything else, so a checkpoint from a stranger cannot run anything.
"""

from __future__ import annotations

import json
import pickle
import random
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from agents.errors import UsageError
from agents.rundir import RunDirectory, write_whole

FORMAT = 1
"""Number of the layout, raised whenever it changes."""

_SECTIONS = ("format", "parameters", "normaliser", "rng", "progress")
_NAME = re.compile(r"step-(\d+)\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file."""

    path: Path
    """Where it was read from."""
    parameters: Mapping[str, Any]
    """State by component: policy, optimizers, curvature."""
    normaliser: Mapping[str, Any]
    """Running statistics; empty if nothing was normalised."""
    rng: Mapping[str, Any]
    """States of the random generators."""
    progress: Mapping[str, Any]
    """Steps, updates, last episodes and seconds so far."""

    @property
    def timesteps(self) -> int:
        """Environment steps taken so far."""
        return int(self.progress["timesteps"])


def save(path: Path, agent: OnPolicyAlgorithm, seconds: float) -> None:
    """Write everything that training needs to go on, whole or not at all.

    Args:
        path: The file.
        agent: The agent, between two rollouts.
        seconds: Training time so far.
    """
    state = {
        "format": FORMAT,
        "parameters": agent.get_parameters(),
        "normaliser": _normaliser_state(agent.get_vec_normalize_env()),
        "rng": _rng_state(agent),
        "progress": _progress(agent, seconds),
    }
    content = _plain(state, "checkpoint")
    write_whole(path, lambda stream: torch.save(content, stream))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: The file.

    Returns:
        Its content, on the CPU.

    Raises:
        UsageError: If the file is missing, damaged, holds more than data, or has another layout.
    """
    advice = "remove it to fall back on an older checkpoint, or train again"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}; name a run directory that holds one") from None
    except pickle.UnpicklingError:
        raise UsageError(f"checkpoint {path} holds more than tensors and was refused; {advice}") from None
    except Exception as error:
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
        raise UsageError(f"checkpoint {path} is damaged or cut short ({reason}); {advice}") from None
    if not isinstance(state, dict) or any(section not in state for section in _SECTIONS):
        raise UsageError(f"{path} is not a checkpoint of this project; {advice}")
    if state["format"] != FORMAT:
        raise UsageError(f"checkpoint {path} has format {state['format']}, this version reads {FORMAT}; train again")
    return Checkpoint(path, **{section: state[section] for section in _SECTIONS[1:]})


def restore(agent: OnPolicyAlgorithm, checkpoint: Checkpoint) -> None:
    """Put an agent in a checkpoint's state, ready to train on.

    Args:
        agent: An agent of the same configuration, with its environments.
        checkpoint: The state.
    """
    restore_policy(agent, checkpoint, everything=True)
    progress = checkpoint.progress
    agent.num_timesteps = checkpoint.timesteps
    agent._n_updates = progress["updates"]
    agent.ep_info_buffer = deque(maxlen=agent._stats_window_size)
    agent.ep_success_buffer = deque(maxlen=agent._stats_window_size)
    agent.ep_info_buffer.extend({"r": r, "l": int(n), "t": 0.0} for r, n in progress["last_episodes"])
    _restore_rng(agent, checkpoint.rng)


def restore_policy(agent: OnPolicyAlgorithm, checkpoint: Checkpoint, *, everything: bool = False) -> None:
    """Put an agent's networks and its environments' normaliser in a checkpoint's state.

    Args:
        agent: An agent of the same configuration, with its environments.
        checkpoint: The state.
        everything: Restore the optimizers and the curvature too.

    Raises:
        UsageError: If the checkpoint belongs to another architecture.
    """
    names = checkpoint.parameters if everything else ["policy"]
    try:
        parameters = {name: checkpoint.parameters[name] for name in names}
        agent.set_parameters(parameters, exact_match=everything, device=agent.device)
        _restore_normaliser(agent.get_vec_normalize_env(), checkpoint.normaliser)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"checkpoint {checkpoint.path} does not fit the run's configuration: {reason}") from None


def checkpoint_path(directory: RunDirectory, timesteps: int) -> Path:
    """Name a checkpoint; names sort by age.

    Args:
        directory: The run.
        timesteps: Environment steps taken so far.

    Returns:
        The file.
    """
    return directory.checkpoints / f"step-{timesteps:012d}.pt"


def listing(directory: RunDirectory) -> list[Path]:
    """List a run's checkpoints.

    Args:
        directory: The run.

    Returns:
        The files, oldest first.
    """
    found = directory.checkpoints.glob("step-*.pt")
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def prune(directory: RunDirectory, keep: int) -> None:
    """Remove all but the newest checkpoints.

    Args:
        directory: The run.
        keep: How many stay.
    """
    for path in listing(directory)[:-keep]:
        path.unlink()


def latest(directory: RunDirectory) -> Checkpoint:
    """Read the state in which a run stands.

    Args:
        directory: The run.

    Returns:
        Its newest checkpoint.

    Raises:
        UsageError: If there is none yet, or it cannot be read.
    """
    found = listing(directory)
    if not found:
        raise UsageError(f"{directory.path} holds no checkpoint yet; train it first, or remove it and start again")
    return load(found[-1])


def _progress(agent: OnPolicyAlgorithm, seconds: float) -> dict[str, Any]:
    episodes = [(float(info["r"]), float(info["l"])) for info in agent.ep_info_buffer or ()]
    return {
        "timesteps": agent.num_timesteps,
        "updates": agent._n_updates,
        "last_episodes": [list(pair) for pair in episodes],
        "seconds": seconds,
    }


def _normaliser_state(normaliser: VecNormalize | None) -> dict[str, Any]:
    if normaliser is None:
        return {}
    state: dict[str, Any] = {"ret_rms": _moments(normaliser.ret_rms)}
    if normaliser.norm_obs:
        rms = normaliser.obs_rms
        state["obs_rms"] = {k: _moments(v) for k, v in rms.items()} if isinstance(rms, dict) else _moments(rms)
    return state


def _moments(rms: RunningMeanStd) -> dict[str, Any]:
    return {"mean": np.asarray(rms.mean), "var": np.asarray(rms.var), "count": float(rms.count)}


def _restore_normaliser(normaliser: VecNormalize | None, state: Mapping[str, Any]) -> None:
    if normaliser is None:
        return
    _set_moments(normaliser.ret_rms, state["ret_rms"])
    if normaliser.norm_obs:
        rms, saved = normaliser.obs_rms, state["obs_rms"]
        for target, moments in [(rms[k], saved[k]) for k in rms] if isinstance(rms, dict) else [(rms, saved)]:
            _set_moments(target, moments)


def _set_moments(rms: RunningMeanStd, moments: Mapping[str, Any]) -> None:
    rms.mean, rms.var, rms.count = moments["mean"].numpy(), moments["var"].numpy(), moments["count"]


def _rng_state(agent: OnPolicyAlgorithm) -> dict[str, Any]:
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


def _restore_rng(agent: OnPolicyAlgorithm, state: Mapping[str, Any]) -> None:
    version, words, gauss = json.loads(state["python"])
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    np.random.set_state((saved["kind"], saved["keys"].numpy().astype(np.uint32), *saved["rest"]))
    torch.set_rng_state(state["torch"])
    # A run may go on with fewer GPUs than it began with, or with none.
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, index)
    agent.action_space.np_random.bit_generator.state = json.loads(state["actions"])


def _as_list(value: object) -> object:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _plain(value: object, where: str) -> Any:
    """Reduce to what the safe reader accepts, so that a bad value fails at the writing, not at the reading.

    Args:
        value: The state, or a part of it.
        where: Its name, for the message.

    Returns:
        The same content as tensors, numbers, text, None, lists and dicts.

    Raises:
        TypeError: If something is none of these.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} of type {type(value).__name__} cannot go into a checkpoint; give it a state of tensors")
