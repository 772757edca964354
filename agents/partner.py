"""What all processes of a run but the first do: learn with it, and write nothing."""

from __future__ import annotations

import sys

from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from agents import checkpoint, faults
from agents.callbacks import Attendant, Clock, Interrupted
from agents.config import RunConfig
from agents.disk import Disk
from agents.interruption import Stopper
from agents.ranks import ranks_of
from agents.rundir import RunDirectory


def learn(
    config: RunConfig,
    directory: RunDirectory,
    stopper: Stopper,
    agent: OnPolicyAlgorithm,
    start: checkpoint.Checkpoint | None,
) -> None:
    """Learn to the end with the others, and have a part in every checkpoint.

    Args:
        config: The run.
        directory: Where the first process writes.
        stopper: Says when to stop early.
        agent: Who learns.
        start: Where the run went on from, if it did.

    Raises:
        Interrupted: As in the first process.
        ended: Likewise, an ``Ended``.
    """
    first, log = start.timesteps if start else 0, faults.log_of(agent)
    disk = Disk(config.max_faults, log.counts.note)
    saver = Attendant(agent, directory, config, Clock(), first, stopper, lambda: None, disk)
    agent.set_logger(Logger(None, []))
    if config.total_timesteps > first:
        try:
            agent.learn(config.total_timesteps - first, [saver], sys.maxsize, reset_num_timesteps=start is None)
        except faults.FINAL as fault:
            raise faults.ended(fault, agent, log, saver.save) from fault
    newest = saver.save()
    checkpoint.content(agent, 0.0)
    agent.get_parameters()  # for Stable-Baselines3's own file
    if ranks_of(agent).any(stopper.wanted):
        raise Interrupted(newest, agent.num_timesteps)
