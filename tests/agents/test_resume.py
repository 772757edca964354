"""A run that is stopped, or killed, and resumed is the run that was never stopped."""

import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import build, callbacks, checkpoint, configfiles, rundir, training
from agents.benchmarks import corruption, faults, torment
from agents.config import RunConfig
from agents.errors import UsageError
from agents.interruption import Stopper

STEPS = 320


def tiny(algorithm: Any = "acktr", env_id: str = "CartPole-v1") -> RunConfig:
    run = configfiles.shipped(env_id)
    # Drawn policies and rollouts that are used again exclude each other.
    exploration_kl = 0.0 if run.acktr.actor.reused_rollouts else 0.01
    actor = replace(
        run.acktr.actor, momentum=0.5, radius_decay="linear", exploration_kl=exploration_kl, exploration_decay="linear"
    )
    return replace(
        run,
        algorithm=algorithm,
        total_timesteps=STEPS,
        env=replace(run.env, n_envs=2),
        evaluation=replace(run.evaluation, episodes=2, period=128),
        checkpoint=replace(run.checkpoint, period=64, keep=2),
        acktr=replace(
            run.acktr, n_steps=32, learning_rate_decay="linear", gamma_init=0.9, horizon_share=1.0, actor=actor
        ),
        ppo=replace(run.ppo, n_steps=32, n_minibatches=2, n_epochs=2, learning_rate_decay="linear"),
        a2c=replace(run.a2c, n_steps=4),
    )


class StopAfter(Stopper):
    """Wishes to stop at the n-th time it is asked, between two updates."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def run(config: RunConfig, path: Path, stop: int = 0) -> None:
    def create() -> rundir.RunDirectory:
        directory = rundir.create(path)
        rundir.write_text(directory.config, configfiles.dump(config, []))
        return directory

    training.train(config, create, StopAfter(stop))


def resume(config: RunConfig, path: Path) -> list[str]:
    told: list[str] = []
    directory = rundir.existing(path)
    training.train(config, lambda: directory, Stopper(), checkpoint.latest(directory, told.append), told.append)
    return told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run(tiny(), path)
    return path


@pytest.mark.parametrize("stop", [2, 4])
def test_a_stopped_run_goes_on_to_the_last_bit(whole: Path, tmp_path: Path, stop: int) -> None:
    path = tmp_path / "run"
    with pytest.raises(callbacks.Interrupted):
        run(tiny(), path, stop)
    assert resume(tiny(), path) == []
    assert torment.differences(whole, path) == []


@pytest.mark.parametrize(("lost", "stop"), [({1}, 2), ({1, 2}, 3), ({3}, 4)])
def test_a_run_stopped_after_a_rollout_was_lost_does_so(
    lost: set[int], stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts that cannot be learned from, before the first update and later, under schedules of noise and γ."""
    config = tiny(env_id="Pendulum-v1")
    actor = replace(config.acktr.actor, log_std_final=-2.0, forgiven_noise=False, exploration_kl=0.0)
    config = replace(config, acktr=replace(config.acktr, actor=actor))
    begun: list[int] = []

    def broken(*_: object) -> str | None:
        begun.append(1)
        return "lost" if len(begun) in lost else None

    monkeypatch.setattr("acktr.sb3.acktr.broken_buffer", broken)
    run(config, tmp_path / "one")
    begun.clear()
    with pytest.raises(callbacks.Interrupted):
        run(config, tmp_path / "other", stop)
    assert resume(config, tmp_path / "other") == []
    assert torment.differences(tmp_path / "one", tmp_path / "other") == []


@pytest.mark.parametrize(
    ("algorithm", "env_id"), [("ppo", "CartPole-v1"), ("a2c", "Pendulum-v1"), ("acktr", "Hopper-v5")]
)
def test_others_do_too(tmp_path: Path, algorithm: str, env_id: str) -> None:
    config = tiny(algorithm, env_id)
    run(config, tmp_path / "one")
    # A2C writes a row every twenty rollouts: it is stopped between two of them.
    with pytest.raises(callbacks.Interrupted):
        run(config, tmp_path / "other", 31 if algorithm == "a2c" else 3)
    assert resume(config, tmp_path / "other") == []
    assert torment.differences(tmp_path / "one", tmp_path / "other") == []


def lose_worlds(agent: Any) -> None:
    agent._last_obs = None


def lose_the_generators(agent: Any) -> None:
    torch.manual_seed(5)


def lose_running_returns(agent: Any) -> None:
    agent.get_vec_normalize_env().returns[:] = 0


@pytest.mark.parametrize("lose", [lose_worlds, lose_the_generators, lose_running_returns])
def test_what_is_lost_shows(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Any], None]
) -> None:
    """The negative control: the comparison sees whatever a resumed run would forget."""
    path, config, before = tmp_path / "run", tiny(), training._resume
    with pytest.raises(callbacks.Interrupted):
        run(config, path, 3)

    def forget(agent: Any, start: checkpoint.Checkpoint, tell: Callable[[str], None]) -> None:
        before(agent, start, tell)
        lose(agent)

    monkeypatch.setattr(training, "_resume", forget)
    resume(config, path)
    assert torment.differences(whole, path) != []


def test_a_log_that_is_lost_shows(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    with pytest.raises(callbacks.Interrupted):
        run(tiny(), path, 3)
    monkeypatch.setattr(training.worlds, "restore_log", lambda *_: None)
    resume(tiny(), path)
    assert "progress.csv" in torment.differences(whole, path)[0]


def test_a_run_without_a_checkpoint_begins_anew(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(callbacks.Interrupted) as stop:
        run(tiny(), path, 3)
    stop.value.path.unlink()  # killed before the first one, with rows of what it did
    for other in checkpoint.listing(rundir.existing(path)):
        other.unlink()
    assert len(rundir.read_rows(path / "progress.csv")) == 2
    assert resume(tiny(), path) == []
    assert torment.differences(whole, path) == []


def test_worlds_that_cannot_be_saved_begin_again_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config, seeds = tmp_path / "run", tiny("ppo"), list[int]()
    monkeypatch.delattr("envs.guard.FiniteGuard.state_dict")
    with pytest.raises(callbacks.Interrupted):
        run(config, path, 3)
    seed = build.envs.FiniteGuard.seed
    monkeypatch.setattr(build.envs.FiniteGuard, "seed", lambda self, s=None: seeds.append(s) or seed(self, s))
    (line,) = resume(config, path)
    assert "begin again" in line
    assert "FiniteGuard cannot be saved" in line
    assert "\n" not in line
    assert any(s not in {None, 0} for s in seeds), "the first episodes are not met again"


def as_format_1(path: Path, target: Path) -> None:
    """What the first version wrote: torch's bare archive, without environments."""
    state = torch.load(checkpoint._unsealed(path), weights_only=True)
    kept = {name: state[name] for name in ("parameters", "normaliser", "rng", "progress")}
    torch.save({"format": 1, **kept}, target)


def test_checkpoints_of_the_first_format_are_read(tmp_path: Path) -> None:
    path, config = tmp_path / "run", tiny("ppo")
    with pytest.raises(callbacks.Interrupted) as stop:
        run(config, path, 3)
    as_format_1(stop.value.path, stop.value.path)
    whole = stop.value.path.read_bytes()
    (line,) = resume(config, path)
    assert "older version" in line
    old = tmp_path / "old.pt"
    old.write_bytes(whole)
    with zipfile.ZipFile(old) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    spot = largest.header_offset + largest.file_size // 2
    for damaged in (whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :], whole[:spot], bytes(len(whole))):
        old.write_bytes(damaged)
        with pytest.raises(checkpoint.DamagedError):
            checkpoint.load(old)


def test_a_later_format_is_no_damage(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.listing(rundir.existing(whole))[-1]
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(UsageError, match=r"format 2.*update") as caught:
        checkpoint.load(path)
    assert not isinstance(caught.value, checkpoint.DamagedError)


def test_pruning_counts_what_is_whole(whole: Path, tmp_path: Path) -> None:
    directory = rundir.create(tmp_path / "run")
    directory.checkpoints.mkdir()
    content = checkpoint.listing(rundir.existing(whole))[-1].read_bytes()
    for number in range(6):
        damaged = number in {2, 4}
        checkpoint.checkpoint_path(directory, number).write_bytes(content[: -1 if damaged else None])
    checkpoint.prune(directory, 2)
    assert [int(path.stem[5:]) for path in checkpoint.listing(directory)] == [3, 4, 5]


@pytest.mark.parametrize("section", ["progress", "rng", "parameters", "worlds"])
def test_a_sealed_file_of_another_content_is_refused_in_one_line(whole: Path, tmp_path: Path, section: str) -> None:
    config = tiny()
    loaded = checkpoint.load(checkpoint.listing(rundir.existing(whole))[-1])
    strange = replace(loaded, **{section: {"timesteps": 3, "layers": [{"layer": 3}], "observations": None}})
    agent = build.make_agent(config, build.make_training_env(config, 0))
    if section == "worlds":
        assert "other worlds" in str(checkpoint.restore(agent, strange))
        return
    with pytest.raises(UsageError, match="does not fit") as caught:
        checkpoint.restore(agent, strange)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- for real


def test_a_run_stopped_before_its_first_step_goes_on_from_there(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(callbacks.Interrupted):
        run(tiny(), path, 1)
    for _ in range(2):  # stopped again at the same place
        assert checkpoint.latest(rundir.existing(path)).timesteps == 0
        with pytest.raises(callbacks.Interrupted):
            training.train(
                tiny(), lambda: rundir.existing(path), StopAfter(1), checkpoint.latest(rundir.existing(path))
            )
    assert resume(tiny(), path) == []
    assert torment.differences(whole, path) == []


def test_stopped_runs_end_as_the_one_never_stopped(tmp_path: Path) -> None:
    plan = faults.Plan(rollouts=3)
    arguments = [*faults.arguments_of(plan, "CartPole-v1"), "--env.n-envs", "2", "--acktr.n-steps", "64"]
    arguments += ["--total-timesteps", "640", "--checkpoint.period", "128"]
    blows = [torment.KILL, *torment.INTERRUPTIONS]
    found = torment.torment("CartPole-v1", arguments, blows, random.Random(1), tmp_path, lambda _: None)
    assert found.failures == []
    assert found.blows == dict.fromkeys(blows, 1)
    assert found.runs >= 1
    # The comparison can fail: a table that lost a digit is found.
    table = tmp_path / "run-0" / "progress.csv"
    table.write_text(table.read_text().replace("7", "8", 1))
    assert "progress.csv" in torment.differences(tmp_path / "never-stopped", tmp_path / "run-0")[0]


def test_no_damaged_checkpoint_is_used(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruption, "_DOOR_PERIOD", 10**9)  # they take processes of their own
    found = corruption.corrupt(whole, 20, random.Random(0), tmp_path, lambda _: None)
    assert found.failures == []
    assert found.older_used > 0
    assert found.refused > 0
    # Without the checksum some damages would be read as if nothing had happened.
    monkeypatch.setattr(checkpoint.sealed, "read", lambda path: path.read_bytes()[len(checkpoint.sealed.HEAD) : -32])
    (tmp_path / "again").mkdir()
    careless = corruption.corrupt(whole, 60, random.Random(0), tmp_path / "again", lambda _: None)
    assert any("used" in failure or "another content" in failure for failure in careless.failures)
