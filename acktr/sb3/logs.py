"""What an agent logs of its updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from acktr.optimizer import NaturalGradient
from acktr.sb3.rollout import Rollout, fit
from acktr.sb3.steps import StepLog

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR


def log_steps(agent: ACKTR, room: Literal["train", "critic"], log: StepLog) -> None:
    """Log what a rollout's steps did, and count what broke in them.

    Args:
        agent: whose.
        room: the value's own, or "train" for the policy's and for those of both together.
        log: of the steps.
    """
    record = agent.logger.record
    for name, value in log.means(agent.ranks).items():
        record(f"{room}/{name}", value)
    who, optimizer = ("critic", agent.critic_optimizer) if room == "critic" else ("actor", agent.actor_optimizer)
    record(f"{room}/skipped_steps", optimizer.skipped)
    agent.faults.follow(who, optimizer)
    if not isinstance(optimizer, NaturalGradient):
        return
    record(f"{room}/damping", optimizer.param_groups[0]["damping"])
    record(f"{room}/radius", optimizer.param_groups[0]["radius"])
    place = "curvature" if room == "train" else "curvature_critic"
    for name, value in optimizer.curvature.diagnostics().items():
        record(f"{place}/{name}", value)
        if name == "skipped_refreshes":
            agent.faults.follow(who, optimizer, value)


def log_rollout(agent: ACKTR, rollout: Rollout) -> None:
    """Log how well the critic knew a rollout, and how much noise there is.

    Args:
        agent: after its update.
        rollout: the transitions.
    """
    variance, entropy = fit(rollout, agent.ranks)
    agent.logger.record("train/explained_variance", variance)
    agent.logger.record("train/entropy", entropy)
    if hasattr(agent.policy, "log_std"):
        agent.logger.record("train/std", float(agent.policy.log_std.detach().exp().mean()))
    agent.logger.record("train/n_updates", agent._n_updates, exclude="tensorboard")
