"""What the doors share: command lines, messages, exit statuses."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from agents.errors import UsageError
from agents.schema import leaves, nearest
from envs import WorldError

T = TypeVar("T")
_cli: Any = tyro.cli  # its overloads tie the result to the default, which is None here where there is none

DONE, OUR_FAILURE, USER_MISTAKE, INTERRUPTED = 0, 1, 2, 130


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _whole_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Read 1e6 as a million where a whole number is wanted."""
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(1, "INT", lambda tokens: _whole(tokens[0]), _is_whole, lambda number: [str(number)])


def _whole(token: str) -> int:
    with contextlib.suppress(ValueError):
        return int(token)
    with contextlib.suppress(ValueError, OverflowError):
        number = float(token)
        if number.is_integer():
            return int(number)
    raise ValueError(f"{token!r} is no whole number")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def parse(arguments: type[T], argv: Sequence[str], *, default: T | None = None, prog: str, about: str) -> T:
    """Parse a command line.

    Args:
        arguments: A dataclass, one option per field.
        argv: The command line without the program's name.
        default: Values of the options that are not given; None takes the dataclass's own.
        prog: The program as the user spells it, for the help.
        about: One line on what it does, for the help.

    Returns:
        The options.

    Raises:
        UsageError: If the command line is wrong.
        SystemExit: With status 0, after the help was asked for and printed.
    """
    complaint = io.StringIO()
    # Fields of a run are set either way over their file's value; switches of a program are only ever set.
    flags = tyro.conf.FlagConversionOff if default is not None else tyro.conf.FlagCreatePairsOff
    texts = {"prog": prog, "description": about, "config": (flags,)}
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: T = _cli(arguments, args=list(argv), default=default, registry=_REGISTRY, **texts)
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
    unknown = _unknown_option(argv, [f"--{name.replace('_', '-')}" for name in _options(arguments)])
    raise UsageError(unknown or f"{_one_line(complaint.getvalue())}; see --help")


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Run a program and turn what stops it into an exit status.

    Args:
        main: The program, from its arguments to an exit status.
        argv: Its arguments; None takes the process's.

    Returns:
        0 done, 2 the user's mistake (told in one line on stderr), 130 interrupted. Failures of ours pass
        as exceptions, with their traceback and status 1.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except (UsageError, WorldError) as mistake:
        say(f"error: {' '.join(str(mistake).split())}")
        return USER_MISTAKE
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left (`… | head`); flushing at the exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUR_FAILURE


def say(line: str) -> None:
    """Print to stderr.

    Args:
        line: What to say.
    """
    print(line, file=sys.stderr, flush=True)


def check_seed(seed: int) -> None:
    """Hold a seed against its range.

    Args:
        seed: The seed.

    Raises:
        UsageError: If it is out of range.
    """
    if not 0 <= seed < 2**31:
        raise UsageError(f"--seed must be between 0 and 2147483647, got {seed}")


def check_output(path: Path) -> None:
    """Make sure that a file can be written without destroying another.

    Args:
        path: The file.

    Raises:
        UsageError: If it exists, or its folder does not or takes no files.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; name another --output, or remove it first")
    if not path.parent.is_dir():
        raise UsageError(f"folder {path.parent} of {path} does not exist; make it first, or name another --output")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; make room, or name another --output") from None


def unused(path: Path) -> Path:
    """Find a name that is still free.

    Args:
        path: The name wished for.

    Returns:
        It, or it with the smallest free number from 2 on.
    """
    free, number = path, 2
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free


def _options(arguments: type) -> list[str]:
    # The fields of ``run`` stand at the top level.
    return [name.removeprefix("run.") for name in leaves(arguments)] + ["help"]


def _unknown_option(argv: Sequence[str], known: list[str]) -> str | None:
    for token in argv:
        name = token.split("=", 1)[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            plain = [other.removeprefix("--") for other in known]
            return f"unknown option {name}; did you mean --{nearest(name.removeprefix('--'), plain)}?"
    return None


def _one_line(box: str) -> str:
    # tyro draws a frame around its complaints, with the kind in its upper edge; where the terminal knows ASCII alone,
    # the kind stands above a rule.
    lines = [line.strip("│| ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    if "╭" not in box:
        lines = list(dropwhile(lambda line: not _is_rule(line), lines))[1:]
    message = takewhile(lambda line: not _is_rule(line), lines)
    # Of options that are held against their ranges together, tyro names the group as the code does.
    told = re.sub(r"^Error parsing run\.[\w.]+: ", "", " ".join(line for line in message if line))
    return told.rstrip(".") or "the command line is wrong"


def _is_rule(line: str) -> bool:
    return bool(line) and set(line) <= set("─-")
