"""How much of a natural gradient is signal: the two halves of a rollout against each other, while an agent learns.

    PYTHONPATH=. python docs/results/halves.py HalfCheetah-v5 SEED STEPS > halves.csv

Trains with the environment's shipped configuration. At every fourth step of the policy the transitions are cut at
random into halves A and B, whose gradients g have the same mean and noises that know nothing of each other. Per layer
and decade of the eigenvalues λ: the share g_A·g_B / |g|² that is signal. Over all layers, for advantages that were
compressed in several ways: the gain d_A·g_B / √(d_A·g_A) that the direction d_A of one half, made from compressed
advantages, has on the other half as it is, per root of what it spends of KL.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import acktr.sb3.acktr as learner
from acktr.curvature.kronecker.kfac import EigenBlock
from acktr.likelihood import outputs_of
from acktr.optimizer import NaturalGradient
from acktr.sb3.rollout import Rollout, policy_loss
from acktr.sb3.steps import StepLog
from agents import build, configfiles

EVERY, WARM_UP = 4, 20

Tensors = dict[str, torch.Tensor]
COMPRESSIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as they are": lambda a: a,
    "within 3": lambda a: a.clamp(-3, 3),
    "within 2": lambda a: a.clamp(-2, 2),
    "within 1": lambda a: a.clamp(-1, 1),
    "signed root": lambda a: a.sign() * a.abs().sqrt(),
}


def gradient(optimizer: NaturalGradient, actor: Any, rows: Rollout) -> Tensors:
    """Of the policy's objective on some transitions.

    Args:
        optimizer: The policy's.
        actor: Its network.
        rows: The transitions.

    Returns:
        By parameter; zeros where it has no say.
    """
    with torch.enable_grad():
        loss = policy_loss(optimizer.likelihood, outputs_of(actor(rows.observations)), rows, 0.2, 0.0)  # type: ignore[arg-type]
        found = torch.autograd.grad(loss, list(optimizer.parameters.values()), allow_unused=True)
    pairs = zip(optimizer.parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs}


def dot(left: Tensors, right: Tensors) -> float:
    """The inner product of two vectors of parameters."""
    return float(sum((left[name] * right[name]).sum() for name in left))


class Halves:
    """Takes notes at the steps of a policy.

    Args:
        take_steps: What takes them.
    """

    def __init__(self, take_steps: Callable[..., StepLog]) -> None:
        self._take_steps, self._steps = take_steps, 0
        self.spectrum: defaultdict[tuple[str, int], list[tuple[int, float, float]]] = defaultdict(list)
        self.gains: defaultdict[str, list[float]] = defaultdict(list)

    def __call__(self, actor: Any, optimizer: Any, rollout: Rollout, *rest: Any) -> StepLog:
        """Look, then step."""
        if self._steps >= WARM_UP and self._steps % EVERY == 0:
            order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(self._steps))
            halves = [rollout.rows(rows) for rows in order.chunk(2)]
            both = [gradient(optimizer, actor, half) for half in halves]
            self._note_spectrum(optimizer, *both)
            self._note_gains(optimizer, actor, halves, both)
        self._steps += 1
        return self._take_steps(actor, optimizer, rollout, *rest)

    def _note_spectrum(self, optimizer: NaturalGradient, first: Tensors, second: Tensors) -> None:
        for member in optimizer.curvature.members:
            if not isinstance(member.block, EigenBlock):
                continue
            output_basis, input_basis, scaling = member.block._bases()
            one, other = (output_basis.T @ member.pack(half) @ input_basis for half in (first, second))
            decades = scaling.clamp(min=1e-9).log10().floor().int()
            for decade in decades.unique().tolist():
                here = decades == decade
                signal, length = (one * other)[here].sum(), ((one + other) / 2).square()[here].sum()
                self.spectrum[member.name, decade].append((int(here.sum()), float(signal), float(length)))

    def _note_gains(self, optimizer: NaturalGradient, actor: Any, halves: list[Rollout], both: list[Tensors]) -> None:
        damping = optimizer.param_groups[0]["damping"]
        for label, compress in COMPRESSIONS.items():
            gain = 0.0
            for half, other in zip(halves, reversed(both), strict=True):
                own = gradient(optimizer, actor, replace(half, advantages=compress(half.advantages)))
                direction = optimizer.curvature.solve(own, damping)
                gain += dot(direction, other) / max(dot(direction, own), 1e-12) ** 0.5 / 2
            self.gains[label].append(gain)


def main(env_id: str, seed: int, steps: int) -> None:
    """Train and print the table.

    Args:
        env_id: The environment.
        seed: Of the run.
        steps: Environment steps.
    """
    torch.set_num_threads(1)
    config = replace(configfiles.shipped(env_id), seed=seed)
    agent = build.make_agent(config, build.make_training_env(config, seed))
    notes = learner.actor_steps = Halves(learner.actor_steps)  # type: ignore[assignment]
    agent.learn(steps)
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["env_id", "seed", "what", "part", "directions", "mean", "standard_error"])
    for (layer, decade), rows in sorted(notes.spectrum.items()):
        count, signal, length = np.mean(rows, axis=0)
        table.writerow([
            env_id,
            seed,
            f"share of signal, {layer}",
            f"λ from 1e{decade}",
            round(count),
            signal / length,
            "",
        ])
    for label, gains in notes.gains.items():
        error = np.std(gains) / len(gains) ** 0.5
        table.writerow([env_id, seed, "gain per root of KL", label, "", np.mean(gains), error])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
