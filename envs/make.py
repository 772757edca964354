"""One function that makes any world a vector environment."""

from __future__ import annotations

import inspect
import os
import re
import sys
from contextlib import nullcontext
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, load_env_creator
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from envs.atari import AtariVecEnv
from envs.catalogue import PIXELS, find_spec, is_atari, is_mujoco, require
from envs.drawing import lighten
from envs.errors import WorldError, did_you_mean
from envs.faults import MAX_FAULTS
from envs.guard import FiniteGuard
from envs.inprocess import InProcessVecEnv
from envs.options import EnvOptions
from envs.quiet import quiet_compiler

_DEFAULTS = EnvOptions()
# Options with a field of their own in EnvOptions.
_RESERVED = {"max_episode_steps": "time_limit", "render_mode": "render_mode"}


def make(
    env_id: str, n_envs: int, *, seed: int | None, options: EnvOptions = _DEFAULTS, max_faults: int = MAX_FAULTS
) -> VecEnv:
    """Make ``n_envs`` copies of a world, stepped together in this process.

    Observations and rewards are the world's own: normalisation is the caller's. Whatever is wrapped around the
    result, ``infos[i]["episode"]["r"]`` is the raw return of an episode (of a whole game on Atari). Light worlds are
    stepped one after the other, since a process for each costs several times the simulation itself.

    Args:
        env_id: A gymnasium id; ``ALE/…-v5`` are Atari games, and ``pixels/`` before the id of a MuJoCo task is the same
            task whose observations are images.
        n_envs: Number of copies, at least 1.
        seed: Seed of the first copy, at least 0 (the others count up from it); None for a random one.
        options: What else can be chosen.
        max_faults: Faults in a row of one environment, with no whole episode between them, that end the run.

    Returns:
        A Stable-Baselines3 vector environment inside a `FiniteGuard`, which restarts environments that break.

    Raises:
        WorldError: If the id, a number or an option is not acceptable, or a package is missing.
    """
    if n_envs < 1:
        raise WorldError(f"n_envs must be at least 1, got {n_envs}")
    if seed is not None and seed < 0:
        raise WorldError(f"seed must be at least 0, or None for a random one, got {seed}")
    spec = find_spec(env_id)
    from_pixels = env_id.startswith(PIXELS)
    if from_pixels:
        _check_pixels(spec, options)
    if options.backend == "native" and not is_mujoco(spec):
        raise WorldError(f"backend 'native' is for MuJoCo tasks, not for {spec.id}; use backend 'gymnasium'")
    if is_atari(spec):
        venv: VecEnv = _make_atari(spec, n_envs, options)
        venv.seed(seed)
    elif options.backend == "native":
        venv = _make_native(spec, n_envs, seed, options, from_pixels=from_pixels)
    else:
        venv = _make_gymnasium(spec, n_envs, seed, options, max_faults)
    return FiniteGuard(venv, max_faults)


def _make_atari(spec: EnvSpec, n_envs: int, options: EnvOptions) -> AtariVecEnv:
    if options.time_limit is not None:
        raise WorldError(f"time_limit ({options.time_limit}) is not for Atari; set atari.max_episode_frames")
    if options.env_kwargs:
        raise WorldError(
            f"env_kwargs {sorted(options.env_kwargs)} are not for Atari; its choices are those of AtariOptions"
        )
    return AtariVecEnv(spec.kwargs["game"], n_envs, options.atari, render_mode=options.render_mode)


def _check_pixels(spec: EnvSpec, options: EnvOptions) -> None:
    """Refuse what cannot be seen through the native camera.

    Raises:
        WorldError: If the world is not MuJoCo's, or the backend not ours.
    """
    if not is_mujoco(spec):
        raise WorldError(f"{PIXELS} is for MuJoCo tasks, not for {spec.id}; use {spec.id} as it is")
    if options.backend != "native":
        raise WorldError(f"backend {options.backend!r} has no {PIXELS}{spec.id}; use backend 'native'")


def _make_native(spec: EnvSpec, n_envs: int, seed: int | None, options: EnvOptions, *, from_pixels: bool) -> VecEnv:
    _refuse_reserved(options)
    _load_mujoco(draws=from_pixels or options.render_mode is not None)
    from envs.mujoco import make_native  # imports MuJoCo, which only its users have

    venv = make_native(spec, n_envs, options, from_pixels=from_pixels)
    venv.seed(seed)
    if seed is not None:
        venv.action_space.seed(seed)  # as gymnasium's worlds have it
    return venv


def _refuse_reserved(options: EnvOptions) -> None:
    """Refuse constructor options that have a field of their own.

    Raises:
        WorldError: If there is one.
    """
    for name, remedy in _RESERVED.items():
        if name in options.env_kwargs:
            raise WorldError(f"env_kwargs must not hold {name!r}; set {remedy} instead")


def _load_mujoco(*, draws: bool) -> None:
    if draws:
        _choose_headless_renderer()
    require("mujoco", extra="mujoco")
    require("imageio", extra="mujoco")  # gymnasium's MuJoCo tasks import it even if nothing is drawn


def _make_gymnasium(spec: EnvSpec, n_envs: int, seed: int | None, options: EnvOptions, max_faults: int) -> VecEnv:
    _refuse_reserved(options)
    if is_mujoco(spec):
        _load_mujoco(draws=options.render_mode is not None)

    # A builder rather than an id: with an id, Stable-Baselines3 asks every world to draw.
    def build() -> gym.Env[Any, Any]:
        with quiet_compiler() if is_mujoco(spec) else nullcontext():
            return _build(spec, options)

    kind: dict[str, Any] = {"vec_env_cls": InProcessVecEnv, "vec_env_kwargs": {"max_faults": max_faults}}
    return make_vec_env(build, n_envs=n_envs, seed=seed, **kind)


def _build(spec: EnvSpec, options: EnvOptions) -> gym.Env[Any, Any]:
    """Build one environment.

    Returns:
        The environment with its time limit.

    Raises:
        WorldError: If an option is unknown, or the environment's package is missing.
        TypeError: If the environment's own constructor fails with one.
    """
    kwargs = dict(options.env_kwargs)
    if options.render_mode is not None:
        kwargs["render_mode"] = options.render_mode
        if is_mujoco(spec) and "camera_id" not in kwargs:
            # The model's own camera follows the body; gymnasium's default stays behind.
            kwargs.setdefault("camera_name", "track")
    try:
        env = gym.make(spec, max_episode_steps=options.time_limit, **kwargs)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in kwargs:
            raise
        name = unknown[1]
        raise WorldError(f"{spec.id} has no option {name!r}{did_you_mean(name, _option_names(spec))}") from error
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        raise WorldError(f"a package of {spec.id} is missing: {error}") from error
    if options.render_mode == "rgb_array" and is_mujoco(spec):
        lighten(env)
    return env


def _option_names(spec: EnvSpec) -> list[str]:
    """List the constructor options of a registered environment.

    Returns:
        Parameter names, those of its base classes included, sorted.
    """
    creator: Any = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    constructors = list[Any](inspect.getmro(creator)[:-1] if inspect.isclass(creator) else [creator])
    names = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    return sorted(names - {"self", "args", "kwargs"})


def _choose_headless_renderer() -> None:
    """Draw through EGL where there is no display, unless the user chose a renderer.

    MuJoCo's default needs a window system and would fail late, at the first picture; training without pictures
    does not need EGL's libraries and is left alone.
    """
    headless = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if headless:
        os.environ.setdefault("MUJOCO_GL", "egl")
