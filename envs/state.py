"""What worlds need to go on where they stood, as arrays, numbers and text.

A stack of wrappers is saved layer by layer: each that carries something from step to step has a ``state_dict`` and a
``load_state_dict`` for its own part. A layer without them cannot be saved, and neither can the stack around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecTransposeImage

from envs.errors import WorldError

_STATELESS: tuple[type[VecEnv], ...] = (VecTransposeImage,)


class Stateful(Protocol):
    """A world, or a wrapper around one, that can be put back where it stood."""

    def state_dict(self) -> Mapping[str, Any]:
        """Write down all that its future depends on, between two steps.

        Returns:
            Arrays, numbers, text, None, and lists, tuples and dictionaries of them; no views.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, instead of a reset.

        Args:
            state: What it returned, for a world of the same kind. A ``WorldError`` refuses any other.
        """


class UnsavedError(WorldError):
    """A world cannot be saved: one line that names the part in the way."""


def is_stateful(thing: object) -> bool:
    """Say whether something can be saved.

    Args:
        thing: A world or a wrapper.

    Returns:
        Whether its own class has both methods; a wrapper's attributes are often those of the world inside.
    """
    return all(callable(getattr(type(thing), name, None)) for name in ("state_dict", "load_state_dict"))


def save_stack(venv: VecEnv) -> list[dict[str, Any]]:
    """Write down the state of vectorised environments with all their wrappers.

    Args:
        venv: The outermost layer, between two steps.

    Returns:
        One dictionary per layer, the outermost first: the ``layer``'s class and its ``state``. An ``UnsavedError``
        names a layer that cannot be saved.
    """
    return [{"layer": type(layer).__name__, "state": _state_of(layer)} for layer in _layers(venv)]


def load_stack(venv: VecEnv, states: Sequence[Mapping[str, Any]]) -> None:
    """Put environments where ``save_stack`` found them.

    Args:
        venv: The outermost layer of environments built the same way.
        states: What ``save_stack`` returned.

    Raises:
        WorldError: If the state is of other worlds.
    """
    layers = list(_layers(venv))
    own, saved = [type(layer).__name__ for layer in layers], [str(state["layer"]) for state in states]
    if own != saved:
        raise WorldError(f"this state is of other worlds: it holds {' in '.join(saved)}, these are {' in '.join(own)}")
    for layer, state in zip(layers, states, strict=True):
        if not isinstance(layer, _STATELESS):
            cast(Stateful, layer).load_state_dict(state["state"])


def plain(value: object, where: str) -> Any:
    """Copy a value into arrays and plain types.

    Args:
        value: A number, text, None, an array, or tuples and lists of them.
        where: Its name, for the message.

    Returns:
        The same; numpy's scalars as arrays without axes, which keep their type.

    Raises:
        UnsavedError: If it is something else.
    """
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        return np.array(value)
    if value is None or type(value) in {bool, int, float, str}:
        return value
    if type(value) in {tuple, list}:
        return type(value)([plain(item, where) for item in cast(Any, value)])  # type: ignore[call-arg]
    raise UnsavedError(f"{where} holds a {type(value).__name__}, which cannot be saved")


def lively(value: Any) -> Any:
    """Undo ``plain``.

    Args:
        value: What it returned.

    Returns:
        A copy of what it was given.
    """
    if isinstance(value, np.ndarray):
        return value.copy() if value.ndim else value[()]
    if isinstance(value, (tuple, list)):
        return type(value)(map(lively, value))
    return value


def _layers(venv: VecEnv) -> Iterator[VecEnv]:
    yield venv
    while isinstance(venv, VecEnvWrapper):
        venv = venv.venv
        yield venv


def _state_of(layer: VecEnv) -> dict[str, Any]:
    if type(layer) in _STATELESS:
        return {}
    if not is_stateful(layer):
        raise UnsavedError(f"{type(layer).__name__} cannot be saved")
    return dict(cast(Stateful, layer).state_dict())
