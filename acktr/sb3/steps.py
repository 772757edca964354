"""The natural-gradient steps taken on a rollout: the actor's, the critic's, or both on a shared trunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Generator, Tensor, nn

from acktr.fisher import ExactFisher
from acktr.likelihood import Joint, Likelihood, Outputs, PolicyLikelihood, ScalarGaussian
from acktr.optimizer import NaturalGradient
from acktr.sb3.rollout import Rollout, policy_loss
from acktr.sb3.settings import ActorSettings, CriticSettings
from acktr.step import StepReport


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
        shared_pass = one_pass and optimizer.statistics_due
        with optimizer.recording():
            values = critic(batch.observations)
        residual = values.detach() - batch.returns
        loss = 0.5 * residual.square().mean()
        optimizer.param_groups[0]["radius"] = radius * max(float(loss), 1e-12)
        if shared_pass:
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
    log = StepLog()
    policy: PolicyLikelihood = optimizer.likelihood.policy  # type: ignore[attr-defined]
    behaviour = _outputs(network, rollout)[:-1] if settings.max_rollout_kl is not None else None
    for batch in rollout.minibatches(settings.n_epochs, settings.n_minibatches, generator):
        outputs = _observe(network, optimizer, batch, settings.curvature_examples, generator)
        error = 0.5 * (outputs[-1] - batch.returns).square().mean()
        radius = optimizer.param_groups[0]["radius"]
        optimizer.likelihood = joint_likelihood(policy, value_radius * float(error.detach()), radius)
        loss = policy_loss(policy, outputs[:-1], batch, settings.clip_range, ent_coef) + vf_coef * error
        log.add(_descend(optimizer, loss), loss)
        if behaviour is not None and _too_far(
            policy, behaviour, _outputs(network, rollout)[:-1], settings.max_rollout_kl
        ):
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
    # A decayed radius ends at 0, where nothing moves whatever the value's share.
    return Joint(policy, ScalarGaussian(), max(value_radius, 1e-12) / max(radius, 1e-12))


def _observe(
    network: nn.Module, optimizer: NaturalGradient, batch: Rollout, examples: int | None, generator: Generator
) -> Outputs:
    """The batch's outputs, and the curvature brought up to date on the batch or on a random part of it."""
    whole = examples is None or examples >= len(batch)
    part = batch if whole else batch.rows(_draw(len(batch), examples, generator, batch.returns.device))
    with torch.set_grad_enabled(whole or optimizer.statistics_due), optimizer.recording():
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


@torch.no_grad()
def _outputs(network: nn.Module, rollout: Rollout) -> Outputs:
    outputs: Outputs = network(rollout.observations)
    return outputs


def _too_far(likelihood: Likelihood, behaviour: Outputs, now: Outputs, limit: float | None) -> bool:
    return limit is not None and float(likelihood.divergence(behaviour, now).mean()) > limit
