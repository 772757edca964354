"""Which environment an id names, and what to say when it names none."""

from __future__ import annotations

import contextlib
import importlib
import os
import re

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from envs.errors import WorldError, did_you_mean

PIXELS = "pixels/"
"""Put before a MuJoCo task's id, it names the same task seen through a camera."""
_ATARI = "ALE/"
_LEGACY_ATARI = re.compile(r"(?P<game>[A-Za-z0-9]+?)(NoFrameskip|Deterministic)?-v[0-4]")
_VERSIONED = re.compile(r"(?P<name>.+)-v(?P<version>\d+)")


def find_spec(env_id: str) -> EnvSpec:
    """Look an environment up.

    Args:
        env_id: A gymnasium id such as ``HalfCheetah-v5``, ``ALE/Pong-v5`` or ``toy/Reach-v0``; ``module:id`` imports
            the module that registers it first, and ``pixels/`` before an id makes no difference here.

    Returns:
        Its registration.

    Raises:
        WorldError: If the id is unknown or superseded, or its package is not installed.
    """
    pixels, (module, _, name) = env_id.startswith(PIXELS), env_id.removeprefix(PIXELS).rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise WorldError(f"cannot import {module!r} of environment {env_id!r}: {error}") from error
    if name.startswith(_ATARI):
        require("ale_py", extra="atari")
    if name not in gym.registry:
        # Only to name a near miss: without the extra there is nothing to suggest.
        with contextlib.suppress(ImportError):
            importlib.import_module("ale_py")
    _refuse_legacy_atari(name)
    if name not in gym.registry:
        meant = did_you_mean(PIXELS * pixels + name, _current_ids())
        raise WorldError(f"unknown environment {env_id!r}{meant or _whose(module, name, pixels)}")
    _refuse_old_mujoco(name)
    return gym.registry[name]


def _whose(module: str, name: str, pixels: bool) -> str:
    if pixels:
        return f"; {PIXELS} goes before the id of a MuJoCo task, as in {PIXELS}Reacher-v5"
    if module:
        return f"; importing {module!r} registers no such id"
    return f"; for one of your own name the module that registers it: MODULE:{name}"


def is_atari(spec: EnvSpec) -> bool:
    """Tell Atari games from other worlds.

    Args:
        spec: A registration.

    Returns:
        Whether it runs on the Arcade Learning Environment.
    """
    return spec.id.startswith(_ATARI)


def is_mujoco(spec: EnvSpec) -> bool:
    """Tell gymnasium's MuJoCo tasks from other worlds.

    Args:
        spec: A registration.

    Returns:
        Whether it needs the MuJoCo packages.
    """
    return isinstance(spec.entry_point, str) and spec.entry_point.startswith("gymnasium.envs.mujoco")


def require(module: str, extra: str) -> None:
    """Import a package of one of the project's extras.

    Args:
        module: The package's import name.
        extra: The extra that installs it.

    Raises:
        WorldError: If it is not installed, or fails to load.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise WorldError(f"package {module!r} is missing ({error}); pip install 'acktr[{extra}]'") from error
    except (ImportError, AttributeError, RuntimeError) as error:
        # MuJoCo loads its renderer with itself, and fails in one of these ways if that cannot be.
        renderer = os.environ.get("MUJOCO_GL")
        hint = f"; MUJOCO_GL is {renderer!r}, try 'egl', 'osmesa' or 'glfw'" if renderer and module == "mujoco" else ""
        raise WorldError(f"package {module!r} does not load: {error}{hint}") from error


def _refuse_legacy_atari(name: str) -> None:
    """Refuse the ids of the old Atari wrappers, whose protocol the id itself used to fix.

    Raises:
        WorldError: If the id is one of them.
    """
    match = _LEGACY_ATARI.fullmatch(name)
    current = f"{_ATARI}{match['game']}-v5" if match else ""
    if current in gym.registry:
        raise WorldError(
            f"environment {name!r} is a legacy Atari id; use {current!r} (frame skip and others are options)"
        )


def _refuse_old_mujoco(name: str) -> None:
    """Refuse superseded MuJoCo tasks, whose rewards and observations differ from the current ones.

    Raises:
        WorldError: If there is a newer version of the task.
    """
    newest = _newest_version(name)
    if newest != name and is_mujoco(gym.registry[newest]):
        raise WorldError(f"environment {name!r} is superseded; use {newest!r}")


def _newest_version(name: str) -> str:
    match = _VERSIONED.fullmatch(name)
    if match is None:
        return name
    siblings = [other for other in map(_VERSIONED.fullmatch, gym.registry) if other and other["name"] == match["name"]]
    return max(siblings, key=lambda other: int(other["version"]))[0]


def _current_ids() -> list[str]:
    """List the ids worth suggesting.

    Returns:
        The newest version of each name, without the legacy Atari ids, and MuJoCo's once more from pixels.
    """
    newest = [
        env_id
        for env_id, spec in gym.registry.items()
        if env_id == _newest_version(env_id) and (is_atari(spec) or spec.entry_point != "ale_py.env:AtariEnv")
    ]
    return newest + [PIXELS + env_id for env_id in newest if is_mujoco(gym.registry[env_id])]
