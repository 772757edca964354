"""Bodies in a plane that run, hop or swim: HalfCheetah, Hopper, Walker2d and Swimmer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from envs.mujoco.task import Flags, Floats, MortalRunner, Runner, Start, State, normal_start, within

_FASTEST_SEEN = 10.0  # m/s or rad/s; hoppers and walkers are shown velocities up to this


@dataclass(frozen=True)
class HalfCheetah(Runner):
    """Half of a cheetah runs: reward w_v · v − w_a · ‖a‖², no termination."""

    xml_file: str = "half_cheetah.xml"
    frame_skip: int = 5

    def start(self, rng: np.random.Generator) -> Start:
        """Draw uniform positions and normal velocities.

        Args:
            rng: The environment's generator.

        Returns:
            Positions (nq,) and velocities (nv,).
        """
        return normal_start(self, rng, self.reset_noise_scale)


@dataclass(frozen=True)
class Swimmer(Runner):
    """A chain of three links swims in the plane: reward w_v · v − w_a · ‖a‖², no termination."""

    skipped: ClassVar[int] = 2

    xml_file: str = "swimmer.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-4


@dataclass(frozen=True)
class Hopper(MortalRunner):
    """One leg hops: reward w_v · v + healthy_reward − w_a · ‖a‖²; falling ends the episode."""

    xml_file: str = "hopper.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-3
    reset_noise_scale: float = 5e-3
    healthy_z_range: tuple[float, float] = (0.7, np.inf)
    healthy_angle_range: tuple[float, float] = (-0.2, 0.2)
    """Pitch of the torso in radians."""
    healthy_state_range: tuple[float, float] = (-100.0, 100.0)
    """Every position but the first two, and every velocity."""

    def observation(self, state: State) -> Floats:
        """Show positions and clipped velocities.

        Args:
            state: The present.

        Returns:
            Shape (n_envs, 11), or 12 with the x-coordinate.
        """
        return _clipped_observation(self, state)

    def healthy(self, state: State) -> Flags:
        """Tell who stands upright and whose numbers are moderate.

        Args:
            state: The present.

        Returns:
            Shape (n_envs,).
        """
        qpos, qvel = state["qpos"], state["qvel"]
        moderate = within(qpos[:, 2:], self.healthy_state_range).all(axis=1)
        moderate &= within(qvel, self.healthy_state_range).all(axis=1)
        upright = within(qpos[:, 1], self.healthy_z_range) & within(qpos[:, 2], self.healthy_angle_range)
        return np.asarray(moderate & upright)

    def reward(self, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
        """Pay for speed and health, charge for effort.

        Args:
            before: x before the step, shape (n_envs,).
            state: What the step led to.
            actions: Shape (n_envs, nu).
            healthy: Shape (n_envs,).

        Returns:
            Shape (n_envs,).
        """
        return _walking_reward(self, before, state, actions, healthy)


@dataclass(frozen=True)
class Walker2d(MortalRunner):
    """Two legs walk: reward w_v · v + healthy_reward − w_a · ‖a‖²; falling ends the episode."""

    xml_file: str = "walker2d_v5.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-3
    reset_noise_scale: float = 5e-3
    healthy_z_range: tuple[float, float] = (0.8, 2.0)
    healthy_angle_range: tuple[float, float] = (-1.0, 1.0)
    """Pitch of the torso in radians."""

    def observation(self, state: State) -> Floats:
        """Show positions and clipped velocities.

        Args:
            state: The present.

        Returns:
            Shape (n_envs, 17), or 18 with the x-coordinate.
        """
        return _clipped_observation(self, state)

    def healthy(self, state: State) -> Flags:
        """Tell who stands upright.

        Args:
            state: The present.

        Returns:
            Shape (n_envs,).
        """
        qpos = state["qpos"]
        return within(qpos[:, 1], self.healthy_z_range) & within(qpos[:, 2], self.healthy_angle_range)

    def reward(self, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
        """Pay for speed and health, charge for effort.

        Args:
            before: x before the step, shape (n_envs,).
            state: What the step led to.
            actions: Shape (n_envs, nu).
            healthy: Shape (n_envs,).

        Returns:
            Shape (n_envs,).
        """
        return _walking_reward(self, before, state, actions, healthy)


def _clipped_observation(task: Runner, state: State) -> Floats:
    velocities = np.clip(state["qvel"], -_FASTEST_SEEN, _FASTEST_SEEN)
    return np.concatenate((task.seen_positions(state), velocities), axis=1)


def _walking_reward(task: MortalRunner, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
    gain = task.forward_reward_weight * task.velocity(before, state) + healthy * task.healthy_reward
    return np.asarray(gain - task.control_cost(actions))
