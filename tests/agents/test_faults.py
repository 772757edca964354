"""A run that breaks too often ends with a checkpoint and one line, and goes on once that is mended."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acktr.optimizer import NaturalGradient
from agents import checkpoint, rundir
from envs import toy
from scripts import train
from tests.events import shown

SHORT = ["--env.n-envs", "2", "--acktr.n-steps", "16", "--a2c.n-steps", "16", "--evaluation.episodes", "1"]


def run(path: Path, *flags: str) -> int:
    return train.main(["toy/Constant-v0", *SHORT, "--run-dir", str(path), *flags])


def break_at(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the reward of the constant world NaN at given steps, counted over all environments."""
    real, lived = toy.ConstantEnv.step, []

    def step(self: Any, action: Any) -> Any:
        observation, reward, *rest = real(self, action)
        lived.append(1)
        return observation, np.nan if len(lived) in steps else reward, *rest

    monkeypatch.setattr(toy.ConstantEnv, "step", step)


def last_row(path: Path) -> dict[str, str]:
    with (path / "progress.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))[-1]


@pytest.mark.parametrize("algorithm", ["acktr", "a2c"])
def test_a_run_survives_and_counts(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = set(np.random.default_rng(0).choice(np.arange(20, 600), 12, replace=False).tolist())
    break_at(monkeypatch, steps)
    assert run(tmp_path / "run", "--total-timesteps", "640", "--algorithm", algorithm, "--max-faults", "50") == 0
    assert shown(tmp_path / "run" / "tensorboard")["faults/reward"] == 12
    assert last_row(tmp_path / "run")["faults/reward"] == "12"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["timesteps"] == 640
    assert result["training_return_last_100"] == 20  # of whole episodes alone


@pytest.mark.parametrize("algorithm", ["acktr", "a2c"])
def test_too_many_faults_end_it_with_a_checkpoint(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as broken:
        break_at(broken, set(range(200, 10**6)))
        flags = ["--total-timesteps", "640", "--algorithm", algorithm, "--max-faults", "3"]
        assert run(path, *flags) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: stopped after ")
    for words in ("environment", "broke 3 times with no whole episode between: reward of", f"--resume {path}", ".pt"):
        assert words in line
    directory = rundir.existing(path)
    saved = checkpoint.latest(directory)
    assert 196 <= saved.timesteps <= 210
    if algorithm == "acktr":
        assert int(last_row(path)["faults/reward"]) >= 3  # the last one, which ends it, stands in the message
    assert train.main(["--resume", str(path)]) == 0
    assert json.loads(directory.result.read_text())["timesteps"] >= 640


def test_steps_that_never_work_end_it_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = NaturalGradient._gradient

    def broken(self: Any) -> Any:
        return {name: torch.full_like(tensor, float("nan")) for name, tensor in real(self).items()}

    monkeypatch.setattr(NaturalGradient, "_gradient", broken)
    assert run(tmp_path / "run", "--total-timesteps", "6400", "--max-faults", "4") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the gradient was not finite 4 times in a row" in line and ".pt" in line
    saved = checkpoint.latest(rundir.existing(tmp_path / "run"))
    assert all(torch.isfinite(tensor).all() for tensor in saved.parameters["policy"].values())


def test_broken_networks_do_not_replace_a_sound_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from acktr.sb3 import ACKTR

    real = ACKTR.train

    def train_and_break(self: Any) -> None:
        real(self)
        if self.num_timesteps >= 128:
            with torch.no_grad():
                self.policy.action_net.weight.fill_(float("nan"))

    monkeypatch.setattr(ACKTR, "train", train_and_break)
    assert run(tmp_path / "run", "--total-timesteps", "640", "--checkpoint.period", "64") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "its parameters are broken" in line and "no checkpoint could be written" in line
    assert "\n" not in line
