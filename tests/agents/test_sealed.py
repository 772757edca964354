from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents import rundir, sealed


def sealed_file(path: Path, content: bytes) -> bytes:
    sealed.write(path, lambda stream: [stream.write(part) for part in (content[:3], content[3:])] and None)
    return path.read_bytes()


def test_content_comes_back(tmp_path: Path) -> None:
    for content in (b"", b"x", b"\0" * 5000):
        sealed_file(tmp_path / "file", content)
        assert sealed.read(tmp_path / "file") == content
        assert sealed.is_whole(tmp_path / "file")
    assert not sealed.is_whole(tmp_path / "none")


@given(st.binary(max_size=200), st.data())
def test_no_damage_goes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("sealed") / "file"
    whole = sealed_file(path, content)
    damaged = data.draw(
        st.one_of(
            st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)).map(
                lambda change: whole[: change[0]] + bytes([whole[change[0]] ^ change[1]]) + whole[change[0] + 1 :]
            ),
            st.integers(0, len(whole) - 1).map(lambda size: whole[:size]),
            st.binary(min_size=1, max_size=9).map(lambda tail: whole + tail),
            st.just(bytes(len(whole))),
            st.binary(max_size=200),
        )
    )
    path.write_bytes(damaged)
    assert not sealed.is_whole(path)
    with pytest.raises(sealed.BrokenSealError, match=r"^it"):
        sealed.read(path)


def test_a_seal_without_its_content_is_refused(tmp_path: Path) -> None:
    # What stays of a file whose content was lost: shorter than the first line.
    (tmp_path / "file").write_bytes(sealed.HEAD)
    with pytest.raises(sealed.BrokenSealError):
        sealed.read(tmp_path / "file")


def test_half_written_files_are_swept(tmp_path: Path) -> None:
    directory = rundir.create(tmp_path / "run")
    left = [folder / ".step-1.pt.123.tmp" for folder in (directory.path, directory.checkpoints, directory.model)]
    mine = [directory.path / ".hidden", directory.path / ".final.json.tmp", directory.checkpoints / "step-1.pt"]
    for path in (*left, *mine):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    rundir.sweep(directory)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in mine)


def test_a_start_that_was_killed_is_no_run(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.77.tmp").touch()
    rundir.create(tmp_path)
