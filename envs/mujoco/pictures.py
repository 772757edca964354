"""Pictures of vectorised MuJoCo worlds, drawn by gymnasium's renderer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_env import DEFAULT_SIZE
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

from envs.drawing import lighten_renderer

PICTURE_OPTIONS = (
    *("default_camera_config", "width", "height", "max_geom", "camera_id", "camera_name", "visual_options"),
)
"""Constructor options of gymnasium's tasks that change pictures and nothing else."""


class Pictures:
    """Draws one simulation at a time on one canvas, which is made for the first picture.

    Args:
        model: The simulations' model.
        options: Some of ``PICTURE_OPTIONS`` with their values.
    """

    def __init__(self, model: Any, options: Mapping[str, Any]) -> None:
        self._options = {"width": DEFAULT_SIZE, "height": DEFAULT_SIZE, "max_geom": 1000} | dict(options)
        self._model = copy.copy(model)
        canvas = self._model.vis.global_
        canvas.offwidth = max(canvas.offwidth, self._options["width"])
        canvas.offheight = max(canvas.offheight, self._options["height"])
        self._data = mujoco.MjData(self._model)
        self._renderer: Any = None

    def draw(self, copy_into: Callable[[Any], None]) -> np.ndarray:
        """Draw a simulation.

        Args:
            copy_into: Copies its state into MuJoCo's data.

        Returns:
            An RGB picture, uint8, shape (height, width, 3).
        """
        copy_into(self._data)
        mujoco.mj_forward(self._model, self._data)
        if self._renderer is None:
            options = dict(self._options)
            options["default_cam_config"] = options.pop("default_camera_config", None)
            if "camera_id" not in options:
                # The model's own camera follows the body; gymnasium's default stays behind.
                options.setdefault("camera_name", "track")
            self._renderer = MujocoRenderer(self._model, self._data, **options)
            lighten_renderer(self._model, self._renderer)
        # Another world may have drawn in between, on a canvas of its own.
        self._renderer._get_viewer("rgb_array").make_context_current()
        return np.asarray(self._renderer.render("rgb_array"))

    def close(self) -> None:
        """Free the canvas."""
        if self._renderer is not None:
            # Left to itself MuJoCo would free its objects later, in whatever context is current then.
            viewer = self._renderer._get_viewer("rgb_array")
            viewer.make_context_current()
            viewer.con.free()
            self._renderer.close()
        self._renderer = None
