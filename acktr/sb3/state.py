"""What SB3's zip file would lose of an agent: the random generator of its updates, and the normaliser's statistics."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Generator, Tensor

from acktr.passes import SEEDS_APART
from acktr.ranks import Ranks
from acktr.sb3.cuts import Cuts
from acktr.sb3.faults import Faults
from acktr.sb3.moments import Moments, moments_of
from acktr.sb3.reuse import Past
from acktr.sb3.scales import Spread


class MisfitError(ValueError, RuntimeError):
    """Parameters of an agent with other settings."""


class UpdateState:
    """State of an agent that is neither network nor optimizer, in the shape SB3 saves and loads parameters.

    A normaliser's statistics belong to the policy as much as its weights do: the same weights behind other statistics
    are another policy. They are restored into the `VecNormalize` the agent is loaded with, or given later.

    Args:
        seed: of the generator that shuffles minibatches.
        ranks: the processes that learn together, each with a generator of its own; None for this one alone.
    """

    def __init__(self, seed: int, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self.generator = Generator().manual_seed(seed + SEEDS_APART * self._ranks.rank)
        self.faults = Faults()
        self.noise_shift = 0.0
        """What trying out the noise came to (`acktr.sb3.forgiveness`)."""
        self.first_value: dict[str, Tensor] = {}
        """The value's first parameters, until it has begun anew (`acktr.sb3.renewal`)."""
        self.cuts: Cuts | None = None
        """Where the last rollout's episodes were cut (`acktr.sb3.cuts`)."""
        self.past = Past()
        """Rollouts that the policy's steps may use again (`acktr.sb3.reuse`)."""
        self.spread = Spread()
        """How large advantages have been (`acktr.sb3.scales`)."""
        self.normaliser: VecNormalize | None = None
        self.common: dict[str, Moments] = {}
        """The normaliser's moments when those of all processes were the same last."""
        self._waiting: dict[str, Any] | None = None

    def attach(self, normaliser: VecNormalize | None) -> None:
        """Follow a normaliser, and give it the statistics of the one before it or those that were loaded, if any wait.

        Args:
            normaliser: the agent's, or None.
        """
        if self.normaliser is not None and normaliser is not self.normaliser:
            self._waiting = normaliser_state(self.normaliser)
        self.normaliser = normaliser
        if normaliser is not None and self._waiting is not None:
            restore_normaliser(normaliser, self._waiting)
            self._waiting = None
        self.common = moments_of(normaliser)

    def warn_of(self, env: VecEnv | None) -> None:
        """Say so where a policy would see raw observations that it learned from normalised ones.

        Args:
            env: the agent's; None for none yet.
        """
        if env is not None and self._waiting is not None:
            warnings.warn(
                "the policy learned behind a VecNormalize, and this environment has none: wrap it, or its observations "
                "mean something else to the policy",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only; a call for all processes."""
        generators = self._ranks.gathered(self.generator.get_state())
        normaliser = self._waiting if self.normaliser is None else normaliser_state(self.normaliser)
        state = {
            "generator": generators[0],
            "normaliser": normaliser,
            "faults": self.faults.state_dict(),
            "noise_shift": self.noise_shift,
            "first_value": self.first_value,
            "advantage_variance": self.spread.variance,
            "pasts": self._ranks.gathered(self.past.state_dict()),
        }
        return state | ({"others": generators[1:]} if generators[1:] else {})

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: the dictionary.
            strict: SB3's name for «every key must be there», which is always so here.
        """
        restore_generator(self.generator, [state["generator"], *state.get("others", [])], self._ranks)
        if "faults" in state:  # older files have none
            self.faults.load_state_dict(state["faults"])
        self.noise_shift = state.get("noise_shift", 0.0)
        self.first_value = dict(state.get("first_value", {}))
        self.spread.variance = state.get("advantage_variance", 0.0)
        pasts = state.get("pasts", [])
        # Environments of other ranks are no past of this one: with another number of them it begins anew.
        self.past.load_state_dict(pasts[self._ranks.rank] if len(pasts) == self._ranks.size else [])
        self._waiting = state["normaliser"]
        self.attach(self.normaliser)


def restore_generator(generator: Generator, states: list[Tensor], ranks: Ranks) -> None:
    """Go on with a generator; where there were more or fewer processes, all but the first begin another sequence.

    Args:
        generator: this process's.
        states: one for each process that there was.
        ranks: the processes that there are.
    """
    known = len(states) == ranks.size
    generator.set_state(states[ranks.rank if known else 0].cpu())
    if not known and ranks.rank:
        drawn = torch.randint(2**31, (), generator=generator, device=generator.device)
        generator.manual_seed(int(drawn) + SEEDS_APART * ranks.rank)


def normaliser_state(normaliser: VecNormalize) -> dict[str, Any]:
    """The statistics of a VecNormalize, as tensors.

    Args:
        normaliser: any VecNormalize.

    Returns:
        Moments of observations (one set per key for dictionaries) and returns, and the running returns.
    """
    observations = normaliser.obs_rms if normaliser.norm_obs else None
    keyed = observations if isinstance(observations, dict) else {"": observations}
    return {
        "observations": {key: _moments(value) for key, value in keyed.items() if value is not None},
        "returns": _moments(normaliser.ret_rms),
        "running_returns": torch.as_tensor(normaliser.returns),
    }


def restore_normaliser(normaliser: VecNormalize, state: dict[str, Any]) -> None:
    """Put saved statistics into a VecNormalize.

    Args:
        normaliser: wrapped around environments with the same observation space.
        state: what `normaliser_state` returned.

    Raises:
        ValueError: if a part of the observations was normalised that this one leaves alone.
    """
    statistics = normaliser.obs_rms if normaliser.norm_obs else None
    for key, moments in state["observations"].items():
        if isinstance(statistics, dict) and key not in statistics:
            raise ValueError(
                f"observations {key!r} were normalised in training, and this VecNormalize normalises "
                f"{sorted(statistics)} alone; add {key!r} to its norm_obs_keys"
            )
        if statistics is not None:
            _restore(statistics[key] if isinstance(statistics, dict) else statistics, moments)
    _restore(normaliser.ret_rms, state["returns"])
    if len(state["running_returns"]) == normaliser.num_envs:
        normaliser.returns = state["running_returns"].cpu().numpy().copy()


def _moments(statistics: RunningMeanStd) -> dict[str, Tensor]:
    return {
        "mean": torch.as_tensor(np.asarray(statistics.mean)),
        "var": torch.as_tensor(np.asarray(statistics.var)),
        "count": torch.tensor(statistics.count, dtype=torch.float64),
    }


def _restore(statistics: RunningMeanStd, moments: dict[str, Tensor]) -> None:
    statistics.mean = moments["mean"].cpu().numpy().copy()
    statistics.var = moments["var"].cpu().numpy().copy()
    statistics.count = float(moments["count"])
