"""A folder belongs to one program at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agents.benchmarks import campaign
from agents.claims import claimed
from agents.errors import UsageError
from scripts import train


def test_a_folder_is_claimed_as_long_as_a_process_is_at_work_in_it(tmp_path: Path) -> None:
    with claimed(tmp_path, "busy") as lock:
        with pytest.raises(UsageError, match="busy"), claimed(tmp_path, "busy"):
            pass
        left_behind = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(UsageError, match="busy"), claimed(tmp_path, "busy"):
        pass
    left_behind.communicate(b"\n")
    with claimed(tmp_path, "busy"):
        pass


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    flags = ["--env.n-envs", "2", "--acktr.n-steps", "16", "--total-timesteps", "64", "--evaluation.episodes", "1"]
    assert train.main(["toy/Constant-v0", *flags, "--run-dir", str(path)]) == 0
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    capsys.readouterr()
    with claimed(path, "busy"):
        assert train.main(["--resume", str(path), "--total-timesteps", "128"]) == 2
    assert capsys.readouterr().err == f"error: another process trains in {path}; wait for it, or stop it\n"
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert train.main(["--resume", str(path), "--total-timesteps", "128"]) == 0


def test_two_campaigns_do_not_share_a_folder(tmp_path: Path) -> None:
    plan = campaign.Plan(environments=("toy/Constant-v0",), algorithms=("acktr",), seeds=1, total_timesteps=64)
    with claimed(tmp_path, "busy"), pytest.raises(UsageError, match=r"another campaign is at work in .* --output"):
        campaign.run("mujoco", plan, tmp_path, print)
