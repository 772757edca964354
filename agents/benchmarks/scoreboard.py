"""The standings of a campaign as tables to read."""

from __future__ import annotations

from collections.abc import Mapping

from agents.benchmarks.report import Table
from agents.benchmarks.standings import MEASURES, OURS, RIVAL, Comparison, Estimate, Overall, Race, Sprint, Standings

_NAMES = {"acktr": "ACKTR", "ppo": "PPO", "trpo": "TRPO", "a2c": "A2C"}
_HEADS = ("training, last 100", "deterministic", "stochastic")
_NOTHING = "–"


def tables(standings: Standings) -> list[Table]:
    """Put standings in tables.

    Args:
        standings: The standings.

    Returns:
        Those tables that have rows.
    """
    made = [_returns(standings), _against(standings), _overall(standings)]
    made += [_races(races, measure) for measure, races in standings.races.items()]
    made += [_sprints(sprints, measure) for measure, sprints in standings.sprints.items()]
    return [table for table in made if table.rows]


def _returns(standings: Standings) -> Table:
    rows = [
        [env_id, _NAMES[algorithm], _runs(measured), *(_estimate(measured.get(measure)) for measure in MEASURES)]
        for env_id, by in standings.returns.items()
        for algorithm, measured in by.items()
    ]
    title = "Return: interquartile mean [95 % interval] over seeds"
    return Table(title, ("environment", "algorithm", "seeds", *_HEADS), rows)


def _against(standings: Standings) -> Table:
    rows = [
        [env_id, f"{_random(by):,.1f}", *(_compared(by.get(measure)) for measure in MEASURES)]
        for env_id, by in standings.against.items()
    ]
    title = f"{_NAMES[OURS]} over the best peer: (return - random) / (best peer - random) [95 % interval], best peer"
    return Table(title, ("environment", "random", *_HEADS), rows)


def _overall(standings: Standings) -> Table:
    rows = [
        [_NAMES[algorithm], *(_shared(by.get(measure)) for measure in MEASURES)]
        for algorithm, by in standings.overall.items()
        if by
    ]
    title = "Over all environments: interquartile mean of the same shares [95 % interval], environments"
    return Table(title, ("algorithm", *_HEADS), rows)


def _races(races: Mapping[str, Race], measure: str) -> Table:
    rows = [
        [env_id, f"{found.mark:,.1f}", _number(found.ours), _number(found.theirs), _number(found.ratio, 2)]
        for env_id, found in races.items()
    ]
    ours, rival = _NAMES[OURS], _NAMES[RIVAL]
    title = f"Environment steps until the interquartile mean of the {measure} return is {rival}'s final one"
    return Table(title, ("environment", f"{rival}'s final", ours, rival, f"{ours} ÷ {rival}"), rows)


def _sprints(sprints: Mapping[str, Mapping[str, Sprint]], measure: str) -> Table:
    rows = [
        [
            env_id,
            _NAMES[algorithm],
            f"{found.threshold:,.0f}",
            _number(found.median),
            f"{found.reached} of {found.runs}",
        ]
        for env_id, by in sprints.items()
        for algorithm, found in by.items()
    ]
    title = f"Seconds of training until the {measure} return is there: median over seeds, on the runs' own clocks"
    return Table(title, ("environment", "algorithm", "return", "seconds", "seeds that got there"), rows)


def _runs(measured: Mapping[str, Estimate]) -> str:
    return str(max((found.runs for found in measured.values()), default=0))


def _random(by: Mapping[str, Comparison]) -> float:
    return next(iter(by.values())).scale.random


def _compared(found: Comparison | None) -> str:
    return _NOTHING if found is None else f"{_estimate(found.share, 2)} {_NAMES[found.scale.peer]}"


def _shared(found: Overall | None) -> str:
    return _NOTHING if found is None else f"{_estimate(found.share, 2)} ({len(found.environments)})"


def _estimate(found: Estimate | None, digits: int = 1) -> str:
    if found is None:
        return _NOTHING
    return f"{found.centre:,.{digits}f} [{found.low:,.{digits}f}, {found.high:,.{digits}f}]"


def _number(value: float | None, digits: int = 0) -> str:
    return "never" if value is None else f"{value:,.{digits}f}"
