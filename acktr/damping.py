"""Damping that is set by how well the quadratic model foretold the loss, and by what lowers the model most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LevenbergMarquardt:
    """λ by the ratio of the loss's reduction to the model's (Martens & Grosse 2015, section 6.5).

    ρ = (h(θ + δ) − h(θ)) / (M(δ) − M(0)), on the batch of the step. The loss must be seen again after a step:
    `step(closure)`, or `descend(loss)`.
    """

    start: float = 1.0
    """First λ; the paper's 150 was for losses summed over the outputs of autoencoders."""
    period: int = 5
    """Steps between two looks at the loss, T₁."""
    decay: float = (19 / 20) ** 5
    """Factor on λ where the model can be trusted, ω₁; λ is divided by it where it cannot. The paper's is (19/20) to
    the power of the period."""
    least: float = 1e-8
    """λ falls no lower: in float32 no inverse does."""
    most: float = 1e8
    """λ rises no higher: what is wrong beyond is not the damping."""

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.start <= self.most < float("inf"):
            raise ValueError(
                f"start must lie between least and most, 0 < least, got start {self.start}, least {self.least} and "
                f"most {self.most}"
            )
        _check(self.period, self.decay)

    @classmethod
    def hessian_free(cls, start: float = 1.0) -> LevenbergMarquardt:
        """Hessian-free optimisation's: two thirds at every step (Martens 2010, section 4.1).

        Args:
            start: first λ.

        Returns:
            The choice.
        """
        return cls(start, period=1, decay=2 / 3)

    def adapted(self, damping: float, ratio: float) -> float:
        """The next λ.

        Args:
            damping: λ.
            ratio: ρ; NaN, from a loss that is, counts as bad.

        Returns:
            ω₁ λ for ρ > ¾, λ / ω₁ for ρ < ¼, else λ; within its bounds.
        """
        if ratio > 0.75:
            damping *= self.decay
        elif not ratio >= 0.25:
            damping /= self.decay
        return min(self.most, max(self.least, damping))


@dataclass(frozen=True)
class GreedyDamping:
    """The curvature's own γ² beside the model's λ, by what lowers the model most (Martens & Grosse 2015, section 6.6).

    An approximation wants more damping, or less, than the model it approximates. Directions come from (F̂ + γ²)⁻¹, in
    factored damping γ to each factor, and are judged by M with the exact Fisher and λ.
    """

    period: int = 20
    """Steps between two searches, T₂."""
    decay: float = (19 / 20) ** 20
    """Neighbours of γ² are this times it, and it over this. The paper's factor on γ is the root of (19/20) to the
    power of the period, so on γ² it is this."""

    def __post_init__(self) -> None:
        _check(self.period, self.decay)

    def candidates(self, damping: float) -> tuple[float, float, float]:
        """What to try.

        Args:
            damping: γ².

        Returns:
            Three dampings, the present one first: it stays where the others are no better.
        """
        return damping, damping * self.decay, damping / self.decay


def _check(period: int, decay: float) -> None:
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}")
    if not 0 < decay < 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}")
