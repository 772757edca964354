"""The stages of one run of a campaign: training, then two evaluations, each a program of its own.

What a stage leaves on the disk proves that it was done, so whoever comes back after days sees from the folder alone
what is left.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from agents import checkpoint, configfiles, rundir
from agents.config import Algorithm, RunConfig
from agents.errors import UsageError
from agents.rundir import RunDirectory

Kind = Literal["deterministic", "stochastic"]
"""How the final agent chooses its actions: the most likely ones, or samples."""

KINDS: tuple[Kind, ...] = ("deterministic", "stochastic")
"""Every final agent is evaluated both ways."""

EVALUATION_SEED = 2_000_003
"""Seed of the evaluations, the same for every run, and away from the seeds of training and of its last evaluation."""

_FREE = {"name", "device", "torch_threads", "evaluation", "checkpoint"}
_PLACES = ("config", "checkpoints", "tensorboard", "progress", "timing", "episodes", "evaluations", "model", "log")


@dataclass(frozen=True)
class Run:
    """One agent on one environment from one seed."""

    config: RunConfig
    """Everything that defines it."""
    source: Path | None
    """The configuration file it was read from; None if the environment's shipped one."""
    directory: RunDirectory
    """Where it lies."""
    episodes: int
    """Episodes of each evaluation of the final agent."""

    @property
    def label(self) -> str:
        """The run in words."""
        return f"{self.config.algorithm} on {self.config.env_id}, seed {self.config.seed}"

    @property
    def trained(self) -> bool:
        """Whether it was trained to its end."""
        return self.directory.result.exists()


@dataclass(frozen=True)
class Stage:
    """A program to run, and what it leaves."""

    name: str
    """What happens to the run, as a verb."""
    command: tuple[str, ...]
    """The program."""
    output: Path | None
    """Where its standard output goes when it has succeeded; None sends it to the run's log."""


def next_stage(run: Run) -> Stage | None:
    """Find what is to be done next.

    Args:
        run: The run.

    Returns:
        The first stage that has left no proof; None if the run is done.
    """
    if not run.trained:
        found = checkpoint.listing(run.directory)
        name = f"goes on from {found[-1].stem}" if found else "starts"
        return Stage(name, tuple(train_command(run, resume=bool(found))), None)
    for kind in KINDS:
        if not is_evaluated(run, kind):
            command = tuple(evaluate_command(run, kind))
            return Stage(f"is evaluated, {kind}", command, evaluation_path(run.directory, kind))
    return None


def train_command(run: Run, *, resume: bool) -> list[str]:
    """Say how to train.

    Args:
        run: The run.
        resume: Go on from its newest checkpoint.

    Returns:
        The command line.
    """
    program, path, config = [sys.executable, "-m", "scripts.train"], str(run.directory.path), run.config
    looks = ["--evaluation.period", str(config.evaluation.period)]
    looks += ["--evaluation.episodes", str(config.evaluation.episodes)]
    if resume:
        return [*program, "--resume", path, *looks]
    who = [config.env_id, "--algorithm", config.algorithm, "--seed", str(config.seed), "--run-dir", path]
    how = ["--total-timesteps", str(config.total_timesteps), "--torch-threads", str(config.torch_threads)]
    source = ["--config", str(run.source)] if run.source else []
    threads = config.env.options.atari.threads
    emulators = ["--env.options.atari.threads", str(threads)] if threads else []
    return [*program, *who, *how, *looks, *source, *emulators]


def evaluate_command(run: Run, kind: Kind) -> list[str]:
    """Say how to evaluate the final agent.

    Args:
        run: The run.
        kind: How it chooses its actions.

    Returns:
        The command line of a program that prints the scores as JSON.
    """
    how = ["--episodes", str(run.episodes), "--seed", str(EVALUATION_SEED), "--json"]
    sampled = ["--stochastic"] if kind == "stochastic" else []
    return [sys.executable, "-m", "scripts.evaluate", str(run.directory.path), *how, *sampled]


def evaluation_path(directory: RunDirectory, kind: Kind) -> Path:
    """Name the file of an evaluation.

    Args:
        directory: The run's directory.
        kind: How actions were chosen.

    Returns:
        A file next to ``result.json``.
    """
    return directory.path / f"final-{kind}.json"


def is_evaluated(run: Run, kind: Kind) -> bool:
    """Say whether an evaluation has been made, over as many episodes as are asked for.

    Args:
        run: The run.
        kind: How actions are chosen.

    Returns:
        Whether its file is there.
    """
    try:
        content = rundir.read_json(evaluation_path(run.directory, kind))
    except UsageError:
        return False
    return isinstance(content, dict) and content.get("episodes") == run.episodes


def check_unchanged(run: Run) -> None:
    """Make sure that what already lies in a run's folder is the run that is wanted.

    Runs of two configurations under one name would be averaged without a word.

    Args:
        run: The run, which may not have begun.

    Raises:
        UsageError: If it was begun with another configuration.
    """
    if not (run.trained or checkpoint.listing(run.directory)):
        return
    other = difference(configfiles.load(run.directory.config), run.config)
    if other is not None:
        raise UsageError(f"{run.directory.path} was made with another {other}; name another --output")


def difference(before: RunConfig, now: RunConfig) -> str | None:
    """Compare two configurations in all that makes a run another run.

    Args:
        before: A configuration.
        now: One that it should be the same as.

    Returns:
        The first field in which they differ, with its values where these are short; None if there is none.
    """
    wanted = defining(now)
    for name, value in defining(before).items():
        if value != wanted.get(name):
            short = isinstance(value, (int, str))
            return f"{name} ({value!r}, now {wanted.get(name)!r})" if short else name
    return None


def defining(config: RunConfig) -> dict[str, Any]:
    """Pick what makes a run the run it is.

    Args:
        config: A configuration.

    Returns:
        Its fields by name, but those that change nothing that is learnt, and the settings of who does not learn:
        nothing of a peer's run depends on those of the others.
    """
    free = _FREE | {name for name in get_args(Algorithm) if name != config.algorithm}
    return {field.name: getattr(config, field.name) for field in fields(RunConfig) if field.name not in free}


def prepare(run: Run) -> None:
    """Make the folder of a run, and empty it of a training that never came to its first checkpoint.

    Args:
        run: The run, about to be trained or evaluated.

    Raises:
        UsageError: If there is something in the folder that no training leaves.
    """
    directory = run.directory
    directory.path.mkdir(parents=True, exist_ok=True)
    if run.trained or checkpoint.listing(directory):
        return
    ours = {getattr(directory, place) for place in _PLACES}
    foreign = [path.name for path in directory.path.iterdir() if path not in ours and path.suffix != ".tmp"]
    if foreign:
        raise UsageError(f"{directory.path} holds {foreign[0]}, which is no part of a run; move it away")
    for path in directory.path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != directory.log:
            path.unlink()
