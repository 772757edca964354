"""The natural-gradient optimizer: which way from the curvature, how far from the trust region.

Example:
    optimizer = NaturalGradient(network, Categorical(), EKFAC(), radius=1e-3)
    with optimizer.recording():
        logits = network(inputs)
    optimizer.update_curvature()
    optimizer.zero_grad()
    F.cross_entropy(logits, classes).backward()
    optimizer.step()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from acktr.capture import Pass
from acktr.curvature import EKFAC, BlockRule, Curvature, curvature_over
from acktr.exact import Linearisation
from acktr.fisher import FisherSeeds, SampledFisher
from acktr.likelihood import Likelihood, Outputs, outputs_of
from acktr.passes import Passes, trained_parameters
from acktr.search import Bounds, Search
from acktr.step import Descent, StepReport, StepRule
from acktr.tree import Tensors, all_finite, negative
from acktr.trust_region import BlockMetric
from acktr.wake import InnerProblem, Wake, WakeQE, form_at, largest_scale

EAGER_PASSES = 50
"""First recorded passes that all update the curvature: it changes fastest there, and its averages hold least."""


class NaturalGradient(Passes, torch.optim.Optimizer):
    """Steps along (F̂ + λ)⁻¹∇, scaled so that the KL between the outputs before and after meets a radius.

    Hyperparameters that change over training (`lr`, `radius`, `damping`, `momentum`, `weight_decay`) live in
    `param_groups[0]`, so every torch scheduler works. There is one group: one metric, one step.

    Args:
        network: the module; never changed. Its outputs must be what `likelihood` expects.
        likelihood: what the outputs mean.
        curvature: the approximation that gives the direction, layer by layer or for the whole network.
        lr: η_max, the largest multiple of the natural gradient; ≥ 0.
        radius: δ, largest KL per step in nats; ∞ leaves `lr` alone to set the distance.
        damping: λ added to the curvature's eigenvalues; > 0.
        momentum: share of the previous direction carried into this one, in [0, 1).
        weight_decay: coefficient of ½‖θ‖² in the objective; ≥ 0.
        fisher: which output gradients feed the curvature.
        rule: how a direction becomes a step.
        parameters: the trained ones by dotted name; None for all that require gradients.
        blocks: curvature of parameters that choose their own, by dotted name (a Gaussian's log-std: `known_fisher(2)`).
        seed: of the optimizer's own generator, from which targets and subsets are drawn.

    Raises:
        ValueError: if a hyperparameter is out of range or nothing is trained.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        curvature: Curvature | None = None,
        *,
        lr: float = 1.0,
        radius: float = 1e-3,
        damping: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        fisher: FisherSeeds | None = None,
        rule: StepRule | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        blocks: Mapping[str, BlockRule] | None = None,
        seed: int = 0,
    ) -> None:
        _check(lr=lr, radius=radius, damping=damping, momentum=momentum, weight_decay=weight_decay)
        trained = trained_parameters(network, parameters)
        self.fisher = fisher or SampledFisher()
        self.rule = rule or StepRule()
        self.curvature = curvature_over(curvature or EKFAC(), network, trained, blocks)
        self._watch(network, likelihood, trained, self.curvature.layers, seed)
        self._search = Search(self._outputs, self._leaves)
        self._wake = Wake(self.rule.wake) if self.rule.wake else None
        self._passes = self._updates = self._steps = 0
        defaults = {
            "lr": lr,
            "radius": radius,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(list(self.parameters.values()), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group.

        Args:
            param_group: parameters and hyperparameters.

        Raises:
            ValueError: on a second group; a step has one metric and one radius.
        """
        if self.param_groups:
            raise ValueError("a natural-gradient step has one metric and one radius; use one optimizer per network")
        super().add_param_group(param_group)

    @property
    def report(self) -> StepReport:
        """What the last step did."""
        return self._search.report

    @property
    def statistics_due(self) -> bool:
        """Whether the next recorded pass updates the curvature; where not, it may run without gradients."""
        return self._passes < EAGER_PASSES or self._passes % self.rule.statistics_period == 0

    @torch.no_grad()
    def update_curvature(self, targets: Outputs | None = None, weights: Tensor | None = None) -> None:
        """Run the Fisher's backward pass on the recorded call; `.grad` is not touched unless `weights` ask for it.

        Call it before the loss's own backward pass, which frees the graph. Where the objective's output gradient is a
        number per example times the Fisher's one seed (a critic's residual times its seed of ones, an advantage times
        the taken action's score), no backward pass of its own is needed: with these numbers as `weights`, the
        gradient of the mean objective is taken from the same pass and put into `.grad`.

        Between two statistics periods nothing happens, and `weights` are not looked at: ask `statistics_due` before.

        Args:
            targets: for the empirical Fisher alone.
            weights: objective's output gradient over the seed, shape [N]; the gradient is Σ_n w_n g_n aₙᵀ / N.
        """
        due, record = self.statistics_due, self._capture.last
        self._passes += 1
        self.curvature.release()
        if not due:
            return
        if not all_finite(record.outputs):  # no target can be drawn from NaN
            self._skip("the network's output")
            return
        seeds = self.fisher(self.likelihood, record.outputs, targets, self._generator)
        refresh = self._updates % self.rule.refresh_period == 0
        if not self.curvature.update(record, seeds, refresh, self._generator):
            self._skip("the Fisher's backward pass")
            return
        self._updates += 1
        if weights is not None:
            for name, gradient in self.curvature.weighted_gradient(weights).items():
                self.parameters[name].grad = gradient
        if self._wake is None or not self._wake.quadratic:
            self.curvature.release()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step from the gradients in `.grad`.

        Args:
            closure: recomputes the loss and its gradients, as in torch.optim; rarely needed here.

        Returns:
            The closure's loss, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.descend()
        return loss

    @torch.no_grad()
    def descend(self) -> None:
        """Take the step, as `step` does, without what torch wraps around that (profiler ranges, step hooks).

        Raises:
            RuntimeError: if there was no `update_curvature` before.
        """
        gradient = self._gradient()
        record = self._capture.last
        part = record.part(self.rule.examples, self._generator)
        self._capture.release()
        if not self.curvature.ready and not self.skipped:
            raise RuntimeError("the curvature holds no statistics yet; call update_curvature() before step()")
        if not self.curvature.ready or (self.rule.combination is not None and not all_finite(gradient.values())):
            self._skip("the gradient")
            return
        descent = self._descent(gradient, part)
        self.curvature.release()
        # Whatever is not finite in a gradient or a direction shows in its form: one number to look at.
        if not math.isfinite(descent.quadratic):
            self._skip("the direction" if all_finite(gradient.values()) else "the gradient")
            return
        self._move(descent, record)
        self._steps += 1

    def _gradient(self) -> Tensors:
        decay = self.param_groups[0]["weight_decay"]
        gradient = {}
        for name, p in self.parameters.items():
            own = torch.zeros_like(p) if p.grad is None else p.grad
            gradient[name] = own.add(p, alpha=decay) if decay else own
        return gradient

    def _descent(self, gradient: Tensors, part: Pass) -> Descent:
        """Which way: the descent direction and its forms."""
        damping = self.param_groups[0]["damping"]
        if self._steps < self.rule.cold_start:
            return self._with_momentum(negative(gradient), part)
        gradient = self.curvature.follow(gradient)
        linearisation = self._linearisation(part)
        if self._wake is not None:
            return self._descent_in(self._wake, gradient, part, linearisation)
        if self.rule.combination is None and isinstance(self.rule.metric, BlockMetric):
            natural, form = self.curvature.solve_with_form(gradient, damping, linearisation)
            return self._with_momentum(negative(natural), part, float(form))
        natural = self.curvature.solve(gradient, damping, linearisation)
        return self._combined(negative(natural), gradient, part, linearisation)

    def _combined(self, descent: Tensors, gradient: Tensors, part: Pass, linearisation: Linearisation) -> Descent:
        group, combination = self.param_groups[0], self.rule.combination
        if combination is None:
            return self._with_momentum(descent, part)
        pieces = self.curvature.split(descent)
        if combination.previous_step and "previous_step" in self.state[self._leaves[0]]:
            pieces.append({name: self.state[p]["previous_step"] for name, p in self.parameters.items()})
        descent, quadratic = combination.combine(pieces, gradient, group["damping"], linearisation)
        return self._with_momentum(descent, part) if group["momentum"] else Descent(descent, float(quadratic))

    def _with_momentum(self, tensors: Tensors, part: Pass, form: float | None = None) -> Descent:
        """A direction with momentum, where there is any, and its form by the rule's metric unless that is known."""
        momentum = self.param_groups[0]["momentum"]
        if momentum and "momentum_buffer" in self.state[self._leaves[0]]:
            buffers = {name: self.state[p]["momentum_buffer"] for name, p in self.parameters.items()}
            tensors, form = {name: d + momentum * buffers[name] for name, d in tensors.items()}, None
        return Descent(tensors, self._form(tensors, part) if form is None else form)

    def _descent_in(self, wake: Wake, gradient: Tensors, part: Pass, linearisation: Linearisation) -> Descent:
        """Onward by the gradient and back by the wake's pull, which the scale does not multiply."""
        group, solve = self.param_groups[0], self._solver_in(wake, linearisation)
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
            run=lambda: outputs_of(self.network(*part.args)),
            likelihood=self.likelihood,
            gradient=gradient,
            curvature=self.curvature.multiply_batch,
            precondition=solve,
            scale=scale,
            damping=group["damping"],
        )
        step = inner.improve({name: scale * t for name, t in tensors.items()}, wake)
        tensors = {name: s / scale for name, s in step.items()}
        return Descent(tensors, self._form(tensors, part))

    def _solver_in(self, wake: Wake, linearisation: Linearisation) -> Callable[[Tensors], Tensors]:
        group = self.param_groups[0]
        if not wake.quadratic:
            return lambda tensors: self.curvature.solve(tensors, group["damping"], linearisation)
        scale = wake.expected_scale(group["radius"], group["lr"])
        return self.curvature.solver_with_batch(group["damping"], scale, linearisation)

    def _forms(self, onward: Tensors, back: Tensors, linearisation: Linearisation) -> list[Tensor]:
        """The forms of two directions and of their mixture by the rule's metric, in units of each part's radius."""
        if not isinstance(self.rule.metric, BlockMetric):
            grams = linearisation.grams([linearisation.tangent(onward), linearisation.tangent(back)])
            return [gram / part.radius for gram, part in zip(grams, self.likelihood.parts(), strict=True)]
        both = {name: t + back[name] for name, t in onward.items()}
        a, c, whole = (float(self.curvature.quadratic(t)) for t in (onward, back, both))
        b = (whole - a - c) / 2
        return [torch.tensor([[a, b], [b, c]], dtype=torch.float64)]

    def _form(self, tensors: Tensors, part: Pass) -> float:
        if isinstance(self.rule.metric, BlockMetric):
            return float(self.curvature.quadratic(tensors))
        return float(self._linearisation(part).quadratic(tensors))

    def _linearisation(self, part: Pass) -> Linearisation:
        return Linearisation(self.network, self.parameters, part.args, self.likelihood, part)

    def _move(self, descent: Descent, record: Pass) -> None:
        """How far."""
        group, rule, search = self.param_groups[0], self.rule, self._search
        bounds = Bounds(group["radius"], group["lr"])
        start = [p.clone() for p in self._leaves] if isinstance(rule.wake, WakeQE) else []
        if not rule.corrections or bounds.radius == math.inf:
            search.move(descent, bounds)
        elif self._steps < EAGER_PASSES or self._steps % rule.measure_period == 0:
            search.move_measured(descent, bounds, record, self.likelihood, rule.corrections)
        else:
            search.move(descent, bounds)
        search.report = replace(search.report, kl_block=self._block_kl(descent, search.report))
        self._skipped_in_a_row = 0
        self._remember(descent.tensors, search.report.scale, start)

    def _block_kl(self, descent: Descent, report: StepReport) -> float:
        """What the blocks take the step's KL for; a product with the curvature, so only with what was measured."""
        if isinstance(self.rule.metric, BlockMetric) and self.rule.combination is None:
            return report.kl_predicted
        if math.isnan(report.kl_measured):
            return math.nan
        return 0.5 * report.scale**2 * float(self.curvature.quadratic(descent.tensors))

    def _remember(self, direction: Tensors, scale: float, start: list[Tensor]) -> None:
        """Keep what the next step builds on."""
        if self._wake is not None:
            step = {name: scale * d for name, d in direction.items()}
            bent, damping = self.curvature.multiply(step), self.param_groups[0]["damping"]
            self._wake.moved({name: bent[name] + damping * s for name, s in step.items()}, scale, start)
        if self.param_groups[0]["momentum"]:
            for name, p in self.parameters.items():
                self.state[p]["momentum_buffer"] = direction[name]
        if self.rule.combination is not None and self.rule.combination.previous_step:
            for name, p in self.parameters.items():
                self.state[p]["previous_step"] = scale * direction[name]

    def _skip(self, where: str) -> None:
        self._search.report = StepReport(0.0, 0.0, 0.0, float("nan"))
        self._count_skip(where)

    def state_dict(self) -> dict[str, Any]:
        """Torch's state dictionary with the curvature, the counters and the generator."""
        natural = {
            "curvature": self.curvature.state_dict(),
            "counters": [self._passes, self._updates, self._steps, self.skipped, self._skipped_in_a_row],
            "ratio": self._search.ratio,
            "generator": self._generator.get_state(),
            "wake": None if self._wake is None else self._wake.state_dict(),
        }
        return super().state_dict() | {"natural": natural}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, to the last bit.

        Args:
            state_dict: of an optimizer of the same network and curvature.
        """
        natural = state_dict["natural"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "natural"})
        self.curvature.load_state_dict(natural["curvature"])
        self._passes, self._updates, self._steps, self.skipped, self._skipped_in_a_row = natural["counters"]
        self._search.ratio = natural["ratio"]
        if self._wake is not None:
            self._wake.load_state_dict(natural["wake"])
        self._generator.set_state(natural["generator"].cpu())


def _check(**values: float) -> None:
    for name in ("damping", "radius"):
        if not values[name] > 0:
            raise ValueError(f"{name} must be positive, got {values[name]}")
    if not 0 <= values["momentum"] < 1:
        raise ValueError(f"momentum must be in [0, 1), got {values['momentum']}")
    for name in ("lr", "weight_decay"):
        if not 0 <= values[name] < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, got {values[name]}")
