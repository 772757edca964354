import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import configfiles, curves, evaluation, rundir
from agents.benchmarks import campaign, crew, outcomes, records, stages
from agents.benchmarks.campaign import AtariPlan, Plan
from agents.benchmarks.report import Report
from agents.benchmarks.stages import Run
from agents.claims import claimed
from agents.errors import UsageError
from scripts import benchmark, train

SMALL = Plan(environments=("CartPole-v1",), algorithms=("acktr", "ppo"), seeds=2, peer_seeds=1, episodes=2)

FAKE = """
import json, pathlib, signal, sys, time
path, what = pathlib.Path(sys.argv[1]), sys.argv[2]
if what == "evaluate":
    print(json.dumps({"episodes": 2, "mean_return": 7.0}))
elif what == "fail":
    print("error: out of luck", file=sys.stderr)
    sys.exit(3)
elif what == "hang":
    def stop(*_):
        (path / "checkpoints").mkdir()
        (path / "checkpoints" / "step-000000000064.pt").touch()
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    (path / "config.yaml").touch()
    time.sleep(100)
elif what != "nothing":
    (path / "result.json").write_text(json.dumps({"training_return_last_100": 5.0, "steps_per_second": 9.0}))
    (path / "config.yaml").write_text(sys.argv[3])
    (path / "episodes.csv").write_text("timesteps,return,length,seconds\\n10,5.0,10,0.5\\n")
"""


class Stage:
    """Programs that only act as if they trained; `plays` says which part a run has, beside training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plays: dict[str, str] = {}
        self.started: list[tuple[str, str]] = []
        monkeypatch.setattr(stages, "train_command", self.train)
        monkeypatch.setattr(stages, "evaluate_command", lambda run, kind: self.program(run, "evaluate"))

    def program(self, run: Run, part: str) -> list[str]:
        return [sys.executable, "-S", "-c", FAKE, str(run.directory.path), part, configfiles.dump(run.config, [])]

    def train(self, run: Run, *, resume: bool) -> list[str]:
        self.started.append((run.label, "resume" if resume else "new"))
        return self.program(run, self.plays.get(run.label, "train"))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def work(runs: list[Run], output: Path, jobs: int = 2) -> tuple[list[crew.Failure], list[str]]:
    told: list[str] = []
    output.mkdir(exist_ok=True)
    with claimed(output, "busy") as lock:
        return crew.work(runs, jobs, lock, told.append, lambda run: None), told


FIRST, SECOND, PEER = "acktr on CartPole-v1, seed 0", "acktr on CartPole-v1, seed 1", "ppo on CartPole-v1, seed 0"


def test_a_plan_lists_each_run_once_seed_by_seed(tmp_path: Path) -> None:
    plan = replace(SMALL, environments=("CartPole-v1", "ALE/Pong-v5", "CartPole-v1"), first_seed=7)
    runs = list(campaign.runs_of(plan, tmp_path))
    assert [(r.config.env_id, r.config.algorithm, r.config.seed) for r in runs] == [
        ("CartPole-v1", "acktr", 7),
        ("CartPole-v1", "ppo", 7),
        ("ALE/Pong-v5", "acktr", 7),
        ("ALE/Pong-v5", "ppo", 7),
        ("CartPole-v1", "acktr", 8),
        ("ALE/Pong-v5", "acktr", 8),
    ]
    assert runs[2].directory.path == tmp_path / "ALE-Pong-v5" / "acktr" / "seed-7"
    assert all(r.config.torch_threads == 1 and r.config.total_timesteps == 1_000_000 for r in runs)
    assert AtariPlan().total_timesteps == 2_000_000


def test_a_training_command_says_what_the_plan_means(tmp_path: Path) -> None:
    common = configfiles.CONFIGS / "mujoco.yaml"
    plan = replace(SMALL, environments=("Pendulum-v1", "ALE/Pong-v5"), acktr_config=common, seeds=1)
    for run in campaign.runs_of(plan, tmp_path):
        arguments = train._parse(stages.train_command(run, resume=False)[3:])
        assert arguments.run == run.config
        assert arguments.run_dir == run.directory.path
    runs = {(r.config.env_id, r.config.algorithm): r for r in campaign.runs_of(plan, tmp_path)}
    # The one file is ACKTR's; the peers keep theirs.
    ours, peer = configfiles.shipped("Pendulum-v1"), configfiles.shipped("ALE/Pong-v5", "ppo")
    assert runs["Pendulum-v1", "acktr"].config.acktr == configfiles.load(common).acktr != ours.acktr
    assert runs["ALE/Pong-v5", "ppo"].config.ppo == peer.ppo != configfiles.load(common).ppo
    assert runs["ALE/Pong-v5", "ppo"].config.env.options.atari.threads == 1


def test_runs_are_trained_evaluated_and_then_skipped(tmp_path: Path, stage: Stage) -> None:
    runs = list(campaign.runs_of(SMALL, tmp_path))
    failures, told = work(runs, tmp_path)
    assert failures == []
    assert sorted(stage.started) == [(FIRST, "new"), (SECOND, "new"), (PEER, "new")]
    assert told[:2] == [f"{FIRST} starts; 3 runs left", f"{PEER} starts; 3 runs left"]
    assert told[-1].endswith("0 runs left")
    assert len(told) == 6
    for run in runs:
        assert json.loads((run.directory.path / "final-stochastic.json").read_text())["mean_return"] == 7
        assert not list(run.directory.path.glob("*.tmp"))
        assert stages.next_stage(run) is None
    # One evaluation is lost, another had fewer episodes than are asked for now: only these are made again.
    stages.evaluation_path(runs[0].directory, "stochastic").unlink()
    assert stages.next_stage(runs[0]).name == "is evaluated, stochastic"
    assert stages.next_stage(replace(runs[1], episodes=3)).name == "is evaluated, deterministic"
    stage.started.clear()
    assert work([runs[0]], tmp_path)[0] == []
    assert stage.started == []


def test_a_run_with_a_checkpoint_goes_on_and_a_half_made_one_starts_anew(tmp_path: Path, stage: Stage) -> None:
    first, peer, _ = campaign.runs_of(SMALL, tmp_path)
    for run in (first, peer):
        (run.directory.checkpoints).mkdir(parents=True)
        run.directory.progress.touch()
        run.directory.log.write_text("$ before\n")
    (first.directory.checkpoints / "step-000000000064.pt").touch()
    _, told = work([first, peer], tmp_path)
    assert stage.started == [(FIRST, "resume"), (PEER, "new")]
    assert told[0] == f"{FIRST} goes on from step-000000000064; 2 runs left"
    assert first.directory.progress.exists()
    assert not peer.directory.progress.exists()
    assert all(run.directory.log.read_text().startswith("$ before\n$ ") for run in (first, peer))


def test_nothing_but_a_half_made_run_is_removed(tmp_path: Path, stage: Stage) -> None:
    first, _, second = campaign.runs_of(SMALL, tmp_path)
    first.directory.path.mkdir(parents=True)
    (first.directory.path / "thesis.tex").write_text("dear")
    failures, _ = work([first, second], tmp_path)
    assert [failure.run for failure in failures] == [FIRST]
    assert "thesis.tex" in failures[0].reason
    assert (first.directory.path / "thesis.tex").read_text() == "dear"
    assert stage.started == [(SECOND, "new")] or (SECOND, "new") in stage.started


def test_failures_are_reported_and_the_others_go_on(tmp_path: Path, stage: Stage) -> None:
    stage.plays = {FIRST: "fail", PEER: "nothing"}
    runs = list(campaign.runs_of(SMALL, tmp_path))
    failures, told = work(runs, tmp_path, jobs=1)
    assert [failure.run for failure in failures] == [FIRST, PEER]
    assert failures[0].reason.startswith("exit status 3: error: out of luck (")
    assert "without a result" in failures[1].reason
    assert any(line.startswith(f"{FIRST} failed: exit status 3") for line in told)
    assert stages.next_stage(runs[2]) is None
    # The next attempt begins where nothing was.
    stage.plays = {}
    assert work(runs, tmp_path)[0] == []


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(b"$ command\none\n\xff two \n\n")
    assert crew.last_line(log).endswith("two")
    log.write_text("old\n$ command\n")
    assert crew.last_line(log) == "it said nothing"


def interrupt_when(ready: Any) -> None:
    def watch() -> None:
        deadline = time.monotonic() + 20
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def test_an_interruption_lets_every_run_write_its_checkpoint(tmp_path: Path, stage: Stage) -> None:
    stage.plays = {FIRST: "hang", PEER: "hang"}
    runs = list(campaign.runs_of(SMALL, tmp_path))
    interrupt_when(lambda: all(run.directory.config.exists() for run in runs[:2]))
    with pytest.raises(crew.Interrupted, match="3 runs left"):
        work(runs, tmp_path)
    assert all(list(run.directory.checkpoints.iterdir()) for run in runs[:2])
    assert (SECOND, "new") not in stage.started
    stage.plays, stage.started = {}, []
    assert work(runs, tmp_path)[0] == []  # and the folder's claim is free again
    assert sorted(stage.started) == [(FIRST, "resume"), (SECOND, "new"), (PEER, "resume")]


def test_another_configuration_is_not_mixed_in(tmp_path: Path) -> None:
    run = next(campaign.runs_of(SMALL, tmp_path))
    stages.check_unchanged(run)  # nothing is there yet
    run.directory.path.mkdir(parents=True)
    run.directory.result.touch()
    stored = replace(run.config, torch_threads=3, name="other")
    run.directory.config.write_text(configfiles.dump(stored, []))
    stages.check_unchanged(run)  # neither changes what is learnt
    run.directory.config.write_text(configfiles.dump(replace(stored, total_timesteps=5), []))
    with pytest.raises(UsageError, match=r"seed-0 was made with another total_timesteps \(5, now 1000000\)"):
        stages.check_unchanged(run)
    others = replace(stored, ppo=replace(stored.ppo, gamma=0.5))
    run.directory.config.write_text(configfiles.dump(others, []))
    stages.check_unchanged(run)  # ACKTR does not read PPO's settings
    own = replace(stored, acktr=replace(stored.acktr, gamma=0.5))
    run.directory.config.write_text(configfiles.dump(own, []))
    with pytest.raises(UsageError, match="seed-0 was made with another acktr;"):
        stages.check_unchanged(run)


def test_a_random_score_is_played_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = configfiles.shipped("CartPole-v1"), tmp_path / "random.json"
    found = outcomes.random_score(config, 50, path)
    assert 17 < found < 30  # as every CartPole tutorial says: about 22
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("played twice"))
    assert outcomes.random_score(config, 50, path) == found


def test_damaged_runs_are_named(tmp_path: Path) -> None:
    run = next(campaign.runs_of(SMALL, tmp_path))
    assert outcomes.read(run) is None
    rundir.write_json(run.directory.result, {"steps_per_second": 1})
    rundir.write_text(run.directory.episodes, "timesteps,return,seconds\n")
    with pytest.raises(UsageError, match=r"seed-0 is damaged \('training_return_last_100'\)"):
        outcomes.read(run)
    rundir.write_json(run.directory.result, {"steps_per_second": 1, "training_return_last_100": None})
    outcome = outcomes.read(run)
    assert outcome is not None
    assert outcome.scores == {}
    assert outcomes.curve(outcome) is None


def test_runs_of_several_commits_are_told(tmp_path: Path) -> None:
    first, peer, _ = campaign.runs_of(SMALL, tmp_path)
    for run, commits in ((first, ["abc", "abc"]), (peer, [None])):
        run.directory.path.mkdir(parents=True)
        run.directory.result.touch()
        run.directory.config.write_text(configfiles.dump(run.config, [{"git_commit": each} for each in commits]))
    assert campaign.mixed([first, peer], None) == []
    peer.directory.config.write_text(configfiles.dump(peer.config, [{"git_commit": "abc"}, {"git_commit": "def"}]))
    assert campaign.mixed([first, peer], None) == ["the runs were made by 2 commits: abc (2), def (1)"]


def test_records_stand_for_runs_that_are_gone(tmp_path: Path, stage: Stage) -> None:
    kept = tmp_path / "records"
    plan, told, at_announcements = replace(SMALL, records=kept, jobs=2), [], []

    def tell(line: str) -> None:
        if " is done after " in line:
            at_announcements.append(len(list(kept.rglob("seed-*"))))

    stage.plays = {SECOND: "fail"}
    there = campaign.run("mujoco", plan, tmp_path / "first", tell)
    assert at_announcements == [1, 2]  # a machine that goes away in the midst of a campaign loses what is under way
    assert sorted(path.relative_to(kept).as_posix() for path in kept.rglob("seed-*")) == [
        "CartPole-v1/acktr/seed-0.json",
        "CartPole-v1/ppo/seed-0.json",
    ]
    # On another machine, where nothing but the records is left, one run is trained.
    stage.plays, stage.started, told = {}, [], []
    again = campaign.run("mujoco", plan, tmp_path / "second", told.append)
    assert set(stage.started) == {(SECOND, "new")}
    assert told[0] == "3 runs, 2 of them done already"
    assert again.results["runs"][:2] == [there.results["runs"][0], there.results["runs"][1]]
    assert again.results["races"] == there.results["races"]
    assert again.attachments[".csv"].startswith(there.attachments[".csv"].splitlines()[0])
    # A folder that was trained without records gets them with its summary.
    late = replace(plan, records=tmp_path / "late", summary_only=True)
    assert campaign.run("mujoco", late, tmp_path / "first", told.append).results["runs"] == there.results["runs"]
    assert len(list(late.records.rglob("seed-*"))) == 2
    # With all three the table comes from the records alone.
    alone = campaign.run("mujoco", replace(plan, summary_only=True), tmp_path / "third", told.append)
    assert alone.results == again.results
    assert alone.attachments == again.attachments
    assert not (tmp_path / "third").exists()


def test_a_record_holds_what_the_run_left(tmp_path: Path, stage: Stage) -> None:
    run = next(campaign.runs_of(SMALL, tmp_path / "runs"))
    records.keep([run], tmp_path)
    assert records.recorded(run, tmp_path) is None  # it is not done
    assert work([run], tmp_path / "runs")[0] == []
    rows = "".join(f"{10 * n},{n % 7}.125,10,{n / 3}\n" for n in range(1, 1200))
    run.directory.episodes.write_text(f"timesteps,return,length,seconds\n{rows}")
    looks = [{"timesteps": 40, "mean_return": 1.5, "seconds": 0.25, "episodes": 10}]
    rundir.write_json(run.directory.evaluations, looks)
    records.keep([run], tmp_path)
    before, after = outcomes.read(run), records.recorded(run, tmp_path)
    assert before is not None and after is not None
    assert (before.scores, before.steps_per_second) == (after.scores, after.steps_per_second)
    for old, new in ((before.learned, after.learned), (before.evaluated, after.evaluated)):
        np.testing.assert_array_equal(old.steps, new.steps)
        np.testing.assert_allclose(old.means, new.means, rtol=1e-6)
        np.testing.assert_allclose(old.seconds, new.seconds, atol=0.006)
        np.testing.assert_array_equal(old.episodes, new.episodes)
    assert (before.learned.episodes[0], before.learned.episodes[-1]) == (1, 100)
    assert records.path_of(run, tmp_path).stat().st_size < 20_000
    # What is recorded stays, whatever becomes of the run.
    run.directory.episodes.write_text("timesteps,return,length,seconds\n")
    records.keep([run], tmp_path)
    again = records.recorded(run, tmp_path)
    assert again is not None and len(again.learned) == len(after.learned)


def test_records_of_another_run_are_refused(tmp_path: Path, stage: Stage) -> None:
    run = next(campaign.runs_of(SMALL, tmp_path / "runs"))
    assert work([run], tmp_path / "runs")[0] == []
    records.keep([run], tmp_path)
    peer = replace(run, config=replace(run.config, ppo=replace(run.config.ppo, gamma=0.5), torch_threads=3))
    assert records.recorded(peer, tmp_path) is not None  # neither changes what ACKTR learns
    other = replace(run, config=replace(run.config, acktr=replace(run.config.acktr, gamma=0.5)))
    with pytest.raises(UsageError, match=r"seed-0\.json is of another acktr; name another --records"):
        records.recorded(other, tmp_path)
    longer = replace(run, config=replace(run.config, total_timesteps=5))
    with pytest.raises(UsageError, match=r"of another total_timesteps \(1000000, now 5\)"):
        records.recorded(longer, tmp_path)
    with pytest.raises(UsageError, match="has evaluations of 2 episodes, not 3"):
        records.recorded(replace(run, episodes=3), tmp_path)
    path = records.path_of(run, tmp_path)
    record = json.loads(path.read_text())
    for key, value in (("training", {}), ("scores", None), ("config", {"acktr": 3}), ("steps_per_second", "fast")):
        path.write_text(json.dumps({**record, key: value}))
        with pytest.raises(UsageError, match=r"seed-0\.json"):
            records.recorded(run, tmp_path)
    record["training"]["seconds"].append(1.0)
    path.write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"damaged .columns of different lengths"):
        records.recorded(run, tmp_path)


def door(*arguments: str) -> int:
    flags = ["--environments", "CartPole-v1", "--algorithms", "acktr", "ppo", "--episodes", "2", "--jobs", "2"]
    return benchmark.main(["mujoco", *flags, "--seeds", "1", "--peer-seeds", "1", *arguments])


def test_the_summary_of_a_part(tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.plays = {PEER: "fail"}
    assert door("--output", str(tmp_path)) == 1
    captured = capsys.readouterr()
    assert "CartPole-v1, ppo: 0 of 1 seeds are there" in captured.out
    assert f"{PEER} failed: exit status 3: error: out of luck" in captured.out
    (path,) = tmp_path.glob("mujoco-*.json")
    results = json.loads(path.read_text())["results"]
    assert results["returns"]["CartPole-v1"]["acktr"]["training"]["centre"] == 5
    assert results["failures"][0]["run"] == PEER
    assert results["against"] == {}
    # Whoever only asks for the summary gets it, and nobody trains.
    stage.started.clear()
    assert door("--output", str(tmp_path), "--summary-only") == 0
    assert [label for label, _ in stage.started] == []


def test_the_door_refuses_records_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert door("--output", str(tmp_path / "runs"), "--records", str(tmp_path / "file" / "records")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: --records {tmp_path / 'file' / 'records'} cannot be a folder")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs" / "CartPole-v1").exists()


def test_the_door_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Report:
        raise crew.Interrupted(1)

    monkeypatch.setattr(campaign, "run", interrupted)
    assert door("--output", str(tmp_path / "a b")) == 130
    captured = capsys.readouterr()
    assert captured.err.startswith("stopped with 1 run left; go on with: python -m scripts.benchmark mujoco --env")
    assert captured.err.endswith(f"--output '{tmp_path / 'a b'}'\n")
    assert captured.out == ""


@pytest.mark.slow
def test_a_whole_campaign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output", str(tmp_path), "--total-timesteps", "2000"]
    assert door(*flags) == 0
    captured = capsys.readouterr()
    (path,) = tmp_path.glob("mujoco-*.json")
    assert captured.out.endswith(f"\n{path.with_suffix('.csv')}\n{path}\n")
    assert "0 runs left" in captured.err
    results = json.loads(path.read_text())["results"]
    for algorithm in ("acktr", "ppo"):
        returns = results["returns"]["CartPole-v1"][algorithm]
        assert all(5 < returns[measure]["centre"] <= 500 for measure in ("training", "deterministic", "stochastic"))
    assert results["against"]["CartPole-v1"]["training"]["scale"]["peer"] == "ppo"
    lines = curves.read(path.with_suffix(".csv"))
    assert [(line.env_id, line.label, line.seed) for line in lines] == [
        ("CartPole-v1", "acktr", 0),
        ("CartPole-v1", "ppo", 0),
    ]
    assert np.isfinite([line.returns for line in lines]).all()
    # The same command again has nothing left to do.
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed-0/*")}
    assert door(*flags) == 0
    assert "2 runs, 2 of them done already" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed-0/*")} == before
