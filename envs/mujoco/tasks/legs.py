"""Bodies in space that feel the ground: Ant, Humanoid and HumanoidStandup."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from envs.errors import WorldError
from envs.mujoco.task import Flags, Floats, MortalRunner, Start, State, Task, normal_start, uniform_start, within

_FREE_JOINT = 6  # velocities of the root, which has no actuator


@dataclass(frozen=True)
class Ant(MortalRunner):
    """Four legs walk: reward w_v · v + healthy_reward − w_a · ‖a‖² − w_c · ‖clipped contact forces‖²."""

    reads: ClassVar[tuple[str, ...]] = ("qpos", "qvel", "xpos", "cfrc_ext")
    skipped: ClassVar[int] = 2

    xml_file: str = "ant.xml"
    frame_skip: int = 5
    ctrl_cost_weight: float = 0.5
    healthy_z_range: tuple[float, float] = (0.2, 1.0)
    contact_cost_weight: float = 5e-4
    """Cost per squared unit of clipped contact force."""
    main_body: int | str = 1
    """The body whose speed is rewarded, by number or name."""
    contact_force_range: tuple[float, float] = (-1.0, 1.0)
    """Bounds to which contact forces are clipped."""
    include_cfrc_ext_in_observation: bool = True
    """Show the contact forces."""

    @cached_property
    def body(self) -> int:
        """Number of the body whose speed is rewarded.

        Raises:
            WorldError: If the model has no such body.
        """
        try:
            return int(self.model.body(self.main_body).id)
        except (KeyError, IndexError) as error:
            raise WorldError(f"the model {self.xml_file!r} has no body {self.main_body!r}") from error

    def start(self, rng: np.random.Generator) -> Start:
        """Draw uniform positions and normal velocities.

        Args:
            rng: The environment's generator.

        Returns:
            Positions (nq,) and velocities (nv,).
        """
        return normal_start(self, rng, self.reset_noise_scale)

    def position(self, state: State) -> Floats:
        """Find the main body.

        Args:
            state: The present.

        Returns:
            Metres along x, shape (n_envs,).
        """
        return state["xpos"][:, self.body, 0].copy()

    def observation(self, state: State) -> Floats:
        """Show positions, velocities and contact forces.

        Args:
            state: The present.

        Returns:
            Shape (n_envs, 105) by default.
        """
        parts = [self.seen_positions(state), state["qvel"]]
        if self.include_cfrc_ext_in_observation:
            parts.append(_flat(self._contact_forces(state)[:, 1:]))
        return np.concatenate(parts, axis=1)

    def healthy(self, state: State) -> Flags:
        """Tell whose torso is neither too low nor too high, bounds included, and whose numbers are finite.

        Args:
            state: The present.

        Returns:
            Shape (n_envs,).
        """
        low, high = self.healthy_z_range
        height = state["qpos"][:, 2]
        finite = np.isfinite(state["qpos"]).all(axis=1) & np.isfinite(state["qvel"]).all(axis=1)
        return np.asarray(finite & (low <= height) & (height <= high))

    def reward(self, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
        """Pay for speed and health, charge for effort and contact.

        Args:
            before: x of the main body before the step, shape (n_envs,).
            state: What the step led to.
            actions: Shape (n_envs, 8).
            healthy: Shape (n_envs,).

        Returns:
            Shape (n_envs,).
        """
        gain = self.velocity(before, state) * self.forward_reward_weight + healthy * self.healthy_reward
        contact = self.contact_cost_weight * np.square(self._contact_forces(state)).sum(axis=(1, 2))
        return np.asarray(gain - (self.control_cost(actions) + contact))

    def _contact_forces(self, state: State) -> Floats:
        low, high = self.contact_force_range
        return np.clip(state["cfrc_ext"], low, high)


@dataclass(frozen=True)
class Humanoid(MortalRunner):
    """A human body walks: reward w_v · v + healthy_reward − w_a · ‖ctrl‖² − clipped w_c · ‖contact forces‖².

    Its speed is that of its centre of mass.
    """

    reads: ClassVar[tuple[str, ...]] = (
        *("qpos", "qvel", "ctrl", "xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
    )
    skipped: ClassVar[int] = 2

    xml_file: str = "humanoid.xml"
    frame_skip: int = 5
    forward_reward_weight: float = 1.25
    reset_noise_scale: float = 0.01
    healthy_reward: float = 5.0
    healthy_z_range: tuple[float, float] = (1.0, 2.0)
    contact_cost_weight: float = 5e-7
    """Cost per squared unit of contact force."""
    contact_cost_range: tuple[float, float] = (-np.inf, 10.0)
    """Bounds to which the contact cost is clipped."""
    include_cinert_in_observation: bool = True
    """Show the bodies' inertias."""
    include_cvel_in_observation: bool = True
    """Show the bodies' velocities."""
    include_qfrc_actuator_in_observation: bool = True
    """Show the actuators' forces."""
    include_cfrc_ext_in_observation: bool = True
    """Show the contact forces."""

    def position(self, state: State) -> Floats:
        """Find the centre of mass.

        Args:
            state: The present.

        Returns:
            Metres along x, shape (n_envs,).
        """
        masses = self.model.body_mass
        # All three coordinates, as gymnasium adds them up: another shape of sum would be another rounding.
        return np.asarray((np.einsum("b,nbj->nj", masses, state["xipos"]) / masses.sum())[:, 0])

    def observation(self, state: State) -> Floats:
        """Show positions, velocities and whichever else is included.

        Args:
            state: The present.

        Returns:
            Shape (n_envs, 348) by default.
        """
        return _whole_body(self, self.seen_positions(state), state)

    def healthy(self, state: State) -> Flags:
        """Tell whose torso is neither too low nor too high.

        Args:
            state: The present.

        Returns:
            Shape (n_envs,).
        """
        return within(state["qpos"][:, 2], self.healthy_z_range)

    def reward(self, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
        """Pay for speed and health, charge for effort and contact.

        Args:
            before: x of the centre of mass before the step, shape (n_envs,).
            state: What the step led to.
            actions: Without effect: the effort is that of the commands MuJoCo holds, in float64.
            healthy: Shape (n_envs,).

        Returns:
            Shape (n_envs,).
        """
        gain = self.forward_reward_weight * self.velocity(before, state) + healthy * self.healthy_reward
        contact = _impact(state, self.contact_cost_weight, self.contact_cost_range)
        return np.asarray(gain - (self.control_cost(state["ctrl"]) + contact))


@dataclass(frozen=True)
class HumanoidStandup(Task):
    """A human body gets up: reward z / timestep − w_a · ‖ctrl‖² − clipped w_c · ‖contact forces‖² + 1, no termination.

    Gymnasium's ``uph_cost_weight`` is accepted and has no effect, there as here.
    """

    reads: ClassVar[tuple[str, ...]] = ("qpos", "qvel", "ctrl", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")

    xml_file: str = "humanoidstandup.xml"
    frame_skip: int = 5
    uph_cost_weight: float = 1.0
    """Without effect."""
    ctrl_cost_weight: float = 0.1
    """Cost per squared unit of actuator command."""
    impact_cost_weight: float = 5e-7
    """Cost per squared unit of contact force."""
    impact_cost_range: tuple[float, float] = (-np.inf, 10.0)
    """Bounds to which the contact cost is clipped."""
    reset_noise_scale: float = 0.01
    """Spread of the first positions and velocities."""
    exclude_current_positions_from_observation: bool = True
    """Hide where on the ground the body is."""
    include_cinert_in_observation: bool = True
    """Show the bodies' inertias."""
    include_cvel_in_observation: bool = True
    """Show the bodies' velocities."""
    include_qfrc_actuator_in_observation: bool = True
    """Show the actuators' forces."""
    include_cfrc_ext_in_observation: bool = True
    """Show the contact forces."""

    def start(self, rng: np.random.Generator) -> Start:
        """Draw positions and velocities uniformly.

        Args:
            rng: The environment's generator.

        Returns:
            Positions (nq,) and velocities (nv,).
        """
        return uniform_start(self, rng, self.reset_noise_scale)

    def observation(self, state: State) -> Floats:
        """Show positions, velocities and whichever else is included.

        Args:
            state: The present.

        Returns:
            Shape (n_envs, 348) by default.
        """
        seen = state["qpos"][:, 2:] if self.exclude_current_positions_from_observation else state["qpos"]
        return _whole_body(self, seen, state)

    def reward(self, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
        """Pay for height, charge for effort and contact.

        Args:
            before: Without effect.
            state: What the step led to.
            actions: Without effect: the effort is that of the commands MuJoCo holds, in float64.
            healthy: Without effect.

        Returns:
            Shape (n_envs,).
        """
        height = state["qpos"][:, 2] / self.model.opt.timestep
        effort = self.ctrl_cost_weight * np.square(state["ctrl"]).sum(axis=1)
        return np.asarray(height - effort - _impact(state, self.impact_cost_weight, self.impact_cost_range) + 1)


def _whole_body(task: Humanoid | HumanoidStandup, positions: Floats, state: State) -> Floats:
    """Put an observation of a human body together; its first body is the world and is left out.

    Returns:
        Shape (n_envs, observation).
    """
    parts = [positions, state["qvel"]]
    if task.include_cinert_in_observation:
        parts.append(_flat(state["cinert"][:, 1:]))
    if task.include_cvel_in_observation:
        parts.append(_flat(state["cvel"][:, 1:]))
    if task.include_qfrc_actuator_in_observation:
        parts.append(state["qfrc_actuator"][:, _FREE_JOINT:])
    if task.include_cfrc_ext_in_observation:
        parts.append(_flat(state["cfrc_ext"][:, 1:]))
    return np.concatenate(parts, axis=1)


def _impact(state: State, weight: float, bounds: tuple[float, float]) -> Floats:
    low, high = bounds
    return np.asarray(np.clip(weight * np.square(state["cfrc_ext"]).sum(axis=(1, 2)), low, high))


def _flat(values: Floats) -> Floats:
    return values.reshape(len(values), -1)
