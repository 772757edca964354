"""Where a run came from: command, code, versions."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("acktr", "torch", "numpy", "gymnasium", "stable-baselines3", "mujoco", "ale-py")


def describe(command: Sequence[str], now: datetime) -> dict[str, object]:
    """Describe the program that runs.

    Args:
        command: Its command line.
        now: The time of the start.

    Returns:
        Plain types, for ``config.yaml``.
    """
    commit, changed = git_state(Path(__file__).parent)
    return {
        "command": shlex.join(command),
        "started": now.isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_changed": changed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": f"{platform.machine()}, {_cores()} cores",
        "packages": {name: found for name in _PACKAGES if (found := package_version(name))},
    }


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Find the commit of the code.

    Args:
        folder: A folder of the checkout.

    Returns:
        The commit, and whether tracked files differ from it; None and None outside a repository.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, changed


def _git(folder: Path, *arguments: str) -> str:
    call = ["git", "-C", str(folder), *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def package_version(package: str) -> str | None:
    """Look up what is installed.

    Args:
        package: A distribution's name.

    Returns:
        Its version; None if it is not there.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    return os.cpu_count() or 1
