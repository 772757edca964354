"""The natural-gradient steps taken on a rollout: the actor's, the critic's, or both on a shared trunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from statistics import fmean

import torch
from torch import Generator, Tensor, nn

from acktr.capture import Pass
from acktr.firstorder import FirstOrder
from acktr.fisher import ExactFisher
from acktr.likelihood import Joint, Likelihood, Outputs, PolicyLikelihood, ScalarGaussian
from acktr.nograd import without_grad
from acktr.objective import Loss
from acktr.optimizer import NaturalGradient
from acktr.ranks import Ranks
from acktr.sb3.rollout import Rollout, policy_loss
from acktr.sb3.settings import ActorSettings, CriticSettings
from acktr.step import StepReport
from acktr.tree import take_rows

Stepper = NaturalGradient | FirstOrder
"""Who takes the steps."""


@dataclass
class StepLog:
    """What the steps of one rollout did."""

    reports: list[StepReport] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    examples: int = 1
    """Transitions of the rollout."""

    def add(self, report: StepReport, loss: float) -> None:
        """Note one step.

        Args:
            report: the optimizer's.
            loss: the objective before the step.
        """
        self.reports.append(report)
        self.losses.append(loss)

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Averages over the rollout's steps, by the names they are logged under; NaN where nothing was measured.

        Args:
            ranks: the processes that took them, each of which knows the loss of its own examples.

        Returns:
            By name.
        """
        loss = fmean(self.losses)
        if ranks.size > 1:
            loss = float(ranks.mean(torch.tensor(loss, dtype=torch.float64), self.examples))
        return {
            "kl_predicted": _mean(r.kl_predicted for r in self.reports),
            "kl_block": _mean(r.kl_block for r in self.reports),
            "kl_measured": _mean(r.kl_measured for r in self.reports),
            "trust_region_scale": fmean(r.scale for r in self.reports),
            "loss": loss,
        }


class _Average:
    """The mean of where a rollout's last steps led (Polyak & Juditsky 1992).

    Steps to the minimum of one minibatch after the other move about the rollout's own; their mean is nearer to it.

    Args:
        parameters: that move.
        steps: how many, the last ones; 0 for none, which leaves everything where the last step led.
    """

    def __init__(self, parameters: Iterable[Tensor], steps: int) -> None:
        self._parameters, self._steps = list(parameters), steps
        self._sums = [torch.zeros_like(p) for p in self._parameters] if steps else []

    def take(self, left: int) -> None:
        """Count a step in, if it is one of the last.

        Args:
            left: steps from it to the end, itself included.
        """
        if left <= self._steps:
            torch._foreach_add_(self._sums, self._parameters)

    def put(self) -> None:
        """Move the parameters to the mean."""
        if self._steps:
            torch._foreach_copy_(self._parameters, torch._foreach_div(self._sums, self._steps))


def _mean(numbers: Iterable[float]) -> float:
    known = [number for number in numbers if not isnan(number)]
    return fmean(known) if known else nan


def actor_steps(
    actor: nn.Module,
    optimizer: Stepper,
    rollout: Rollout,
    settings: ActorSettings,
    ent_coef: float,
    generator: Generator,
    groups: int = 1,
) -> StepLog:
    """Step the policy along its natural gradient on each minibatch.

    Args:
        actor: observations to the parameters of the action distribution.
        optimizer: the actor's; its likelihood is the action distribution.
        rollout: the transitions.
        settings: how often, and when to stop.
        ent_coef: weight of the entropy bonus.
        generator: source of the shuffles.
        groups: parts of the rollout that keep together, as for `Rollout.orders`.

    Returns:
        What the steps did.
    """
    log = StepLog(examples=len(rollout))
    likelihood: PolicyLikelihood = optimizer.likelihood  # type: ignore[assignment]
    behaviour = _outputs(actor, rollout) if settings.max_rollout_kl is not None else None
    for batch in rollout.minibatches(settings.n_epochs, settings.n_minibatches, generator, groups):
        outputs, passes = _observe(optimizer, batch, settings.curvature_examples)

        def loss(outputs: Outputs, batch: Rollout = batch) -> Tensor:
            return policy_loss(likelihood, outputs, _first(batch, outputs), settings.clip_range, ent_coef)

        log.add(*_descend(optimizer, loss, outputs, passes))
        if behaviour is not None and _too_far(optimizer, behaviour, _outputs(actor, rollout), settings.max_rollout_kl):
            break
    return log


@without_grad
def critic_steps(
    optimizer: Stepper,
    rollout: Rollout,
    settings: CriticSettings,
    radius: float,
    generator: Generator,
) -> StepLog:
    """Step the value along its Gauss–Newton direction on each minibatch.

    The metric is that of unit variance, ½ E[(ΔV)²]; a share of the residual variance as radius makes the bound
    indifferent to the scale of the rewards, and tighter as the fit improves.

    Args:
        optimizer: the critic's, whose network reads observations and returns values.
        rollout: the transitions.
        settings: how often.
        radius: largest mean squared change of V in a step, as a share of the mean squared residual.
        generator: source of the shuffles.

    Returns:
        What the steps did.
    """
    log = StepLog(examples=len(rollout))
    # With seeds of ones the objective's output gradient is the residual times the seed.
    whole = settings.curvature_examples is None and isinstance(settings.fisher, ExactFisher)
    one_pass = whole and isinstance(optimizer, NaturalGradient)
    orders = list(rollout.orders(settings.n_epochs, settings.n_minibatches, generator))
    average = _Average(optimizer.parameters.values(), round(settings.averaged * len(orders)))
    for left, rows in zip(range(len(orders), 0, -1), orders, strict=True):
        observations, returns = take_rows(rollout.observations, rows), rollout.returns[rows]
        if one_pass and optimizer.statistics_due:
            residual = optimizer.run(observations).outputs[0] - returns
            optimizer.update_curvature(weights=residual)
        else:
            passes = optimizer.observe(observations, (returns,), settings.curvature_examples)
            residual = _joined([p.outputs[0] for p in passes]) - returns
            optimizer.pull_back((residual / len(residual),), passes)
        loss = optimizer.average(0.5 * residual.square().mean())
        optimizer.param_groups[0]["radius"] = radius * max(loss, 1e-12)
        optimizer.descend(_squared_error(returns))
        log.add(optimizer.report, loss)
        average.take(left)
    average.put()
    return log


def joint_steps(
    network: nn.Module,
    optimizer: Stepper,
    rollout: Rollout,
    settings: ActorSettings,
    ent_coef: float,
    vf_coef: float,
    value_radius: float,
    generator: Generator,
) -> StepLog:
    """Step a shared trunk along the natural gradient of policy and value together.

    The metric is the sum of the policy's Fisher and the value's at unit variance (Wu et al. 2017, section 3.1), and
    both trust regions hold: the step is as long as the shorter of the two allows.

    Args:
        network: observations to the action distribution's parameters and the value.
        optimizer: its likelihood is a `Joint`.
        rollout: the transitions.
        settings: how often, and when to stop.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value's mean squared error over 2 in the objective.
        value_radius: largest mean squared change of V in a step, as a share of the mean squared residual.
        generator: source of the shuffles.

    Returns:
        What the steps did.
    """
    log = StepLog(examples=len(rollout))
    policy: PolicyLikelihood = optimizer.likelihood.policy  # type: ignore[attr-defined]
    behaviour = _outputs(network, rollout)[:-1] if settings.max_rollout_kl is not None else None
    for batch in rollout.minibatches(settings.n_epochs, settings.n_minibatches, generator):
        outputs, passes = _observe(optimizer, batch, settings.curvature_examples)
        error = optimizer.ranks.mean(0.5 * (outputs[-1] - batch.returns).square().mean(), len(batch))
        radius = optimizer.param_groups[0]["radius"]
        optimizer.likelihood = joint_likelihood(policy, value_radius * float(error.detach()), radius)

        def loss(outputs: Outputs, batch: Rollout = batch) -> Tensor:
            seen = _first(batch, outputs)
            squares = 0.5 * (outputs[-1] - seen.returns).square().mean()
            return policy_loss(policy, outputs[:-1], seen, settings.clip_range, ent_coef) + vf_coef * squares

        log.add(*_descend(optimizer, loss, outputs, passes))
        now = _outputs(network, rollout)[:-1] if behaviour is not None else ()
        if behaviour is not None and _too_far(optimizer, behaviour, now, settings.max_rollout_kl, policy):
            break
    return log


def joint_likelihood(policy: PolicyLikelihood, value_radius: float, radius: float) -> Joint:
    """Policy and value of a shared trunk, each with a radius of its own.

    Args:
        policy: of the actions.
        value_radius: largest ½ E[(ΔV)²].
        radius: of the policy, in nats.

    Returns:
        The likelihood.
    """
    # A decayed radius ends at 0, where nothing moves whatever the value's share; nor does it where the error is NaN.
    share = value_radius if math.isfinite(value_radius) else 0.0
    return Joint(policy, ScalarGaussian(), max(share, 1e-12) / max(radius, 1e-12))


def _observe(optimizer: Stepper, batch: Rollout, examples: int | None) -> tuple[Outputs, list[Pass]]:
    """The batch's outputs as leaves of the loss, and the curvature brought up to date.

    Returns:
        The outputs, and the passes they come from.
    """
    targets = (batch.actions, batch.returns) if isinstance(optimizer.likelihood, Joint) else (batch.actions,)
    passes = optimizer.observe(batch.observations, targets, examples)
    joined = (_joined(parts) for parts in zip(*(p.outputs for p in passes), strict=True))
    return tuple(o.detach().requires_grad_() for o in joined), passes


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _first(batch: Rollout, outputs: Outputs) -> Rollout:
    """The transitions that outputs are of: a pass that was run in parts is looked at again on its first."""
    return batch if len(outputs[0]) == len(batch) else batch.rows(slice(len(outputs[0])))


def _squared_error(returns: Tensor) -> Loss:
    return lambda outputs: 0.5 * (outputs[0] - returns[: len(outputs[0])]).square().mean()


def _descend(
    optimizer: Stepper, loss: Callable[[Outputs], Tensor], outputs: Outputs, passes: Sequence[Pass]
) -> tuple[StepReport, float]:
    """Step against a loss, whose graph begins at the outputs.

    Returns:
        What the step did, and the loss before it.
    """
    before = loss(outputs)
    optimizer.pull_back(torch.autograd.grad(before, outputs), passes)
    optimizer.descend(loss)
    return optimizer.report, float(before.detach())


@without_grad
def _outputs(network: nn.Module, rollout: Rollout) -> Outputs:
    outputs: Outputs = network(rollout.observations)
    return outputs


def _too_far(
    optimizer: Stepper, behaviour: Outputs, now: Outputs, limit: float | None, likelihood: Likelihood | None = None
) -> bool:
    divergences = (likelihood or optimizer.likelihood).divergence(behaviour, now)
    return limit is not None and float(optimizer.ranks.mean(divergences.mean(), len(divergences))) > limit
