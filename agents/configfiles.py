"""Configurations on disk: which file serves which environment, inheritance, reading and writing.

A file may name another one in the same folder with ``base:``; it then only holds what differs. Without a
``base``, ``default.yaml`` of the shipped configurations is the base, and that one is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from agents.config import Algorithm, RunConfig
from agents.errors import UsageError
from agents.schema import plain, read

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""The folder of the shipped configurations."""

PROVENANCE = "provenance"
"""The key under which a run directory's ``config.yaml`` says where the run came from; readers skip it."""


def file_for(env_id: str, algorithm: Algorithm = "acktr") -> Path:
    """Find the shipped configuration of an environment.

    Args:
        env_id: The environment's id.
        algorithm: Who learns; a peer may have a file of its own.

    Returns:
        The file of the first pattern in ``configs/index.yaml`` that fits ``ALGORITHM:ENV_ID``, or else ``ENV_ID``; if
        there is none ``default.yaml``.
    """
    index = _read_yaml(CONFIGS / "index.yaml")
    wanted = (f"{algorithm}:{env_id}", env_id)
    names = (name for key in wanted for pattern, name in index.items() if fnmatchcase(key, pattern))
    return CONFIGS / next(names, "default.yaml")


def load(path: Path, env_id: str = "") -> RunConfig:
    """Read a configuration with everything it inherits.

    Args:
        path: A YAML file, for instance one of ``configs/`` or a run directory's ``config.yaml``.
        env_id: The environment to configure; empty keeps the file's own.

    Returns:
        The complete configuration.

    Raises:
        UsageError: If a file cannot be read or something in it is wrong.
    """
    data = _merge({"env_id": ""}, _with_bases(path, ()))
    try:
        config = read(RunConfig, data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return replace(config, env_id=env_id) if env_id else config


def complete(data: Mapping[str, Any], source: str) -> RunConfig:
    """Read a configuration that lies in another file than its own.

    Args:
        data: What it says; the rest is as in ``default.yaml``.
        source: What to name in a complaint.

    Returns:
        The complete configuration.

    Raises:
        UsageError: If something in it is wrong.
    """
    try:
        return read(RunConfig, _merge({"env_id": "", **_read_yaml(CONFIGS / "default.yaml")}, data))
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def shipped(env_id: str, algorithm: Algorithm = "acktr") -> RunConfig:
    """Read the shipped configuration of an environment.

    Args:
        env_id: The environment's id; any id works, unknown ones get the defaults.
        algorithm: Who learns.

    Returns:
        The complete configuration.
    """
    return replace(load(file_for(env_id, algorithm), env_id), algorithm=algorithm)


def identity(path: Path) -> tuple[str, str, int]:
    """Read what a curve needs to know of a run; nothing else in the file has to be understood today.

    Args:
        path: A run directory's ``config.yaml``.

    Returns:
        Environment, label and seed.

    Raises:
        UsageError: If one of them is not there.
    """
    data = _read_yaml(path)
    try:
        return str(data["env_id"]), str(data["name"] or data["algorithm"]), int(data["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} does not say what ran ({error}); name a run that scripts.train made") from None


def provenance(path: Path) -> list[Any]:
    """Read where a run came from.

    Args:
        path: A run directory's ``config.yaml``.

    Returns:
        One entry for each part of the run.
    """
    found = _read_yaml(path).get(PROVENANCE, [])
    return found if isinstance(found, list) else [found]


def dump(config: RunConfig, origins: Sequence[object]) -> str:
    """Write a configuration and its provenance as YAML that ``load`` reads back.

    Args:
        config: The configuration.
        origins: For each part of the run its command, versions and the like, in plain types.

    Returns:
        The YAML text.
    """
    data = {**plain(config), PROVENANCE: plain(list(origins))}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise UsageError(f"{path}: inherits itself by way of {seen[-1].name}; remove one `base`")
    data = _read_yaml(path)
    data.pop(PROVENANCE, None)
    base = data.pop("base", None)
    if base is None:
        root = (CONFIGS / "default.yaml").resolve()
        return data if path == root else _merge(_with_bases(root, (*seen, path)), data)
    if not isinstance(base, str):
        raise UsageError(f"{path}: base must be the name of a file, got {base!r}")
    beside = path.parent / base
    return _merge(_with_bases(beside if beside.exists() else CONFIGS / base, (*seen, path)), data)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise UsageError(f"there is no configuration {path}; name a YAML file, such as those in {CONFIGS}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(f"{path} must hold a mapping of keys to values, got {type(data).__name__}")
    return data


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader (no tags that build objects) that refuses a key given twice instead of dropping one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
