"""Record a trained agent: ``python -m scripts.record RUN_DIR``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from agents import loading
from agents.errors import UsageError
from scripts import console

_PROG = "python -m scripts.record"


@dataclass(frozen=True)
class Arguments:
    """Options of the program."""

    run: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """Run directory that scripts.train made."""
    output: Path | None = None
    """Video file to write, ending in .mp4; by default RUN_DIR/video.mp4, numbered if that exists."""
    episodes: int = 1
    """Episodes to play."""
    seed: int = 1_000_003
    """Seed of the environment."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Its arguments; None takes the process's.

    Returns:
        The exit status.
    """
    return console.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    arguments = console.parse(Arguments, argv, prog=_PROG, about="Record a trained agent as a video.")
    if arguments.episodes < 1:
        raise UsageError(f"--episodes must be at least 1, got {arguments.episodes}")
    console.check_seed(arguments.seed)
    output = _output(arguments)
    try:
        from agents import video
    except ImportError as error:
        raise UsageError(f"recording needs {error.name}; install it with: pip install imageio imageio-ffmpeg") from None
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # else SDL complains of a screen that nobody asks for
    run = loading.load_run(arguments.run, loading.video_env(arguments.seed), console.say)
    with closing(run.env):
        scores = video.record(run.agent, run.env, arguments.episodes, seed=arguments.seed, path=output)
    count = len(scores.returns)
    print(f"{output}: {count} episode{'s' if count > 1 else ''}, {scores.steps:,} steps, return {scores.mean:,.2f}")
    return console.DONE


def _output(arguments: Arguments) -> Path:
    output = arguments.output or console.unused(arguments.run / "video.mp4")
    if output.suffix != ".mp4":
        raise UsageError(f"--output must end in .mp4, got {output}")
    if arguments.run.is_dir():  # else loading says what is wrong with it
        console.check_output(output)
    return output


if __name__ == "__main__":
    sys.exit(main())
