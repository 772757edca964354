"""Who is how good: statistics over the runs of a campaign.

A score is one run's mean return. Scores of several seeds become an interquartile mean with a 95 % interval from a
bootstrap that draws seeds anew within each environment (Agarwal et al. 2021, Deep Reinforcement Learning at the Edge
of the Statistical Precipice).

Returns of different environments have different zeros and units, and Reacher's are negative, so ratios of returns mean
nothing across environments. What is compared is

    share = (return - random) / (best peer - random),

where `random` is the mean return of uniformly random actions on the environment and `best peer` the highest
interquartile mean among the peers: 0 is learning nothing, 1 is as good as the best peer, whatever the sign of the
returns. Both ends are held fixed in the bootstrap: the interval is that of the agent's seeds alone. Where no peer is
better than random there is no such scale, and the environment is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.benchmarks.outcomes import Outcome, Track
from agents.callbacks import LAST
from agents.curves import iqm, stratified_bootstrap

Array = NDArray[np.float64]

OURS, RIVAL = "acktr", "ppo"
"""Whose standing it is, and whose final return is the mark in the race for few steps."""

MEASURES = ("training", "deterministic", "stochastic")
"""Mean return of the last 100 training episodes, and of the final agent without noise and with sampled actions."""

THRESHOLDS = {"HalfCheetah-v5": 4500.0, "Hopper-v5": 2500.0, "Walker2d-v5": 3000.0}
"""Returns to be reached in as few seconds as possible."""

WAYS = ("training", "deterministic")
"""Measures taken while an agent learns: the return of what it does, noise and all, and of what it has learned."""

GRID = 1000
"""Times at which a mean over runs is compared with a mark."""


@dataclass(frozen=True)
class Estimate:
    """An interquartile mean over runs."""

    centre: float
    """The interquartile mean."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    runs: int
    """Number of runs."""


@dataclass(frozen=True)
class Scale:
    """What counts as 0 and as 1 on an environment."""

    random: float
    """Mean return of random actions."""
    peer: str
    """The best of the others."""
    best: float
    """Its interquartile mean."""


@dataclass(frozen=True)
class Comparison:
    """Ours on an environment, measured by the best peer."""

    scale: Scale
    """What counts as 0 and as 1."""
    share: Estimate
    """Ours on that scale."""


@dataclass(frozen=True)
class Overall:
    """An algorithm over all environments."""

    share: Estimate
    """Interquartile mean of all its runs, each on its environment's scale."""
    environments: tuple[str, ...]
    """Those that count: with a scale, and with runs of this algorithm."""


@dataclass(frozen=True)
class Race:
    """Steps to the rival's final return."""

    mark: float
    """The rival's interquartile mean at the end, the one of the table of returns."""
    ours: float | None
    """Steps after which our interquartile mean is there; None if it never is."""
    theirs: float
    """Steps after which the rival's own is there for the first time, or all of its steps."""

    @property
    def ratio(self) -> float | None:
        """Our steps over the rival's."""
        return None if self.ours is None else self.ours / self.theirs


@dataclass(frozen=True)
class Sprint:
    """Seconds to a given return."""

    threshold: float
    """The return."""
    median: float | None
    """Median over all runs, where a run that never gets there counts as infinite; None if that is infinite."""
    reached: int
    """Runs that got there."""
    runs: int
    """All runs."""


@dataclass(frozen=True)
class Standings:
    """Everything that a campaign says."""

    returns: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    """Returns by environment, algorithm and measure."""
    against: Mapping[str, Mapping[str, Comparison]]
    """Ours against the best peer, by environment and measure."""
    overall: Mapping[str, Mapping[str, Overall]]
    """By algorithm and measure."""
    races: Mapping[str, Mapping[str, Race]]
    """By measure and environment."""
    sprints: Mapping[str, Mapping[str, Mapping[str, Sprint]]]
    """By measure, environment and algorithm."""


def compute(outcomes: Sequence[Outcome], random: Mapping[str, float]) -> Standings:
    """Compute everything that the runs at hand allow.

    Args:
        outcomes: The runs, any part of a campaign.
        random: For each of their environments the mean return of random actions.

    Returns:
        The standings; what lacks its runs is not in them.
    """
    groups = grouped(outcomes)
    scores = {env_id: {name: _scores(runs) for name, runs in by.items()} for env_id, by in groups.items()}
    scales = {env_id: _scales(by, random[env_id]) for env_id, by in scores.items()}
    against = {env_id: _against(by.get(OURS, {}), scales[env_id]) for env_id, by in scores.items()}
    names = dict.fromkeys(name for by in groups.values() for name in by)
    return Standings(
        {env_id: {name: _estimates(measured) for name, measured in by.items()} for env_id, by in scores.items()},
        {env_id: found for env_id, found in against.items() if found},
        {name: _overall(name, scores, scales) for name in names},
        {measure: _races(groups, measure) for measure in WAYS},
        {measure: _sprints(groups, measure) for measure in WAYS},
    )


def grouped(outcomes: Iterable[Outcome]) -> dict[str, dict[str, list[Outcome]]]:
    """Group runs.

    Args:
        outcomes: The runs.

    Returns:
        Runs by environment and algorithm, in the order in which these come first.
    """
    groups: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.env_id, {}).setdefault(outcome.algorithm, []).append(outcome)
    return groups


def estimate(strata: Sequence[Array]) -> Estimate:
    """Compute an interquartile mean and its interval.

    Args:
        strata: For each environment the scores of its runs, [runs].

    Returns:
        The mean over all runs; its interval comes from runs that are drawn within each environment.
    """
    low, high = stratified_bootstrap([scores[:, None] for scores in strata])
    every = np.concatenate(strata)
    return Estimate(float(iqm(every)), float(low[0]), float(high[0]), len(every))


def scale(peers: Mapping[str, Array], random: float) -> Scale | None:
    """Find what counts as 0 and as 1.

    Args:
        peers: Scores of the peers, [runs] each.
        random: Mean return of random actions.

    Returns:
        The scale; None if no peer is better than random.
    """
    means = {peer: float(iqm(scores)) for peer, scores in peers.items()}
    best = max(means, key=lambda peer: means[peer], default=None)
    if best is None or means[best] <= random:
        return None
    return Scale(random, best, means[best])


def normalise(scores: Array, by: Scale) -> Array:
    """Put scores on a scale.

    Args:
        scores: Returns, [runs].
        by: The scale.

    Returns:
        0 for random's, 1 for the best peer's, [runs].
    """
    return (scores - by.random) / (by.best - by.random)


def track(run: Outcome, measure: str) -> Track:
    """Follow a run.

    Args:
        run: The run.
        measure: ``deterministic`` for its evaluations, or ``training`` for the mean return of the last 100 episodes.
            Before 100 have ended there is none: a lucky first one must not count as having learnt.

    Returns:
        The track, which may be empty.
    """
    if measure == "deterministic":
        return run.evaluated
    whole, learned = run.learned.episodes >= LAST, run.learned
    return Track(learned.steps[whole], learned.means[whole], learned.seconds[whole], learned.episodes[whole])


def centre(runs: Sequence[Outcome], measure: str) -> tuple[Array, Array]:
    """Follow the interquartile mean over runs.

    Args:
        runs: Runs of one algorithm on one environment.
        measure: What to follow.

    Returns:
        Steps, from where all runs have a mean to where the first one ends, and the interquartile mean of their means,
        both [``GRID``]; empty if a run has none.
    """
    tracks = [track(run, measure) for run in runs]
    if not runs or not all(map(len, tracks)):
        return np.zeros(0), np.zeros(0)
    last = min(each.steps[-1] for each in tracks)
    grid = np.linspace(min(max(each.steps[0] for each in tracks), last), last, GRID)
    # The last one by then; a run whose means begin later than another ends shows its first.
    at = [np.maximum(np.searchsorted(each.steps, grid, side="right") - 1, 0) for each in tracks]
    return grid, iqm(np.stack([each.means[index] for each, index in zip(tracks, at, strict=True)]))


def race(ours: Sequence[Outcome], rivals: Sequence[Outcome], measure: str) -> Race | None:
    """Count the steps to the rival's final return.

    Args:
        ours: Our runs on an environment.
        rivals: The rival's.
        measure: Which return.

    Returns:
        The race; None where one of them has no runs with a track each.
    """
    (our_steps, our_means), (their_steps, their_means) = centre(ours, measure), centre(rivals, measure)
    if not len(our_steps) or not len(their_steps):
        return None
    final = [run.scores[measure] for run in rivals if measure in run.scores]
    # A look under way has few episodes; the final score has a hundred, and may be one that no look came up to.
    mark = float(iqm(np.array(final))) if final else float(their_means[-1])
    theirs = _first(their_steps, their_means, mark)
    return Race(mark, _first(our_steps, our_means, mark), float(their_steps[-1]) if theirs is None else theirs)


def sprint(runs: Sequence[Outcome], threshold: float, measure: str) -> Sprint:
    """Time the way to a return.

    Args:
        runs: Runs of one algorithm on one environment, at least one.
        threshold: The mean return to be reached.
        measure: Of what.

    Returns:
        The time on the runs' own clocks.
    """
    times = [seconds_to(run, threshold, measure) for run in runs]
    reached = [time for time in times if time is not None]
    never = [np.inf] * (len(times) - len(reached))
    median = float(np.median([*reached, *never]))
    return Sprint(threshold, median if np.isfinite(median) else None, len(reached), len(times))


def seconds_to(run: Outcome, threshold: float, measure: str) -> float | None:
    """Time one run's way to a return.

    Args:
        run: The run.
        threshold: The mean return to be reached.
        measure: Of what.

    Returns:
        Seconds on the run's own clock; None if it never got there.
    """
    followed = track(run, measure)
    return _first(followed.seconds, followed.means, threshold)


def _first(positions: Array, values: Array, mark: float) -> float | None:
    there = np.flatnonzero(values >= mark)
    return float(positions[there[0]]) if len(there) else None


_Groups = Mapping[str, Mapping[str, list[Outcome]]]  # by environment and algorithm


def _races(groups: _Groups, measure: str) -> dict[str, Race]:
    races = {env_id: race(by.get(OURS, []), by.get(RIVAL, []), measure) for env_id, by in groups.items()}
    return {env_id: found for env_id, found in races.items() if found is not None}


def _sprints(groups: _Groups, measure: str) -> dict[str, dict[str, Sprint]]:
    return {
        env_id: {name: sprint(runs, THRESHOLDS[env_id], measure) for name, runs in by.items()}
        for env_id, by in groups.items()
        if env_id in THRESHOLDS
    }


_Scores = Mapping[str, Array]  # by measure, those that a run has
_Scales = Mapping[str, Scale]  # by measure


def _scores(runs: Sequence[Outcome]) -> dict[str, Array]:
    found = {measure: [run.scores[measure] for run in runs if measure in run.scores] for measure in MEASURES}
    return {measure: np.array(values) for measure, values in found.items() if values}


def _estimates(scores: _Scores) -> dict[str, Estimate]:
    return {measure: estimate([values]) for measure, values in scores.items()}


def _scales(scores: Mapping[str, _Scores], random: float) -> dict[str, Scale]:
    peers = {name: measured for name, measured in scores.items() if name != OURS}
    found = {
        measure: scale({name: by[measure] for name, by in peers.items() if measure in by}, random)
        for measure in MEASURES
    }
    return {measure: each for measure, each in found.items() if each is not None}


def _against(ours: _Scores, scales: _Scales) -> dict[str, Comparison]:
    return {
        measure: Comparison(by, estimate([normalise(ours[measure], by)]))
        for measure, by in scales.items()
        if measure in ours
    }


def _overall(
    name: str, scores: Mapping[str, Mapping[str, _Scores]], scales: Mapping[str, _Scales]
) -> dict[str, Overall]:
    found = {}
    for measure in MEASURES:
        strata = {
            env_id: normalise(by[name][measure], scales[env_id][measure])
            for env_id, by in scores.items()
            if measure in scales[env_id] and measure in by.get(name, {})
        }
        if strata:
            found[measure] = Overall(estimate(list(strata.values())), tuple(strata))
    return found
