import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from agents import checkpoint, rundir
from scripts import evaluate, export, plot, record, train

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--env.n-envs", "2", "--evaluation.episodes", "2", "--checkpoint.period", "64"]
SHORT = ["--acktr.n-steps", "32", "--ppo.n-steps", "32", "--ppo.n-minibatches", "2", "--total-timesteps", "128"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "pendulum"
    arguments = ["InvertedPendulum-v5", *TINY, *SHORT, "--run-dir", str(path), "--acktr.actor.radius", "0.03"]
    assert train.main(arguments) == 0
    return path


def told(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Check that exactly one line went to stderr, that it names the words, and that stdout has no result."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    for word in words:
        assert word in captured.err
    assert captured.out == ""


MISTAKES = {
    "CartPole-v1 --acktr.actor.raduis 1": ["--acktr.actor.raduis", "--acktr.actor.radius"],
    "CartPole-v1 --radius 1": ["--radius", "--acktr.actor.radius"],
    "CartPole-v1 --seed x": ["--seed", "'x'"],
    "CartPole-v1 --seed": ["--seed"],
    "CartPole-v1 --seed -4": ["seed", "-4"],
    "CartPole-v1 --algorithm dqn": ["dqn", "acktr"],
    "CartPole-v1 --normalisation.rewards perhaps": ["perhaps", "True"],
    "CartPole-v1 Pole-v2": ["Pole-v2"],
    "CartPole-v1 --device tpu": ["tpu", "cpu"],
    "CartPole-v1 --config none.yaml": ["none.yaml"],
    "CartPole-v1 --total-timesteps 0": ["total_timesteps", "0"],
    "CartPole-v1 --ppo.n-minibatches 3 --algorithm ppo": ["ppo.n_minibatches", "3"],
    "CartPole-v1 --env.options.time-limit 0": ["time_limit", "0"],
    "CartPole-v9": ["CartPole-v9"],
    "pixels/CartPole-v1": ["pixels/", "CartPole-v1", "MuJoCo"],
    "pixels/Hopper-v5 --env.options.backend gymnasium": ["'gymnasium'", "'native'"],
    "pixels/Hopper-v5 --env.options.pixels.size 0": ["pixels.size", "0"],
    "Nothing-v0": ["Nothing-v0"],
    "": ["HalfCheetah-v5"],
    "--resume nowhere": ["nowhere"],
    "CartPole-v1 --policy.kind cnn": ["policy.kind", "cnn", "mlp"],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_in_training_are_told_in_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(line.split()) == 2
    told(capsys, *MISTAKES[line])
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_mistakes_in_a_file_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("acktr:\n  actor:\n    raduis: 0.1\n")
    assert train.main(["CartPole-v1", "--config", str(path)]) == 2
    told(capsys, str(path), "acktr.actor.raduis", "acktr.actor.radius")


def test_the_configuration_of_a_run_repeats_it(finished: Path, tmp_path: Path) -> None:
    data = yaml.safe_load((finished / "config.yaml").read_text())
    assert data["acktr"]["actor"]["radius"] == pytest.approx(0.03)
    assert data["env_id"] == "InvertedPendulum-v5"
    origin = data["provenance"][0]
    assert "InvertedPendulum-v5" in origin["command"]
    assert {"git_commit", "python", "packages"} <= origin.keys()
    assert "torch" in origin["packages"]
    again = tmp_path / "again"
    assert train.main(["--config", str(finished / "config.yaml"), "--run-dir", str(again)]) == 0
    first, second = (json.loads((path / "result.json").read_text()) for path in (finished, again))
    assert first["evaluation"] == second["evaluation"]
    assert first["training_return_last_100"] == second["training_return_last_100"]


def test_training_ends_with_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert train.main(["CartPole-v1", *TINY, *SHORT, "--algorithm", "ppo", "--run-dir", str(path)]) == 0
    out = capsys.readouterr().out
    for text in ("training return, mean of the last 100", "±", f"tensorboard --logdir {path}"):
        assert text in out
    assert f"python -m scripts.evaluate {path}" in out
    assert f"python -m scripts.record {path}" in out


def test_trpo_trains(tmp_path: Path) -> None:
    path, few = tmp_path / "run", ["--trpo.n-steps", "32", "--trpo.n-minibatches", "2", "--total-timesteps", "128"]
    assert train.main(["CartPole-v1", *TINY, *few, "--algorithm", "trpo", "--run-dir", str(path)]) == 0
    assert json.loads((path / "result.json").read_text())["algorithm"] == "trpo"
    assert evaluate.main([str(path), "--episodes", "1"]) == 0


def test_a_run_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert train.main(["CartPole-v1", *TINY, *SHORT, "--run-dir", str(finished)]) == 2
    told(capsys, "not empty", "--run-dir", "--resume")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_run_is_extended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "run")
    assert train.main(["CartPole-v1", *TINY, *SHORT, "--run-dir", path]) == 0
    assert train.main(["--resume", path, "--total-timesteps", "192"]) == 0
    assert "192 steps" in capsys.readouterr().out
    data = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert data["total_timesteps"] == 192
    assert len(data["provenance"]) == 2
    for changed, told_of in (
        (["--seed", "3"], "seed cannot change"),
        (["--acktr.actor.radius", "1"], "acktr.actor.radius cannot change"),
        (["--env.n-envs", "3"], "env.n_envs cannot change"),
        (["Hopper-v5"], "from CartPole-v1 to Hopper-v5"),
    ):
        assert train.main(["--resume", path, *changed]) == 2
        told(capsys, told_of)


def test_an_extended_run_that_was_stopped_before_its_result_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert train.main(["CartPole-v1", *TINY, *SHORT, "--run-dir", str(path)]) == 0
    monkeypatch.setattr(rundir, "write_json", interrupted_at("result.json", rundir.write_json))
    assert train.main(["--resume", str(path), "--total-timesteps", "192"]) == 130
    monkeypatch.undo()
    assert json.loads((path / "result.json").read_text())["timesteps"] == 128
    capsys.readouterr()
    assert train.main(["--resume", str(path)]) == 0
    assert json.loads((path / "result.json").read_text())["timesteps"] == 192
    capsys.readouterr()
    assert train.main(["--resume", str(path)]) == 2
    told(capsys, "is complete, with 192 of 192 steps")


def interrupted_at(name: str, write: Callable[[Path, object], None]) -> Callable[[Path, object], None]:
    """Writes all files but one, at which somebody gets impatient."""

    def writing(path: Path, content: object) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        write(path, content)

    return writing


def test_a_folder_that_takes_no_files(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    for door, line in (
        (plot, [str(run), "--output", f"{tmp_path}/x.png"]),
        (plot, [str(run), "--csv", f"{tmp_path}/x.csv"]),
        (record, [str(run)]),
        (export, [str(run), "--output", f"{tmp_path}/agent"]),
    ):
        assert door.main(line) == 2
        told(capsys, "cannot write", "Permission denied", "name another --output")
    monkeypatch.setattr(rundir, "write_text", refused)
    assert train.main(["--resume", str(run), "--total-timesteps", "1e6"]) == 2
    told(capsys, f"cannot write in {run}: Permission denied")


def test_files_that_are_not_what_they_should_be(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent, run = tmp_path / "agent", tmp_path / "run"
    assert export.main([str(finished), "--output", str(agent)]) == 0
    capsys.readouterr()
    assert plot.main([str(agent), "--output", str(tmp_path / "x.png")]) == 2
    told(capsys, "episodes.csv", "name the run they come from")
    shutil.copytree(finished, run)
    (run / "evaluations.json").write_text("{ ", encoding="utf-8")
    assert train.main(["--resume", str(run), "--total-timesteps", "1e6"]) == 2
    assert "evaluations.json: Expecting property name" in (said := capsys.readouterr().err)
    assert "move it away to go on without it" in said
    (run / "config.yaml").write_text("", encoding="utf-8")
    for door, line in ((evaluate, [str(run)]), (train, ["--resume", str(run)])):
        assert door.main(line) == 2
        told(capsys, f"{run}/config.yaml names no environment")


def test_evaluation(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(finished), "--episodes", "3", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["episodes"] == len(scores["returns"]) == 3
    assert scores["steps"] == sum(scores["lengths"])
    assert evaluate.main([str(finished), "--episodes", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == scores
    assert evaluate.main([str(finished), "--episodes", "2", "--stochastic", "--seed", "4"]) == 0
    assert "over 2 episodes" in capsys.readouterr().out


def test_recording(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import imageio.v2 as imageio

    path = tmp_path / "film.mp4"
    assert record.main([str(finished), "--output", str(path)]) == 0
    steps = int(capsys.readouterr().out.split(" steps")[0].split()[-1])
    with imageio.get_reader(path) as reader:  # type: ignore[attr-defined]
        meta = reader.get_meta_data()
        assert (meta["codec"], meta["pix_fmt"].split("(")[0]) == ("h264", "yuv420p")
        assert reader.count_frames() == steps
        # Not a black screen, and not a still picture.
        first, last = reader.get_data(0), reader.get_data(steps - 1)
    assert first.std() > 5
    assert (first != last).any()
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]
    assert record.main([str(finished), "--output", str(path)]) == 2
    told(capsys, "film.mp4", "exists")


@pytest.mark.parametrize("more", [[], ["--total-timesteps", "64"]], ids=["as it was", "fewer steps"])
def test_a_finished_run_stays_as_it_is(more: list[str], finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train.main(["--resume", str(finished), *more]) == 2
    told(capsys, str(finished), "complete", "128", "--total-timesteps")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_an_exported_agent_plays_as_it_did_and_holds_nothing_else(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "exported"
    assert export.main([str(finished), "--output", str(path)]) == 0
    assert f"python -m scripts.evaluate {path}" in capsys.readouterr().out
    played = []
    for directory in (finished, path):
        assert evaluate.main([str(directory), "--episodes", "2", "--json"]) == 0
        played.append(json.loads(capsys.readouterr().out))
    assert played[0] | {"run": ""} == played[1] | {"run": ""}
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    assert files == ["config.yaml", "model/agent.pt"]
    data = (path / "config.yaml").read_text()
    assert str(finished.parent) not in data, "where it was trained is nobody's business"
    assert str(finished.parent) in (finished / "config.yaml").read_text()  # the control
    assert (path / "model" / "agent.pt").stat().st_size < (finished / "model" / "agent.pt").stat().st_size / 4


def test_an_exported_agent_is_not_trained_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "exported"
    assert export.main([str(finished), "--output", str(path)]) == 0
    before = (path / "config.yaml").read_bytes()
    capsys.readouterr()
    assert train.main(["--resume", str(path), "--total-timesteps", "1000"]) == 2
    told(capsys, "agent.pt", "exported", "resume the run that it is from")
    assert (path / "config.yaml").read_bytes() == before
    assert export.main([str(finished), "--output", str(path)]) == 2
    told(capsys, str(path), "exists", "--output")


def test_plotting(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, table, again = tmp_path / "p.png", tmp_path / "c.csv", tmp_path / "q.svg"
    assert plot.main([str(finished), "--output", str(picture), "--csv", str(table)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plot.main([str(table), str(finished.parent), "--output", str(again)]) == 0
    assert "InvertedPendulum-v5" in again.read_text() or again.stat().st_size > 5000
    capsys.readouterr()
    for arguments, word in {
        (str(table), "--output", str(picture)): "exists",
        (str(table), "--output", "x.gif"): ".png",
        (str(table),): "--output",
        ("--output", "x.png"): "nothing to plot",
        (str(tmp_path / "nowhere"), "--output", "x.png"): "nowhere",
    }.items():
        assert plot.main(list(arguments)) == 2
        told(capsys, word)


@pytest.mark.parametrize("door", [evaluate, record])
def test_mistakes_about_runs(door: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = door.main  # type: ignore[attr-defined]
    assert main([str(tmp_path / "none")]) == 2
    told(capsys, "none", "no run directory")
    assert main([]) == 2
    told(capsys, "RUN_DIR")
    assert main([str(tmp_path), "--episodes", "0"]) == 2
    told(capsys, "--episodes", "0")
    assert main([str(tmp_path), "--seed", "-1"]) == 2
    told(capsys, "--seed", "-1")


def test_truncated_checkpoints_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert train.main(["CartPole-v1", *TINY, *SHORT, "--algorithm", "ppo", "--run-dir", str(path)]) == 0
    older, newest = checkpoint.listing(rundir.existing(path))
    for file in (newest, path / "model" / "agent.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    capsys.readouterr()
    assert evaluate.main([str(path), "--episodes", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["timesteps"] == 64
    for line, file in zip(captured.err.splitlines(), (newest, path / "model" / "agent.pt"), strict=True):
        assert f"checkpoint {file} is damaged or cut short" in line
        assert f"{older} is used in its place" in line
    older.write_bytes(b"")
    for main, arguments in ((evaluate.main, [str(path)]), (train.main, ["--resume", str(path)])):
        assert main(arguments) == 2
        told(capsys, f"checkpoint {newest} is damaged or cut short", "no whole checkpoint is left")


def test_a_damaged_checkpoint_is_trained_past(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert train.main(["CartPole-v1", *TINY, *SHORT, "--algorithm", "ppo", "--run-dir", str(path)]) == 0
    directory = rundir.existing(path)
    weights = checkpoint.load(directory.final).parameters
    for file in (checkpoint.listing(directory)[-1], directory.final):
        file.write_bytes(bytes(1000))
    capsys.readouterr()
    assert train.main(["--resume", str(path)]) == 0
    assert "is used in its place" in capsys.readouterr().err
    again = checkpoint.load(directory.final).parameters
    assert all((again["policy"][name] == tensor).all() for name, tensor in weights["policy"].items())


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scripts.train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_program_says_how_to_go_on(which: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = start(["CartPole-v1", *TINY, *SHORT, "--total-timesteps", "100_000_000", "--run-dir", str(path)])
    deadline = time.monotonic() + 200
    while not (path / "episodes.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(which)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"python -m scripts.train --resume {path}" in errors
    directory = rundir.existing(path)
    stopped = checkpoint.latest(directory).timesteps
    assert stopped > 0
    assert train.main(["--resume", str(path), "--total-timesteps", str(stopped + 64)]) == 0
    assert json.loads(directory.result.read_text())["timesteps"] == stopped + 64


def test_help_names_every_setting_of_the_environment() -> None:
    process = start(["ALE/Pong-v5", "--help"])
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "--acktr.actor.radius" in out
    assert "Largest KL of one step" in out
    assert "(default: 32)" in out.split("--env.n-envs")[1].split("--")[0]


def test_whole_numbers_may_be_written_short() -> None:
    run = train._parse(["CartPole-v1", "--total-timesteps", "1e6", "--policy.pi", "3e1", "1_6"]).run
    assert (run.total_timesteps, run.policy.pi) == (1_000_000, (30, 16))
    assert isinstance(run.total_timesteps, int)
