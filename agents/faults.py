"""A run that breaks too often ends with a checkpoint and one line; the faults that it survives are logged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from acktr.linalg import DecompositionError
from acktr.sb3 import ACKTR
from envs import WorldError

FINAL = (WorldError, FloatingPointError, DecompositionError)
"""What ends a run: environments, rollouts, steps or decompositions that broke too often in a row."""


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


def ended(fault: Exception, agent: OnPolicyAlgorithm, save: Callable[[], Path]) -> Ended:
    """Save what is sound of a run that cannot go on.

    Args:
        fault: What ended it.
        agent: Who learned.
        save: Writes a checkpoint.

    Returns:
        What to raise.
    """
    if isinstance(agent, ACKTR):  # what broke since the last rollout
        agent.faults.record(agent.logger.record)
        agent.logger.dump(agent.num_timesteps)
    saved = None
    agent._last_obs = None  # the environments stand anywhere in a rollout that is lost: they begin again
    # A checkpoint of broken networks would hide the sound one before it.
    if all(bool(torch.isfinite(parameter).all()) for parameter in agent.policy.parameters()):
        try:
            saved = save()
        except OSError:
            saved = None
    return Ended(str(fault), agent.num_timesteps, saved)


class FaultLog(BaseCallback):
    """Counts what the environments tell of their faults (`envs.faults`), for learners that do not themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            self.counts.update(kind for kind, _ in info.get("faults", ()))
        return True

    def _on_rollout_end(self) -> None:
        for kind, count in self.counts.items():
            self.logger.record(f"faults/{kind}", count)


def logs(agent: OnPolicyAlgorithm) -> list[BaseCallback]:
    """Say what logs an agent's faults.

    Args:
        agent: Who learns; ACKTR logs its own.

    Returns:
        The callbacks it needs.
    """
    return [] if isinstance(agent, ACKTR) else [FaultLog()]
