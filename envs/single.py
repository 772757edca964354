"""The state of single gymnasium environments: simulation, random generator, and what their wrappers count.

Known are gymnasium's MuJoCo tasks of version 5, its classic-control tasks, and every world with a ``state_dict`` and a
``load_state_dict`` of its own, inside the wrappers that ``gymnasium.make`` and Stable-Baselines3 put around a world.
Classes are known by their exact names: a subclass may remember more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

import gymnasium as gym
import numpy as np

from envs.errors import WorldError
from envs.state import Stateful, UnsavedError, is_stateful, lively, plain

_CONTROL = "gymnasium.envs.classic_control"
_CHECKER = "gymnasium.wrappers.common:PassiveEnvChecker"
_REMEMBERS: dict[str, tuple[str, ...]] = {
    "gymnasium.wrappers.common:TimeLimit": ("_elapsed_steps",),
    "gymnasium.wrappers.common:OrderEnforcing": ("_has_reset",),
    _CHECKER: (),
    # Its lists of former episodes grow without end and are read by nobody here.
    "stable_baselines3.common.monitor:Monitor": ("rewards", "needs_reset", "total_steps"),
    f"{_CONTROL}.acrobot:AcrobotEnv": ("state",),
    f"{_CONTROL}.cartpole:CartPoleEnv": ("state", "steps_beyond_terminated"),
    f"{_CONTROL}.continuous_mountain_car:Continuous_MountainCarEnv": ("state",),
    f"{_CONTROL}.mountain_car:MountainCarEnv": ("state",),
    f"{_CONTROL}.pendulum:PendulumEnv": ("state", "last_u"),
}
"""Attributes that change from step to step, by class."""

_MUJOCO = re.compile(r"gymnasium\.envs\.mujoco\.\w+_v5:\w+")
_DERIVED = ("xpos", "xipos")
"""What tasks read before a step: MuJoCo computed it on its way to the present state, not from it."""


def save_single(env: gym.Env[Any, Any]) -> dict[str, Any]:
    """Write down the state of an environment.

    Args:
        env: With its wrappers, between two steps.

    Returns:
        The state of each of the ``layers``, the outermost first, and the ``generator``'s as text. An ``UnsavedError``
        names a layer that is not known.
    """
    layers = _layers(env)
    return {"layers": [[_name(layer), _state_of(layer)] for layer in layers], "generator": _generator(layers[-1])}


def load_single(env: gym.Env[Any, Any], state: Mapping[str, Any]) -> None:
    """Put an environment where ``save_single`` found one like it.

    Args:
        env: With its wrappers.
        state: What ``save_single`` returned.

    Raises:
        WorldError: If the state is of another environment.
    """
    layers = _layers(env)
    own, saved = [_name(layer) for layer in layers], [name for name, _ in state["layers"]]
    if own != saved:
        raise WorldError(f"this state is of another environment: it holds {saved[-1]}, this is {own[-1]}")
    for layer, (_, content) in zip(layers, state["layers"], strict=True):
        _load(layer, content)
    if state["generator"] is not None:
        layers[-1].np_random.bit_generator.state = json.loads(state["generator"])


def _layers(env: gym.Env[Any, Any]) -> list[gym.Env[Any, Any]]:
    layers = [env]
    while isinstance(env, gym.Wrapper):
        env = env.env
        layers.append(env)
    return layers


def _name(layer: object) -> str:
    return f"{type(layer).__module__}:{type(layer).__qualname__}"


def _generator(world: gym.Env[Any, Any]) -> str | None:
    generator = world._np_random
    return None if generator is None else json.dumps(generator.bit_generator.state, default=np.ndarray.tolist)


def _state_of(layer: gym.Env[Any, Any]) -> dict[str, Any]:
    name = _name(layer)
    if is_stateful(layer):
        return dict(cast(Stateful, layer).state_dict())
    if name in _REMEMBERS:
        return {attribute: plain(getattr(layer, attribute), name) for attribute in _REMEMBERS[name]}
    if _MUJOCO.fullmatch(name):
        return _simulation(cast(Any, layer))
    raise UnsavedError(f"{type(layer).__name__} cannot be saved: it has no state_dict and load_state_dict")


def _load(layer: gym.Env[Any, Any], state: Mapping[str, Any]) -> None:
    if is_stateful(layer):
        cast(Stateful, layer).load_state_dict(state)
    elif _MUJOCO.fullmatch(_name(layer)):
        _load_simulation(cast(Any, layer), state)
    else:
        for attribute in _REMEMBERS[_name(layer)]:
            setattr(layer, attribute, lively(state[attribute]))
        if _name(layer) == _CHECKER:
            # It compares the first step with the reset before, which was another process's.
            vars(layer).update(checked_reset=True, checked_step=True, checked_data_reuse=True)


def _simulation(world: Any) -> dict[str, Any]:
    import mujoco

    row = np.empty(mujoco.mj_stateSize(world.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(world.model, world.data, row, mujoco.mjtState.mjSTATE_INTEGRATION)
    return {"simulation": row} | {name: np.array(getattr(world.data, name)) for name in _DERIVED}


def _load_simulation(world: Any, state: Mapping[str, Any]) -> None:
    import mujoco

    own = _simulation(world)
    for name, values in own.items():
        if state[name].shape != values.shape:
            raise WorldError(
                f"this state is of another model: {name} must have shape {values.shape}, got {state[name].shape}"
            )
    row = np.ascontiguousarray(state["simulation"])
    mujoco.mj_setState(world.model, world.data, row, mujoco.mjtState.mjSTATE_INTEGRATION)
    for name in _DERIVED:
        getattr(world.data, name)[:] = state[name]
