"""Runs of a campaign as small files, which outlive the folder that they were trained in.

A run's directory weighs megabytes, most of them checkpoints. Its record, some ten kilobytes, holds what the standings
need and what tells whether it is the run that is wanted: fit for a repository, from which a campaign can go on where
nothing else of it is left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents import configfiles, rundir
from agents.benchmarks.outcomes import Outcome, Track, read
from agents.benchmarks.stages import Run, defining, difference, next_stage
from agents.errors import UsageError
from agents.schema import plain

_NUMBERS = re.compile(r"\[([-+.,\deE\s]+)\]")


def path_of(run: Run, folder: Path) -> Path:
    """Name the file of a run's record.

    Args:
        run: The run.
        folder: The folder of the records.

    Returns:
        The file; a slash in the environment's id becomes a dash.
    """
    config = run.config
    return folder / config.env_id.replace("/", "-") / config.algorithm / f"seed-{config.seed}.json"


def keep(runs: Sequence[Run], folder: Path) -> None:
    """Record the runs that are done and have no record yet.

    Args:
        runs: The runs, done or not.
        folder: The folder of the records.
    """
    for run in runs:
        path = path_of(run, folder)
        if path.exists() or next_stage(run) is not None:
            continue
        outcome = read(run)
        if outcome is not None:
            rundir.write_text(path, _text(run, outcome))


def recorded(run: Run, folder: Path) -> Outcome | None:
    """Read the record of a run.

    Args:
        run: The run.
        folder: The folder of the records.

    Returns:
        What it left; None if it has no record.

    Raises:
        UsageError: If the record is damaged, or that of another configuration.
    """
    path = path_of(run, folder)
    if not path.exists():
        return None
    record: Any = rundir.read_json(path)
    try:
        _check(record, run, path)
        return Outcome(
            run.config.env_id,
            run.config.algorithm,
            run.config.seed,
            {name: float(score) for name, score in record["scores"].items()},
            _track(record["training"]),
            _track(record["evaluated"]),
            float(record["steps_per_second"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove it to train the run again") from None


def origins(run: Run, folder: Path) -> list[Any]:
    """Find out where a recorded run came from.

    Args:
        run: A run with a record.
        folder: The folder of the records.

    Returns:
        One entry for each of its parts.
    """
    record: Any = rundir.read_json(path_of(run, folder))
    return list(record.get(configfiles.PROVENANCE, []))


def _check(record: Mapping[str, Any], run: Run, path: Path) -> None:
    if record["episodes"] != run.episodes:
        played = record["episodes"]
        raise UsageError(f"{path} has evaluations of {played} episodes, not {run.episodes}; name another --records")
    other = difference(configfiles.complete(record["config"], str(path)), run.config)
    if other is not None:
        raise UsageError(f"{path} is of another {other}; name another --records")


def _track(columns: Mapping[str, Sequence[float]]) -> Track:
    names = ("timesteps", "return", "seconds", "episodes")
    track = Track(*(np.array(columns[name], dtype=np.float64) for name in names))
    if len({len(columns[name]) for name in names}) > 1:
        raise ValueError("columns of different lengths")
    return track


def _text(run: Run, outcome: Outcome) -> str:
    """Put a run's record in JSON, one line for each list of numbers.

    Returns:
        The text.
    """
    record = {
        "scores": dict(outcome.scores),
        "episodes": run.episodes,
        "steps_per_second": outcome.steps_per_second,
        "training": _columns(outcome.learned),
        "evaluated": _columns(outcome.evaluated),
        "config": plain(defining(run.config)),
        configfiles.PROVENANCE: list(map(_origin, configfiles.provenance(run.directory.config))),
    }
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(record, indent=1)) + "\n"


def _origin(part: Any) -> Any:
    # The command names folders of the machine, and says no more than the configuration.
    return {name: value for name, value in part.items() if name != "command"} if isinstance(part, dict) else part


def _columns(track: Track) -> dict[str, list[float]]:
    return {
        "timesteps": track.steps.tolist(),
        "return": [float(f"{mean:.7g}") for mean in track.means],
        "seconds": [round(time, 2) for time in track.seconds.tolist()],
        "episodes": track.episodes.tolist(),
    }
