"""Which way to step: the natural gradient of a curvature, rescaled, combined, with momentum, or in a wake."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from acktr.capture import Pass
from acktr.curvature import NetworkCurvature
from acktr.exact import Linearisation
from acktr.likelihood import Outputs, outputs_of
from acktr.objective import Foretold
from acktr.passes import Passes
from acktr.search import Search
from acktr.step import Descent, StepRule
from acktr.still import generator_states, still
from acktr.tree import Tensors, all_finite, negative
from acktr.trust_region import BlockMetric, is_form
from acktr.wake import InnerProblem, Wake, WakeQE, form_at, largest_scale


class Directions(Passes):
    """Turns gradients into descent directions and their forms, by the rule of a step."""

    curvature: NetworkCurvature
    """F̂."""
    rule: StepRule
    """How a direction becomes a step."""
    param_groups: list[dict[str, Any]]
    """Torch's: one group, whose hyperparameters are read at every step."""
    state: defaultdict[Tensor, Any]
    """Torch's: what momentum builds on, by parameter."""
    _search: Search
    _wake: Wake | None
    _steps: int
    _averaged: bool
    """Whether a backward pass of the loss leaves the mean over all processes in `.grad`."""

    def _model(self, gradient: Tensors, direction: Tensors, part: Pass) -> Foretold:
        return self._linearisation(part).model(gradient, direction, self._damping)

    @property
    def _damping(self) -> float:
        """λ + η: what the quadratic model adds to F, weight decay's own curvature included."""
        group = self.param_groups[0]
        return float(group["damping"] + group["weight_decay"])

    def _weigh(self, seeds: Sequence[Outputs], weights: Tensor) -> None:
        """Put the gradient of Σ_n w_n seed_n · outputs_n / N into `.grad`: from the statistics' rows if they hold it.

        Args:
            seeds: the one seed.
            weights: shape [N].

        Raises:
            ValueError: if there are several seeds.
        """
        if len(seeds) != 1:
            raise ValueError(f"weights say how much of one seed each example takes, and the Fisher has {len(seeds)}")
        if not self.curvature.weighs(len(weights)):  # a part of the batch, or parameters without a layer
            shares = weights / len(weights)
            self.pull_back(tuple(shares.view(-1, *[1] * (part.dim() - 1)) * part for part in seeds[0]))
            return
        self._pulled, self._alike = len(weights), False
        for name, gradient in self.curvature.weighted_gradient(weights).items():
            self.parameters[name].grad = gradient

    def _gradient(self) -> Tensors:
        decay = self.param_groups[0]["weight_decay"]
        gradient = self._own_gradient()
        if self._ranks.size > 1 and not self._alike and (self._pulled or not self._averaged):
            gradient = self._ranks.mean_gradient(gradient, self._examples)
        self._pulled, self._alike = 0, False
        if decay:
            gradient = {name: gradient[name].add(p, alpha=decay) for name, p in self.parameters.items()}
        return gradient

    def _descent(self, gradient: Tensors, part: Pass) -> Descent:
        """Which way: the descent direction and its forms."""
        if self._steps < self.rule.cold_start:
            return self._with_momentum(negative(gradient), part)
        gradient = self.curvature.follow(gradient)
        if self._wake is not None:
            return self._in_wake(self._wake, gradient, part)
        group, greedy = self.param_groups[0], self.rule.curvature_damping
        if greedy is None:
            return self._natural(gradient, part, self._damping)
        if self._steps % greedy.period:
            return self._natural(gradient, part, group["curvature_damping"])
        found: list[tuple[float, float, Descent]] = []
        for damping in greedy.candidates(group["curvature_damping"]):
            descent = self._natural(gradient, part, damping)
            reduction = self._ranks.agreed(self._model(gradient, descent.tensors, part).reduction(1.0))
            found.append((reduction if math.isfinite(reduction) else math.inf, damping, descent))
        _, group["curvature_damping"], descent = min(found, key=lambda each: each[0])
        return descent

    @property
    def _looks_first(self) -> bool:
        """Whether a gradient is looked at before anything is made of it.

        Elsewhere the blocks' form of its direction is the one number that is read, and nothing is kept before. An exact
        form tells of the outputs alone: what is not finite behind a unit that is off does not show in it.
        """
        rule = self.rule
        plain = rule.combination is None and rule.curvature_damping is None and rule.wake is None
        return not (plain and isinstance(rule.metric, BlockMetric) and self.curvature.forms_tell)

    def _is_sound(self, descent: Descent) -> bool:
        if descent.quadratic is not None:
            return is_form(descent.quadratic)
        return self._ranks.all(all_finite(descent.tensors.values()))

    def _natural(self, gradient: Tensors, part: Pass, damping: float) -> Descent:
        """The natural gradient with a damping of the curvature's own, rescaled by the model's."""
        linearisation = self._linearisation(part)
        # With momentum the form of the natural gradient alone says nothing of the step.
        plain = self.rule.combination is None and self._buffers is None
        if plain and isinstance(self.rule.metric, BlockMetric):
            natural, form = self.curvature.solve_with_form(gradient, damping, linearisation)
            quadratic = float(form)
            if quadratic < 0:  # by rounding; ∇ᵀΔ is the form of the damped curvature, which bounds it
                quadratic = sum(float((gradient[name] * t).sum()) for name, t in natural.items())
            return Descent(negative(natural), self._ranks.agreed(quadratic))
        natural = self.curvature.solve(gradient, damping, linearisation)
        return self._combined(negative(natural), gradient, part, linearisation)

    def _combined(self, descent: Tensors, gradient: Tensors, part: Pass, linearisation: Linearisation) -> Descent:
        """The direction with the lengths that the exact Fisher gives its columns."""
        combination = self.rule.combination
        if combination is None:
            return self._with_momentum(descent, part)
        pieces = combination.columns(descent, self.curvature.split)
        if combination.previous_step and "previous_step" in self.state[self._leaves[0]]:
            pieces.append({name: self.state[p]["previous_step"] for name, p in self.parameters.items()})
        descent, quadratic = combination.combine(pieces, gradient, self._damping, linearisation)
        momentum = self.param_groups[0]["momentum"]
        if momentum:
            return self._with_momentum(descent, part)
        return Descent(descent, self._ranks.agreed(float(quadratic)))

    @property
    def _buffers(self) -> Tensors | None:
        """The last direction, where momentum carries it on."""
        if not self.param_groups[0]["momentum"] or "momentum_buffer" not in self.state[self._leaves[0]]:
            return None
        return {name: self.state[p]["momentum_buffer"] for name, p in self.parameters.items()}

    def _with_momentum(self, tensors: Tensors, part: Pass) -> Descent:
        """A direction with momentum, where there is any, and its form by the rule's metric."""
        momentum, buffers = self.param_groups[0]["momentum"], self._buffers
        if buffers is not None:
            tensors = {name: d + momentum * buffers[name] for name, d in tensors.items()}
        return self._as_descent(tensors, part)

    def _in_wake(self, wake: Wake, gradient: Tensors, part: Pass) -> Descent:
        """Onward by the gradient and back by the wake's pull, which the scale does not multiply."""
        group, linearisation = self.param_groups[0], self._linearisation(part)
        solve = self._solver_in(wake, linearisation)
        onward = self._combined(negative(solve(gradient)), gradient, part, linearisation)
        if wake.pull is None:
            back = {name: torch.zeros_like(t) for name, t in onward.tensors.items()}
        else:
            back = negative(solve(wake.pull))
        forms = self._forms(onward.tensors, back, linearisation)
        scale = largest_scale(forms, 2 * group["radius"] / self._search.ratio, group["lr"])
        if not scale > 0:
            return onward
        tensors = {name: t + back[name] / scale for name, t in onward.tensors.items()}
        if not isinstance(wake.rule, WakeQE):
            return Descent(tensors, form_at(forms, scale) / scale**2)
        inner = InnerProblem(
            leaves=list(self._leaves),
            run=self._repeated(part),
            likelihood=self.likelihood,
            gradient=gradient,
            curvature=self.curvature.multiply_batch,
            precondition=solve,
            scale=scale,
            damping=self._damping,
        )
        step = inner.improve({name: scale * t for name, t in tensors.items()}, wake)
        return self._as_descent({name: s / scale for name, s in step.items()}, part)

    def _repeated(self, part: Pass) -> Callable[[], Outputs]:
        """Runs the network on a pass's examples, every time with the same draws, from which it learns nothing."""
        draws = part.draws or generator_states(self.network)

        def run() -> Outputs:
            with still(self.network, draws):
                return outputs_of(self.network(*part.args))

        return run

    def _solver_in(self, wake: Wake, linearisation: Linearisation) -> Callable[[Tensors], Tensors]:
        if not wake.quadratic:
            return lambda tensors: self.curvature.solve(tensors, self._damping, linearisation)
        group = self.param_groups[0]
        scale = wake.expected_scale(group["radius"], group["lr"])
        return self.curvature.solver_with_batch(self._damping, scale, linearisation)

    def _forms(self, onward: Tensors, back: Tensors, linearisation: Linearisation) -> list[Tensor]:
        """The forms of two directions and of their mixture by the rule's metric, in units of each part's radius."""
        if not isinstance(self.rule.metric, BlockMetric):
            grams = linearisation.grams([linearisation.tangent(onward), linearisation.tangent(back)])
            return [gram / part.radius for gram, part in zip(grams, self.likelihood.parts(), strict=True)]
        both = {name: t + back[name] for name, t in onward.items()}
        quadratics = (float(self.curvature.quadratic(t, linearisation)) for t in (onward, back, both))
        a, c, whole = map(self._ranks.agreed, quadratics)
        b = (whole - a - c) / 2
        return [torch.tensor([[a, b], [b, c]], dtype=torch.float64)]

    def _as_descent(self, tensors: Tensors, part: Pass) -> Descent:
        """A direction, and its form by the rule's metric where a radius asks for it."""
        if self.param_groups[0]["radius"] == math.inf:
            return Descent(tensors, None)  # a form costs as much as the solve
        linearisation = self._linearisation(part)
        if isinstance(self.rule.metric, BlockMetric):
            return Descent(tensors, self._ranks.agreed(float(self.curvature.quadratic(tensors, linearisation))))
        return Descent(tensors, float(linearisation.quadratic(tensors)))

    def _linearisation(self, part: Pass) -> Linearisation:
        return Linearisation(self.network, self.parameters, part.args, self.likelihood, part, self._ranks)

    def _bent(self, descent: Descent, part: Pass) -> Tensors:
        """(F̂ + λ)Δ, which a wake goes by; to be taken before the network moves, for an exact F moves with it."""
        if self._wake is None:
            return {}
        product = self.curvature.multiply(descent.tensors, self._linearisation(part))
        return {name: product[name] + self._damping * d for name, d in descent.tensors.items()}

    def _remember(self, direction: Tensors, scale: float, start: list[Tensor], bent: Tensors) -> None:
        """Keep what the next step builds on."""
        if self._wake is not None:
            self._wake.moved({name: scale * b for name, b in bent.items()}, scale, start)
        if self.param_groups[0]["momentum"]:
            for name, p in self.parameters.items():
                self.state[p]["momentum_buffer"] = direction[name]
        if self.rule.combination is not None and self.rule.combination.previous_step:
            for name, p in self.parameters.items():
                self.state[p]["previous_step"] = scale * direction[name]
