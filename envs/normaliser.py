"""Running normalisation: Stable-Baselines3's, number for number, in less of its time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from envs.errors import WorldError

Observations = NDArray[Any] | dict[str, NDArray[Any]]
"""An array [n_envs, ...], or a dictionary of such."""


class RunningNormaliser(VecNormalize):
    """Stable-Baselines3's ``VecNormalize``, with the same arguments and the same results to the last bit.

    On a handful of environments what numpy's ``mean``, ``var`` and ``clip`` wrap around their sums costs several times
    the sums. Here these are taken bare, in the same order. Dictionaries are normalised by the base class.
    Its pickles are a ``VecNormalize``'s, which can be read without this project.
    """

    def step_wait(self) -> VecEnvStepReturn:
        """Step the worlds, learn from what they show if training, and normalise it.

        Returns:
            Normalised observations and rewards (float32), ends, and infos with normalised final observations.
        """
        stepped, rewards, dones, infos = self.venv.step_wait()
        observations = cast(Observations, stepped)
        self.old_obs, self.old_reward = observations, rewards
        if self.training:
            self._learn_observations(observations)
            self._update_reward(rewards)
        if np.count_nonzero(dones):
            for index in np.flatnonzero(dones):
                if "terminal_observation" in infos[index]:
                    final = infos[index]["terminal_observation"]
                    infos[index]["terminal_observation"] = self.normalize_obs(final)
            self.returns[dones] = 0
        return self.normalize_obs(observations), self.normalize_reward(rewards), dones, infos

    def normalize_obs(self, obs: Any) -> Any:
        """Normalise observations by the present statistics.

        Args:
            obs: Of one or several environments.

        Returns:
            A new array, float32 where it is normalised.
        """
        if not self.norm_obs or isinstance(obs, dict):
            return super().normalize_obs(obs)
        statistics = cast(RunningMeanStd, self.obs_rms)
        return _clipped((obs - statistics.mean) / np.sqrt(statistics.var + self.epsilon), self.clip_obs)

    def normalize_reward(self, reward: NDArray[Any]) -> NDArray[Any]:
        """Normalise rewards by the present statistics.

        Args:
            reward: One per environment.

        Returns:
            A new float32 array.
        """
        if not self.norm_reward:
            return super().normalize_reward(reward)
        return _clipped(reward / np.sqrt(self.ret_rms.var + self.epsilon), self.clip_reward)

    def _learn_observations(self, observations: Observations) -> None:
        if not self.norm_obs:
            return
        if isinstance(observations, dict):
            for key, statistics in self.obs_rms.items():
                learn(statistics, observations[key])
        else:
            learn(cast(RunningMeanStd, self.obs_rms), observations)

    def _update_reward(self, reward: NDArray[Any]) -> None:
        self.returns = self.returns * self.gamma + reward
        learn(self.ret_rms, self.returns)

    def state_dict(self) -> dict[str, Any]:
        """Write down what belongs to the running episodes; the statistics belong to the policy and are saved with it.

        Returns:
            The discounted ``returns`` so far, and the raw ``observations`` and ``rewards`` of the last step.
        """
        return {
            "returns": self.returns.copy(),
            "observations": _copied(self.old_obs),
            "rewards": self.old_reward.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the episodes that ``state_dict`` was taken in.

        Args:
            state: What it returned.

        Raises:
            WorldError: If it is of another number of environments.
        """
        if state["returns"].shape != self.returns.shape:
            raise WorldError(f"this state is of {len(state['returns'])} environments, these are {self.num_envs}")
        self.returns, self.old_reward = state["returns"].copy(), state["rewards"].copy()
        self.old_obs = _copied(state["observations"])

    def __reduce__(self) -> Any:
        return object.__new__, (VecNormalize,), self.__getstate__()


def learn(statistics: RunningMeanStd, batch: NDArray[Any]) -> None:
    """Do what ``statistics.update(batch)`` does.

    Args:
        statistics: Changed in place.
        batch: One example per row.
    """
    if batch.dtype.char not in "fd":  # others are not summed in their own type
        statistics.update(batch)
        return
    count = len(batch)
    mean = np.add.reduce(batch, 0) / count
    deviations = batch - mean
    deviations *= deviations
    statistics.update_from_moments(mean, np.add.reduce(deviations, 0) / count, count)


def _copied(observations: Any) -> Any:
    if isinstance(observations, Mapping):
        return {key: values.copy() for key, values in observations.items()}
    return observations.copy()


def _clipped(values: NDArray[Any], bound: float) -> NDArray[Any]:
    return np.asarray(np.minimum(np.maximum(values, -bound), bound), dtype=np.float32)
