"""How good a direction is: what a step of a given KL gains, with the curvature estimated in different ways.

    PYTHONPATH=. python docs/results/directions.py RUN_DIRECTORY CHECKPOINT > docs/results/directions.csv

An image agent's checkpoint is loaded and plays 32 rollouts. Half of them feed each way of estimating the curvature, 40
updates long; the gradient of each rollout of the other half is solved with it; the direction is scaled so that the
exact Fisher form on 480 other transitions meets the radii of policy and value; and its slope is taken on the gradients
of all other rollouts. What comes out is the first-order gain per step, of the policy's objective and of the value's,
mean and standard error over 16 directions, and how far the blocks' own form is from the exact one.
"""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acktr.curvature import EKFAC, CurvatureFactory, Diagonal, FactoredKFAC
from acktr.exact import Linearisation
from acktr.optimizer import NaturalGradient
from acktr.sb3.networks import JointNetwork
from acktr.sb3.rollout import Rollout, flatten_rollout, policy_loss
from acktr.sb3.settings import at
from acktr.sb3.steps import joint_likelihood
from acktr.step import StepRule
from agents import build, checkpoint
from agents.loading import load_config

ROLLOUTS, UPDATES, RADIUS, TESTED = 32, 40, 0.0075, 480

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One way of estimating the curvature."""

    label: str
    factory: CurvatureFactory
    examples: int = 160
    max_rows: int = 2048
    refresh_period: int = 4


VARIANTS = [
    Variant("EKFAC, 640 examples, 4096 rows", EKFAC(0.98), 640, 4096, 10),
    Variant("EKFAC, 160 examples", EKFAC(0.95)),
    Variant("EKFAC, 160 examples, rank 256", EKFAC(0.95, 256)),
    Variant("EKFAC, 160 examples, rank 64", EKFAC(0.95, 64)),
    Variant("EKFAC, 80 examples, rank 64", EKFAC(0.95, 64), 80),
    Variant("EKFAC, 160 examples, rank 32", EKFAC(0.95, 32)),
    Variant("factored K-FAC, 160 examples", FactoredKFAC(0.95)),
    Variant("diagonal, 160 examples", Diagonal(0.95)),
]
DAMPINGS = (1e-4, 3e-4, 1e-3, 1e-2)


class Laboratory:
    """An agent, rollouts of it, and the gradients on each.

    Args:
        directory: Of the run.
        state: The checkpoint.
    """

    def __init__(self, directory: Path, state: Path) -> None:
        _, config = load_config(directory)
        env = build.make_training_env(config, 7)
        self.agent: Any = build.make_agent(config, env)
        checkpoint.restore_policy(self.agent, checkpoint.load(state))
        _, callback = self.agent._setup_learn(10**9)
        generator = torch.Generator().manual_seed(0)
        self.rollouts: list[Rollout] = []
        for number in range(ROLLOUTS + 3):
            self.agent.collect_rollouts(self.agent.env, callback, self.agent.rollout_buffer, self.agent.n_steps)
            if number >= 3:  # away from the episodes' beginnings
                found = flatten_rollout(self.agent.rollout_buffer, self.agent.device, True, generator)
                self.rollouts.append(found)
        env.close()
        self.network = JointNetwork(self.agent.policy)
        self.parameters = dict(self.agent.actor_optimizer.parameters)
        self.gradients = [self._gradients(rollout) for rollout in self.rollouts]
        errors = [float(0.5 * (r.returns - r.values).square().mean()) for r in self.rollouts]
        value_radius = at(self.agent.critic.radius, 1.0) * float(np.mean(errors))
        self.likelihood = joint_likelihood(self.agent.action_likelihood, value_radius, RADIUS)
        tested = self.network.prepared(self.rollouts[0].observations[:TESTED])
        self.exact = Linearisation(self.network, self.parameters, (tested,), self.likelihood)

    def _gradients(self, rollout: Rollout) -> tuple[Tensors, Tensors]:
        agent, outputs = self.agent, self.network(rollout.observations)
        policy = policy_loss(agent.action_likelihood, outputs[:-1], rollout, 0.2, agent.ent_coef)
        value = agent.vf_coef * 0.5 * (outputs[-1] - rollout.returns).square().mean()
        leaves = list(self.parameters.values())
        both = [
            torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True) for loss in (policy, value)
        ]
        return dict(zip(self.parameters, both[0], strict=True)), dict(zip(self.parameters, both[1], strict=True))

    def tested(self) -> range:
        """The rollouts whose gradients are solved."""
        return range(ROLLOUTS // 2, ROLLOUTS)

    def curvature(self, variant: Variant) -> NaturalGradient:
        """Feed a way of estimating the curvature with the first half of the rollouts.

        Args:
            variant: Which.

        Returns:
            An optimizer that holds it.
        """
        rule = StepRule(refresh_period=variant.refresh_period)
        optimizer = NaturalGradient(
            self.network, self.likelihood, variant.factory, rule=rule, parameters=self.parameters, seed=1
        )
        optimizer.curvature.max_rows = variant.max_rows
        for number in range(UPDATES):
            part = self.rollouts[number % (ROLLOUTS // 2)].rows(slice(variant.examples))
            optimizer.observe(part.observations, (part.actions, part.returns))
        return optimizer

    def forms(self, direction: Tensors) -> tuple[float, float]:
        """The exact Fisher form of a direction in units of RADIUS, of the policy and of the value."""
        grams = self.exact.grams([self.exact.tangent(direction)])
        policy, value = (float(g) / part.radius for g, part in zip(grams, self.likelihood.parts(), strict=True))
        return policy, value

    def gain(self, number: int, direction: Tensors, form: float) -> tuple[float, float]:
        """What a step along a direction gains on all rollouts but its own.

        Args:
            number: The rollout whose gradient it was.
            direction: A descent.
            form: Its exact form, the larger one.

        Returns:
            Of the policy's objective and of the value's.
        """
        scale = math.sqrt(2 * RADIUS / form)
        others = [pair for other, pair in enumerate(self.gradients) if other != number]
        policy, value = (scale * float(np.mean([-dot(pair[part], direction) for pair in others])) for part in (0, 1))
        return policy, value


def dot(left: Tensors, right: Tensors) -> float:
    """Inner product over all parameters."""
    return sum(float((left[name] * right[name]).sum()) for name in left)


@torch.no_grad()
def rows(laboratory: Laboratory, label: str, damping: float, optimizer: NaturalGradient | None) -> list[Any]:
    """Test one way of estimating the curvature.

    Args:
        laboratory: With what.
        label: Its name.
        damping: λ.
        optimizer: It; None for the plain gradient.

    Returns:
        A line of the table.
    """
    gains, ratios = [], []
    for number in laboratory.tested():
        policy, value = laboratory.gradients[number]
        direction = {name: -(policy[name] + value[name]) for name in policy}
        if optimizer is not None:
            direction = optimizer.curvature.solve(direction, damping)
        form = max(laboratory.forms(direction))
        if optimizer is not None:
            ratios.append(form / float(optimizer.curvature.quadratic(direction)))
        gains.append(laboratory.gain(number, direction, form))
    means, errors = np.mean(gains, 0), np.std(gains, 0) / math.sqrt(len(gains))
    spread = [f"{v:.1f}" for v in (np.median(ratios), min(ratios), max(ratios))] if ratios else ["", "", ""]
    numbers = [f"{x:.2e}" for pair in zip(means, errors, strict=True) for x in pair]
    return [label, damping if optimizer else "", *numbers, *spread]


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    laboratory, out = Laboratory(Path(sys.argv[1]), Path(sys.argv[2])), csv.writer(sys.stdout)
    gains = ["policy_gain", "policy_error", "value_gain", "value_error"]
    out.writerow(["curvature", "damping", *gains, "exact_over_block", "least", "most"])
    out.writerow(rows(laboratory, "none (plain gradient)", 0.0, None))
    for variant in VARIANTS:
        optimizer = laboratory.curvature(variant)
        for damping in DAMPINGS:
            out.writerow(rows(laboratory, variant.label, damping, optimizer))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
