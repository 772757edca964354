"""Whole training steps per second: ours, the peers, and the bare environments as the bound.

A learner is timed over whole rounds of rollout and update, from the beginning of one rollout to the beginning of
another, so that no update is cut in two and each refresh of our curvature weighs what it weighs in a long run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

import envs
from agents import build, configfiles
from agents.benchmarks.measuring import Timing, clocks, interleave, isolated, ratios, spread
from agents.benchmarks.report import Report, Table, raw, with_range
from agents.config import RunConfig
from agents.errors import UsageError
from agents.loading import set_threads

OURS, BARE = "acktr", "environments alone"
SUBJECTS = (OURS, "a2c", "ppo", "trpo", BARE)
"""Everything that is measured, in the order of the table."""

_LABELS = {"acktr": "ACKTR (ours)", "a2c": "SB3 A2C", "ppo": "SB3 PPO", "trpo": "sb3-contrib TRPO"}


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    env: str = "HalfCheetah-v5"
    """Environment id; its shipped configuration gives environments, networks and algorithms."""
    repeats: int = 5
    """Rounds; each measures everyone once, in another order."""
    steps: int = 20_000
    """Environment steps per measurement, rounded up to whole rollouts."""


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

    def measure_once(subject: str, number: int) -> Timing:
        return isolated(measure, plan.env, subject, plan.steps, number)

    return summarise(plan, interleave(subjects, plan.repeats, measure_once, tell), notes)


def measure(env_id: str, subject: str, steps: int, seed: int) -> Timing:
    """Measure one subject in this process.

    Args:
        env_id: The environment.
        subject: One of ``SUBJECTS``.
        steps: Environment steps at least.
        seed: Of environments and networks.

    Returns:
        The time, per environment step.
    """
    config = replace(configfiles.shipped(env_id), seed=seed)
    set_threads(config)
    return _bare(config, steps) if subject == BARE else _learner(learner_config(config, subject), steps)


def learner_config(config: RunConfig, algorithm: Any) -> RunConfig:
    """Choose who learns; environments and networks stay.

    Args:
        config: The shipped configuration.
        algorithm: The learner.

    Returns:
        The configuration, without our cold start, whose first cheap updates are no part of a long run.
    """
    actor = replace(config.acktr.actor, cold_start=0)
    return replace(config, algorithm=algorithm, acktr=replace(config.acktr, actor=actor))


def window(config: RunConfig, steps: int) -> int:
    """Round a number of steps up to whole periods of a learner.

    Args:
        config: Who learns.
        steps: Environment steps at least.

    Returns:
        The smallest multiple of its rollouts (for ACKTR of those from one refresh of the bases to the next).
    """
    period = config.env.n_envs * config.learner.n_steps
    if config.algorithm == OURS:
        period *= config.acktr.actor.refresh_period
    return math.ceil(steps / period) * period


def summarise(plan: Plan, found: Mapping[str, Sequence[Timing]], notes: Sequence[str] = ()) -> Report:
    """Turn timings into a report.

    Args:
        plan: What was measured.
        found: The timings of each subject, one per round.
        notes: What else the reader must know.

    Returns:
        Medians of the rates, and our rate over each peer's round by round.
    """
    rows, results = [], {}
    for subject, timings in found.items():
        rates = {clock: [t.rate(clock) for t in timings] for clock in ("wall", "cpu")}
        ours = {clock: [t.rate(clock) for t in found[OURS]] for clock in ("wall", "cpu")}
        against = {clock: ratios(ours[clock], rates[clock]) for clock in rates}
        speed = {clock: spread(values) for clock, values in rates.items()}
        cells = [_LABELS.get(subject, subject), *(with_range(speed[clock], 0) for clock in speed)]
        rows.append([*cells, *("" if subject == OURS else with_range(against[clock]) for clock in against)])
        results[subject] = {"steps_per_second": speed, "ours_over_this": against, "rounds": raw(timings)}
    columns = ["", "steps/s", "steps/CPU-s", "ours ÷ this", "ours ÷ this, CPU"]
    title = f"Training steps per second on {plan.env}: median [range] of {plan.repeats}"
    return Report("throughput", vars(plan), [Table(title, columns, rows)], results, notes)


def _available() -> tuple[list[str], list[str]]:
    if find_spec("sb3_contrib") is not None:
        return list(SUBJECTS), []
    return [s for s in SUBJECTS if s != "trpo"], [
        "sb3-contrib is not installed and was left out: pip install '.[bench]'"
    ]


class _Window(BaseCallback):
    """Times whole rounds of rollout and update, then stops."""

    def __init__(self, warm_up: int, steps: int) -> None:
        super().__init__()
        self.timing: Timing | None = None
        self._warm_up, self._steps = warm_up, steps
        self._first, self._began = -1, (0.0, 0.0)

    def _on_rollout_start(self) -> None:
        now, done = clocks(), self.model.num_timesteps
        if self._first < 0 and done >= self._warm_up:
            self._first, self._began = done, clocks()
        elif self._first >= 0 and done - self._first >= self._steps:
            self.timing = Timing(now[0] - self._began[0], now[1] - self._began[1], done - self._first)

    def _on_step(self) -> bool:
        return self.timing is None


def _learner(config: RunConfig, steps: int) -> Timing:
    warm_up, steps = config.env.n_envs * config.learner.n_steps, window(config, steps)
    env = build.make_training_env(config, config.seed)
    try:
        measured = _Window(warm_up, steps)
        # The length of a real run, so that schedules stand where they stand at its beginning.
        length = max(config.total_timesteps, 2 * (warm_up + steps))
        build.make_agent(config, env).learn(length, measured)
    finally:
        env.close()
    if measured.timing is None:
        raise UsageError(f"{config.algorithm} ended before {steps} steps were measured; give fewer --steps")
    return measured.timing


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
