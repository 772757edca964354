"""What an agent sees of simulations: their state, or a camera's frames.

A view is a function of what was seen before and of the state now, and keeps nothing itself, so that a saved
observation is all of its memory.
"""

from __future__ import annotations

from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from envs.mujoco.offscreen import Offscreen
from envs.mujoco.task import State, Task
from envs.options import PixelOptions

Frames = NDArray[np.uint8]
"""Pictures, channels first: [environments, channels, height, width]."""


class View(Protocol):
    """From states to observations, one row per environment."""

    def space(self, observations: NDArray[Any]) -> gym.spaces.Box:
        """Describe one observation.

        Args:
            observations: As ``first`` gives them.

        Returns:
            Their space, without the axis of environments.
        """

    def first(self, state: State) -> NDArray[Any]:
        """Look at the beginnings of episodes.

        Args:
            state: The present of some environments.

        Returns:
            A new array of shape (environments, *observation).
        """

    def next(self, seen: NDArray[Any], state: State) -> NDArray[Any]:
        """Look at the present of episodes that go on.

        Args:
            seen: What was observed a step ago, shape (environments, *observation).
            state: The present of the same environments.

        Returns:
            A new array of the shape of ``seen``.
        """

    def close(self) -> None:
        """Free what draws; a second call does nothing."""


class StateView:
    """Gymnasium's own observations.

    Args:
        task: Which of the state's numbers the agent sees.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def space(self, observations: NDArray[Any]) -> gym.spaces.Box:
        """Describe one observation.

        Args:
            observations: As ``first`` gives them.

        Returns:
            Any numbers, float64.
        """
        return gym.spaces.Box(-np.inf, np.inf, observations.shape[1:], np.float64)

    def first(self, state: State) -> NDArray[Any]:
        """Look at the beginnings of episodes.

        Args:
            state: The present of some environments.

        Returns:
            Float64, shape (environments, observation).
        """
        return self._task.observation(state)

    def next(self, seen: NDArray[Any], state: State) -> NDArray[Any]:
        """Look at the present.

        Args:
            seen: Without effect.
            state: The present of some environments.

        Returns:
            Float64, shape (environments, observation).
        """
        return self._task.observation(state)

    def close(self) -> None:
        """Do nothing."""


class PixelView:
    """The last few frames of a camera: uint8, shape (frame_stack · channels, size, size), oldest first.

    A frame shows positions alone, as they are after the step; the first one of an episode fills the stack.

    Args:
        model: The simulations' model.
        options: Frames and camera.
    """

    def __init__(self, model: Any, options: PixelOptions) -> None:
        self._options = options
        self._canvas = Offscreen(model, options)

    def space(self, observations: NDArray[Any]) -> gym.spaces.Box:
        """Describe one observation.

        Args:
            observations: As ``first`` gives them.

        Returns:
            An image space with its channels first, which ``CnnPolicy`` takes as it is.
        """
        return gym.spaces.Box(0, 255, observations.shape[1:], np.uint8)

    def first(self, state: State) -> NDArray[Any]:
        """Look at the beginnings of episodes.

        Args:
            state: The present of some environments.

        Returns:
            Stacks of one frame each, shape (environments, frame_stack · channels, size, size).
        """
        return np.tile(self._frames(state), (1, self._options.frame_stack, 1, 1))

    def next(self, seen: NDArray[Any], state: State) -> NDArray[Any]:
        """Put a new frame on each stack and drop the oldest.

        Args:
            seen: The stacks a step ago, shape (environments, frame_stack · channels, size, size).
            state: The present of the same environments.

        Returns:
            New stacks.
        """
        frames = self._frames(state)
        return np.concatenate((seen[:, frames.shape[1] :], frames), axis=1)

    def close(self) -> None:
        """Free the canvas; a second call does nothing."""
        self._canvas.close()

    def _frames(self, state: State) -> Frames:
        pictures = self._canvas.draw(state["qpos"])
        return pictures.transpose(0, 3, 1, 2) if self._options.colour else grey(pictures)


def grey(pictures: NDArray[np.uint8]) -> Frames:
    """Weigh red, green and blue as the eye does: 0.30, 0.59, 0.11, in whole numbers.

    Args:
        pictures: RGB, shape (pictures, height, width, 3).

    Returns:
        Shape (pictures, 1, height, width).
    """
    wide = pictures.astype(np.uint16)  # 255 · 256 just fits
    return ((77 * wide[..., 0] + 150 * wide[..., 1] + 29 * wide[..., 2]) >> 8).astype(np.uint8)[:, None]
