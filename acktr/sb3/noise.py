"""The noise of continuous actions: a standard deviation per dimension, learned with the policy or on a schedule.

Policy gradients wear noise down as long as it costs return, long before nothing is left to be found: of a standard
deviation of 0.37, HalfCheetah's had 0.18 left after a quarter of its training and 0.10 at the end. MPO holds it up by a
trust region of its own for the covariance (Abdolmaleki et al. 2018, section 4.2); a floor or a schedule says the same
more plainly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Generator

from acktr.ranks import Ranks
from acktr.sb3.forgiveness import Forgiveness, Trial, try_noise
from acktr.sb3.schedules import Schedule, at


class Noise(ABC):
    """How the standard deviations of Box actions develop; without effect on Discrete ones."""

    @abstractmethod
    def check(self, space: spaces.Space[object]) -> None:
        """Refuse actions that have no such noise.

        Args:
            space: of the actions.

        Raises:
            ValueError: says why.
        """

    def begin(self, policy: ActorCriticPolicy) -> None:
        """Prepare a policy; unless this says otherwise, log standard deviations are parameters like others.

        Args:
            policy: the new policy.
        """

    def try_out(
        self, policy: ActorCriticPolicy, env: VecEnv, total: int, generator: Generator, ranks: Ranks | None = None
    ) -> Trial:
        """Find out what the environment forgives; unless this says otherwise, nothing is tried.

        Args:
            policy: the new policy.
            env: its environment, which has to be reset after steps were taken.
            total: environment steps of the whole training.
            generator: of noise.
            ranks: the processes that learn together; None for this one alone.

        Returns:
            Nats to be added to log standard deviations, and the steps it took.
        """
        return Trial(0.0, 0)

    @abstractmethod
    def keep(self, policy: ActorCriticPolicy, progress_remaining: float, shift: float) -> None:
        """Hold the noise where it belongs.

        Args:
            policy: after an update.
            progress_remaining: 1 at the start of training, 0 at its end.
            shift: what trying out came to.
        """


@dataclass(frozen=True)
class LearnedNoise(Noise):
    """A log standard deviation that takes the policy's steps, above a floor."""

    least: Schedule = 0.0
    """The floor, held after each update: the standard deviations of d dimensions add up to this at least, and each
    keeps least / d. 0 for none.

    Where the noise dies out the policy meets ever fewer states, and forgets what to do in the others."""

    def check(self, space: spaces.Space[object]) -> None:
        """Refuse actions that have no such noise.

        Args:
            space: of the actions.

        Raises:
            ValueError: if the floor is negative, or there is one and actions are not a Box.
        """
        least = at(self.least, 1.0)
        if not least >= 0:
            raise ValueError(f"the least noise must be at least 0, got {least}")
        if least > 0 and not isinstance(space, spaces.Box):
            raise ValueError(f"a least noise (noise_min) is for Box actions, got {space}; leave it at 0")

    @torch.no_grad()
    def keep(self, policy: ActorCriticPolicy, progress_remaining: float, shift: float) -> None:
        """Hold the floor.

        Args:
            policy: after an update.
            progress_remaining: 1 at the start of training, 0 at its end.
            shift: what trying out came to.
        """
        least = at(self.least, progress_remaining)
        if least > 0:
            policy.log_std.clamp_(min=math.log(least / policy.log_std.numel()))


@dataclass(frozen=True)
class ScheduledNoise(Noise):
    """A log standard deviation that is not learned: from the policy's `log_std_init` it moves linearly to its last.

    The whole radius is then the mean's.
    """

    last: float
    """Natural logarithm of the standard deviation at the end of training."""
    forgiveness: Forgiveness | None = None
    """Whether, and how, it is tried out before training how much noise the environment forgives: where episodes end of
    the first noise and would not at rest, the whole schedule is lower. None does not try."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.last):
            raise ValueError(f"the last log standard deviation must be finite, got {self.last}; None learns the noise")

    def check(self, space: spaces.Space[object]) -> None:
        """Refuse actions that have no such noise.

        Args:
            space: of the actions.

        Raises:
            ValueError: if actions are not a Box.
        """
        if not isinstance(space, spaces.Box):
            raise ValueError(f"scheduled noise (log_std_final) is for Box actions, got {space}; learn it")

    def begin(self, policy: ActorCriticPolicy) -> None:
        """Take the log standard deviations out of what is trained.

        Args:
            policy: the new policy.
        """
        policy.log_std.requires_grad_(False)

    def try_out(
        self, policy: ActorCriticPolicy, env: VecEnv, total: int, generator: Generator, ranks: Ranks | None = None
    ) -> Trial:
        """Find out what the environment forgives, if that is wanted.

        Args:
            policy: the new policy.
            env: its environment, which has to be reset afterwards.
            total: environment steps of the whole training.
            generator: of noise.
            ranks: the processes that learn together; None for this one alone.

        Returns:
            Nats by which the whole schedule has to be lower, and the steps it took.
        """
        if self.forgiveness is None:
            return Trial(0.0, 0)
        return try_noise(env, policy.log_std_init, self.forgiveness, total, generator, ranks)

    @torch.no_grad()
    def keep(self, policy: ActorCriticPolicy, progress_remaining: float, shift: float) -> None:
        """Go on along the schedule.

        Args:
            policy: after an update.
            progress_remaining: 1 at the start of training, 0 at its end.
            shift: what trying out came to.
        """
        policy.log_std.fill_(shift + self.last + (policy.log_std_init - self.last) * progress_remaining)
