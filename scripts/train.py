"""Train an agent: ``python -m scripts.train HalfCheetah-v5``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from acktr.ranks import LostRankError
from agents import (
    callbacks,
    checkpoint,
    configfiles,
    faults,
    interruption,
    loading,
    provenance,
    ranks,
    rundir,
    training,
)
from agents.claims import claimed
from agents.config import RunConfig
from agents.errors import UsageError
from agents.ranges import check
from agents.ranks import Company
from agents.schema import leaves, value_at
from scripts import console

_PROG = "python -m scripts.train"
_FREE_ON_RESUME = (
    *("total_timesteps", "max_faults", "device", "torch_threads", "ranks", "name", "evaluation", "checkpoint"),
)


@dataclass(frozen=True)
class Arguments:
    """Options of the program."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """What to run."""
    config: Path | None = None
    """Configuration file; by default the one that configs/index.yaml names for the environment."""
    run_dir: Path | None = None
    """Where to put the run; by default runs/ENV_ID/TIME-sSEED."""
    resume: Path | None = None
    """Run directory to go on with, from its newest checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Its arguments; None takes the process's.

    Returns:
        The exit status.
    """
    return console.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    with ranks.joined(console.say) as company:
        if company.ranks.rank and not {"-h", "--help"}.isdisjoint(argv):
            return console.DONE
        return _together(argv, company)


def _together(argv: Sequence[str], company: Company) -> int:
    arguments = _agreed(argv, company)
    path: Path = company.ranks.first(arguments.resume or arguments.run_dir or _new_path(arguments.run))
    directory, otherwise = rundir.RunDirectory(path), f"another process trains in {path}; wait for it, or stop it"
    with ExitStack() as claims:

        def start() -> checkpoint.Checkpoint | None:
            if not arguments.resume:
                return None
            # Before anything is read that somebody else may be writing.
            claims.enter_context(claimed(rundir.existing(path).path, otherwise))
            return _start(arguments.resume, arguments.run)

        def opened() -> None:
            _open(directory, arguments, argv)
            if not arguments.resume:
                claims.enter_context(claimed(path, otherwise))
            print(f"{_title(arguments.run)}: {path}", flush=True)

        def open_directory() -> rundir.RunDirectory:
            ranks.by_first(company, opened)
            company.remedy = f"go on with: {_command(company, directory)}"
            return directory

        return _train(arguments.run, directory, open_directory, ranks.by_first(company, start), company)


def _agreed(argv: Sequence[str], company: Company) -> Arguments:
    """The options, which all processes have been given alike; those of a stored run are the first one's to read."""
    alone, here = company.ranks.size == 1, company.ranks
    resumed = ranks.restarts() > 0 or any(token.split("=", 1)[0] == "--resume" for token in argv)

    def read() -> Arguments | None:
        if here.rank and resumed:
            return None
        arguments = _parse(argv)
        check(arguments.run)
        return arguments

    arguments = ranks.alike(company, read)
    if not alone:
        settings = {"command line": list(argv)} if arguments is None or resumed else _settings(arguments.run)
        ranks.check_same(company, settings | {"torch": torch.__version__})
    return here.first(arguments)  # type: ignore[no-any-return]


def _settings(run: RunConfig) -> dict[str, object]:
    return {name: value_at(run, name) for name in leaves(RunConfig)}


def _command(company: Company, directory: rundir.RunDirectory) -> str:
    program = _PROG if company.ranks.size == 1 else "torchrun … -m scripts.train"
    return f"{program} --resume {shlex.quote(str(directory.path))}"


def _train(
    run: RunConfig,
    directory: rundir.RunDirectory,
    open_directory: Callable[[], rundir.RunDirectory],
    start: checkpoint.Checkpoint | None,
    company: Company,
) -> int:
    go_on = _command(company, directory)
    tell = _silence if company.ranks.rank else console.say
    with interruption.signals() as stopper:
        try:
            result = training.train(run, open_directory, stopper, start, tell, company)
        except callbacks.Interrupted as stop:
            tell(f"{stop}; go on with: {go_on}")
            return console.INTERRUPTED
        except faults.Ended as stop:
            tell(f"error: {stop}; once that is mended, go on with: {go_on}")
            return console.OUR_FAILURE
        except KeyboardInterrupt:
            tell(_stopped_hard(directory))
            return console.INTERRUPTED
        except LostRankError as error:
            company.lost(error)
    if result is not None:
        _report(run, directory, result)
    return console.DONE


def _silence(_: str) -> None:
    """Say nothing: the first process says it."""


def _parse(argv: Sequence[str]) -> Arguments:
    # Twice: the first pass finds the file whose values are the defaults of the second.
    about = "Train an agent. The defaults below are those of the environment's configuration file."
    without_help = [token for token in argv if token not in {"-h", "--help"}]
    default = Arguments(configfiles.load(configfiles.CONFIGS / "default.yaml"))
    first = _gone_on(console.parse(Arguments, without_help, default=default, prog=_PROG, about=about))
    base = replace(first, run=_base(first))
    final = console.parse(Arguments, argv, default=base, prog=_PROG, about=about)
    final = replace(final, run_dir=first.run_dir, resume=first.resume)
    if final.resume is not None:
        _check_resumed(base.run, final)
    return final


def _gone_on(first: Arguments) -> Arguments:
    """Let a run that torchrun has started again go on in its directory.

    Returns:
        The options, which resume it.

    Raises:
        UsageError: If that is not known.
    """
    if not ranks.restarts() or first.resume is not None:
        return first
    if first.run_dir is None:
        raise UsageError("torchrun has started this again, and nobody knows what it began; give it a --run-dir")
    if not rundir.RunDirectory(first.run_dir).config.is_file():
        return first
    return replace(first, resume=first.run_dir, run_dir=None, config=None)


def _base(first: Arguments) -> RunConfig:
    if first.resume is not None:
        if first.config is not None or first.run_dir is not None:
            raise UsageError(f"--resume {first.resume} goes on with that run; leave --config and --run-dir out")
        return loading.load_config(first.resume)[1]
    if first.config is not None:
        return configfiles.load(first.config, first.run.env_id)
    return configfiles.shipped(first.run.env_id, first.run.algorithm)


def _check_resumed(stored: RunConfig, final: Arguments) -> None:
    for name in leaves(RunConfig):
        before, after = value_at(stored, name), value_at(final.run, name)
        if name.split(".")[0] not in _FREE_ON_RESUME and before != after:
            raise UsageError(
                f"{name} cannot change on --resume {final.resume}, from {before} to {after}; start a new run instead"
            )


def _start(path: Path, config: RunConfig) -> checkpoint.Checkpoint | None:
    directory = rundir.existing(path)
    start = checkpoint.latest(directory, console.say)
    if start is not None and start.timesteps >= config.total_timesteps and _is_told(directory, start):
        raise UsageError(
            f"{path} is complete, with {start.timesteps:,} of {config.total_timesteps:,} steps; to train on, name a "
            "larger --total-timesteps"
        )
    if start is None:
        console.say(f"{path} holds no checkpoint yet; training begins anew, with the same seed")
    return start


def _is_told(directory: rundir.RunDirectory, end: checkpoint.Checkpoint) -> bool:
    """Whether the result is of this end, and not of an earlier one that the run was extended from."""
    result: Any = rundir.read_json(directory.result) if directory.result.exists() else {}
    return isinstance(result, dict) and result.get("timesteps", -1) >= end.timesteps


def _new_path(config: RunConfig) -> Path:
    return rundir.new_path(config.env_id, config.seed, datetime.now().astimezone())


def _open(directory: rundir.RunDirectory, arguments: Arguments, argv: Sequence[str]) -> None:
    before = configfiles.provenance(directory.config) if arguments.resume else []
    if not arguments.resume:
        rundir.create(directory.path)
    origin = provenance.describe([*_PROG.split(), *argv], datetime.now().astimezone())
    try:
        if arguments.resume:
            rundir.sweep(directory)
        rundir.write_text(directory.config, configfiles.dump(arguments.run, [*before, origin]))
    except OSError as error:
        raise UsageError(
            f"cannot write in {directory.path}: {error.strerror}; make room and let it be written, then try again"
        ) from None


def _title(config: RunConfig) -> str:
    return f"{config.label} on {config.env_id}, seed {config.seed}, {config.total_timesteps:,} steps"


def _stopped_hard(directory: rundir.RunDirectory) -> str:
    found = checkpoint.listing(directory)
    if not found and not directory.config.exists():
        return f"interrupted before training began; nothing in {directory.path} is of use"
    stand = f"go on from {found[-1].name}" if found else "no checkpoint was written yet, begin again"
    return f"interrupted; {stand} with: {_PROG} --resume {shlex.quote(str(directory.path))}"


def _report(config: RunConfig, directory: rundir.RunDirectory, result: training.Result) -> None:
    path = shlex.quote(str(directory.path))
    scores = result.evaluation
    trained = "none has ended" if result.training_return is None else f"{result.training_return:,.2f}"
    print(f"""
{_title(config)}: {result.timesteps:,} steps in {result.seconds:,.0f} s ({result.steps_per_second:,.0f} steps/s)
training return, mean of the last {callbacks.LAST} episodes: {trained}
evaluation: {scores.mean:,.2f} ± {scores.std:,.2f} over {len(scores.returns)} episodes

run       {directory.path}
watch     tensorboard --logdir {path}
evaluate  python -m scripts.evaluate {path}
record    python -m scripts.record {path}""")


if __name__ == "__main__":
    sys.exit(main())
