"""How far to go along a descent: scale it, place it, measure it, correct it.

The metric predicts the KL of a step; networks are not quadratic, and blocks do not see each other. What a step really
measures is therefore looked at now and then, by a forward pass of its own, and the ratio of measured to predicted KL is
carried on to the predictions that follow, where it shortens them: a minibatch that was less far than predicted says
nothing of the next one, which may hold the rare examples that it lacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acktr.capture import Pass
from acktr.likelihood import Likelihood, Outputs
from acktr.objective import Objective
from acktr.ranks import Ranks
from acktr.step import Backtracking, Descent, StepReport
from acktr.trust_region import corrected_scale, trust_region_scale

TOLERANCE = 1.1
"""Measured KL within this factor of the radius needs no correction."""
OVERSHOOT = 1.5
"""Measured KL beyond this factor of the radius is corrected however many passes it takes."""
_MOST_PASSES = 20
"""Each may shorten the step ten times, so that these reach any scale a float can hold."""


@dataclass(frozen=True)
class Bounds:
    """How far a step may go."""

    radius: float
    """δ, largest KL in nats."""
    max_scale: float
    """η_max, largest multiple of the direction."""


class Search:
    """Moves parameters along descents.

    Args:
        run: what a recorded call returns at present.
        leaves: the trained parameters, in the order of a descent's tensors.
        ranks: the processes over whose examples distances are averaged; None for this one alone.
    """

    def __init__(self, run: Callable[[Pass], Outputs], leaves: Sequence[Tensor], ranks: Ranks | None = None) -> None:
        self._run, self._leaves, self._ranks = run, list(leaves), ranks or Ranks()
        self.ratio = 1.0
        """Measured over predicted KL of the last step that was measured."""
        self.report = StepReport(0.0, 0.0, 0.0, float("nan"))
        self.broke = False
        """Whether the last step was taken back, because no length of it left the outputs finite."""

    def move(self, descent: Descent, bounds: Bounds) -> None:
        """Step by the prediction alone.

        Args:
            descent: which way.
            bounds: how far at most.
        """
        scale = _longest(descent, bounds, max(self.ratio, 1.0))
        torch._foreach_add_(self._leaves, list(descent.tensors.values()), alpha=scale)
        self._tell(descent, scale, float("nan"))

    def move_measured(
        self, descent: Descent, bounds: Bounds, record: Pass, likelihood: Likelihood, corrections: int
    ) -> None:
        """Step, measure at once, and place the step anew as long as it misses the radius.

        Args:
            descent: which way.
            bounds: how far at most.
            record: the pass to measure on, before the step.
            likelihood: what its outputs mean.
            corrections: passes that may bring the step nearer to the radius; beyond, only overshoot is corrected.
        """
        start, scale = [p.clone() for p in self._leaves], _longest(descent, bounds, self.ratio)
        measured = self._place(start, descent, scale, record, likelihood)
        for attempt in range(corrections + _MOST_PASSES):
            free = attempt < corrections
            too_far = not measured <= bounds.radius * (TOLERANCE if free else OVERSHOOT)
            too_near = free and measured < bounds.radius / TOLERANCE and scale < bounds.max_scale
            if not too_far and not too_near:
                break
            scale = corrected_scale(scale, measured, bounds.radius, bounds.max_scale)
            measured = self._place(start, descent, scale, record, likelihood)
        self.broke = not measured < math.inf
        if self.broke:
            torch._foreach_copy_(self._leaves, start)
        else:
            self._learn(descent, scale, measured)

    def move_improving(
        self,
        descent: Descent,
        bounds: Bounds,
        record: Pass,
        likelihood: Likelihood,
        objective: Objective,
        before: float,
        settings: Backtracking,
    ) -> None:
        """Shorten the step until the loss is lower than before within the radius; else stay.

        Args:
            descent: which way.
            bounds: how far at most.
            record: the pass to measure on, before the step.
            likelihood: what its outputs mean.
            objective: what goes down.
            before: its value before the step.
            settings: how often and by how much.
        """
        start = [p.clone() for p in self._leaves]
        scale = _longest(descent, bounds, 1.0)
        for _ in range(settings.attempts):
            self._put(start, descent, scale)
            outputs = self._run(record)
            measured = self._distance(record, outputs, likelihood)
            # The bound first: beyond it, or where it is no number, the loss tells nothing.
            if measured <= bounds.radius and objective.value(outputs) < before:
                self._learn(descent, scale, measured)
                return
            scale *= settings.shrink
        torch._foreach_copy_(self._leaves, start)
        self.report = StepReport(0.0, 0.0, 0.0, 0.0)

    def _learn(self, descent: Descent, scale: float, measured: float) -> None:
        predicted = _predicted(descent, scale)
        ratio = measured / predicted if predicted > 0 else 1.0
        # 1 where they tell nothing, so that no broken step outlives itself.
        self.ratio = ratio if 0 < ratio < math.inf else 1.0
        self._tell(descent, scale, measured)

    def _tell(self, descent: Descent, scale: float, measured: float) -> None:
        self.broke = False
        self.report = StepReport(scale, _predicted(descent, scale), float("nan"), measured)

    def _place(
        self, start: list[Tensor], descent: Descent, scale: float, record: Pass, likelihood: Likelihood
    ) -> float:
        """Move the parameters, and measure how far the outputs went."""
        self._put(start, descent, scale)
        return self._distance(record, self._run(record), likelihood)

    def _distance(self, record: Pass, outputs: Outputs, likelihood: Likelihood) -> float:
        old, ranks = record.outputs, self._ranks
        if ranks.size == 1:
            return float(likelihood.distance(old, outputs))
        parts = likelihood.parts()
        # The largest of the means over everyone's examples, which is not the mean of everyone's largest.
        means = [p.likelihood.divergence(old[p.outputs], outputs[p.outputs]).mean() for p in parts]
        return max(
            float(mean) / part.radius
            for mean, part in zip(ranks.mean(torch.stack(means), record.examples), parts, strict=True)
        )

    def _put(self, start: list[Tensor], descent: Descent, scale: float) -> None:
        torch._foreach_copy_(self._leaves, torch._foreach_add(start, list(descent.tensors.values()), alpha=scale))


def _longest(descent: Descent, bounds: Bounds, ratio: float) -> float:
    """The largest scale within the bounds, where KLs measure `ratio` times what the form predicts."""
    if descent.quadratic is None:
        return bounds.max_scale
    return trust_region_scale(descent.quadratic * ratio, bounds.radius, bounds.max_scale)


def _predicted(descent: Descent, scale: float) -> float:
    return math.nan if descent.quadratic is None else 0.5 * scale**2 * descent.quadratic
