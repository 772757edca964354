"""Whatever a configuration says, training it ends as it should, or is refused in one line: nothing in between."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import checkpoint, rundir, schema
from agents.config import RunConfig
from agents.configfiles import shipped
from scripts import train

TOYS = {"toy/Constant-v0": "categorical", "toy/Reach-v0": "Gaussian"}
NUMBERS = {
    float: st.sampled_from([-1.0, 0.0, 1e-12, 1e-3, 0.5, 1.0, 3.0, 1e9, float("nan"), float("inf")]),
    int: st.sampled_from([-1, 0, 1, 2, 3, 5, 17]),
    bool: st.booleans(),
    str: st.sampled_from(["", "a name"]),
    type(None): st.none(),
}
LEFT_ALONE = {"env_id", "total_timesteps", "env.options"}
"""Which world is run, how it is built, and for how long."""


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values that a file may give a field of some type; numbers out of range among them."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in (Union, types.UnionType):
        return st.one_of([values(part) for part in parts])
    if origin is tuple:
        return st.lists(st.sampled_from([0, 1, 3, 8]), max_size=3)
    return NUMBERS[kind]


def choices(cls: Any, prefix: str = "") -> list[st.SearchStrategy[tuple[str, Any]]]:
    """One strategy for each field, with its dotted name; the environments' own options are theirs to check."""
    found = []
    for field in fields(cls):
        kind, name = get_type_hints(cls)[field.name], prefix + field.name
        if name in LEFT_ALONE:
            continue
        if is_dataclass(kind):
            found += choices(kind, f"{name}.")
        else:
            found.append(values(kind).map(lambda value, name=name: (name, value)))
    return found


CHOICES = choices(RunConfig)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A small run of a toy world with up to five of its fields changed, whatever that makes of it."""
    config = schema.plain(shipped(draw(st.sampled_from(sorted(TOYS))), "acktr"))
    config |= {"total_timesteps": 96, "torch_threads": 1}
    config["env"]["n_envs"], config["evaluation"]["episodes"] = 2, 1
    for name in ("acktr", "ppo", "a2c", "trpo"):
        config[name]["n_steps"] = 16
    config["policy"] |= {"pi": [8], "vf": [8]}
    for dotted, value in draw(st.lists(st.one_of(CHOICES), min_size=1, max_size=5)):
        *path, last = dotted.split(".")
        place = config
        for key in path:
            place = place[key]
        place[last] = value
    return config


def trained(config: dict[str, Any]) -> tuple[int, list[str], Path]:
    """Run the program with a file."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    flags = ["--config", str(folder / "config.yaml"), "--run-dir", str(folder / "run")]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        status = train.main([config["env_id"], *flags])
    return status, err.getvalue().splitlines(), folder


@settings(max_examples=60, deadline=None)
@given(configurations())
def test_any_configuration_trains_or_is_refused(config: dict[str, Any]) -> None:
    status, err, folder = trained(config)
    try:
        last = err[-1] if err else ""
        assert status in {0, 1, 2}
        if status:
            assert last.startswith("error: ") and "Traceback" not in last, err
            assert (folder / "run").exists() == (status == 1), "what is refused leaves nothing behind"
        else:
            saved = checkpoint.latest(rundir.existing(folder / "run"))
            assert saved is not None
            assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.parameters["policy"].values())
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("env_id", sorted(TOYS))
def test_the_small_run_is_sound_as_it_is(env_id: str) -> None:
    config = schema.plain(shipped(env_id, "acktr")) | {"total_timesteps": 96}
    status, _, folder = trained(config)
    shutil.rmtree(folder)
    assert status == 0
