"""A run that breaks too often ends with a checkpoint and one line; the faults that it survives are logged."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from acktr.linalg import DecompositionError
from acktr.ranks import BrokenRankError
from acktr.sb3 import ACKTR
from acktr.sb3.faults import Faults
from agents.disk import reason
from agents.ranks import ranks_of
from envs import WorldError

_NO_MEMORY = (MemoryError, torch.OutOfMemoryError)
_SMALLER = "shorter rollouts (n_steps), fewer curvature_examples, a rank, or --device cpu need less"

FINAL = (WorldError, FloatingPointError, DecompositionError, BrokenRankError, *_NO_MEMORY)
"""What ends a run: environments, rollouts, steps or decompositions that broke too often in a row, or no memory; here,
or in another process that learns with this one."""


class Ended(Exception):  # ruff: ignore[error-suffix-on-exception-name] - as Interrupted
    """Training broke too often to go on.

    Args:
        reason: What broke, and where.
        timesteps: Environment steps taken.
        saved: The checkpoint of the last sound state; None if it could not be written, or there is none.
    """

    def __init__(self, reason: str, timesteps: int, saved: Path | None) -> None:
        state = "no checkpoint could be written of it" if saved is None else f"checkpoint {saved.name} holds its state"
        super().__init__(f"stopped after {timesteps:,} steps: {' '.join(reason.split())}; {state}")


def ended(fault: Exception, agent: OnPolicyAlgorithm, log: FaultLog, save: Callable[[], Path]) -> Ended:
    """Save what is sound of a run that cannot go on.

    Args:
        fault: What ended it.
        agent: Who learned.
        log: Where its faults are counted.
        save: Writes a checkpoint.

    Returns:
        What to raise.
    """
    if isinstance(fault, _NO_MEMORY):  # other faults were counted where they arose
        log.counts.add("memory")
    if log.counts.unrecorded:
        log.counts.record(agent.logger.record)
        agent.logger.dump(agent.num_timesteps)
    saved = None
    agent._last_obs = None  # the environments stand anywhere in a rollout that is lost: they begin again
    # What one process alone has met finds the others elsewhere, and no checkpoint is made without them.
    together = ranks_of(agent).size == 1 or not isinstance(fault, (WorldError, *_NO_MEMORY))
    # A checkpoint of broken networks would hide the sound one before it.
    if together and all(bool(torch.isfinite(parameter).all()) for parameter in agent.policy.parameters()):
        with suppress(OSError):
            saved = save()
    what = str(fault)
    if isinstance(fault, _NO_MEMORY):
        what = f"out of memory ({what.split('. ', 1)[0] or type(fault).__name__}): {_SMALLER}"
    return Ended(what, agent.num_timesteps, saved)


def unwritten(fault: OSError, timesteps: int) -> Ended:
    """End a run whose state no disk takes.

    Args:
        fault: The last attempt's.
        timesteps: Environment steps taken.

    Returns:
        What to raise.
    """
    return Ended(f"cannot write: {reason(fault)}; make room, or mend the disk", timesteps, None)


class FaultLog(Protocol):
    """Where faults are counted, and who writes the counts into the log."""

    callbacks: list[BaseCallback]
    """What the learner has to call."""
    counts: Faults
    """What was counted."""


class _Own:
    """ACKTR counts for itself."""

    def __init__(self, agent: ACKTR) -> None:
        self.callbacks: list[BaseCallback] = []
        self.counts = agent.faults


class _Counts(BaseCallback):
    """Counts for learners that do not themselves, from what environments tell of their faults (`envs.faults`) too."""

    def __init__(self) -> None:
        super().__init__()
        self.callbacks: list[BaseCallback] = [self]
        self.counts = Faults()

    def _on_step(self) -> bool:
        self.counts.take(self.locals["infos"])
        return True

    def _on_rollout_end(self) -> None:
        self.counts.record(self.logger.record)


def log_of(agent: OnPolicyAlgorithm) -> FaultLog:
    """Say who counts an agent's faults.

    Args:
        agent: Who learns.

    Returns:
        The agent's own log, or one beside it.
    """
    return _Own(agent) if isinstance(agent, ACKTR) else _Counts()
