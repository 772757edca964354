"""What vector environments have in common whose worlds are no Python objects."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from envs.errors import WorldError


class NativeVecEnv(VecEnv, ABC):
    """A vector environment that keeps its own scores and cannot be reached into."""

    _worlds: ClassVar[str]
    """What the environments are called in messages."""
    _chosen_in: ClassVar[str]
    """Where their attributes are chosen."""
    _method_remedy: ClassVar[str]
    """What to do instead of calling one of their methods."""

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refuse: native worlds are fixed once made.

        Args:
            attr_name: The attribute.
            value: Its new value.
            indices: Environments to change.

        Raises:
            WorldError: Always.
        """
        raise WorldError(f"cannot set {attr_name!r} of {self._worlds} to {value!r}; choose it in {self._chosen_in}")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refuse: the environments are not Python objects.

        Args:
            method_name: The method.
            *method_args: Its arguments.
            indices: Environments to call it on.
            **method_kwargs: Its keyword arguments.

        Raises:
            WorldError: Always.
        """
        raise WorldError(f"{self._worlds} have no method {method_name!r}; use {self._method_remedy}")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Say which wrappers the environments behave as if they had.

        Args:
            wrapper_class: A gymnasium wrapper.
            indices: Environments to ask; None for all.

        Returns:
            True per environment for Stable-Baselines3's ``Monitor``, whose score keeping is built in (so that
            ``evaluate_policy`` reads raw scores of whole episodes), False for others.
        """
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]
