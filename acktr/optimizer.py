"""The natural-gradient optimizer: which way from the curvature, how far from the trust region.

Example:
    optimizer = NaturalGradient(network, Categorical(), EKFAC(), radius=1e-3)
    with optimizer.recording():
        logits = network(inputs)
    optimizer.update_curvature()
    optimizer.zero_grad()
    F.cross_entropy(logits, classes).backward()
    optimizer.step()

With a `LevenbergMarquardt` damping or a line search a step looks at the loss again, and asks a closure for it:
    def closure():
        optimizer.zero_grad()
        with optimizer.recording():
            loss = F.cross_entropy(network(inputs), classes)
        optimizer.update_curvature()
        loss.backward()
        return loss

    optimizer.step(closure)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from acktr.capture import Pass
from acktr.checks import check_identity, check_numbers, check_parts, check_types, identity
from acktr.curvature import EKFAC, BlockRule, Curvature, curvature_over
from acktr.damping import LevenbergMarquardt
from acktr.directions import Directions
from acktr.fisher import FisherSeeds, SampledFisher
from acktr.likelihood import Likelihood, Outputs, check_outputs
from acktr.linalg import DecompositionError
from acktr.nograd import without_grad
from acktr.objective import Loss, Objective, number
from acktr.passes import SEEDS_APART, trained_parameters
from acktr.search import Bounds, Search
from acktr.step import Descent, StepReport, StepRule
from acktr.tree import Tensors, all_finite, cast_like
from acktr.trust_region import BlockMetric
from acktr.wake import Wake, WakeQE

_OF_PASSES = {"output", "statistics"}
EAGER_PASSES = 50
"""First recorded passes that all update the curvature: it changes fastest there, and its averages hold least."""


class NaturalGradient(Directions, torch.optim.Optimizer):
    """Steps along (F̂ + λ)⁻¹∇, scaled so that the KL between the outputs before and after meets a radius.

    Hyperparameters that change over training (`lr`, `radius`, `damping`, `momentum`, `weight_decay`) live in
    `param_groups[0]`, so every torch scheduler works. There is one group: one metric, one step.

    Args:
        network: the module; never changed. Its outputs must be what `likelihood` expects. One that is wrapped in
            DistributedDataParallel goes by its own parameters' names.
        likelihood: what the outputs mean.
        curvature: the approximation that gives the direction, layer by layer or for the whole network.
        lr: η_max, the largest multiple of the natural gradient; ≥ 0.
        radius: δ, largest KL per step in nats; ∞ leaves `lr` alone to set the distance.
        damping: λ added to the curvature's eigenvalues; > 0. A `LevenbergMarquardt` sets it as training goes.
        momentum: share of the previous direction carried into this one, in [0, 1).
        weight_decay: coefficient of ½‖θ‖² in the objective; ≥ 0.
        fisher: which output gradients feed the curvature.
        rule: how a direction becomes a step.
        parameters: the trained ones by dotted name; None for all that require gradients.
        blocks: curvature of parameters that choose their own, by dotted name (a Gaussian's log-std: `known_fisher(2)`).
        seed: of the optimizer's own generator, from which targets and subsets are drawn.

    Raises:
        ValueError: if a hyperparameter is out of range, nothing is trained, or a parameter is in half precision.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        curvature: Curvature | None = None,
        *,
        lr: float = 1.0,
        radius: float = 1e-3,
        damping: float | LevenbergMarquardt = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        fisher: FisherSeeds | None = None,
        rule: StepRule | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        blocks: Mapping[str, BlockRule] | None = None,
        seed: int = 0,
    ) -> None:
        self.adaptation = damping if isinstance(damping, LevenbergMarquardt) else None
        damping = damping.start if isinstance(damping, LevenbergMarquardt) else damping
        check_numbers(lr=lr, radius=radius, damping=damping, momentum=momentum, weight_decay=weight_decay)
        check_parts(network, likelihood, curvature)
        self._averaged = isinstance(network, DistributedDataParallel)
        network = network.module if isinstance(network, DistributedDataParallel) else network
        trained = trained_parameters(network, parameters)
        check_types(trained)
        self.fisher = fisher or SampledFisher()
        if not callable(self.fisher):
            raise ValueError(f"fisher must be a choice such as SampledFisher() or ExactFisher(), got {fisher!r}")
        self.rule = rule or StepRule()
        self.curvature = curvature_over(curvature or EKFAC(), network, trained, blocks)
        self._identity = identity(curvature or EKFAC(), trained)
        self._ranks = self.curvature.ranks
        self._watch(network, likelihood, trained, self.curvature.layers, seed)
        self._search = Search(self._again, self._leaves, self._ranks)
        self._wake = Wake(self.rule.wake) if self.rule.wake else None
        if self._ranks.size > 1 and self._wake is not None and self._wake.quadratic:
            raise ValueError(
                f"{self.rule.wake} looks at the batch's own curvature, which ranks do not share; take WakeSO"
            )
        self._passes = self._updates = self._steps = 0
        self._pass_broke = False
        defaults = {
            "lr": lr,
            "radius": radius,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        if self.rule.curvature_damping is not None:
            defaults["curvature_damping"] = damping + weight_decay
        super().__init__(list(self.parameters.values()), defaults)
        # How many examples are looked at may differ between processes, as their batches do.
        rule = replace(self.rule, examples=None)
        settings = f"{defaults} {curvature} {rule} {self.fisher} {likelihood} seed {seed}"
        shapes = {name: (tuple(p.shape), p.dtype) for name, p in trained.items()}
        self._ranks.begin([*network.parameters(), *network.buffers()], f"{settings} {shapes}")

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

    @without_grad
    def update_curvature(self, targets: Outputs | None = None, weights: Tensor | None = None) -> None:
        """Run the Fisher's backward pass on the recorded call; `.grad` is not touched unless `weights` ask for it.

        Call it before the loss's own backward pass, which frees the graph. Where the objective's output gradient is a
        number per example times the Fisher's one seed (a critic's residual times its seed of ones, an advantage times
        the taken action's score), hardly ever is a backward pass of its own needed: with these numbers as `weights`,
        the gradient of the mean objective is taken from the same pass and put into `.grad`.

        Between two statistics periods nothing happens, and `weights` are not looked at: ask `statistics_due` before.

        Args:
            targets: for the empirical Fisher alone.
            weights: objective's output gradient over the seed, shape [N]; the gradient is Σ_n w_n g_n aₙᵀ / N.
        """
        if self._looking:
            return
        self._pass_broke = False
        due, record = self.statistics_due, self._capture.last
        self._passes += 1
        self.curvature.release()
        if not due:
            return
        check_outputs(self.likelihood, record.outputs)
        if not self._ranks.all(all_finite(record.outputs)):  # no target can be drawn from NaN
            self._skip("output")
            return
        seeds = self.fisher(self.likelihood, record.outputs, targets, self._generator)
        refresh = self._updates % self.rule.refresh_period == 0
        if not self.curvature.update(record, seeds, refresh, self._generator):
            self._skip("statistics")
            return
        self._updates += 1
        if weights is not None:
            self._weigh(seeds, weights)
        if self._wake is None or not self._wake.quadratic:
            self.curvature.release()

    @without_grad
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step from the gradients in `.grad`.

        Args:
            closure: recomputes the loss and its gradients, as in torch.optim. Where damping or search look at the loss
                again it is called again, and `.grad` is then that of the new parameters; what it records and the
                curvature it updates count at the first call alone.

        Returns:
            The closure's loss, if there is one.
        """
        if closure is None:
            self.descend()
            return None
        with torch.enable_grad():
            loss = closure()
        self.descend(lambda _outputs: self._look(closure), number(loss))
        return loss

    def _look(self, closure: Callable[[], float]) -> float:
        """The closure's loss at the present parameters; nothing is learned from the pass."""
        record, self._looking = self._capture.last, True
        try:
            with torch.enable_grad():
                return number(closure())
        finally:
            self._capture.keep(record)
            self._looking = False

    @without_grad
    def descend(self, loss: Loss | None = None, before: float | None = None) -> None:
        """Take the step, as `step` does, without what torch wraps around that (profiler ranges, step hooks).

        Args:
            loss: the mean loss from the network's outputs on the recorded batch, for damping and searches that look at
                it again; others leave it alone.
            before: its value before the step, where that is known.

        Raises:
            RuntimeError: if there was no `update_curvature` before, or no loss where one is asked for.
        """
        if loss is None and (self.adaptation is not None or self.rule.line_search is not None):
            raise RuntimeError("damping or search look at the loss again; call step(closure), or descend(loss)")
        gradient = self._gradient()
        record = self._capture.take()
        part = record.part(self.rule.examples, self._generator)
        self._capture.release()
        if not (self.curvature.ready or self.skipped or self._updates):
            raise RuntimeError("the curvature holds no statistics yet; call update_curvature() before step()")
        descent = self._sound_descent(gradient, part)
        self.curvature.release()
        if descent is None:
            return
        if loss is None or (self.rule.line_search is None and not self._adapts):
            self._move(descent, record, part)
        else:
            loss, before = self._over_ranks(loss, before, record.examples)
            self._move_watched(descent, record, part, gradient, loss, before)
        self._steps += 1

    def _over_ranks(self, loss: Loss, before: float | None, examples: int) -> tuple[Loss, float | None]:
        """The mean loss over everyone's examples."""
        if self._ranks.size == 1:
            return loss, before

        def mean(value: Tensor | float) -> float:
            return float(self._ranks.mean(torch.tensor(number(value), dtype=torch.float64), examples))

        return lambda outputs: mean(loss(outputs)), None if before is None else mean(before)

    def _sound_descent(self, gradient: Tensors, part: Pass) -> Descent | None:
        """Which way; None, and counted, where that is not finite."""
        broke = self._looks_first and not all_finite(gradient.values())
        # Of a pass that broke no gradient was taken either: what `.grad` holds is of another one.
        if self._pass_broke or broke:
            self._skip("gradient")
        elif not self.curvature.ready:
            self._skip("decomposition" if self._updates else "gradient")
        else:
            try:
                descent = self._descent(gradient, part)
            except (DecompositionError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                self._skip("direction")
                return None
            if self._is_sound(descent):
                return descent
            self._skip("direction" if all_finite(gradient.values()) else "gradient")
        return None

    @property
    def _adapts(self) -> bool:
        return self.adaptation is not None and (self._steps + 1) % self.adaptation.period == 0

    def _move_watched(
        self, descent: Descent, record: Pass, part: Pass, gradient: Tensors, loss: Loss, before: float | None
    ) -> None:
        """How far, with an eye on the loss; damping by what the model foretold of it."""
        group = self.param_groups[0]
        objective = Objective(loss, self._leaves, group["weight_decay"])
        start = objective.value(record.outputs, before)
        model = self._model(gradient, descent.tensors, part) if self._adapts else None
        self._move(descent, record, part, objective, start)
        if model is not None and self.adaptation is not None:
            scale = self._search.report.scale
            change = objective.value(self._again(record)) - start if scale else math.nan
            ratio = self._ranks.agreed(model.ratio(scale, change))
            group["damping"] = self.adaptation.adapted(group["damping"], ratio)

    def _move(
        self, descent: Descent, record: Pass, part: Pass, objective: Objective | None = None, before: float = math.nan
    ) -> None:
        """How far."""
        group, rule, search = self.param_groups[0], self.rule, self._search
        bounds, form = Bounds(group["radius"], group["lr"]), self._block_form(descent, part)
        bent = self._bent(descent, part)
        start = [p.clone() for p in self._leaves] if isinstance(rule.wake, WakeQE) else []
        if rule.line_search is not None and objective is not None:
            search.move_improving(descent, bounds, record, self.likelihood, objective, before, rule.line_search)
        elif self._measures:
            search.move_measured(descent, bounds, record, self.likelihood, rule.corrections)
        else:
            search.move(descent, bounds)
        if search.broke:
            self._skip("distance")
            return
        search.report = replace(search.report, kl_block=0.5 * search.report.scale**2 * form)
        self._skipped_in_a_row = 0
        self._remember(descent.tensors, search.report.scale, start, bent)

    @property
    def _measures(self) -> bool:
        """Whether this step measures how far it went."""
        if self.rule.line_search is not None:
            return True
        bounded = self.rule.corrections > 0 and self.param_groups[0]["radius"] < math.inf
        return bounded and (self._steps < EAGER_PASSES or self._steps % self.rule.measure_period == 0)

    def _block_form(self, descent: Descent, part: Pass) -> float:
        """ΔᵀF̂Δ; a product with the curvature, so only for steps that are measured, and before the network moves."""
        if isinstance(self.rule.metric, BlockMetric) and self.rule.combination is None:
            return math.nan if descent.quadratic is None else descent.quadratic
        if not self._measures:
            return math.nan
        return float(self.curvature.quadratic(descent.tensors, self._linearisation(part)))

    def _skip(self, cause: str) -> None:
        self._search.report = StepReport(0.0, 0.0, 0.0, float("nan"))
        # A pass that broke breaks its step too, and is one fault.
        broke, self._pass_broke = self._pass_broke, cause in _OF_PASSES
        if not broke:
            self._count_skip(cause)

    def state_dict(self) -> dict[str, Any]:
        """Torch's state dictionary with the curvature, the counters and the generators; a call for all ranks."""
        generators = self._ranks.gathered(self._generator.get_state())
        natural = {
            "identity": self._identity,
            "curvature": self.curvature.state_dict(),
            "counters": [self._passes, self._updates, self._steps, self.skipped, self._skipped_in_a_row],
            "causes": dict(self.causes),
            "ratio": self._search.ratio,
            "generator": generators[0],
            "others": generators[1:],
            "wake": None if self._wake is None else self._wake.state_dict(),
        }
        return super().state_dict() | {"natural": natural}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, to the last bit where there are as many ranks.

        As in torch.optim, tensors come to the parameters' device and type. What the rule of steps asks for and the
        state does not hold, because it was saved under another rule, begins anew.

        Args:
            state_dict: of an optimizer of the same network and curvature; any other is refused.
        """
        check_identity(self._identity, state_dict)
        natural = state_dict["natural"]
        self.curvature.load_state_dict(cast_like(natural["curvature"], self._leaves))
        own = dict(self.param_groups[0])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "natural"})
        for name, value in own.items():
            self.param_groups[0].setdefault(name, value)
        self._passes, self._updates, self._steps, self.skipped, self._skipped_in_a_row = natural["counters"]
        self.causes = dict(natural.get("causes", {}))  # older files have none
        self._search.ratio = natural["ratio"]
        if self._wake is not None:
            self._wake = Wake(self._wake.rule)
            if natural["wake"] is not None:
                self._wake.load_state_dict(cast_like(natural["wake"], self._leaves))
        generators = [natural["generator"], *natural.get("others", [])]
        known = len(generators) == self._ranks.size
        self._generator.set_state(generators[self._ranks.rank if known else 0].cpu())
        if not known and self._ranks.rank:
            drawn = torch.randint(2**31, (), generator=self._generator, device=self._generator.device)
            self._generator.manual_seed(int(drawn) + SEEDS_APART * self._ranks.rank)
