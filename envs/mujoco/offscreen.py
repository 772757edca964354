"""Small pictures of many simulations of one model, drawn on one canvas that nobody sees.

All environments share one OpenGL context, one scene and one buffer the size of a picture. A buffer for all of them,
read once a step, was no faster on a processor, and a picture's last bit then depended on where in it the picture lay.

The model is a copy made cheap to draw and easy to read: one light at the camera; no shadows, reflections, sky or
textures but the floor's; bodies of few facets, bright on a dark ground. A floor without a pattern would hide movement
rather than show it, and is left out. Most of a picture's time had gone into the floor: a model may ask for a grid of
100,000 facets, of which a flat light needs one.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from functools import cache
from importlib import import_module
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.drawing import is_software, renderer_name
from envs.errors import WorldError
from envs.options import PixelOptions

_log = logging.getLogger(__name__)
_CONTEXTS = {"egl": "mujoco.egl", "osmesa": "mujoco.osmesa", "glfw": "mujoco.glfw", "cgl": "mujoco.cgl"}
_MOST_GEOMS = 1000
_GROUND = 0.12  # brightness of a floor's pattern, 1 is white


class Offscreen:
    """Draws simulations by their positions.

    Args:
        model: The simulations' model, which stays as it is.
        options: Their size and camera.

    Raises:
        WorldError: If there is no renderer.
    """

    def __init__(self, model: Any, options: PixelOptions) -> None:
        self._options, self._size = options, options.size
        self._model = _simplified(model, options)
        canvas = self._model.vis.global_
        canvas.offwidth = canvas.offheight = self._size
        self._data = mujoco.MjData(self._model)
        self._camera, self._shown = _camera(options), mujoco.MjvOption()
        self._target = np.array(options.target)
        self._gl: Any = None
        self._open()

    def _open(self) -> None:
        try:
            self._gl = _context_class()(self._size, self._size)
            self._gl.make_current()
            self._context: Any = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_50)
        except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
            # A library that is not there shows as any of these.
            reason = " ".join(str(error).split())
            raise WorldError(f"cannot draw pixels: {reason}; install EGL, or set MUJOCO_GL=osmesa") from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene: Any = mujoco.MjvScene(self._model, _MOST_GEOMS)
        self._scene.flags[:] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_CULL_FACE] = 1
        if is_software(renderer_name()):
            _tell_of_software(renderer_name())

    def draw(self, qpos: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Draw simulations.

        Args:
            qpos: Joint positions, shape (pictures, nq).

        Returns:
            RGB, a new array of shape (pictures, size, size, 3).

        Raises:
            WorldError: If the canvas is closed.
        """
        if self._gl is None:
            raise WorldError("this MuJoCo environment is closed; make a new one")
        # Another world may have drawn in between.
        self._gl.make_current()
        pictures = np.empty((len(qpos), self._size, self._size, 3), np.uint8)
        whole = mujoco.MjrRect(0, 0, self._size, self._size)
        for positions, picture in zip(qpos, pictures, strict=True):
            self._pose(positions)
            mujoco.mjr_render(whole, self._scene, self._context)
            mujoco.mjr_readPixels(picture, None, whole, self._context)
        return pictures[:, ::-1]  # OpenGL's lowest row comes first

    def _pose(self, positions: NDArray[np.float64]) -> None:
        model, data = self._model, self._data
        data.qpos[:] = positions
        mujoco.mj_kinematics(model, data)
        self._camera.lookat[:] = self._target
        if self._options.follow:
            self._camera.lookat[:2] += data.xpos[1, :2]
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._shown, None, self._camera, everything, self._scene)

    def close(self) -> None:
        """Free the canvas; a second call does nothing."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
        self._gl = None

    def __del__(self) -> None:
        # MuJoCo would free its objects in whatever context is current, that is, those of another world. At the end of
        # the program there are no contexts any more.
        if getattr(self, "_context", None) is not None and not sys.is_finalizing():
            self.close()


def _simplified(model: Any, options: PixelOptions) -> Any:
    """Copy a model and make the copy cheap to draw; nothing that moves is changed.

    Returns:
        The copy.
    """
    model = copy.copy(model)
    quality = model.vis.quality
    quality.offsamples, quality.shadowsize = options.samples, 0
    quality.numslices, quality.numstacks, quality.numquads = 12, 6, 1
    model.light_active[:] = 0
    light = model.vis.headlight
    # More than full light where a surface faces the camera: dark colours are hard to tell from the ground.
    light.active, light.ambient[:], light.diffuse[:], light.specular[:] = 1, 0.6, 0.8, 0.0
    floors = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    patterned = floors & (model.geom_matid >= 0)
    model.geom_rgba[floors & ~patterned, 3] = 0.0
    model.geom_matid[~floors] = -1
    materials = model.geom_matid[patterned]
    model.mat_rgba[materials] = (_GROUND, _GROUND, _GROUND, 1.0)
    model.mat_reflectance[materials] = model.mat_specular[materials] = model.mat_shininess[materials] = 0.0
    model.geom_size[floors, 2] = np.abs(model.geom_size[floors]).max(initial=1.0)  # metres of a grid's cell
    return model


def _camera(options: PixelOptions) -> Any:
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.distance, camera.azimuth, camera.elevation = options.distance, options.azimuth, options.elevation
    return camera


def _context_class() -> Any:
    """Find the OpenGL context that MUJOCO_GL names; without it EGL on Linux, which needs no window.

    Returns:
        A class of MuJoCo's.

    Raises:
        WorldError: If the variable names none.
    """
    name = os.environ.get("MUJOCO_GL", "").lower().strip() or ("egl" if sys.platform == "linux" else "glfw")
    if name not in _CONTEXTS:
        raise WorldError(f"pixels need a renderer, and MUJOCO_GL is {name!r}; set it to 'egl' or 'osmesa'")
    # Mesa's threads cost more than they give on pictures of this size; it looks when its first context is made.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    return import_module(_CONTEXTS[name]).GLContext


@cache
def _tell_of_software(renderer: str) -> None:
    _log.warning(
        "pixels are drawn on the processor (%s); with a graphics card and its EGL it would be faster", renderer
    )
