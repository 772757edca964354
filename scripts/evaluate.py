"""Evaluate a trained agent: ``python -m scripts.evaluate RUN_DIR``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from agents import evaluation, loading
from agents.errors import UsageError
from scripts import console

_PROG = "python -m scripts.evaluate"


@dataclass(frozen=True)
class Arguments:
    """Options of the program."""

    run: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """Run directory that scripts.train made."""
    episodes: int = 20
    """Episodes to play."""
    seed: int = 1_000_003
    """Seed of the environments, and of the actions if they are sampled."""
    stochastic: bool = False
    """Sample the actions in place of taking the most likely ones."""
    json: bool = False
    """Print one JSON object and nothing else."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Its arguments; None takes the process's.

    Returns:
        The exit status.
    """
    return console.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    arguments = console.parse(Arguments, argv, prog=_PROG, about="Evaluate a trained agent by its raw scores.")
    if arguments.episodes < 1:
        raise UsageError(f"--episodes must be at least 1, got {arguments.episodes}")
    console.check_seed(arguments.seed)
    run = loading.load_run(arguments.run, loading.evaluation_envs(arguments.episodes, arguments.seed), console.say)
    with closing(run.env):
        deterministic = not arguments.stochastic
        scores = evaluation.evaluate(
            run.agent, run.env, arguments.episodes, seed=arguments.seed, deterministic=deterministic
        )
    if arguments.json:
        about = {"run": str(arguments.run), "env_id": run.config.env_id, "algorithm": run.config.algorithm}
        how = {"timesteps": run.timesteps, "seed": arguments.seed, "deterministic": deterministic}
        print(json.dumps({**about, **how, **scores.summary()}))
    else:
        print(
            f"{run.config.label} on {run.config.env_id} after {run.timesteps:,} steps: "
            f"{scores.mean:,.2f} ± {scores.std:,.2f} over {len(scores.returns)} episodes, {scores.steps:,} steps"
        )
    return console.DONE


if __name__ == "__main__":
    sys.exit(main())
