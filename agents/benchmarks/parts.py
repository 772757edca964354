"""The steps that an update takes on one network, ours and RMSprop's, and the seams along which ours is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acktr.curvature import BlockDiagonal
from acktr.likelihood import Joint
from acktr.optimizer import EAGER_PASSES, NaturalGradient
from acktr.sb3 import ActorSettings, CriticSettings
from acktr.sb3.networks import action_likelihood
from acktr.sb3.rollout import Rollout, policy_loss
from acktr.sb3.schedules import at
from acktr.sb3.steps import actor_steps, critic_steps, joint_likelihood, joint_steps
from agents.benchmarks.measuring import Phases


def optimizer_of(agent: Any, part: str) -> NaturalGradient:
    """Find the optimizer of a network.

    Args:
        agent: Ours.
        part: ``actor``, ``critic`` or ``joint``.

    Returns:
        The optimizer, which knows its network.
    """
    found: NaturalGradient = agent.critic_optimizer if part == "critic" else agent.actor_optimizer
    return found


def networks_of(agent: Any) -> tuple[str, ...]:
    """List the networks that take steps of their own.

    Args:
        agent: Ours.

    Returns:
        ``actor`` and ``critic``, or ``joint`` where they share a trunk.
    """
    return ("actor", "critic") if hasattr(agent, "critic_optimizer") else ("joint",)


def settings_of(agent: Any, part: str) -> ActorSettings | CriticSettings:
    """Find the settings of a network's steps.

    Args:
        agent: Ours.
        part: Which network; on a shared trunk the actor's settings rule.

    Returns:
        The settings.
    """
    found: ActorSettings | CriticSettings = agent.critic if part == "critic" else agent.actor
    return found


def period(agent: Any, part: str) -> int:
    """Count the updates over which statistics, refreshes and measurements weigh what they weigh in a long run.

    Args:
        agent: Ours.
        part: Which network.

    Returns:
        The fewest updates whose steps are whole periods of all three; 1 where a single update's are.
    """
    settings = settings_of(agent, part)
    steps = _whole_period(settings)
    return steps // math.gcd(steps, settings.n_epochs * settings.n_minibatches)


def leave_eager_phase(agent: Any, part: str) -> None:
    """Move an optimizer beyond its first steps, which all update the curvature and measure: no part of a long run.

    Taking them would cost more than the measurement. The curvature has to be there already: call it after an update.

    Args:
        agent: Ours.
        part: Which network.
    """
    # The optimizer's own counters; that they rule statistics and measurements is seen by a test that counts them.
    optimizer, steps = optimizer_of(agent, part), _whole_period(settings_of(agent, part))
    optimizer._passes = optimizer._steps = math.ceil(max(EAGER_PASSES, optimizer._passes) / steps) * steps


def natural_steps(agent: Any, rollout: Rollout, part: str) -> Callable[[], None]:
    """Make the call that takes all natural-gradient steps of one update.

    Args:
        agent: Ours.
        rollout: The batch.
        part: Which network.

    Returns:
        The call.
    """
    optimizer, generator = optimizer_of(agent, part), torch.Generator().manual_seed(0)
    if part == "critic":
        radius = at(agent.critic.radius, 1.0)
        call = partial(critic_steps, optimizer, rollout, agent.critic, radius, generator)
    elif part == "actor":
        call = partial(actor_steps, optimizer.network, optimizer, rollout, agent.actor, agent.ent_coef, generator)
    else:
        optimizer.likelihood = _joint(agent, rollout)
        radius = at(agent.critic.radius, 1.0)
        step = partial(joint_steps, optimizer.network, optimizer, rollout, agent.actor)
        call = partial(step, agent.ent_coef, agent.vf_coef, radius, generator)
    return lambda: _forget(call())


def rmsprop_steps(agent: Any, rollout: Rollout, part: str) -> Callable[[], None]:
    """Make the call that takes as many RMSprop steps on the same objective and batches.

    Args:
        agent: Ours, whose networks are taken.
        rollout: The batch.
        part: Which network.

    Returns:
        The call.
    """
    natural, settings = optimizer_of(agent, part), settings_of(agent, part)
    optimizer = torch.optim.RMSprop(natural.parameters.values(), lr=7e-4, alpha=0.99, eps=1e-5)  # A2C's
    generator = torch.Generator().manual_seed(0)
    loss = _objective(agent, part, natural.network)

    def steps() -> None:
        for batch in rollout.minibatches(settings.n_epochs, settings.n_minibatches, generator):
            optimizer.zero_grad(set_to_none=True)
            loss(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return steps


def tell_apart(phases: Phases, optimizer: NaturalGradient) -> None:
    """Put clocks on the seams of our update.

    Args:
        phases: The clocks; what no seam claims stays with the phase that is open.
        optimizer: Ours. Its private methods are named here; the tests see every phase take time.
    """
    phases.wrap(optimizer, "update_curvature", "statistics")
    phases.wrap(optimizer, "descend", "apply")
    phases.wrap(optimizer, "_descent", "distance")
    phases.wrap(optimizer, "_move", "distance")
    phases.wrap(optimizer.curvature, "solve", "solve")
    phases.wrap(optimizer.curvature, "solve_with_form", "solve")
    if isinstance(optimizer.curvature, BlockDiagonal):
        for member in optimizer.curvature.members:
            phases.wrap(member.block, "refresh", "refresh")


def _whole_period(settings: ActorSettings | CriticSettings) -> int:
    # Refreshes count updates of the curvature, and those are a statistics period of steps apart.
    return math.lcm(settings.statistics_period * settings.refresh_period, settings.measure_period)


def _joint(agent: Any, rollout: Rollout) -> Joint:
    error = 0.5 * float((rollout.returns - rollout.values).square().mean())
    return joint_likelihood(
        action_likelihood(agent.policy), at(agent.critic.radius, 1.0) * error, at(agent.actor.radius, 1.0)
    )


def _objective(agent: Any, part: str, network: nn.Module) -> Callable[[Rollout], Tensor]:
    likelihood = action_likelihood(agent.policy)

    def value(values: Tensor, batch: Rollout) -> Tensor:
        return 0.5 * (values - batch.returns).square().mean()

    def policy(outputs: Any, batch: Rollout) -> Tensor:
        return policy_loss(likelihood, outputs, batch, agent.actor.clip_range, agent.ent_coef)

    def loss(batch: Rollout) -> Tensor:
        outputs = network(batch.observations)
        if part == "critic":
            return value(outputs, batch)
        if part == "actor":
            return policy(outputs, batch)
        joint: Tensor = policy(outputs[:-1], batch) + agent.vf_coef * value(outputs[-1], batch)
        return joint

    return loss


def _forget(_: object) -> None:
    """Drop a value."""
