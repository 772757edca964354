"""One ACKTR update against RMSprop: the same networks, the same batches, as many gradient steps.

The networks, batch sizes and periods are those of the shipped configurations; observations are noise, because the
time does not depend on them and neither simulator nor emulator is then needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from acktr.sb3.rollout import Rollout
from agents import build, configfiles
from agents.benchmarks import parts
from agents.benchmarks.measuring import Phases, Timing, interleave, isolated, ratios, spread, timed
from agents.benchmarks.report import Report, Table, raw, with_range
from agents.config import RunConfig
from agents.loading import set_threads

Choice = Literal["mlp", "atari", "all"]
"""Which networks."""

PHASES = ("statistics", "refresh", "solve", "distance", "apply", "gradient")
"""Where an update's time goes: Fisher pass and moments; decompositions; damped inverse times gradient; combination of
the layers, trust region and measured KL; moving the parameters; and the loss's own passes."""

OURS, PEER = "ACKTR", "RMSprop"


@dataclass(frozen=True)
class Case:
    """Networks to update, as an environment's shipped configuration builds them."""

    env_id: str
    """Names the configuration."""
    observations: spaces.Space[Any]
    """What the networks read."""
    actions: spaces.Space[Any]
    """What they choose."""
    parts: tuple[str, ...]
    """Networks with steps of their own: actor and critic, or both on one trunk."""


CASES = {
    "mlp": Case("HalfCheetah-v5", spaces.Box(-np.inf, np.inf, (17,)), spaces.Box(-1, 1, (6,)), ("actor", "critic")),
    "atari": Case("ALE/Pong-v5", spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6), ("joint",)),
}
_TITLES = {"actor": "64-64 actor", "critic": "64-64 critic", "joint": "Atari actor and critic"}


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    network: Choice = "all"
    """Networks to update: 64-64 actor and critic, the Atari network, or all of them."""
    repeats: int = 5
    """Rounds; each measures everyone once, in another order."""
    updates: int = 10
    """Updates per measurement, rounded up to whole periods of statistics and refreshes."""


def run(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Measure everything.

    Args:
        plan: What to measure.
        tell: Where to announce what is measured next.

    Returns:
        What was found.
    """
    names = [plan.network] if plan.network != "all" else list(CASES)
    subjects = [f"{who}, {part}" for name in names for part in CASES[name].parts for who in (OURS, PEER)]
    where = {part: name for name in names for part in CASES[name].parts}

    def measure_once(subject: str, number: int) -> Timing:
        who, part = subject.split(", ")
        return isolated(measure, CASES[where[part]], part, who, plan.updates, number)

    return summarise(plan, interleave(subjects, plan.repeats, measure_once, tell))


def measure(case: Case, part: str, who: str, updates: int, seed: int) -> Timing:
    """Measure one subject in this process.

    Args:
        case: The networks.
        part: Which of them steps.
        who: ``ACKTR`` or ``RMSprop``.
        updates: Updates at least.
        seed: Of networks and batch.

    Returns:
        The time per update: total without, and phases with the clocks that tell them apart.
    """
    config = replace(configfiles.shipped(case.env_id), seed=seed)
    config = replace(config, acktr=replace(config.acktr, actor=replace(config.acktr.actor, cold_start=0)))
    set_threads(config)
    agent = make_agent(config, case)
    rollout = make_rollout(agent, config)
    period = parts.period(agent, part)
    times = math.ceil(updates / period) * period
    step = parts.natural_steps(agent, rollout, part) if who == OURS else parts.rmsprop_steps(agent, rollout, part)
    step()  # the first update also decomposes what later ones refresh; it is not timed
    if who == OURS:
        parts.leave_eager_phase(agent, part)
    whole = timed(step, times)
    return replace(whole, phases=_phases(agent, part, step, times)) if who == OURS else whole


def make_agent(config: RunConfig, case: Case) -> Any:
    """Make our agent for the spaces of a case.

    Args:
        config: The run.
        case: The spaces.

    Returns:
        The agent, in environments in which nothing happens.
    """
    env = DummyVecEnv([lambda: _Still(case.observations, case.actions) for _ in range(config.env.n_envs)])
    return build.make_agent(replace(config, algorithm="acktr"), env)


def make_rollout(agent: Any, config: RunConfig) -> Rollout:
    """Make a batch of noise on which the agent acts as it would on observations.

    Args:
        agent: Ours.
        config: The run, which gives the size.

    Returns:
        The batch.
    """
    size = config.env.n_envs * config.acktr.n_steps
    generator = torch.Generator().manual_seed(config.seed)
    shape = (size, *agent.observation_space.shape)
    if agent.observation_space.dtype == np.uint8:
        observations = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        observations = torch.randn(shape, generator=generator)
    observations = observations.to(agent.device)
    with torch.no_grad():
        actions, values, log_probs = agent.policy(observations)
    noise = torch.randn(2, size, generator=generator).to(agent.device)
    return Rollout(observations, actions, log_probs, noise[0], values.flatten() + noise[1], values.flatten())


def summarise(plan: Plan, found: Mapping[str, Sequence[Timing]]) -> Report:
    """Turn timings into a report.

    Args:
        plan: What was measured.
        found: The timings of each subject, one per round.

    Returns:
        Times per update, ACKTR over RMSprop, and where the time goes.
    """
    measured = {part: title for part, title in _TITLES.items() if f"{OURS}, {part}" in found}
    pairs = {title: (found[f"{OURS}, {part}"], found[f"{PEER}, {part}"]) for part, title in measured.items()}
    if {"actor", "critic"} <= measured.keys():
        both = [[a.unit() + c.unit() for a, c in zip(*side, strict=True)] for side in zip(*_mlp(pairs), strict=True)]
        pairs = {"64-64 actor and critic": (both[0], both[1]), **pairs}
    rows, results = [], {}
    for title, (ours, peer) in pairs.items():
        seconds = {c: [[t.per_unit(c) for t in side] for side in (ours, peer)] for c in ("wall", "cpu")}
        against = {clock: ratios(*sides) for clock, sides in seconds.items()}
        times = {clock: [spread([1000 * s for s in side]) for side in sides] for clock, sides in seconds.items()}
        rows.append([title, *(with_range(t) for c in times for t in times[c]), *map(with_range, against.values())])
        rounds = {OURS: raw(ours), PEER: raw(peer)}
        results[title] = {"milliseconds": times, "acktr_over_rmsprop": against, "rounds": rounds}
    columns = ["", "ACKTR ms", "RMSprop ms", "ACKTR CPU-ms", "RMSprop CPU-ms", "ACKTR ÷ RMSprop", "the same, CPU"]
    title = f"One update, median [range] of {plan.repeats}; RMSprop takes as many gradient steps on the same batches"
    split = {title: pairs[title][0] for title in measured.values()}
    return Report("update", vars(plan), [Table(title, columns, rows), breakdown(split)], results)


def breakdown(ours: Mapping[str, Sequence[Timing]]) -> Table:
    """Say where the time of our updates goes.

    Args:
        ours: Timings with phases, by network.

    Returns:
        Processor milliseconds per update and phase: the median of the rounds and its share of the sum.
    """
    rows = []
    for title, timings in ours.items():
        each = {p: spread([1000 * t.phases.get(p, (0.0, 0.0))[1] / t.work for t in timings]).median for p in PHASES}
        total = sum(each.values()) or 1.0
        rows.append([title, *(f"{ms:,.2f} ({100 * ms / total:.0f}%)" for ms in each.values())])
    return Table("Where an ACKTR update goes, CPU-ms (share)", ["", *PHASES], rows)


def _mlp(pairs: Mapping[str, Any]) -> tuple[Any, Any]:
    return pairs[_TITLES["actor"]], pairs[_TITLES["critic"]]


def _phases(agent: Any, part: str, step: Callable[[], None], times: int) -> dict[str, tuple[float, float]]:
    with Phases() as phases:
        parts.tell_apart(phases, parts.optimizer_of(agent, part))
        with phases.phase("gradient"):
            for _ in range(times):
                step()
    return phases.seconds


class _Still(gym.Env[Any, Any]):
    """An environment of any spaces in which nothing happens."""

    def __init__(self, observations: spaces.Space[Any], actions: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observations, actions

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin; SB3 asks for it.

        Args:
            seed: Ignored.
            options: Ignored.

        Returns:
            An observation and nothing else.
        """
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Do nothing.

        Args:
            action: Ignored.

        Returns:
            An observation, no reward, no end.
        """
        return self.observation_space.sample(), 0.0, False, False, {}
