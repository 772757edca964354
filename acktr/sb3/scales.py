"""What advantages are divided by, so that one radius suits every task."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class RunningScale:
    """The larger of a rollout's own standard deviation s and a running one: σ = max(s, √v), v ← β v + (1 − β) s².

    By its own alone every rollout has advantages of unit variance, and where hardly anything happened (nobody fell) it
    is noise that is blown up to a whole step. Beside the rollouts before it such a one makes a short step.
    """

    decay: float = 0.8
    """β in [0, 1), per rollout."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"scale.decay must be in [0, 1), got {self.decay}")


class Spread:
    """How large advantages have been."""

    def __init__(self) -> None:
        self.variance = 0.0
        """v; 0 before the first rollout."""

    def take(self, std: float, scale: RunningScale) -> float:
        """Take in a rollout.

        Args:
            std: s, finite.
            scale: with which decay.

        Returns:
            √v from now on.
        """
        share = scale.decay if self.variance else 0.0
        self.variance = share * self.variance + (1 - share) * std**2
        return self.least

    @property
    def least(self) -> float:
        """What advantages are divided by at least, √v."""
        return sqrt(self.variance)
