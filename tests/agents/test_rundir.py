from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import pytest

from agents import rundir
from agents.errors import UsageError


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    rundir.write_text(path, "old")

    def fail_half_way(stream: BinaryIO) -> None:
        stream.write(b"ne")
        raise RuntimeError("power failure")

    with pytest.raises(RuntimeError, match="power"):
        rundir.write_whole(path, fail_half_way)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match=r"not empty.*--run-dir.*--resume"):
        rundir.create(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        rundir.create(tmp_path / "mine")
    rundir.create(tmp_path / "new")
    rundir.create(tmp_path / "new")  # empty still


def test_new_paths_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    now = datetime(2031, 2, 3, 4, 5, 6)
    path = rundir.new_path("ALE/Pong-v5", 7, now)
    assert path == Path("runs/ALE-Pong-v5/20310203-040506-s7")
    path.mkdir(parents=True)
    assert rundir.new_path("ALE/Pong-v5", 7, now).name == "20310203-040506-s7-2"


def test_a_table_grows_rows_and_columns(tmp_path: Path) -> None:
    table = rundir.Table(tmp_path / "t.csv")
    table.append({"a": 1})
    table.flush()
    table.append({"a": 2, "b": "x,y"})
    table.flush()
    assert rundir.read_rows(table.path) == [{"a": "1", "b": ""}, {"a": "2", "b": "x,y"}]


def test_a_table_forgets_rows_that_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,v\n1,a\n2,b\n3,c\n4,to")  # the last line was cut short
    table = rundir.Table(path, lambda row: int(row["step"]) <= 2)
    table.append({"step": 3, "v": "new"})
    table.flush()
    assert [row["v"] for row in rundir.read_rows(path)] == ["a", "b", "new"]


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run directory"):
        rundir.existing(tmp_path)
