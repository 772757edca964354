"""Files from strangers: no door runs what they hold, or writes where they say."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from agents import checkpoint, rundir, sealed
from scripts import evaluate, export, record, train

TINY = ["--env.n-envs", "2", "--acktr.n-steps", "16", "--total-timesteps", "64", "--evaluation.episodes", "1"]

DOORS: dict[str, Callable[[Path], int]] = {
    "evaluate": lambda path: evaluate.main([str(path), "--episodes", "1"]),
    "record": lambda path: record.main([str(path), "--output", str(path.parent / "film.mp4")]),
    "export": lambda path: export.main([str(path), "--output", str(path.parent / "exported")]),
    "train --resume": lambda path: train.main(["--resume", str(path), "--total-timesteps", "128"]),
}


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def pickled(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(marker)))


def sealed_pickle(path: Path, marker: Path) -> None:
    sealed.write(path, lambda stream: pickle.dump(Bomb(marker), stream))


def sealed_by_torch(path: Path, marker: Path) -> None:
    sealed.write(path, lambda stream: torch.save({"format": checkpoint.FORMAT, "parameters": Bomb(marker)}, stream))


def archive(stream: BinaryIO, whole: bytes) -> None:
    """A torch archive with one more member, whose path leads out of it."""
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.infolist():
            new.writestr(member, old.read(member))
        new.writestr("../../outside", b"here")


def sealed_archive(path: Path, marker: Path) -> None:
    content = io.BytesIO()
    torch.save({"weights": torch.zeros(2)}, content)
    sealed.write(path, lambda stream: archive(stream, content.getvalue()))


def bare_archive(path: Path, marker: Path) -> None:
    content = io.BytesIO()
    torch.save({"weights": torch.zeros(2)}, content)
    with path.open("wb") as stream:
        archive(stream, content.getvalue())


PAYLOADS = (pickled, sealed_pickle, sealed_by_torch, sealed_archive, bare_archive)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(["InvertedPendulum-v5", *TINY, "--run-dir", str(path)]) == 0
    return path


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload.__name__)
def test_no_door_runs_a_strangers_checkpoint(
    payload: Callable[[Path, Path], None], door: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, marker = tmp_path / "a" / "b" / "run", tmp_path / "marker"
    shutil.copytree(finished, path)
    directory = rundir.existing(path)
    for place in [directory.final, *checkpoint.listing(directory)]:
        payload(place, marker)
    assert DOORS[door](path) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert not marker.exists()
    assert not list(tmp_path.rglob("outside"))
    assert not (tmp_path / "a" / "film.mp4").exists()


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    pickled(tmp_path / "file", tmp_path / "marker")
    pickle.loads((tmp_path / "file").read_bytes())
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("door", [*DOORS, "train --config"])
def test_no_door_runs_a_strangers_configuration(
    door: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(finished, path)
    config = rundir.existing(path).config
    config.write_text(f"!!python/object/apply:os.system ['touch {marker}']\n")
    doors = DOORS | {"train --config": lambda _: train.main(["CartPole-v1", *TINY, "--config", str(config)])}
    assert doors[door](path) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "YAML" in captured.err
    assert not marker.exists()


def test_the_same_seed_gives_the_same_run_twice(tmp_path: Path) -> None:
    for name in ("one", "other"):
        assert train.main(["Hopper-v5", *TINY, "--seed", "5", "--run-dir", str(tmp_path / name)]) == 0
    one, other = (rundir.existing(tmp_path / name) for name in ("one", "other"))
    assert one.progress.read_bytes() == other.progress.read_bytes()
    left, right = (checkpoint.load(directory.final).parameters["policy"] for directory in (one, other))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert train.main(["Hopper-v5", *TINY, "--seed", "6", "--run-dir", str(tmp_path / "third")]) == 0
    assert one.progress.read_bytes() != rundir.existing(tmp_path / "third").progress.read_bytes()
