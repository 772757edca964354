"""What a MuJoCo task is: a model file, and pure functions of its state.

All functions take and give one row per environment, so that a task is written once and computed for all of them.
The tasks equal gymnasium's to the last bit, which fixes more than the formulas: the order of additions, the type an
intermediate result is rounded to (costs of float32 actions are float32), and the routine that adds products up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, TypedDict

import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_env import expand_model_path
from numpy.typing import NDArray

from envs.errors import WorldError
from envs.quiet import quiet_compiler

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Start = tuple[Floats, Floats]
"""Where an episode starts: positions of shape (nq,) and velocities of shape (nv,)."""


class State(TypedDict, total=False):
    """What MuJoCo knows about every environment, under MuJoCo's names; a task lists those it reads.

    As in gymnasium, all but the first three describe the world one simulation step before them, since MuJoCo computes
    them on its way to the next state.
    """

    qpos: Floats
    """Joint positions, shape (n_envs, nq)."""
    qvel: Floats
    """Joint velocities, shape (n_envs, nv)."""
    ctrl: Floats
    """Actuator commands, shape (n_envs, nu)."""
    xpos: Floats
    """Positions of bodies in metres, shape (n_envs, nbody, 3)."""
    xipos: Floats
    """Positions of the bodies' centres of mass in metres, shape (n_envs, nbody, 3)."""
    site_xpos: Floats
    """Positions of marked points in metres, shape (n_envs, nsite, 3)."""
    qfrc_constraint: Floats
    """Forces of contacts and joint limits, shape (n_envs, nv)."""
    qfrc_actuator: Floats
    """Forces of the actuators, shape (n_envs, nv)."""
    cinert: Floats
    """Inertias of bodies about the tree's centre of mass, shape (n_envs, nbody, 10)."""
    cvel: Floats
    """Rotational and linear velocities of bodies, shape (n_envs, nbody, 6)."""
    cfrc_ext: Floats
    """External torques and forces on bodies, shape (n_envs, nbody, 6)."""


@dataclass(frozen=True)
class Task:
    """A task with its options, named as gymnasium names them.

    Raises:
        WorldError: If an option is of the wrong kind.
    """

    reads: ClassVar[tuple[str, ...]] = ("qpos", "qvel")
    """The entries of ``State`` the functions below look up."""

    xml_file: str = ""
    """Model file: one of gymnasium's, or a path that starts with ``/``, ``.`` or ``~``."""
    frame_skip: int = 1
    """Simulation steps per agent step, at least 1."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            accepts, kind = _KINDS[str(option.type)]
            if not accepts(value):
                raise WorldError(f"{option.name} must be {kind}, got {value!r}")
        if self.frame_skip < 1:
            raise WorldError(f"frame_skip must be at least 1, got {self.frame_skip}")

    @cached_property
    def model(self) -> Any:
        """The compiled model.

        Raises:
            WorldError: If the file does not exist or is no model.
        """
        try:
            with quiet_compiler():
                return mujoco.MjModel.from_xml_path(expand_model_path(self.xml_file))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise WorldError(f"cannot load the MuJoCo model {self.xml_file!r}: {reason}") from error

    @cached_property
    def dt(self) -> float:
        """Seconds per agent step."""
        return float(self.model.opt.timestep * self.frame_skip)

    @cached_property
    def init_qpos(self) -> Floats:
        """The model's own joint positions, shape (nq,)."""
        return np.array(self.model.qpos0)

    @cached_property
    def init_qvel(self) -> Floats:
        """The model's own joint velocities, shape (nv,): rest."""
        return np.zeros(self.model.nv)

    def start(self, rng: np.random.Generator) -> Start:
        """Draw the start of an episode, with the calls gymnasium makes, in its order.

        Args:
            rng: The environment's generator.

        Returns:
            Positions (nq,) and velocities (nv,).
        """
        return self.init_qpos.copy(), self.init_qvel.copy()

    def position(self, state: State) -> Floats:
        """Find where the environment is on its way forward.

        Args:
            state: The present.

        Returns:
            Metres along x, shape (n_envs,), not a view of the state.
        """
        return state["qpos"][:, 0].copy()

    def observation(self, state: State) -> Floats:
        """Show the agent what it may see.

        Args:
            state: The present.

        Returns:
            A new array of shape (n_envs, observation).
        """
        return np.concatenate((state["qpos"], state["qvel"]), axis=1)

    def healthy(self, state: State) -> Flags:
        """Tell which environments are in a state the task is about.

        Args:
            state: The present.

        Returns:
            Shape (n_envs,).
        """
        return np.ones(len(state["qpos"]), dtype=np.bool_)

    def reward(self, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
        """Judge a step.

        Args:
            before: ``position`` before the step, shape (n_envs,).
            state: What the step led to.
            actions: What was done, shape (n_envs, nu).
            healthy: ``healthy`` of ``state``, shape (n_envs,).

        Returns:
            Shape (n_envs,).
        """
        return healthy.astype(np.float64)

    def terminated(self, healthy: Flags) -> Flags:
        """Tell which episodes end here.

        Args:
            healthy: ``healthy`` of the present, shape (n_envs,).

        Returns:
            Shape (n_envs,).
        """
        return ~healthy


@dataclass(frozen=True)
class Runner(Task):
    """A body that is paid for its speed along x and pays for its effort: w_v · v − w_a · ‖a‖²."""

    skipped: ClassVar[int] = 1
    """First positions, those along the ground, that are hidden from the agent by default."""

    forward_reward_weight: float = 1.0
    """Reward per m/s."""
    ctrl_cost_weight: float = 0.1
    """Cost per squared unit of action."""
    reset_noise_scale: float = 0.1
    """Spread of the first positions and velocities."""
    exclude_current_positions_from_observation: bool = True
    """Hide where on the ground the body is."""

    def start(self, rng: np.random.Generator) -> Start:
        """Draw positions and velocities uniformly around the model's own.

        Args:
            rng: The environment's generator.

        Returns:
            Positions (nq,) and velocities (nv,).
        """
        return uniform_start(self, rng, self.reset_noise_scale)

    def observation(self, state: State) -> Floats:
        """Show positions and velocities.

        Args:
            state: The present.

        Returns:
            A new array of shape (n_envs, nq + nv), less what is hidden.
        """
        return np.concatenate((self.seen_positions(state), state["qvel"]), axis=1)

    def reward(self, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
        """Pay for speed, charge for effort.

        Args:
            before: ``position`` before the step, shape (n_envs,).
            state: What the step led to.
            actions: Shape (n_envs, nu).
            healthy: Without effect.

        Returns:
            Shape (n_envs,).
        """
        return np.asarray(self.forward_reward_weight * self.velocity(before, state) - self.control_cost(actions))

    def velocity(self, before: Floats, state: State) -> Floats:
        """Measure the speed of a step.

        Args:
            before: ``position`` before it, shape (n_envs,).
            state: What it led to.

        Returns:
            m/s along x, shape (n_envs,).
        """
        return np.asarray((self.position(state) - before) / self.dt)

    def control_cost(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Price the effort: ctrl_cost_weight · ‖a‖².

        Args:
            actions: Shape (n_envs, nu).

        Returns:
            Shape (n_envs,), of the actions' own precision.
        """
        return np.asarray(self.ctrl_cost_weight * np.square(actions).sum(axis=1))

    def seen_positions(self, state: State) -> Floats:
        """Select the positions that the agent is shown.

        Args:
            state: The present.

        Returns:
            Shape (n_envs, nq) or (n_envs, nq − skipped).
        """
        return state["qpos"][:, self.skipped :] if self.exclude_current_positions_from_observation else state["qpos"]


@dataclass(frozen=True)
class MortalRunner(Runner):
    """A runner that is paid for staying in its healthy range, and whose episode ends outside of it."""

    healthy_reward: float = 1.0
    """Reward per healthy step."""
    terminate_when_unhealthy: bool = True
    """End the episode at the first unhealthy step."""
    healthy_z_range: tuple[float, float] = (-np.inf, np.inf)
    """Height of the torso in metres."""

    def terminated(self, healthy: Flags) -> Flags:
        """Tell which episodes end here.

        Args:
            healthy: ``healthy`` of the present, shape (n_envs,).

        Returns:
            Shape (n_envs,).
        """
        return ~healthy if self.terminate_when_unhealthy else np.zeros_like(healthy)


def uniform_start(task: Task, rng: np.random.Generator, scale: float) -> Start:
    """Draw positions and velocities uniformly within ``scale`` of the model's own.

    Args:
        task: The task.
        rng: The environment's generator.
        scale: Largest distance from the model's own values.

    Returns:
        Positions (nq,) and velocities (nv,).
    """
    qpos = task.init_qpos + rng.uniform(low=-scale, high=scale, size=task.model.nq)
    return qpos, task.init_qvel + rng.uniform(low=-scale, high=scale, size=task.model.nv)


def normal_start(task: Task, rng: np.random.Generator, scale: float) -> Start:
    """Draw positions uniformly within ``scale`` of the model's own, velocities with standard deviation ``scale``.

    Args:
        task: The task.
        rng: The environment's generator.
        scale: The spread of both.

    Returns:
        Positions (nq,) and velocities (nv,).
    """
    qpos = task.init_qpos + rng.uniform(low=-scale, high=scale, size=task.model.nq)
    return qpos, task.init_qvel + scale * rng.standard_normal(task.model.nv)


def within(values: Floats, bounds: tuple[float, float]) -> Flags:
    """Tell which values lie strictly between two bounds.

    Args:
        values: Any shape; NaN lies nowhere.
        bounds: The lower and the upper bound.

    Returns:
        The shape of ``values``.
    """
    low, high = bounds
    return np.asarray((low < values) & (values < high))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_pair(value: object) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and len(value) == 2 and all(map(_is_number, value))


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "bool": (lambda value: isinstance(value, (bool, np.bool_)), "true or false"),
    "int": (_is_whole, "a whole number"),
    "float": (_is_number, "a number"),
    "str": (lambda value: isinstance(value, str), "a string"),
    "int | str": (lambda value: _is_whole(value) or isinstance(value, str), "a whole number or a string"),
    "tuple[float, float]": (_is_pair, "two numbers"),
}
"""What an option of each annotated type accepts, and how to say so."""
