"""Faults on purpose: processes stopped at random instants, checkpoints damaged at random."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import envs
from agents import configfiles
from agents.benchmarks.corruption import Damage, corrupt
from agents.benchmarks.report import Report, Table
from agents.benchmarks.torment import INTERRUPTIONS, KILL, Torment, begin, torment
from agents.errors import UsageError


@dataclass(frozen=True)
class Plan:
    """What to break, and how often."""

    environments: tuple[str, ...] = ("CartPole-v1", "HalfCheetah-v5")
    """Environments whose training is stopped."""
    kills: int = 50
    """Processes to kill with SIGKILL, shared out over the environments."""
    interruptions: int = 30
    """Processes to stop with SIGTERM, SIGINT, or SIGINT twice, shared out too."""
    corruptions: int = 200
    """Checkpoints to damage."""
    rollouts: int = 20
    """Length of each run."""
    seed: int = 0
    """Seed of the runs, of the instants and of the damages."""


def run(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Break what can be broken.

    Args:
        plan: What, and how often.
        tell: Where to announce what happens.

    Returns:
        What was found; runs that came to harm are kept where its notes say.

    Raises:
        UsageError: If no environment is named.
    """
    if not plan.environments:
        raise UsageError("--environments names none; name one or more, for example CartPole-v1")
    for env_id in plan.environments:
        envs.make(env_id, 1, seed=0).close()  # a mistake in an id should not cost a folder
    lines = {env_id: arguments_of(plan, env_id) for env_id in plan.environments}
    folder, rng = Path(tempfile.mkdtemp(prefix="acktr-faults-")), random.Random(plan.seed)
    torments = []
    for index, (env_id, arguments) in enumerate(lines.items()):
        room = folder / f"kills-{index}"
        room.mkdir()
        torments.append(torment(env_id, arguments, blows_of(plan, index, rng), rng, room, tell))
    damage = _damage(plan, folder, rng, tell)
    failures = [*(failure for found in torments for failure in found.failures), *damage.failures]
    notes = [f"seed {plan.seed}; {plan.rollouts} rollouts a run, a checkpoint after each", *failures]
    if failures:
        notes.append(f"the runs lie in {folder}")
    else:
        shutil.rmtree(folder)
    return Report("faults", vars(plan), _tables(torments, damage), _results(torments, damage, failures), notes)


def arguments_of(plan: Plan, env_id: str) -> list[str]:
    """Say how to train, so that much is written in little time.

    Args:
        plan: The plan.
        env_id: The environment.

    Returns:
        The options, without the environment and the directory.
    """
    config = configfiles.shipped(env_id)
    rollout = config.learner.n_steps * config.env.n_envs
    return [
        *("--seed", str(plan.seed), "--total-timesteps", str(plan.rollouts * rollout)),
        *("--checkpoint.period", str(rollout), "--evaluation.period", str(4 * rollout), "--evaluation.episodes", "2"),
    ]


def blows_of(plan: Plan, index: int, rng: random.Random) -> list[str]:
    """Say what the processes of one environment are stopped with.

    Args:
        plan: The plan.
        index: Which of its environments.
        rng: Draws the order.

    Returns:
        Its share of all blows.
    """
    interruptions = [INTERRUPTIONS[number % len(INTERRUPTIONS)] for number in range(plan.interruptions)]
    blows = ([KILL] * plan.kills + interruptions)[index :: len(plan.environments)]
    rng.shuffle(blows)
    return blows


def _damage(plan: Plan, folder: Path, rng: random.Random, tell: Callable[[str], None]) -> Damage:
    env_id, room, log = plan.environments[0], folder / "copies", folder / "victim.log"
    room.mkdir()
    process = begin([env_id, *arguments_of(plan, env_id), "--run-dir", str(folder / "victim")], log)
    process.join()
    if process.exitcode:
        return Damage(failures=[f"{env_id}: training ended with status {process.exitcode} ({log})"])
    return corrupt(folder / "victim", plan.corruptions, rng, room, tell)


def _tables(torments: list[Torment], damage: Damage) -> list[Table]:
    killed = Table(
        "Stopped and resumed",
        ("", "runs", KILL, *INTERRUPTIONS, "before a checkpoint", "in the midst of a file", "failures"),
        [tuple(map(str, _row(found))) for found in torments],
    )
    rows = [*damage.kinds.most_common(), ("an older one was used", damage.older_used), ("refused", damage.refused)]
    rows += [("programs run on them", damage.doors), ("failures", len(damage.failures))]
    return [killed, Table("Checkpoints damaged", ("", "times"), [(name, str(number)) for name, number in rows])]


def _row(found: Torment) -> tuple[str | int, ...]:
    blows = [found.blows[name] for name in (KILL, *INTERRUPTIONS)]
    return found.env_id, found.runs, *blows, found.without_checkpoint, found.half_written, len(found.failures)


def _results(torments: list[Torment], damage: Damage, failures: list[str]) -> dict[str, Any]:
    return {
        "stopped": [vars(found) | {"blows": dict(found.blows)} for found in torments],
        "damages": vars(damage) | {"kinds": dict(damage.kinds)},
        "failures": failures,
    }
