"""The natural-gradient steps taken on a rollout: the actor's, the critic's, or both on a shared trunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Generator, Tensor, nn

from acktr.combination import ObjectiveCombination
from acktr.fisher import ExactFisher
from acktr.likelihood import Joint, Likelihood, Outputs, PolicyLikelihood, ScalarGaussian
from acktr.optimizer import NaturalGradient, StepReport
from acktr.sb3.rollout import Rollout, policy_loss
from acktr.sb3.settings import ActorSettings, CriticSettings


@dataclass
class StepLog:
    """What the steps of one rollout did."""

    reports: list[StepReport] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, report: StepReport, loss: Tensor) -> None:
        """Note one step.

        Args:
            report: the optimizer's.
            loss: the objective before the step.
        """
        self.reports.append(report)
        self.losses.append(float(loss.detach()))

    def means(self) -> dict[str, float]:
        """Averages over the rollout's steps, by the names they are logged under."""
        return {
            "kl_predicted": fmean(r.kl_predicted for r in self.reports),
            "kl_block": fmean(r.kl_block for r in self.reports),
            "kl_measured": fmean(r.kl_measured for r in self.reports),
            "trust_region_scale": fmean(r.scale for r in self.reports),
            "loss": fmean(self.losses),
        }


def actor_steps(
    actor: nn.Module,
    optimizer: NaturalGradient,
    rollout: Rollout,
    settings: ActorSettings,
    ent_coef: float,
    generator: Generator,
) -> StepLog:
    """Step the policy along its natural gradient on each minibatch.

    Args:
        actor: observations to the parameters of the action distribution.
        optimizer: the actor's; its likelihood is the action distribution.
        rollout: the transitions.
        settings: how often, and when to stop.
        ent_coef: weight of the entropy bonus.
        generator: source of the shuffles.

    Returns:
        What the steps did.
    """
    log = StepLog()
    likelihood: PolicyLikelihood = optimizer.likelihood  # type: ignore[assignment]
    behaviour = _outputs(actor, rollout) if settings.max_rollout_kl is not None else None
    for batch in rollout.minibatches(settings.n_epochs, settings.n_minibatches, generator):
        outputs = _observe(actor, optimizer, batch, settings.curvature_examples, generator)
        loss = policy_loss(likelihood, outputs, batch, settings.clip_range, ent_coef)
        log.add(_descend(optimizer, loss), loss)
        if behaviour is not None and _too_far(likelihood, behaviour, _outputs(actor, rollout), settings.max_rollout_kl):
            break
    return log


def critic_steps(
    critic: nn.Module,
    optimizer: NaturalGradient,
    rollout: Rollout,
    settings: CriticSettings,
    radius: float,
    generator: Generator,
) -> StepLog:
    """Step the value along its Gauss–Newton direction on each minibatch.

    The metric is that of unit variance, ½ E[(ΔV)²]; a share of the residual variance as radius makes the bound
    indifferent to the scale of the rewards, and tighter as the fit improves.

    Args:
        critic: observations to values.
        optimizer: the critic's.
        rollout: the transitions.
        settings: how often.
        radius: largest mean squared change of V in a step, as a share of the mean squared residual.
        generator: source of the shuffles.

    Returns:
        What the steps did.
    """
    log = StepLog()
    # With seeds of ones the objective's output gradient is the residual times the seed.
    one_pass = isinstance(settings.fisher, ExactFisher) and optimizer.curvature.all_layers
    for batch in rollout.minibatches(settings.n_epochs, settings.n_minibatches, generator):
        with optimizer.recording():
            values = critic(batch.observations)
        residual = values.detach() - batch.returns
        loss = 0.5 * residual.square().mean()
        optimizer.param_groups[0]["radius"] = radius * max(float(loss), 1e-12)
        if one_pass:
            optimizer.update_curvature(weights=residual)
            optimizer.step()
            log.add(optimizer.report, loss)
        else:
            optimizer.update_curvature((batch.returns,))
            objective = 0.5 * (values - batch.returns).square().mean()
            log.add(_descend(optimizer, objective), loss)
    return log


def joint_steps(
    network: nn.Module,
    optimizer: NaturalGradient,
    rollout: Rollout,
    settings: ActorSettings,
    coefficients: tuple[float, float],
    generator: Generator,
) -> StepLog:
    """Step a shared trunk along the natural gradient of policy and value together.

    Both are likelihoods: of the actions, and of returns around the value with the residual's own variance over
    c_v. The same weight then stands in the objective, in the summed Fisher and in the radius, so a value that runs
    away is held by the same bound as a policy that does.

    Args:
        network: observations to the action distribution's parameters and the value.
        optimizer: its likelihood is a `Joint`.
        rollout: the transitions.
        settings: how often, and when to stop.
        coefficients: weights of the entropy bonus and of the value.
        generator: source of the shuffles.

    Returns:
        What the steps did.
    """
    log = StepLog()
    joint: Joint = optimizer.likelihood  # type: ignore[assignment]
    ent_coef, _ = coefficients
    behaviour = _outputs(network, rollout) if settings.max_rollout_kl is not None else None
    for batch in rollout.minibatches(settings.n_epochs, settings.n_minibatches, generator):
        outputs = _observe(network, optimizer, batch, settings.curvature_examples, generator)
        policy = policy_loss(joint.policy, outputs[:-1], batch, settings.clip_range, ent_coef)
        value = 0.5 * (outputs[-1] - batch.returns).square().mean() / joint.value.variance
        if isinstance(settings.combination, ObjectiveCombination):
            optimizer.step(parts=_gradients(optimizer, [policy, value]))
            log.add(optimizer.report, policy + value)
        else:
            log.add(_descend(optimizer, policy + value), policy + value)
        if behaviour is not None and _too_far(joint, behaviour, _outputs(network, rollout), settings.max_rollout_kl):
            break
    return log


def value_likelihood(residual: float, vf_coef: float) -> ScalarGaussian:
    """Returns around the value: variance = mean squared residual / c_v.

    Args:
        residual: mean squared difference of returns and values, ≥ 0.
        vf_coef: c_v > 0.

    Returns:
        The value's part of the joint likelihood.
    """
    return ScalarGaussian(max(residual, 1e-8) / vf_coef)


def _observe(
    network: nn.Module, optimizer: NaturalGradient, batch: Rollout, examples: int | None, generator: Generator
) -> Outputs:
    """The batch's outputs, and the curvature brought up to date on the batch or on a random part of it."""
    whole = examples is None or examples >= len(batch)
    part = batch if whole else batch.rows(_draw(len(batch), examples, generator, batch.returns.device))
    with optimizer.recording():
        outputs: Outputs = network(part.observations)
    targets = (part.actions, part.returns) if isinstance(optimizer.likelihood, Joint) else (part.actions,)
    optimizer.update_curvature(targets)
    return outputs if whole else network(batch.observations)


def _draw(size: int, count: int | None, generator: Generator, device: torch.device) -> Tensor:
    return torch.randperm(size, generator=generator)[:count].to(device)


def _descend(optimizer: NaturalGradient, loss: Tensor) -> StepReport:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return optimizer.report


def _gradients(optimizer: NaturalGradient, objectives: list[Tensor]) -> list[dict[str, Tensor]]:
    parameters = optimizer.parameters
    out = []
    for objective in objectives:
        grads = torch.autograd.grad(objective, list(parameters.values()), retain_graph=True, allow_unused=True)
        filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads, strict=True))
        out.append(dict(zip(parameters, filled, strict=True)))
    return out


@torch.no_grad()
def _outputs(network: nn.Module, rollout: Rollout) -> Outputs:
    outputs: Outputs = network(rollout.observations)
    return outputs


def _too_far(likelihood: Likelihood, behaviour: Outputs, now: Outputs, limit: float | None) -> bool:
    return limit is not None and float(likelihood.divergence(behaviour, now).mean()) > limit
