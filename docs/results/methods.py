"""Every curvature in a real run: CartPole-v1 for 150,000 steps and HalfCheetah-v5 for 300,000.

    python docs/results/methods.py FOLDER > docs/results/methods.csv

Each method takes the policy's steps, with the shipped configuration but for the flags in the table. What is in the
folder already is not run again. A row for each run: mean return of the last 100 training episodes, mean and standard
deviation of twenty without noise. (How long an update takes: ``scripts.benchmark curvature --experiments cost``.)
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

TASKS = {"CartPole-v1": 150_000, "HalfCheetah-v5": 300_000}
ACTOR = "--acktr.actor."
NAMES = (
    *("ekfac", "ekfac-ra", "ekfac-c", "kfac", "factored-kfac", "kfe-rmsprop", "kfe-adagrad", "kfe-adam", "diagonal"),
    *("cg-fac", "cg-fac-e", "seng", "tridiagonal"),
)
LOW_RANK = ("rs-kfac", "sre-kfac", "b-kfac", "b-r-kfac", "b-kfac-c")
METHODS = {
    **{name: [f"{ACTOR}curvature", name] for name in NAMES},
    # The factors of a 64-64 network are low-rank with a rank this small only.
    **{f"{name}, rank 16": [f"{ACTOR}curvature", name, f"{ACTOR}rank", "16"] for name in LOW_RANK},
    "dense-fisher, 16-16": [f"{ACTOR}curvature", "dense-fisher", "--policy.pi", "16", "16"],
    "exact-cg, damping 0.1": [f"{ACTOR}curvature", "exact-cg", f"{ACTOR}combination", "none", f"{ACTOR}damping", "0.1"],
    "exact-cg, line search (TRPO)": [
        *(f"{ACTOR}curvature", "exact-cg", f"{ACTOR}combination", "none"),
        *(f"{ACTOR}damping", "0.1", f"{ACTOR}line-search", "backtracking"),
    ],
    "ekfac, damping by Levenberg-Marquardt": [f"{ACTOR}damping-rule", "levenberg-marquardt"],
    **{f"ekfac, wake {wake}": [f"{ACTOR}wake", wake] for wake in ("so", "q", "qe")},
    "ekfac, drawn policies": [f"{ACTOR}exploration-kl", "0.01"],
    "adam": [f"{ACTOR}curvature", "adam", f"{ACTOR}n-epochs", "10", f"{ACTOR}n-minibatches", "32"],
}


def train(folder: Path, task: str, flags: list[str]) -> dict[str, float]:
    """Train one agent, unless that was done.

    Args:
        folder: Of the run.
        task: Environment id.
        flags: Of the method.

    Returns:
        Its row's numbers.
    """
    if not (folder / "result.json").exists():
        command = [sys.executable, "-m", "scripts.train", task, "--seed", "0", "--torch-threads", "1"]
        command += ["--total-timesteps", str(TASKS[task]), "--run-dir", str(folder), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((folder / "result.json").read_text())
    return {
        "training": result["training_return_last_100"],
        "evaluation": result["evaluation"]["mean_return"],
        "deviation": result["evaluation"]["std_return"],
    }


def main() -> None:
    """Train them all and print the table."""
    folder = Path(sys.argv[1])
    table = csv.writer(sys.stdout)
    table.writerow(["method", "flags", "task", "training", "evaluation", "deviation"])
    for method, flags in METHODS.items():
        for task in TASKS:
            place = folder / method.replace(", ", "_").replace(" ", "-") / task
            row = train(place, task, flags)
            table.writerow([method, " ".join(flags), task, *(round(number, 1) for number in row.values())])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
