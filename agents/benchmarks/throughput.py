"""Whole training steps per second, and the memory they take: ours, the peers, and the bare environments as the bound.

A learner is timed over whole rounds of rollout and update, from the beginning of one rollout to the beginning of
another, so that no update is cut in two and statistics and refreshes of our curvature weigh what they weigh in a long
run.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback

import envs
from agents import build, configfiles
from agents.benchmarks import memory, parts
from agents.benchmarks.batches import Batch, batch_of
from agents.benchmarks.measuring import Timing, clocks, interleave, isolated, ratios, spread
from agents.benchmarks.memory import Memory
from agents.benchmarks.report import Report, Table, raw, with_range
from agents.config import A2cConfig, RunConfig
from agents.errors import UsageError
from agents.loading import set_threads

OURS, BARE = "acktr", "environments alone"
SUBJECTS = (OURS, "a2c", "ppo", "trpo", BARE)
"""Everything that is measured, in the order of the table."""

_LABELS = {"acktr": "ACKTR (ours)", "a2c": "SB3 A2C", "ppo": "SB3 PPO", "trpo": "sb3-contrib TRPO"}
_PACKAGES = {"acktr": "agents.natural", "trpo": "sb3_contrib"}


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    env: str = "HalfCheetah-v5"
    """Environment id; its shipped configuration gives environments, networks and algorithms."""
    repeats: int = 5
    """Rounds; each measures everyone once, in another order."""
    steps: int = 20_000
    """Environment steps per measurement, rounded up to whole rollouts."""
    n_envs: int | None = None
    """Environments side by side, for everyone; None takes the shipped configuration's."""


@dataclass(frozen=True)
class Measured:
    """What one process found."""

    timing: Timing
    """The time of the steps."""
    memory: Memory | None = None
    """What the process held; None where the kernel does not tell."""
    batch: Batch | None = None
    """What the learner learnt from; None for the bare environments."""


def run(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Measure everything.

    Args:
        plan: What to measure.
        tell: Where to announce what is measured next.

    Returns:
        What was found.
    """
    configfiles.shipped(plan.env)
    envs.make(plan.env, 1, seed=0).close()  # a mistake in the id should not cost a measurement
    subjects, notes = _available()

    def measure_once(subject: str, number: int) -> Measured:
        return isolated(measure, plan.env, subject, plan.steps, number, plan.n_envs)

    return summarise(plan, interleave(subjects, plan.repeats, measure_once, tell), notes)


def measure(env_id: str, subject: str, steps: int, seed: int, n_envs: int | None = None) -> Measured:
    """Measure one subject in this process.

    Args:
        env_id: The environment.
        subject: One of ``SUBJECTS``.
        steps: Environment steps at least.
        seed: Of environments and networks.
        n_envs: Environments side by side; None takes the shipped configuration's.

    Returns:
        Time per environment step, and memory.
    """
    config = replace(configfiles.shipped(env_id), seed=seed)
    if n_envs is not None:
        config = replace(config, env=replace(config.env, n_envs=n_envs))
    set_threads(config)
    # Imported here so that they count as imports, although only their own learner asks for them.
    import_module(_PACKAGES.get(subject, "stable_baselines3"))
    imports = memory.resident()
    found = Measured(_bare(config, steps)) if subject == BARE else _learner(learner_config(config, subject), steps)
    return replace(found, memory=memory.since_imports(imports))


def learner_config(config: RunConfig, algorithm: Any) -> RunConfig:
    """Choose who learns; environments and networks stay.

    A2C takes Stable-Baselines3's defaults, whatever the configuration makes of it; PPO and TRPO keep the rollouts and
    the numbers of minibatches of the configuration.

    Args:
        config: The shipped configuration.
        algorithm: The learner.

    Returns:
        The configuration, without our cold start, whose first cheap updates are no part of a long run.
    """
    actor = replace(config.acktr.actor, cold_start=0)
    acktr = replace(config.acktr, actor=actor)
    return replace(config, algorithm=algorithm, acktr=acktr, a2c=_sb3_defaults(config.a2c))


def window(agent: Any, steps: int) -> int:
    """Round a number of steps up to whole periods of a learner.

    Args:
        agent: Who learns.
        steps: Environment steps at least.

    Returns:
        The smallest multiple of its rollouts (for ACKTR of as many as hold whole periods of statistics and refreshes,
        of actor and critic alike).
    """
    updates = [parts.period(agent, part) for part in _natural(agent)]
    period: int = agent.n_envs * agent.n_steps * math.lcm(*updates)
    return math.ceil(steps / period) * period


def summarise(plan: Plan, found: Mapping[str, Sequence[Measured]], notes: Sequence[str] = ()) -> Report:
    """Turn measurements into a report.

    Args:
        plan: What was measured.
        found: The measurements of each subject, one per round.
        notes: What else the reader must know.

    Returns:
        Medians of rates and peak memory, ours over each peer's round by round, and what each learnt from.
    """
    results = {subject: _result(measured, found[OURS]) for subject, measured in found.items()}
    rows = [_row(subject, result) for subject, result in results.items()]
    clocks_columns = ["", "steps/s", "steps/CPU-s", "ours ÷ this", "ours ÷ this, CPU"]
    columns = [*clocks_columns, "peak MiB", "of it imports", "ours ÷ this, MiB"]
    where = plan.env if plan.n_envs is None else f"{plan.n_envs} × {plan.env}"
    title = f"Training steps per second and resident memory on {where}: median [range] of {plan.repeats}"
    batches = [f"{_LABELS[s]}: {r['batch']}" for s, r in results.items() if r["batch"] is not None]
    return Report("throughput", vars(plan), [Table(title, columns, rows)], results, [*batches, *notes])


def _result(measured: Sequence[Measured], ours: Sequence[Measured]) -> dict[str, Any]:
    rates = {clock: [m.timing.rate(clock) for m in measured] for clock in ("wall", "cpu")}
    against = {clock: ratios([m.timing.rate(clock) for m in ours], rates[clock]) for clock in rates}
    result: dict[str, Any] = {
        "steps_per_second": {clock: spread(values) for clock, values in rates.items()},
        "ours_over_this": against,
        "batch": measured[0].batch,
    }
    held, ours_held = ([m.memory for m in side if m.memory is not None] for side in (measured, ours))
    if len(held) == len(ours_held) == len(measured):
        peaks = [memory.peak for memory in held]
        result["memory_mib"] = {"peak": spread(peaks), "imports": spread([memory.imports for memory in held])}
        against["memory"] = ratios([memory.peak for memory in ours_held], peaks)
    rounds = zip(raw([m.timing for m in measured]), measured, strict=True)
    return {**result, "rounds": [{**timing, "memory_mib": m.memory} for timing, m in rounds]}


def _row(subject: str, result: Mapping[str, Any]) -> list[str]:
    against = {} if subject == OURS else result["ours_over_this"]
    speed, held = result["steps_per_second"], result.get("memory_mib", {})
    compared = {clock: with_range(found) for clock, found in against.items()}
    sizes = {kind: with_range(found, 0) for kind, found in held.items()}
    return [
        _LABELS.get(subject, subject),
        *(with_range(found, 0) for found in speed.values()),
        *(compared.get(clock, "") for clock in speed),
        *(sizes.get(kind, "") for kind in ("peak", "imports")),
        compared.get("memory", ""),
    ]


def _natural(agent: Any) -> tuple[str, ...]:
    # Only ours has optimizers with statistics and refreshes.
    return parts.networks_of(agent) if hasattr(agent, "actor_optimizer") else ()


def _sb3_defaults(config: A2cConfig) -> A2cConfig:
    signature = inspect.signature(A2C).parameters
    defaults = {f.name: signature[f.name].default for f in fields(config) if f.name in signature}
    return replace(config, **defaults, learning_rate_decay="constant")


def _available() -> tuple[list[str], list[str]]:
    if find_spec("sb3_contrib") is not None:
        return list(SUBJECTS), []
    return [s for s in SUBJECTS if s != "trpo"], [
        "sb3-contrib is not installed and was left out: pip install '.[bench]'"
    ]


class _Window(BaseCallback):
    """Times whole rounds of rollout and update after the first, then stops."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.timing: Timing | None = None
        self._steps, self._first, self._began = steps, -1, (0.0, 0.0)

    def _on_rollout_start(self) -> None:
        now, done = clocks(), self.model.num_timesteps
        if self._first < 0 and done > 0:
            for part in _natural(self.model):
                parts.leave_eager_phase(self.model, part)
            self._first, self._began = done, clocks()
        elif self._first >= 0 and done - self._first >= self._steps:
            self.timing = Timing(now[0] - self._began[0], now[1] - self._began[1], done - self._first)

    def _on_step(self) -> bool:
        return self.timing is None


def _learner(config: RunConfig, steps: int) -> Measured:
    env = build.make_training_env(config, config.seed)
    try:
        agent = build.make_agent(config, env)
        steps = window(agent, steps)
        measured = _Window(steps)
        # The length of a real run, so that schedules stand where they stand at its beginning.
        length = max(config.total_timesteps, 2 * (agent.n_envs * agent.n_steps + steps))
        agent.learn(length, measured)
    finally:
        env.close()
    if measured.timing is None:
        raise UsageError(f"{config.algorithm} ended before {steps} steps were measured; give fewer --steps")
    return Measured(measured.timing, batch=batch_of(config.algorithm, agent))


def _bare(config: RunConfig, steps: int) -> Timing:
    env = envs.make(config.env_id, config.env.n_envs, seed=config.seed, options=config.env.options)
    try:
        env.action_space.seed(config.seed)
        rounds = math.ceil(steps / env.num_envs)
        plan = [np.array([env.action_space.sample() for _ in range(env.num_envs)]) for _ in range(min(rounds, 1000))]
        env.reset()
        began = clocks()
        for index in range(rounds):
            env.step(plan[index % len(plan)])
        wall, cpu = clocks()
    finally:
        env.close()
    return Timing(wall - began[0], cpu - began[1], rounds * env.num_envs)
