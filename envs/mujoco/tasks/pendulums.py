"""Poles balanced on a cart: InvertedPendulum and InvertedDoublePendulum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from envs.mujoco.task import Flags, Floats, Start, State, Task, normal_start, uniform_start

_FASTEST_SEEN = 10.0  # m/s or rad/s, and newtons of the constraint force
_WIDEST_ANGLE = 0.2  # radians
_LOWEST_TIP = 1.0  # metres


@dataclass(frozen=True)
class InvertedPendulum(Task):
    """One pole: reward 1 while it stands within 0.2 rad, the end of the episode otherwise."""

    xml_file: str = "inverted_pendulum.xml"
    frame_skip: int = 2
    reset_noise_scale: float = 0.01
    """Spread of the first positions and velocities."""

    def start(self, rng: np.random.Generator) -> Start:
        """Draw positions and velocities uniformly.

        Args:
            rng: The environment's generator.

        Returns:
            Positions (2,) and velocities (2,).
        """
        return uniform_start(self, rng, self.reset_noise_scale)

    def healthy(self, state: State) -> Flags:
        """Tell where the pole stands.

        Args:
            state: The present.

        Returns:
            Shape (n_envs,).
        """
        observation = self.observation(state)
        return np.asarray(np.isfinite(observation).all(axis=1) & (np.abs(observation[:, 1]) <= _WIDEST_ANGLE))


@dataclass(frozen=True)
class InvertedDoublePendulum(Task):
    """Two poles: healthy_reward while the tip is above 1 m, less a cost of its place and of the joints' speed."""

    reads: ClassVar[tuple[str, ...]] = ("qpos", "qvel", "site_xpos", "qfrc_constraint")

    xml_file: str = "inverted_double_pendulum.xml"
    frame_skip: int = 5
    healthy_reward: float = 10.0
    """Reward per healthy step."""
    reset_noise_scale: float = 0.1
    """Spread of the first positions and velocities."""

    def start(self, rng: np.random.Generator) -> Start:
        """Draw uniform positions and normal velocities.

        Args:
            rng: The environment's generator.

        Returns:
            Positions (3,) and velocities (3,).
        """
        return normal_start(self, rng, self.reset_noise_scale)

    def observation(self, state: State) -> Floats:
        """Show the cart, the poles' sines and cosines, clipped velocities and the clipped force on the cart.

        Args:
            state: The present.

        Returns:
            Shape (n_envs, 9).
        """
        poles = np.ascontiguousarray(state["qpos"][:, 1:])
        velocities = np.clip(state["qvel"], -_FASTEST_SEEN, _FASTEST_SEEN)
        force = np.clip(state["qfrc_constraint"][:, :1], -_FASTEST_SEEN, _FASTEST_SEEN)
        return np.concatenate((state["qpos"][:, :1], np.sin(poles), np.cos(poles), velocities, force), axis=1)

    def healthy(self, state: State) -> Flags:
        """Tell where the tip is high enough; a height that is not a number counts, as in gymnasium.

        Args:
            state: The present.

        Returns:
            Shape (n_envs,).
        """
        return np.asarray(~(state["site_xpos"][:, 0, 2] <= _LOWEST_TIP))

    def reward(self, before: Floats, state: State, actions: NDArray[Any], healthy: Flags) -> Floats:
        """Pay for health: healthy_reward − 0.01 x² − (y − 2)² − 0.001 v₁² − 0.005 v₂² with the tip at (x, y).

        Args:
            before: Without effect.
            state: What the step led to.
            actions: Without effect.
            healthy: Shape (n_envs,).

        Returns:
            Shape (n_envs,).
        """
        tip, qvel = state["site_xpos"][:, 0], state["qvel"]
        place = 0.01 * _squares(tip[:, 0]) + _squares(tip[:, 2] - 2)
        speed = 0.001 * _squares(qvel[:, 1]) + 0.005 * _squares(qvel[:, 2])
        return np.asarray(self.healthy_reward * healthy - place - speed)


def _squares(values: Floats) -> Floats:
    """Square one number at a time.

    Gymnasium squares scalars, which goes through the C library's power function and rounds about one in a thousand
    differently from the multiplication that squares an array.

    Args:
        values: Shape (n_envs,).

    Returns:
        Shape (n_envs,).
    """
    return np.array([value**2 for value in values])
