"""Checkpoints: one sealed file of tensors, numbers and text that holds no code.

They are written by ``torch.save`` and read with ``weights_only=True``, which builds tensors and plain
containers and refuses everything else, so a checkpoint from a stranger cannot run anything. A checksum over all of it
(``agents.sealed``) is verified before anything is read.
"""

from __future__ import annotations

import io
import logging
import pickle
import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from agents import generators, normaliser, sealed, worlds
from agents.errors import UsageError
from agents.ranks import ranks_of
from agents.rundir import RunDirectory

FORMAT = 2
"""Number of the layout, raised whenever it changes. Format 1 had no seal and no environments; it is still read, so
that finished runs can be evaluated and recorded for as long as they lie there; a run resumed from it begins new
episodes."""

_log = logging.getLogger(__name__)
_ZIP = b"PK\x03\x04"  # a checkpoint of format 1 is torch's bare archive
_SECTIONS = ("parameters", "normaliser", "rng", "progress")
_SINCE_2 = ("worlds", "log")
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
    worlds: Mapping[str, Any]
    """The environments and what is seen of them; empty in format 1."""
    log: Mapping[str, Any]
    """What waits for the next row of the log; empty in format 1."""
    others: Sequence[Mapping[str, Any]] = ()
    """``rng`` and ``worlds`` of each further process, if there were several."""

    @property
    def timesteps(self) -> int:
        """Environment steps taken so far."""
        return int(self.progress["timesteps"])


class DamagedError(UsageError):
    """A checkpoint that is not as a run of ours wrote it.

    Args:
        path: The file.
        what: What is wrong with it, as a predicate.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"checkpoint {path} {what}; restore it from a copy, or train again")
        self.path = path
        self.what = what


def save(path: Path, agent: OnPolicyAlgorithm, seconds: float) -> None:
    """Write everything that training needs to go on, whole or not at all.

    Args:
        path: The file.
        agent: The agent, between two rollouts.
        seconds: Training time so far.
    """
    write(path, content(agent, seconds))


def content(agent: OnPolicyAlgorithm, seconds: float) -> dict[str, Any]:
    """Put together what a checkpoint holds; where several processes learn together, a call for all of them.

    Args:
        agent: The agent, between two rollouts.
        seconds: Training time so far.

    Returns:
        For ``write``.
    """
    ranks = ranks_of(agent)
    parameters = agent.get_parameters()
    own, *others = ranks.gathered({"rng": generators.save(agent), "worlds": worlds.save(agent)})
    state = {
        "format": FORMAT,
        "parameters": parameters,
        "normaliser": normaliser.save(agent.get_vec_normalize_env()),
        "rng": own["rng"],
        "progress": _progress(agent, seconds),
        "worlds": own["worlds"],
        "log": worlds.save_log(agent),
    }
    if others:
        state["others"] = others
    return state


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: The file.
        state: What ``content`` put together.
    """
    plain = _plain(state, "checkpoint")
    sealed.write(path, lambda stream: torch.save(plain, stream))


def without_training(state: Checkpoint) -> dict[str, Any]:
    """Leave out what acting does not need: optimizers, curvature, generators, environments.

    Args:
        state: What was read.

    Returns:
        For `write`; `restore_policy` takes it, `restore` refuses it.
    """
    kept = {"parameters": {"policy": state.parameters["policy"]}, "normaliser": state.normaliser}
    return {"format": FORMAT, **kept, "rng": {}, "progress": state.progress, "worlds": {}, "log": {}}


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, after its checksum has been verified.

    Args:
        path: The file.

    Returns:
        Its content, on the CPU.

    Raises:
        UsageError: If the file is missing, or was written by a later version.
        DamagedError: If it is damaged, holds more than data, or is something else.
        MemoryError: If there is no room for it.
    """
    try:
        state = torch.load(_unsealed(path), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}; name a run directory that holds one") from None
    except pickle.UnpicklingError:
        raise DamagedError(path, "holds more than tensors and was refused") from None
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ", 1)[0]
        raise DamagedError(path, f"is damaged or cut short ({reason})") from None
    if not isinstance(state, dict) or not _is_ours(state):
        raise DamagedError(path, "is not a checkpoint of this project")
    if state.get("format") not in (1, FORMAT):
        raise UsageError(
            f"checkpoint {path} has format {state.get('format')}, this version reads 1 to {FORMAT}; update acktr"
        )
    later = {section: state.get(section, {}) for section in _SINCE_2}
    own = {section: state[section] for section in _SECTIONS}
    return Checkpoint(path, **own, **later, others=tuple(state.get("others", ())))


def restore(agent: OnPolicyAlgorithm, checkpoint: Checkpoint) -> str | None:
    """Put an agent in a checkpoint's state, ready to train on.

    Args:
        agent: An agent of the same configuration, with its environments.
        checkpoint: The state.

    Returns:
        None if the environments go on where they stood; else why their episodes begin again.

    Raises:
        UsageError: If the checkpoint belongs to another configuration, or was exported for acting alone.
    """
    if not checkpoint.rng:
        raise UsageError(f"{checkpoint.path} was exported without what training needs; resume the run that it is from")
    restore_policy(agent, checkpoint, everything=True)
    try:
        progress = checkpoint.progress
        agent.num_timesteps = checkpoint.timesteps
        agent._n_updates = progress["updates"]
        agent._current_progress_remaining = progress.get("remaining", agent._current_progress_remaining)
        agent.ep_info_buffer = deque(maxlen=agent._stats_window_size)
        agent.ep_success_buffer = deque(progress.get("last_successes", ()), maxlen=agent._stats_window_size)
        agent.ep_info_buffer.extend({"r": r, "l": int(n), "t": 0.0} for r, n in progress["last_episodes"])
        ranks, known = ranks_of(agent), [{"rng": checkpoint.rng, "worlds": checkpoint.worlds}, *checkpoint.others]
        as_before = len(known) == ranks.size
        state = known[ranks.rank] if as_before else {"rng": checkpoint.rng, "worlds": worlds.of_others(known, ranks)}
        reason = worlds.restore(agent, state["worlds"], checkpoint.timesteps)
        # Last of all: a world that is built or seeded may draw from the process's generators.
        generators.restore(agent, state["rng"])
        if not as_before and ranks.rank:
            generators.begin(agent.seed or 0, checkpoint.timesteps, ranks.rank)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(_misfit(checkpoint, error)) from None
    return reason


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
        normaliser.restore(agent.get_vec_normalize_env(), checkpoint.normaliser)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(_misfit(checkpoint, error)) from None


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
    """Remove all but the newest checkpoints; those that are damaged do not count.

    Args:
        directory: The run.
        keep: How many whole ones stay.
    """
    whole = 0
    for path in reversed(listing(directory)):
        if whole < keep:
            whole += _is_whole(path)
        else:
            path.unlink(missing_ok=True)


def latest(directory: RunDirectory, tell: Callable[[str], None] = _log.warning) -> Checkpoint | None:
    """Read the state in which a run stands: its newest whole checkpoint, or its final agent if that is newer.

    Args:
        directory: The run.
        tell: Where to name each file that is damaged, and what is used in its place.

    Returns:
        The state; None if none was saved yet.

    Raises:
        UsageError: If something was saved, and nothing of it is whole.
    """
    complaints: list[DamagedError] = []
    final = [directory.final] if directory.final.exists() else []
    states = [_newest_whole(paths, complaints) for paths in (reversed(listing(directory)), final)]
    found = [state for state in states if state is not None]
    if not found and complaints:
        left = f"no whole checkpoint is left in {directory.path}; restore one from a copy, or train again"
        raise UsageError(f"checkpoint {complaints[0].path} {complaints[0].what}, and {left}")
    newest = max(found, key=lambda state: state.timesteps, default=None)
    for complaint in complaints:
        tell(f"checkpoint {complaint.path} {complaint.what}; {newest and newest.path} is used in its place")
    return newest


def _newest_whole(paths: Iterable[Path], complaints: list[DamagedError]) -> Checkpoint | None:
    for path in paths:
        try:
            return load(path)
        except DamagedError as error:
            complaints.append(error)
    return None


def _is_ours(state: Mapping[str, Any]) -> bool:
    sections = all(isinstance(state.get(name), dict) for name in _SECTIONS)
    return sections and isinstance(state["progress"].get("timesteps"), int)


def _unsealed(path: Path) -> io.BytesIO:
    if not _is_zip(path):
        return io.BytesIO(sealed.read(path))
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise sealed.BrokenSealError(f"its part {broken} does not match its checksum")
    content.seek(0)
    return content


def _is_whole(path: Path) -> bool:
    try:
        return bool(_unsealed(path).getbuffer()) if _is_zip(path) else sealed.is_whole(path)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_ZIP)) == _ZIP


def _misfit(checkpoint: Checkpoint, error: Exception) -> str:
    reason = " ".join(f"{error}".split())[:200]
    return f"checkpoint {checkpoint.path} does not fit the run's configuration: {reason}; leave config.yaml as it was"


def _progress(agent: OnPolicyAlgorithm, seconds: float) -> dict[str, Any]:
    episodes = [(float(info["r"]), float(info["l"])) for info in agent.ep_info_buffer or ()]
    return {
        "timesteps": agent.num_timesteps,
        "updates": agent._n_updates,
        "remaining": agent._current_progress_remaining,
        "last_episodes": [list(pair) for pair in episodes],
        "last_successes": [float(success) for success in agent.ep_success_buffer or ()],
        "seconds": seconds,
    }


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
