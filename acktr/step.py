"""How a direction becomes a step, and what a step tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from acktr.combination import LayerCombination
from acktr.damping import GreedyDamping
from acktr.trust_region import ExactMetric, StepMetric
from acktr.wake import WakeRule


@dataclass(frozen=True)
class Backtracking:
    """TRPO's line search (Schulman et al. 2015, appendix C): shorter and shorter until the loss goes down.

    The first try is as long as the prediction allows; a step stands where the loss is lower than before and the
    measured KL within the radius, and where no try does, no step is taken. The loss must be known at new parameters:
    `step(closure)`, or `descend(loss)`.
    """

    attempts: int = 10
    """Steps that are tried at most."""
    shrink: float = 0.8
    """Factor from one try to the next."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink must be between 0 and 1, got {self.shrink}")


@dataclass(frozen=True)
class StepRule:
    """How a direction becomes a step."""

    combination: LayerCombination | None = field(default_factory=LayerCombination)
    """One coefficient per layer from the exact Fisher; None leaves every coefficient at 1."""
    metric: StepMetric = field(default_factory=ExactMetric)
    """The quadratic form that sets the distance."""
    corrections: int = 2
    """Forward passes that may rescale the step until its measured KL meets the radius; 0 trusts the prediction."""
    measure_period: int = 1
    """Steps between two that measure their KL, after the first `EAGER_PASSES`, which all do; the steps between go by
    the last ratio of measured to predicted KL where it is above 1, and by the prediction where it is not."""
    examples: int | None = None
    """Examples of the recorded batch in the exact forms; None for all. KLs are measured on all
    of it, because the rare ones count; where `observe` runs a batch in two passes, the first is the recorded one."""
    statistics_period: int = 1
    """Recorded passes between two updates of the curvature, after the first `EAGER_PASSES`, which all update it."""
    refresh_period: int = 1
    """Curvature updates between two decompositions."""
    line_search: Backtracking | None = None
    """Demand that the loss goes down, at every step; corrections and their period are then left aside. None asks for
    the distance alone."""
    curvature_damping: GreedyDamping | None = None
    """A damping of its own for the direction; None solves with that of the quadratic model."""
    cold_start: int = 0
    """First steps along the plain gradient, while the curvature gathers statistics; the radius holds all the same."""
    wake: WakeRule | None = None
    """Which divergences to the networks of the past hold the step back (KLD-WRM): `WakeSO`, `WakeQ` or `WakeQE`."""

    def __post_init__(self) -> None:
        for name, least in (
            ("corrections", 0),
            ("measure_period", 1),
            ("statistics_period", 1),
            ("refresh_period", 1),
            ("cold_start", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.wake is not None and self.curvature_damping is not None:
            raise ValueError("a wake's parts share one damping; leave curvature_damping or the wake out")
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"examples must be at least 1, or None for the whole batch, got {self.examples}")


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    scale: float
    """η; 0 where the step was skipped."""
    kl_predicted: float
    """½ η² Δᵀ F Δ by the metric that set the distance, in nats; NaN without a radius, where `lr` alone sets it."""
    kl_block: float
    """The same by the blocks' own approximation; NaN where the step was not measured and they did not predict it."""
    kl_measured: float
    """KL(old ‖ new) on the batch, in nats; NaN where it was not measured."""


@dataclass(frozen=True)
class Descent:
    """Which way to step, and how far that is."""

    tensors: dict[str, Tensor]
    """The direction Δ, one tensor per trained parameter."""
    quadratic: float | None
    """Δᵀ F Δ by the metric that sets the distance; None without a radius, where nothing asks for it."""
