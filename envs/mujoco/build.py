"""From gymnasium's registration and constructor options to a native vector environment."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from gymnasium.envs.registration import EnvSpec, load_env_creator

from envs.errors import WorldError, did_you_mean
from envs.mujoco import tasks
from envs.mujoco.pictures import PICTURE_OPTIONS
from envs.mujoco.task import Task
from envs.mujoco.vecenv import MujocoVecEnv
from envs.mujoco.views import PixelView, StateView
from envs.options import EnvOptions

_KINDS: list[type[Task]] = [
    *(tasks.HalfCheetah, tasks.Hopper, tasks.Walker2d, tasks.Swimmer),
    *(tasks.Reacher, tasks.Pusher, tasks.InvertedPendulum, tasks.InvertedDoublePendulum),
    *(tasks.Ant, tasks.Humanoid, tasks.HumanoidStandup),
]
TASKS = {f"{kind.__name__}-v5": kind for kind in _KINDS}
"""The tasks by gymnasium's ids."""


def make_native(spec: EnvSpec, n_envs: int, options: EnvOptions, *, from_pixels: bool = False) -> MujocoVecEnv:
    """Make native copies of one of gymnasium's MuJoCo tasks.

    Args:
        spec: The registration.
        n_envs: Number of copies, at least 1.
        options: What else can be chosen; ``env_kwargs`` are gymnasium's.
        from_pixels: Show the agent images, not states.

    Returns:
        The vector environment.

    Raises:
        WorldError: If there is no native version of the task, or an option is not acceptable.
    """
    if spec.id not in TASKS:
        remedy = "use one of them" if from_pixels else "use backend 'gymnasium'"
        raise WorldError(f"{spec.id} has no native version ({', '.join(TASKS)} have); {remedy}")
    kind = TASKS[spec.id]
    known = [option.name for option in fields(kind)]
    for name in options.env_kwargs:
        if name not in known and name not in PICTURE_OPTIONS:
            raise WorldError(f"{spec.id} has no option {name!r}{did_you_mean(name, [*known, *PICTURE_OPTIONS])}")
    chosen = {name: value for name, value in options.env_kwargs.items() if name in known}
    pictures = {name: value for name, value in options.env_kwargs.items() if name in PICTURE_OPTIONS}
    task = kind(**chosen)
    return MujocoVecEnv(
        task,
        n_envs,
        view=PixelView(task.model, options.pixels) if from_pixels else StateView(task),
        time_limit=options.time_limit or spec.max_episode_steps,
        threads=options.threads,
        render_mode=options.render_mode,
        picture_options={"default_camera_config": _camera(spec)} | pictures,
    )


def _camera(spec: EnvSpec) -> Any:
    """Look up where gymnasium looks from.

    Returns:
        The default of its task's constructor.
    """
    creator: Any = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    return inspect.signature(creator).parameters["default_camera_config"].default
