"""Export a trained agent: ``python -m scripts.export RUN_DIR --output FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from agents import exporting
from scripts import console

_PROG = "python -m scripts.export"


@dataclass(frozen=True)
class Arguments:
    """Options of the program."""

    run: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """Run directory that scripts.train made."""
    output: Path
    """Directory to write; it must not exist yet."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Its arguments; None takes the process's.

    Returns:
        The exit status.
    """
    return console.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    about = "Write a trained agent and its configuration, without what only training needs."
    arguments = console.parse(Arguments, argv, prog=_PROG, about=about)
    console.check_output(arguments.output)
    exported = exporting.export(arguments.run, arguments.output, console.say)
    size = sum(path.stat().st_size for path in exported.path.rglob("*") if path.is_file())
    print(f"{exported.path}: {size / 1000:,.0f} kB; play it with: python -m scripts.evaluate {exported.path}")
    return console.DONE


if __name__ == "__main__":
    sys.exit(main())
