"""Pictures of MuJoCo worlds where there is no display, and perhaps no graphics card."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

SOFTWARE = ("llvmpipe", "softpipe", "swrast", "swiftshader")
"""What renderers without a graphics card call themselves."""


def lighten(env: gym.Env[Any, Any]) -> bool:
    """Leave out shadows, reflections and smoothing where a processor draws: a third of the time per picture.

    Args:
        env: A MuJoCo world of gymnasium's with render_mode "rgb_array".

    Returns:
        Whether the renderer is software, and so was lightened.
    """
    world: Any = env.unwrapped
    return lighten_renderer(world.model, world.mujoco_renderer)


def lighten_renderer(model: Any, renderer: Any) -> bool:
    """Do what `lighten` does, to a renderer that has drawn nothing yet.

    Args:
        model: The MuJoCo model it draws.
        renderer: A MuJoCo renderer of gymnasium's.

    Returns:
        Whether it is software, and so was lightened.
    """
    import mujoco

    # Samples are fixed when the renderer is made, so they are set before it is known.
    samples = model.vis.quality.offsamples
    model.vis.quality.offsamples = 0
    viewer = renderer._get_viewer("rgb_array")
    if not is_software(renderer_name()):
        model.vis.quality.offsamples = samples
        viewer.close()
        renderer._viewers.pop("rgb_array", None)
        return False
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        viewer.scn.flags[flag] = 0
    return True


def is_software(renderer: str) -> bool:
    """Whether a renderer draws on the processor.

    Args:
        renderer: Its own name, as OpenGL's GL_RENDERER.

    Returns:
        True for the names in `SOFTWARE`, whatever follows them.
    """
    return renderer.lower().startswith(SOFTWARE)


def renderer_name() -> str:
    """What the renderer of the current OpenGL context calls itself; empty if there is none."""
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER)
    return name.decode() if name else ""
