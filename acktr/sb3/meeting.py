"""What the processes of one agent tell each other at the end of a rollout.

While environments are stepped no process waits for another. At the end of a rollout they meet once: episodes, faults
and steps are everyone's from then on, and so are the moments of a normaliser, which each has taken of its own
environments since the last time. What breaks in one process is raised in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv

from acktr.ranks import Ranks
from acktr.sb3.moments import moments_of, put_moments
from acktr.sb3.ranks import everyones
from acktr.sb3.rollout import check_buffer

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR

_TOLD = ("episode", "is_success")


def _told(info: dict[str, Any]) -> dict[str, Any]:
    """An episode's score, but none of one that an environment broke off, whatever a monitor around it has counted."""
    return {} if info.get("broken_off") else {name: info[name] for name in _TOLD if name in info}


def broken_buffer(buffer: RolloutBuffer, ranks: Ranks) -> str | None:
    """Look whether everyone's buffers can be learned from.

    Args:
        buffer: this process's, full.
        ranks: the processes.

    Returns:
        What is wrong, alike in all of them; None for nothing.
    """
    complaint = None
    try:
        check_buffer(buffer)
    except FloatingPointError as error:
        complaint = str(error)
    if ranks.size == 1 or ranks.all(complaint is None):
        return complaint
    told = enumerate(ranks.gathered(complaint))
    return next(f"on rank {rank}, {what}" for rank, what in told if what is not None)


class Meeting:
    """A process by itself knows everything at once.

    Args:
        agent: who learns.
        env: its environments.
    """

    def __init__(self, agent: ACKTR, env: VecEnv) -> None:
        self._agent = agent
        self.envs = env.num_envs
        """Environments of everyone."""

    def hear(self, infos: list[dict[str, Any]], dones: NDArray[Any]) -> None:
        """Take what environments say of a step.

        Args:
            infos: one per environment.
            dones: whether the step ended their episodes.
        """
        self._agent._update_info_buffer([_told(info) for info in infos], dones)

    def after(self, fill: Callable[[], bool]) -> bool:
        """Collect a rollout.

        Args:
            fill: collects it.

        Returns:
            What it returned.
        """
        return fill()


class RanksMeeting(Meeting):
    """Several processes, which meet when all have collected their parts.

    Args:
        agent: who learns.
        env: this process's environments.
    """

    def __init__(self, agent: ACKTR, env: VecEnv) -> None:
        super().__init__(agent, env)
        self.envs = agent.part.total
        self._begun, self._heard = agent.num_timesteps, list[tuple[int, int, dict[str, Any], bool]]()
        self.episodes: list[tuple[int, dict[str, Any]]] = []
        """Steps taken when they ended, and what the environment said of them; everyone's, once all have met."""

    def hear(self, infos: list[dict[str, Any]], dones: NDArray[Any]) -> None:
        """Keep what environments say of a step until all processes meet.

        Args:
            infos: one per environment.
            dones: whether the step ended their episodes.
        """
        for index, info in enumerate(infos):
            said = _told(info)
            if said:
                place = self._agent.part.first + index
                self._heard.append((self._agent.num_timesteps, place, said, bool(dones[index])))

    def after(self, fill: Callable[[], bool]) -> bool:
        """Collect this process's part, and bring all of them together.

        Args:
            fill: collects it.

        Returns:
            Whether all have collected theirs; where one was stopped, all are.
        """
        agent = self._agent

        def part() -> dict[str, Any]:
            full = fill()
            taken = (agent.num_timesteps - self._begun) // self.envs * agent.part.count
            faults, moments = agent.faults.fresh(), moments_of(agent.update_state.normaliser)
            return {"full": full, "steps": taken, "heard": self._heard, "faults": faults, "moments": moments}

        told = everyones(agent.ranks, part)
        agent.num_timesteps = self._begun + sum(each["steps"] for each in told)
        heard = sorted((one for each in told for one in each["heard"]), key=lambda one: one[:2])
        for _, _, said, over in heard:
            agent._update_info_buffer([said], np.array([over]))
        self.episodes = [(steps, said) for steps, _, said, _ in heard]
        for rank, each in enumerate(told):
            if rank != agent.ranks.rank:
                agent.faults.hear(each["faults"])
        state = agent.update_state
        put_moments(state.normaliser, state.common, [each["moments"] for each in told])
        state.common = moments_of(state.normaliser)
        return all(each["full"] for each in told)


def meeting_of(agent: ACKTR, env: VecEnv) -> Meeting:
    """How a rollout ends.

    Args:
        agent: who learns.
        env: its environments.

    Returns:
        The meeting of one process or of several.
    """
    return Meeting(agent, env) if agent.ranks.size == 1 else RanksMeeting(agent, env)
