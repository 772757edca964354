"""Strict reading of plain data (as YAML gives it) into typed frozen dataclasses, and back.

Nothing is guessed: an unknown key, a missing one and a value of another type are errors that name the
dotted key, the value and what was expected.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from agents.errors import UsageError

T = TypeVar("T")


def read(cls: type[T], data: Mapping[str, object]) -> T:
    """Build a dataclass from nested mappings.

    Args:
        cls: The dataclass, whose fields may be dataclasses themselves.
        data: One entry per field; entries of fields that have a default may be left out.

    Returns:
        The instance. An unknown or missing key, or a value of another type than its field's, is a
        ``UsageError``.
    """
    return _read_dataclass(cls, data, "", cls)


def plain(value: object) -> Any:
    """Turn a dataclass into nested dicts, lists and scalars, ready for YAML or JSON.

    Args:
        value: A dataclass instance, or anything inside one.

    Returns:
        The same content in plain types.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every field that is not a dataclass itself.

    Args:
        cls: The dataclass to walk.
        prefix: What to write before each name, with its trailing dot.

    Yields:
        Names such as ``acktr.actor.radius``, in order of definition.
    """
    hints = get_type_hints(cls)
    for f in fields(cls):
        inner = hints[f.name]
        if is_dataclass(inner) and isinstance(inner, type):
            yield from leaves(inner, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def value_at(instance: object, name: str) -> Any:
    """Look a dotted name up.

    Args:
        instance: A dataclass instance.
        name: A name as ``leaves`` yields it.

    Returns:
        The value there.
    """
    for part in name.split("."):
        instance = getattr(instance, part)
    return instance


def nearest(name: str, known: list[str]) -> str:
    """Find the known dotted name that a mistyped one most likely meant.

    A right last part in the wrong place counts before a similar spelling of the whole.

    Args:
        name: The unknown name.
        known: The names to choose from, at least one.

    Returns:
        The best candidate.
    """
    close = get_close_matches(name, known, n=1, cutoff=0.75)
    if close:
        return close[0]
    last = name.rsplit(".", 1)[-1]
    same_end = [other for other in known if other.rsplit(".", 1)[-1] == last]
    return same_end[0] if same_end else get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _read_dataclass(cls: type[T], data: object, where: str, root: type) -> T:
    if not isinstance(data, Mapping):
        raise UsageError(f"{where or 'the configuration'} must be a mapping of keys to values, got {data!r}")
    prefix = f"{where}." if where else ""
    hints = get_type_hints(cls)
    by_name: dict[str, Field[Any]] = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in by_name:
            siblings = [prefix + name for name in by_name]
            raise UsageError(_unknown(f"{prefix}{key}", siblings, list(leaves(root))))
    values = {}
    for name, f in by_name.items():
        if name in data:
            values[name] = _read(hints[name], data[name], prefix + name, root)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise UsageError(f"{prefix}{name} is missing; add it, or inherit it with `base: default.yaml`")
    return cls(**values)


def _unknown(name: str, siblings: list[str], known: list[str]) -> str:
    close = get_close_matches(name, siblings, n=1, cutoff=0.75)
    return f"unknown key {name}; did you mean {close[0] if close else nearest(name, known)}?"


def _read(hint: Any, value: object, where: str, root: type) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return _read_dataclass(hint, value, where, root)
    origin = get_origin(hint)
    if origin is Literal:
        return _read_choice(get_args(hint), value, where)
    if origin in {Union, types.UnionType}:
        return _read_optional(hint, value, where, root)
    if origin is dict:
        return _read_mapping(value, where)
    if origin is tuple:
        return _read_tuple(get_args(hint), value, where, root)
    return _read_scalar(hint, value, where)


def _read_choice(choices: tuple[object, ...], value: object, where: str) -> object:
    if value in choices:
        return value
    raise UsageError(f"{where} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _read_optional(hint: Any, value: object, where: str, root: type) -> Any:
    members = [member for member in get_args(hint) if member is not type(None)]
    if value is None and len(members) < len(get_args(hint)):
        return None
    for member in members[:-1]:
        try:
            return _read(member, value, where, root)
        except UsageError:
            continue
    return _read(members[-1], value, where, root)


def _read_tuple(items: tuple[Any, ...], value: object, where: str, root: type) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{where} must be a list, got {value!r}")
    if len(items) == 2 and items[1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise UsageError(f"{where} must be a list of {len(items)} values, got {value!r}")
    return tuple(
        _read(hint, item, f"{where}[{i}]", root) for i, (hint, item) in enumerate(zip(items, value, strict=True))
    )


def _read_mapping(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} must be a mapping of keys to values, got {value!r}")
    return {str(key): item for key, item in value.items()}


def _read_scalar(hint: Any, value: object, where: str) -> Any:
    if hint is float and (number := _number(value)) is not None:
        return number
    if hint is int and (number := _number(value)) is not None and number.is_integer():
        return int(value) if isinstance(value, int) else int(number)
    if hint is str and isinstance(value, str):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint not in {int, float, str, bool, Path}:
        raise TypeError(f"{where} has type {hint}, which configuration files cannot hold")
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    raise UsageError(f"{where} must be {names[hint]}, got {value!r}")


def _number(value: object) -> float | None:
    # YAML 1.1 takes 3e-4 (no dot) for text, and nobody means text by it.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
