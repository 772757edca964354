"""A trained agent without what only training needs: small enough to keep beside the code, or to hand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agents import checkpoint, configfiles, loading, rundir
from agents.errors import UsageError

_TOLD = ("started", "git_commit", "git_changed", "python", "packages")


def export(source: Path, target: Path, tell: Callable[[str], None]) -> rundir.RunDirectory:
    """Write a run directory that holds a run's configuration and its agent, and nothing to train on with.

    Where the run came from is told by commit, versions and time; its command lines and its machine stay behind.

    Args:
        source: The run.
        target: The new directory; what lies there already is replaced.
        tell: Where to name files that are damaged, and what is used in their place.

    Returns:
        The new directory, which `scripts.evaluate` and `scripts.record` take.

    Raises:
        UsageError: If the disk does not take it.
    """
    directory, config = loading.load_config(source)
    state = loading.newest(directory, tell)
    origins = [_public(origin) for origin in configfiles.provenance(directory.config)]
    exported = rundir.RunDirectory(target)
    try:
        checkpoint.write(exported.final, checkpoint.without_training(state))
        rundir.write_text(exported.config, configfiles.dump(config, origins))
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}; make room, or name another --output") from None
    return exported


def _public(origin: Mapping[str, Any]) -> dict[str, Any]:
    return {key: origin[key] for key in _TOLD if key in origin}
