"""Measure side by side: ``python -m scripts.benchmark NAME``.

``throughput``, ``update`` and ``engine`` measure speed within minutes, ``uci`` how well Bayesian regression fits;
``curvature`` repeats the papers' experiments within half an hour, and goes on when the same command is given again.
``faults`` stops trainings and damages checkpoints for some minutes, ``ranks`` kills processes of shared ones,
``together`` says how fast these are, and ``scaling`` foretells what many GPUs would be worth; ``soak`` runs for an hour
and watches the memory.
``mujoco`` and ``atari`` are campaigns of hours or days: they train agents and peers over environments and seeds, can be
stopped at any time, and go on when the same command is given again.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from agents.benchmarks import (
    campaign,
    crew,
    engine,
    faults,
    ranks,
    report,
    scaling,
    soak,
    throughput,
    together,
    uci,
    update,
)
from agents.benchmarks.curvature import campaign as curvature
from agents.errors import UsageError
from agents.schema import nearest
from scripts import console

_PROG = "python -m scripts.benchmark"
_ABOUT = {
    "throughput": "Training steps per second, and memory: ours, SB3's A2C and PPO, TRPO, and the bare environments.",
    "update": "One ACKTR update against RMSprop steps of the same networks on the same batches.",
    "engine": "Statistics, decomposition and solve of our curvature against nngeometry's and curvlinops'.",
    "uci": "Error and likelihood of Bayesian regression: noisy natural gradients and Bayes by Backprop.",
    "curvature": "The curvature papers' experiments: autoencoders, wide and convolutional networks, the dense Fisher.",
    "faults": "Trainings stopped at random instants and resumed, checkpoints damaged at random: nothing may be lost.",
    "ranks": "Ranks of a shared training killed at random instants: the job must end, and the run go on.",
    "together": "A training that processes share, against one process with its part of the environments.",
    "scaling": "What many GPUs would be worth, by a model of compute, decompositions and traffic that is checked here.",
    "soak": "Long runs: does the memory stay flat, is every decomposition made?",
    "mujoco": "Returns after training on MuJoCo: ACKTR, PPO, TRPO and A2C over environments and seeds. Takes hours.",
    "atari": "The same on Atari games. Takes days.",
}
_FOLDER = Path("runs") / "benchmarks"


@dataclass(frozen=True)
class Throughput(throughput.Plan):
    """Options of ``throughput``."""

    output: Path = _FOLDER
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Update(update.Plan):
    """Options of ``update``."""

    output: Path = _FOLDER
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Engine(engine.Plan):
    """Options of ``engine``."""

    output: Path = _FOLDER
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Uci(uci.Plan):
    """Options of ``uci``."""

    output: Path = _FOLDER
    """Folder for the JSON file and the table of all fits."""


@dataclass(frozen=True)
class Curvature(curvature.Plan):
    """Options of ``curvature``."""

    output: Path = _FOLDER / "curvature"
    """Folder for the measurements, the figure and the JSON file; the same command goes on in the folder."""


@dataclass(frozen=True)
class Faults(faults.Plan):
    """Options of ``faults``."""

    output: Path = _FOLDER
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Ranks(ranks.Plan):
    """Options of ``ranks``."""

    output: Path = _FOLDER
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Together(together.Plan):
    """Options of ``together``."""

    output: Path = _FOLDER
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Scaling(scaling.Plan):
    """Options of ``scaling``."""

    output: Path = _FOLDER
    """Folder for the JSON file, the tables and the figure."""


@dataclass(frozen=True)
class Soak(soak.Plan):
    """Options of ``soak``."""

    output: Path = _FOLDER
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Mujoco(campaign.Plan):
    """Options of ``mujoco``."""

    output: Path = _FOLDER / "mujoco"
    """Folder for the runs, the JSON file and the curves; a campaign goes on in the folder it began in."""


@dataclass(frozen=True)
class Atari(campaign.AtariPlan):
    """Options of ``atari``."""

    output: Path = _FOLDER / "atari"
    """Folder for the runs, the JSON file and the curves; a campaign goes on in the folder it began in."""


_Options = Throughput | Update | Engine | Uci | Curvature | Faults | Ranks | Together | Scaling | Soak | Mujoco | Atari
_OPTIONS: dict[str, type[_Options]] = {
    "throughput": Throughput,
    "update": Update,
    "engine": Engine,
    "uci": Uci,
    "curvature": Curvature,
    "faults": Faults,
    "ranks": Ranks,
    "together": Together,
    "scaling": Scaling,
    "soak": Soak,
    "mujoco": Mujoco,
    "atari": Atari,
}
_NUMBERS = (
    "repeats",
    "steps",
    "updates",
    "n_envs",
    "seeds",
    "peer_seeds",
    "total_timesteps",
    "jobs",
    "episodes",
    "splits",
    "epochs",
    "kills",
    "interruptions",
    "corruptions",
    "rollouts",
    "width",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Its arguments; None takes the process's.

    Returns:
        The exit status.
    """
    return console.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    name, *rest = argv or [""]
    if name in {"-h", "--help"}:
        print(_usage())
        return console.DONE
    if name not in _OPTIONS:
        raise UsageError(_unknown(name))
    options = console.parse(_OPTIONS[name], rest, prog=f"{_PROG} {name}", about=_ABOUT[name])
    _check(options)
    report.check_folder(options.output)
    if isinstance(options, campaign.Plan) and options.records is not None:
        report.check_folder(options.records, "--records")
    started = datetime.now().astimezone()
    command = [*_PROG.split(), *argv]
    try:
        found = _measure(name, options)
    except crew.Interrupted as stop:
        console.say(f"{stop}; go on with: {shlex.join(command)}")
        return console.INTERRUPTED
    print(found)
    path = report.write(found, options.output, command, started)
    print("\n" + "\n".join(str(place) for place in [*map(path.with_suffix, found.attachments), path]))
    return console.OUR_FAILURE if found.results.get("failures") else console.DONE


def _measure(name: str, options: _Options) -> report.Report:
    # Where the file goes is no part of what is measured, and of what is reported.
    plan = {field: value for field, value in vars(options).items() if field != "output"}
    if isinstance(options, campaign.Plan):
        return campaign.run(name, campaign.Plan(**plan), options.output, console.say)
    if isinstance(options, curvature.Plan):
        return curvature.run(curvature.Plan(**plan), options.output, console.say)
    rooms = {"throughput": throughput, "update": update, "engine": engine, "uci": uci, "faults": faults, "soak": soak}
    rooms |= {"ranks": ranks, "together": together, "scaling": scaling}
    room: Any = rooms[name]
    found: report.Report = room.run(room.Plan(**plan), console.say)
    return found


def _check(options: Any) -> None:
    for name in _NUMBERS:
        number = getattr(options, name, None)
        if number is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {number}")


def _unknown(name: str) -> str:
    if not name or name.startswith("-"):
        return f"name a benchmark first: {', '.join(_OPTIONS)}"
    return f"there is no benchmark {name!r}; did you mean {nearest(name, list(_OPTIONS))}?"


def _usage() -> str:
    width = max(map(len, _ABOUT))
    lines = [f"  {name.ljust(width)}  {about}" for name, about in _ABOUT.items()]
    return "\n".join([f"usage: {_PROG} NAME [options]", "", *lines, "", f"{_PROG} NAME --help lists the options."])


if __name__ == "__main__":
    sys.exit(main())
