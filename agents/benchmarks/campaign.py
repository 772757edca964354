"""A campaign: agents and peers on several environments from several seeds, side by side, over days if need be.

Every run is a ``scripts.train`` of its own below the output folder, at ``ENV/ALGORITHM/seed-S``. When it is trained,
its final agent plays fixed episodes. The same command again goes on where the last one stopped: what is there is kept,
what has a checkpoint goes on from it. At the end (or at any time with ``summary_only``) comes a summary of what is
there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import envs
from agents import configfiles, curves
from agents.benchmarks import crew, outcomes, records, scoreboard, stages, standings
from agents.benchmarks.crew import Failure
from agents.benchmarks.outcomes import Outcome
from agents.benchmarks.report import Report
from agents.benchmarks.stages import Run
from agents.claims import claimed
from agents.config import Algorithm, EvaluationConfig, RunConfig
from agents.errors import UsageError
from agents.ranges import check as check_ranges
from agents.rundir import RunDirectory
from agents.schema import nearest

ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
"""Whoever can be sent on a campaign."""

_OURS = standings.OURS
_EPISODES_UNDER_WAY = 10


@dataclass(frozen=True)
class Plan:
    """Who learns what, how often and for how long."""

    environments: tuple[str, ...] = (
        "Ant-v5",
        "HalfCheetah-v5",
        "Hopper-v5",
        "InvertedDoublePendulum-v5",
        "InvertedPendulum-v5",
        "Reacher-v5",
        "Swimmer-v5",
        "Walker2d-v5",
    )
    """Environment ids."""
    algorithms: tuple[str, ...] = ("acktr", "ppo", "trpo", "a2c")
    """Who learns: of acktr, ppo, a2c and trpo."""
    seeds: int = 10
    """Seeds of ACKTR on each environment."""
    peer_seeds: int = 5
    """Seeds of each of the others on each environment."""
    first_seed: int = 0
    """The first seed; the others follow it."""
    total_timesteps: int = 1_000_000
    """Environment steps of each run."""
    jobs: int | None = None
    """Runs at a time, each on one thread; None takes the number of cores."""
    acktr_config: Path | None = None
    """Configuration file of ACKTR for every environment, such as configs/mujoco.yaml; None takes each one's shipped
    file, as the peers always do."""
    episodes: int = 100
    """Episodes of each evaluation of a final agent: as many without noise, as many with sampled actions."""
    evaluation_period: int = 50_000
    """Environment steps between two evaluations of an agent that learns, 10 episodes each without noise; the runs'
    clocks stand still meanwhile. 0 for none."""
    records: Path | None = None
    """Folder of small records, some ten kilobytes a run: whatever has one there is done, wherever it was trained, and
    every run that gets done is given one; None for none."""
    summary_only: bool = False
    """Train nothing; summarise what is there."""


@dataclass(frozen=True)
class AtariPlan(Plan):
    """A campaign on Atari games."""

    environments: tuple[str, ...] = ("ALE/Pong-v5", "ALE/Breakout-v5")
    """Environment ids."""
    total_timesteps: int = 2_000_000
    """Environment steps of each run."""


def run(name: str, plan: Plan, output: Path, tell: Callable[[str], None]) -> Report:
    """Do what is left of a campaign and summarise it.

    Args:
        name: The campaign's name.
        plan: What to do.
        output: The campaign's folder.
        tell: Where to announce each start and end.

    Returns:
        The summary of everything that is there; failed runs stand in its notes and under ``failures``.
    """
    check(plan)
    wanted = list(runs_of(plan, output))
    for each in wanted:
        stages.check_unchanged(each)
    if plan.summary_only:
        _record(wanted, plan)
        return summarise(name, plan, output, wanted, [], tell)
    output.mkdir(parents=True, exist_ok=True)
    with claimed(output, f"another campaign is at work in {output}; wait for it, or name another --output") as lock:
        todo = [each for each in wanted if _recorded(each, plan) is None and stages.next_stage(each) is not None]
        tell(f"{len(wanted)} runs, {len(wanted) - len(todo)} of them done already")
        _record(wanted, plan)  # of those that were done without records
        failures = crew.work(todo, plan.jobs or cores(), lock, tell, lambda done: _record([done], plan))
        return summarise(name, plan, output, wanted, failures, tell)


def check(plan: Plan) -> None:
    """Make sure that a plan can be carried out.

    Args:
        plan: The plan.

    Raises:
        UsageError: If nobody learns, nothing is to be learnt, or an algorithm is unknown.
    """
    if not plan.environments:
        raise UsageError("--environments is empty; name at least one, for example HalfCheetah-v5")
    if not plan.algorithms:
        raise UsageError(f"--algorithms is empty; name at least one of {', '.join(ALGORITHMS)}")
    for algorithm in plan.algorithms:
        if algorithm not in ALGORITHMS:
            meant = nearest(algorithm, list(ALGORITHMS))
            raise UsageError(f"there is no algorithm {algorithm!r}; did you mean {meant}?")
    for env_id in plan.environments:
        # Finds unknown ids and missing packages, and names what was meant.
        envs.make(env_id, 1, seed=0, options=configfiles.shipped(env_id).env.options).close()


def runs_of(plan: Plan, output: Path) -> Iterator[Run]:
    """List a plan's runs, so that after any part of them every environment has seen nearly as many seeds.

    Args:
        plan: The plan.
        output: The campaign's folder.

    Yields:
        Each run once, seed by seed.
    """

    @cache
    def config_of(env_id: str, algorithm: Any) -> RunConfig:
        source = plan.acktr_config if algorithm == _OURS else None
        config = configfiles.load(source, env_id) if source else configfiles.shipped(env_id, algorithm)
        looked_at = EvaluationConfig(_EPISODES_UNDER_WAY, plan.evaluation_period)
        wanted = replace(config, total_timesteps=plan.total_timesteps, evaluation=looked_at)
        return _on_one_thread(replace(wanted, algorithm=algorithm))

    seeds = {algorithm: plan.seeds if algorithm == _OURS else plan.peer_seeds for algorithm in plan.algorithms}
    for number in range(max(seeds.values())):
        for env_id in dict.fromkeys(plan.environments):
            for algorithm in (algorithm for algorithm, count in seeds.items() if number < count):
                seed = plan.first_seed + number
                config = replace(config_of(env_id, algorithm), seed=seed)
                check_ranges(config)
                path = folder_of(output, env_id) / algorithm / f"seed-{seed}"
                source = plan.acktr_config if algorithm == _OURS else None
                yield Run(config, source, RunDirectory(path), plan.episodes)


def folder_of(output: Path, env_id: str) -> Path:
    """Name the folder of an environment.

    Args:
        output: The campaign's folder.
        env_id: The environment; a slash in it becomes a dash.

    Returns:
        The folder.
    """
    return output / env_id.replace("/", "-")


def cores() -> int:
    """Count the processor cores that this program may use.

    Returns:
        How many.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summarise(
    name: str,
    plan: Plan,
    output: Path,
    wanted: Sequence[Run],
    failures: Sequence[Failure],
    tell: Callable[[str], None],
) -> Report:
    """Summarise what is there of a campaign.

    Args:
        name: The campaign's name.
        plan: What was planned.
        output: The campaign's folder.
        wanted: Its runs.
        failures: Runs that failed this time.
        tell: Where to announce what takes a while.

    Returns:
        Tables, every number, and the curves as an attachment for ``scripts.plot``.

    Raises:
        UsageError: If nothing was to be trained and nothing is there.
    """
    found = [outcome for each in wanted if (outcome := _recorded(each, plan) or outcomes.read(each)) is not None]
    if plan.summary_only and not found:
        raise UsageError(f"there is no finished run of this plan in {output}; leave --summary-only out")
    tell(f"summarising {len(found)} of {len(wanted)} runs")
    random = {
        env_id: outcomes.random_score(
            _on_one_thread(configfiles.shipped(env_id)),
            plan.episodes,
            folder_of(plan.records or output, env_id) / "random.json",
        )
        for env_id in dict.fromkeys(outcome.env_id for outcome in found)
    }
    table = standings.compute(found, random)
    results = {
        **asdict(table),
        "ratios_of_steps": {
            measure: {env_id: race.ratio for env_id, race in races.items()} for measure, races in table.races.items()
        },
        "runs": [outcomes.plain(outcome) for outcome in found],
        "failures": [asdict(failure) for failure in failures],
    }
    lines = [curve for outcome in found if (curve := outcomes.curve(outcome)) is not None]
    notes = [*missing(wanted, found), *mixed(wanted, plan.records), *map(str, failures)]
    return Report(name, vars(plan), scoreboard.tables(table), results, notes, {".csv": curves.to_csv(lines)})


def missing(wanted: Sequence[Run], found: Sequence[Outcome]) -> list[str]:
    """Say which runs a summary lacks.

    Args:
        wanted: The runs of the plan.
        found: Those that have a result.

    Returns:
        A line for each environment and algorithm that is not complete.
    """
    planned = Counter((each.config.env_id, each.config.algorithm) for each in wanted)
    done = Counter((outcome.env_id, outcome.algorithm) for outcome in found)
    return [
        f"{env_id}, {algorithm}: {done[env_id, algorithm]} of {count} seeds are there"
        for (env_id, algorithm), count in planned.items()
        if done[env_id, algorithm] < count
    ]


def mixed(wanted: Sequence[Run], kept: Path | None) -> list[str]:
    """Say so if the code changed while a campaign was under way.

    Args:
        wanted: The runs of the plan.
        kept: The folder of the records; None for none.

    Returns:
        A line if the trained ones come from more than one commit.
    """
    commits = Counter(commit for each in wanted for commit in _commits(each, kept))
    counted = ", ".join(f"{commit[:10]} ({count})" for commit, count in commits.most_common())
    return [f"the runs were made by {len(commits)} commits: {counted}"] if len(commits) > 1 else []


def _commits(run: Run, kept: Path | None) -> set[str]:
    """The commits of a run's parts, as far as they are known."""
    recorded = kept and records.path_of(run, kept).exists()
    parts = records.origins(run, kept) if kept and recorded else outcomes.origins(run)
    known = [part.get("git_commit") for part in parts if isinstance(part, dict)]
    return {str(commit) for commit in known if commit}


def _record(wanted: Sequence[Run], plan: Plan) -> None:
    if plan.records is not None:
        records.keep(wanted, plan.records)


def _recorded(run: Run, plan: Plan) -> Outcome | None:
    return None if plan.records is None else records.recorded(run, plan.records)


def _on_one_thread(config: RunConfig) -> RunConfig:
    options = config.env.options
    if config.env_id.startswith("ALE/"):
        options = replace(options, atari=replace(options.atari, threads=1))
    return replace(config, torch_threads=1, env=replace(config.env, options=options))
