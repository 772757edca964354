"""Arms that bring something somewhere: Reacher and Pusher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from envs.mujoco.task import Flags, Floats, Start, State, Task

_SLOW = 0.005  # rad/s: largest joint velocity at the start
_REACH = 0.2  # metres: how far from the centre Reacher's target may be
_CLEARANCE = 0.17  # metres: how near to its goal Pusher's object may not be


@dataclass(frozen=True)
class Reacher(Task):
    """A two-link arm reaches for a target: reward −w_d · ‖fingertip − target‖ − w_a · ‖a‖², no termination."""

    reads: ClassVar[tuple[str, ...]] = ("qpos", "qvel", "xpos")

    xml_file: str = "reacher.xml"
    frame_skip: int = 2
    reward_dist_weight: float = 1.0
    """Cost per metre between fingertip and target."""
    reward_control_weight: float = 1.0
    """Cost per squared unit of action."""

    @cached_property
    def bodies(self) -> tuple[int, int]:
        """Numbers of the fingertip and the target."""
        return self.model.body("fingertip").id, self.model.body("target").id

    def start(self, rng: np.random.Generator) -> Start:
        """Draw the arm, then a target within its reach.

        Args:
            rng: The environment's generator.

        Returns:
            Positions (nq,) and velocities (nv,).
        """
        qpos = rng.uniform(low=-0.1, high=0.1, size=self.model.nq) + self.init_qpos
        while True:
            target = rng.uniform(low=-_REACH, high=_REACH, size=2)
            if np.linalg.norm(target) < _REACH:
                break
        qpos[-2:] = target
        qvel = self.init_qvel + rng.uniform(low=-_SLOW, high=_SLOW, size=self.model.nv)
        qvel[-2:] = 0
        return qpos, qvel

    def observation(self, state: State) -> Floats:
        """Show the joints' cosines and sines, the target, the joints' velocities and the way to the target.

        Args:
            state: The present.

        Returns:
            Shape (n_envs, 10).
        """
        qpos = state["qpos"]
        joints = np.ascontiguousarray(qpos[:, :2])
        way = self._way(state)[:, :2]
        return np.concatenate((np.cos(joints), np.sin(joints), qpos[:, 2:], state["qvel"][:, :2], way), axis=1)

    def reward(self, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
        """Charge for distance and effort.

        Args:
            before: Without effect.
            state: What the step led to.
            actions: Shape (n_envs, 2).
            healthy: Without effect.

        Returns:
            Shape (n_envs,).
        """
        distance = -_lengths(self._way(state)) * self.reward_dist_weight
        return np.asarray(distance + -np.square(actions).sum(axis=1) * self.reward_control_weight)

    def _way(self, state: State) -> Floats:
        fingertip, target = self.bodies
        return np.asarray(state["xpos"][:, fingertip] - state["xpos"][:, target])


@dataclass(frozen=True)
class Pusher(Task):
    """A seven-joint arm pushes an object to a goal: it pays for two distances and its effort, no termination.

    Reward −w_n · ‖object − tip‖ − w_d · ‖object − goal‖ − w_a · ‖a‖².
    """

    reads: ClassVar[tuple[str, ...]] = ("qpos", "qvel", "xpos")

    xml_file: str = "pusher_v5.xml"
    frame_skip: int = 5
    reward_near_weight: float = 0.5
    """Cost per metre between the arm's tip and the object."""
    reward_dist_weight: float = 1.0
    """Cost per metre between the object and its goal."""
    reward_control_weight: float = 0.1
    """Cost per squared unit of action."""

    @cached_property
    def bodies(self) -> tuple[int, int, int]:
        """Numbers of the arm's tip, the object and the goal."""
        return self.model.body("tips_arm").id, self.model.body("object").id, self.model.body("goal").id

    def start(self, rng: np.random.Generator) -> Start:
        """Draw the object not too near to the goal; the arm starts at the model's own position.

        Args:
            rng: The environment's generator.

        Returns:
            Positions (nq,) and velocities (nv,).
        """
        while True:
            thing = np.concatenate([rng.uniform(low=-0.3, high=0, size=1), rng.uniform(low=-0.2, high=0.2, size=1)])
            if np.linalg.norm(thing) > _CLEARANCE:
                break
        qpos = self.init_qpos.copy()
        qpos[-4:-2] = thing
        qpos[-2:] = 0
        qvel = self.init_qvel + rng.uniform(low=-_SLOW, high=_SLOW, size=self.model.nv)
        qvel[-4:] = 0
        return qpos, qvel

    def observation(self, state: State) -> Floats:
        """Show the joints and where the tip, the object and the goal are.

        Args:
            state: The present.

        Returns:
            Shape (n_envs, 23).
        """
        places = [state["xpos"][:, body] for body in self.bodies]
        return np.concatenate((state["qpos"][:, :7], state["qvel"][:, :7], *places), axis=1)

    def reward(self, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
        """Charge for both distances and for effort.

        Args:
            before: Without effect.
            state: What the step led to.
            actions: Shape (n_envs, 7).
            healthy: Without effect.

        Returns:
            Shape (n_envs,).
        """
        tip, thing, goal = (state["xpos"][:, body] for body in self.bodies)
        near = -_lengths(thing - tip) * self.reward_near_weight
        distance = -_lengths(thing - goal) * self.reward_dist_weight
        return np.asarray(distance + -np.square(actions).sum(axis=1) * self.reward_control_weight + near)


def _lengths(vectors: Floats) -> Floats:
    """Measure vectors of shape (n_envs, 3) with the dot product ``np.linalg.norm`` uses for one vector.

    A sum of squares would round differently from time to time, by one bit.

    Returns:
        Shape (n_envs,).
    """
    return np.asarray(np.sqrt(np.vecdot(vectors, vectors)))
