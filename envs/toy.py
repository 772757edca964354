"""Tiny worlds whose best return and best action are known, and one that breaks on purpose.

A learner that fails here is wrong rather than unlucky. They are registered with gymnasium as ``toy/…-v0``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from envs.errors import WorldError

Vector = NDArray[np.float32]
Step = tuple[Vector, float, bool, bool, dict[str, Any]]


class BanditEnv(gym.Env[Vector, np.int64]):
    """Contextual bandit: one step, reward 1 for the action that follows the context (cyclically), else 0.

    Best return 1; a uniformly random policy has 1 / n_contexts.

    Args:
        n_contexts: Number of contexts and of actions, at least 2.
    """

    optimal_return = 1.0

    def __init__(self, n_contexts: int = 4) -> None:
        self.n_contexts = n_contexts
        self.observation_space = gym.spaces.Box(0.0, 1.0, (n_contexts,), np.float32)
        self.action_space = gym.spaces.Discrete(n_contexts)
        self._context = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Vector, dict[str, Any]]:
        """Draw a context.

        Args:
            seed: Seed of the contexts.
            options: Unused.

        Returns:
            The context as a one-hot vector of shape (n_contexts,), and no information.
        """
        super().reset(seed=seed, options=options)
        self._context = int(self.np_random.integers(self.n_contexts))
        return _one_hot(self._context, self.n_contexts), {}

    def step(self, action: np.int64) -> Step:
        """Pull an arm, which ends the episode.

        Args:
            action: The arm, in 0 … n_contexts − 1.

        Returns:
            The gymnasium five.
        """
        observation = _one_hot(self._context, self.n_contexts)
        reward = float(int(action) == self.optimal_action(observation))
        return observation, reward, True, False, {}

    def state_dict(self) -> dict[str, Any]:
        """Write down what the next step depends on.

        Returns:
            The ``context`` on show.
        """
        return {"context": self._context}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Args:
            state: What it returned.
        """
        self._context = int(state["context"])

    def optimal_action(self, observation: Vector) -> int:
        """Name the arm that pays.

        Args:
            observation: One-hot context of shape (n_contexts,).

        Returns:
            The next context's index.
        """
        return (int(np.argmax(observation)) + 1) % self.n_contexts


class ReachEnv(gym.Env[Vector, Vector]):
    """One continuous step: reward −‖a − x/2‖² for action a under observation x, uniform in [−1, 1]^dim.

    Best return 0, at the mean ``optimal_action``; a Gaussian policy around it with standard deviation σ has −dim σ².

    Args:
        dim: Dimension of observations and actions, at least 1.
    """

    optimal_return = 0.0

    def __init__(self, dim: int = 2) -> None:
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (dim,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (dim,), np.float32)
        self._position = np.zeros(dim, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Vector, dict[str, Any]]:
        """Draw an observation.

        Args:
            seed: Seed of the observations.
            options: Unused.

        Returns:
            The observation, shape (dim,), and no information.
        """
        super().reset(seed=seed, options=options)
        self._position = self.np_random.uniform(-1.0, 1.0, self._position.shape).astype(np.float32)
        return self._position, {}

    def step(self, action: Vector) -> Step:
        """Reach, which ends the episode.

        Args:
            action: Shape (dim,).

        Returns:
            The gymnasium five.
        """
        miss = np.asarray(action) - self.optimal_action(self._position)
        return self._position, -float(np.sum(miss**2)), True, False, {}

    def state_dict(self) -> dict[str, Any]:
        """Write down what the next step depends on.

        Returns:
            The ``position`` on show, shape (dim,).
        """
        return {"position": self._position.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Args:
            state: What it returned.
        """
        self._position = state["position"].copy()

    @staticmethod
    def optimal_action(observation: Vector) -> Vector:
        """Name the action without loss.

        Args:
            observation: Shape (dim,), or a batch of them.

        Returns:
            Half the observation.
        """
        return np.asarray(observation * np.float32(0.5))


class ConstantEnv(gym.Env[Vector, np.int64]):
    """Reward 1 at every step, for ever; only its registered time limit cuts it.

    The value is 1 / (1 − γ) in every state for whoever bootstraps at truncations, and smaller for whoever takes
    the time limit for an end: (1 − γᵏ) / (1 − γ) with k steps left.
    """

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Vector, dict[str, Any]]:
        """Start over.

        Args:
            seed: Unused but by gymnasium.
            options: Unused.

        Returns:
            The observation, always [1], and no information.
        """
        super().reset(seed=seed, options=options)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action: np.int64) -> Step:  # whatever is done pays the same
        """Collect the reward.

        Args:
            action: Without effect.

        Returns:
            The gymnasium five; the reward is 1 and no end is announced.
        """
        return np.ones(1, dtype=np.float32), 1.0, False, False, {}

    def state_dict(self) -> dict[str, Any]:
        """Write down what the next step depends on.

        Returns:
            Nothing: every step is like every other.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Args:
            state: What it returned.
        """

    @staticmethod
    def optimal_value(gamma: float) -> float:
        """Value of every state.

        Args:
            gamma: Discount in [0, 1).

        Returns:
            1 / (1 − γ).
        """
        return 1.0 / (1.0 - gamma)


class CorridorEnv(gym.Env[Vector, np.int64]):
    """A corridor walked from its left end: action 1 goes right, 0 left; the right end pays 1 and terminates.

    Best return 1 in ``length − 1`` steps. Credit has to travel the whole way back.

    Args:
        length: Number of cells, at least 2.
    """

    optimal_return = 1.0

    def __init__(self, length: int = 6) -> None:
        self.length = length
        self.observation_space = gym.spaces.Box(0.0, 1.0, (length,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self._cell = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Vector, dict[str, Any]]:
        """Return to the left end.

        Args:
            seed: Unused but by gymnasium.
            options: Unused.

        Returns:
            The cell as a one-hot vector of shape (length,), and no information.
        """
        super().reset(seed=seed, options=options)
        self._cell = 0
        return _one_hot(0, self.length), {}

    def step(self, action: np.int64) -> Step:
        """Walk one cell; walls hold.

        Args:
            action: 1 for right, 0 for left.

        Returns:
            The gymnasium five.
        """
        self._cell = min(max(self._cell + (1 if action == 1 else -1), 0), self.length - 1)
        arrived = self._cell == self.length - 1
        return _one_hot(self._cell, self.length), float(arrived), arrived, False, {}

    def state_dict(self) -> dict[str, Any]:
        """Write down what the next step depends on.

        Returns:
            The ``cell`` walked to.
        """
        return {"cell": self._cell}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Args:
            state: What it returned.
        """
        self._cell = int(state["cell"])

    def optimal_value(self, cell: int, gamma: float) -> float:
        """Best discounted return from a cell.

        Args:
            cell: Where to start, in 0 … length − 2.
            gamma: Discount in [0, 1].

        Returns:
            γ^(length − 2 − cell): the reward comes with the last of ``length − 1 − cell`` steps.
        """
        return float(gamma ** (self.length - 2 - cell))


class NaNEnv(ConstantEnv):
    """The constant world with a fault: from step ``after + 1`` on, an observation or a reward is not a number.

    Args:
        what: Which of the two breaks.
        after: Sound steps of each episode, at least 0.

    Raises:
        WorldError: If ``what`` is neither.
    """

    def __init__(self, what: Literal["observation", "reward"] = "observation", after: int = 3) -> None:
        super().__init__()
        if what not in {"observation", "reward"}:
            raise WorldError(f"what must be 'observation' or 'reward', got {what!r}")
        self._what, self._after, self._steps = what, after, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Vector, dict[str, Any]]:
        """Start over, sound again.

        Args:
            seed: Unused but by gymnasium.
            options: Unused.

        Returns:
            The observation, always [1], and no information.
        """
        self._steps = 0
        return super().reset(seed=seed, options=options)

    def step(self, action: np.int64) -> Step:
        """Collect the reward, or the fault.

        Args:
            action: Without effect.

        Returns:
            The gymnasium five.
        """
        observation, reward, terminated, truncated, info = super().step(action)
        self._steps += 1
        if self._steps > self._after and self._what == "observation":
            observation = np.full_like(observation, np.nan)
        if self._steps > self._after and self._what == "reward":
            reward = float("nan")
        return observation, reward, terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        """Write down what the next step depends on.

        Returns:
            The ``steps`` of the episode so far.
        """
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Args:
            state: What it returned.
        """
        self._steps = int(state["steps"])


def register_toys() -> None:
    """Make the toy worlds known to gymnasium; a second call does nothing."""
    time_limits = {"Bandit": None, "Reach": None, "Constant": 20, "Corridor": 50, "NaN": 20}
    for name, time_limit in time_limits.items():
        env_id, entry_point = f"toy/{name}-v0", f"{__name__}:{name}Env"
        if env_id not in gym.registry:
            # Without gymnasium's own checker, whose warnings would precede the faults that tests look for.
            gym.register(env_id, entry_point=entry_point, max_episode_steps=time_limit, disable_env_checker=True)


def _one_hot(index: int, size: int) -> Vector:
    vector = np.zeros(size, dtype=np.float32)
    vector[index] = 1.0
    return vector


register_toys()
