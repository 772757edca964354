from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from agents.errors import UsageError
from agents.schema import leaves, nearest, plain, read, value_at


@dataclass(frozen=True)
class Inner:
    radius: float
    widths: tuple[int, ...]
    choice: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    count: int
    flag: bool
    limit: int | None
    path: Path
    extra: dict[str, Any] = field(default_factory=dict)


GOOD: dict[str, Any] = {
    "inner": {"radius": 0.5, "widths": [1, 2]},
    "count": 3,
    "flag": True,
    "limit": None,
    "path": "x/y",
}


def changed(**values: Any) -> dict[str, Any]:
    return {**GOOD, **values}


def inner(**values: Any) -> dict[str, Any]:
    return changed(inner={**GOOD["inner"], **values})


def test_good_data_becomes_the_dataclass_and_back() -> None:
    made = read(Outer, GOOD)
    assert made == Outer(Inner(0.5, (1, 2), "a"), 3, True, None, Path("x/y"), {})
    assert read(Outer, plain(made)) == made


def test_numbers_as_people_write_them() -> None:
    assert read(Outer, inner(radius="3e-4")).inner.radius == pytest.approx(3e-4)
    assert read(Outer, inner(radius=1)).inner.radius == pytest.approx(1.0)
    assert read(Outer, changed(count="1e6")).count == 1_000_000
    assert read(Outer, changed(count=2**60 + 1)).count == 2**60 + 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (inner(raduis=1), ["inner.raduis", "inner.radius"]),
        (changed(radius=1), ["unknown key radius", "inner.radius"]),
        (inner(radius="big"), ["inner.radius", "'big'", "a number"]),
        (inner(radius=True), ["inner.radius", "True"]),
        (inner(widths=3), ["inner.widths", "list", "3"]),
        (inner(widths=[3, "x"]), ["inner.widths[1]", "'x'"]),
        (inner(choice="c"), ["inner.choice", "a, b", "'c'"]),
        (changed(count=1.5), ["count", "1.5", "whole"]),
        (changed(count=float("inf")), ["count", "inf"]),
        (changed(flag="yes"), ["flag", "'yes'", "true or false"]),
        (changed(flag=1), ["flag", "1"]),
        (changed(limit="x"), ["limit", "'x'"]),
        (changed(inner=4), ["inner", "mapping", "4"]),
        (changed(extra=[1]), ["extra", "mapping"]),
        ({k: v for k, v in GOOD.items() if k != "count"}, ["count is missing"]),
    ],
)
def test_bad_data_is_named(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        read(Outer, data)
    assert all(word in str(caught.value) for word in words), caught.value


def test_leaves_and_values() -> None:
    names = list(leaves(Outer))
    assert names[:3] == ["inner.radius", "inner.widths", "inner.choice"]
    assert value_at(read(Outer, GOOD), "inner.widths") == (1, 2)


def test_nearest_prefers_spelling_then_the_last_part() -> None:
    known = ["acktr.actor.radius", "acktr.critic.radius", "seed"]
    assert nearest("acktr.critic.raduis", known) == "acktr.critic.radius"
    assert nearest("radius", known) == "acktr.actor.radius"
    assert nearest("sed", known) == "seed"
