import io
import json
import pickle
import pickletools
import signal
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import (
    build,
    callbacks,
    checkpoint,
    configfiles,
    evaluation,
    interruption,
    loading,
    rundir,
    sealed,
    training,
)
from agents.config import RunConfig
from agents.errors import UsageError
from agents.interruption import Stopper


def tiny(algorithm: Any, steps: int = 192) -> RunConfig:
    run = configfiles.shipped("CartPole-v1")
    return replace(
        run,
        algorithm=algorithm,
        total_timesteps=steps,
        env=replace(run.env, n_envs=2),
        evaluation=replace(run.evaluation, episodes=2, period=64),
        checkpoint=replace(run.checkpoint, period=64, keep=2),
        acktr=replace(run.acktr, n_steps=32, learning_rate_decay="linear"),
        ppo=replace(run.ppo, n_steps=32, n_minibatches=2, n_epochs=2, learning_rate_decay="linear"),
        a2c=replace(run.a2c, n_steps=32),
        trpo=replace(run.trpo, n_steps=32, n_minibatches=2, n_critic_updates=2),
    )


def run(config: RunConfig, path: Path, stopper: Stopper | None = None) -> training.Result:
    def create() -> rundir.RunDirectory:
        directory = rundir.create(path)
        rundir.write_text(directory.config, configfiles.dump(config, []))
        return directory

    return training.train(config, create, stopper or Stopper())


def resume(config: RunConfig, path: Path) -> training.Result:
    directory = rundir.existing(path)
    return training.train(config, lambda: directory, Stopper(), checkpoint.latest(directory))


class StopAfter(Stopper):
    """Wishes to stop at the n-th time it is asked."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("algorithm", ["acktr", "ppo", "a2c", "trpo"])
def test_a_run_leaves_everything(tmp_path: Path, algorithm: str) -> None:
    path = tmp_path / "run"
    result = run(tiny(algorithm), path)
    directory = rundir.existing(path)
    assert result.timesteps == 192
    assert [p.name for p in checkpoint.listing(directory)] == ["step-000000000128.pt", "step-000000000192.pt"]
    assert [row["timesteps"] for row in json.loads(directory.evaluations.read_text())] == [64, 128, 192]
    episodes = rundir.read_rows(directory.episodes)
    assert result.training_return == pytest.approx(np.mean([float(row["return"]) for row in episodes]))
    # CartPole pays 1 a step: raw scores are lengths, whatever the normaliser does.
    assert all(int(float(row["return"])) == int(row["length"]) for row in episodes)
    if algorithm != "a2c":  # whose short rollouts are logged less often
        steps = [int(row["time/total_timesteps"]) for row in rundir.read_rows(directory.progress)]
        assert steps == [64, 128, 192]
    assert list(directory.tensorboard.glob("events.*"))
    summary = json.loads(directory.result.read_text())
    assert summary["training_return_last_100"] == pytest.approx(result.training_return)
    assert summary["evaluation"]["returns"] == list(result.evaluation.returns)
    assert {p.name for p in directory.model.iterdir()} == {"agent.pt", "sb3.zip", "vecnormalize.pkl"}
    assert not list(path.rglob("*.tmp"))


@pytest.mark.parametrize("algorithm", ["acktr", "ppo"])
def test_an_interrupted_run_goes_on(tmp_path: Path, algorithm: str) -> None:
    path, config = tmp_path / "run", tiny(algorithm, 256)
    with pytest.raises(callbacks.Interrupted) as caught:
        run(config, path, StopAfter(3))
    assert caught.value.timesteps == 128
    directory = rundir.existing(path)
    assert checkpoint.listing(directory)[-1] == caught.value.path
    seconds = checkpoint.load(caught.value.path).progress["seconds"]
    # What a crash after the checkpoint would have left, to be done again.
    table = rundir.Table(directory.episodes)
    table.append({"timesteps": 140, "return": 1e9, "length": 1, "seconds": 1})
    table.flush()

    result = resume(config, path)
    assert result.timesteps == 256
    assert result.seconds > seconds
    steps = [int(row["time/total_timesteps"]) for row in rundir.read_rows(directory.progress)]
    assert steps == [64, 128, 192, 256]
    ends = [int(row["timesteps"]) for row in rundir.read_rows(directory.episodes)]
    assert ends == sorted(ends)
    assert result.training_return is not None
    assert result.training_return < 1e6
    assert [row["timesteps"] for row in json.loads(directory.evaluations.read_text())] == [64, 128, 192, 256]


def test_a_signal_in_the_last_rollout_is_heeded(tmp_path: Path) -> None:
    class Late(Stopper):
        def __call__(self) -> bool:
            return False

    late = Late()
    late.wanted = True
    with pytest.raises(callbacks.Interrupted) as caught:
        run(tiny("ppo", 64), tmp_path / "run", late)
    assert caught.value.timesteps == 64
    assert resume(tiny("ppo", 64), tmp_path / "run").timesteps == 64


def test_signals_are_taken_once_then_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruption.signals() as stopper:
        assert not stopper()
        signal.raise_signal(signal.SIGTERM)
        assert stopper()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    config, path = tiny("ppo", 64), tmp_path / "run"
    run(config, path)
    (path / "episodes.csv").write_text("timesteps,return\nx,1\n")
    with pytest.raises(UsageError, match=r"episodes\.csv is damaged"):
        resume(config, path)


def test_a_finished_run_that_is_resumed_only_evaluates(tmp_path: Path) -> None:
    config = tiny("ppo", 64)
    run(config, tmp_path / "run")
    assert resume(config, tmp_path / "run").timesteps == 64


def trained(config: RunConfig, path: Path) -> Any:
    """Train an agent by hand and write its checkpoint."""
    agent = build.make_agent(config, build.make_training_env(config, 0))
    agent.learn(config.total_timesteps)
    checkpoint.save(path, agent, 1.5)
    return agent


@pytest.mark.parametrize("algorithm", ["acktr", "ppo", "a2c", "trpo"])
def test_a_checkpoint_holds_the_whole_state(tmp_path: Path, algorithm: str) -> None:
    config, path = tiny(algorithm), tmp_path / "agent.pt"
    agent = trained(config, path)
    other = build.make_agent(replace(config, seed=9), build.make_training_env(config, 0))
    checkpoint.restore(other, checkpoint.load(path))
    expected = torch.rand(3), np.random.rand(3), agent.action_space.sample()
    checkpoint.restore(other, checkpoint.load(path))
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()
    assert (other.num_timesteps, other._n_updates) == (agent.num_timesteps, agent._n_updates)
    assert [e["r"] for e in other.ep_info_buffer or ()] == [e["r"] for e in agent.ep_info_buffer]
    same(other.get_parameters(), agent.get_parameters())
    for name in ("obs_rms", "ret_rms"):
        mine, theirs = (getattr(a.get_vec_normalize_env(), name) for a in (other, agent))
        assert np.array_equal(mine.mean, theirs.mean)
        assert np.array_equal(mine.var, theirs.var)
        assert mine.count == theirs.count


def same(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        for one, two in zip(left, right, strict=True):
            same(one, two)
    else:
        assert left == right


def test_a_loaded_run_plays_like_the_one_that_was_saved(tmp_path: Path) -> None:
    result = run(tiny("acktr"), tmp_path / "run")
    seed = callbacks.evaluation_seed(0)
    loaded = loading.load_run(tmp_path / "run", loading.evaluation_envs(2, seed), print)
    scores = evaluation.evaluate(loaded.agent, loaded.env, 2, seed=seed)
    assert scores == result.evaluation
    assert loaded.timesteps == 192


def test_the_newest_state_is_the_one_that_loads(tmp_path: Path) -> None:
    config = tiny("ppo", 64)
    run(config, tmp_path / "run")
    directory = rundir.existing(tmp_path / "run")
    longer = replace(config, total_timesteps=256)
    with pytest.raises(callbacks.Interrupted):
        training.train(longer, lambda: directory, StopAfter(2), checkpoint.latest(directory))
    assert loading.newest(directory, print).timesteps == 128


class Bomb:
    def __reduce__(self) -> Any:
        return print, ("boom",)


def test_a_malicious_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"format": checkpoint.FORMAT, "parameters": Bomb()}
    torch.save(state, tmp_path / "torch.pt")  # as the first format was
    sealed.write(tmp_path / "sealed.pt", lambda stream: torch.save(state, stream))
    sealed.write(tmp_path / "pickled.pt", lambda stream: pickle.dump(state, stream))
    for path in tmp_path.iterdir():
        with pytest.raises(checkpoint.DamagedError, match="holds more than tensors and was refused"):
            checkpoint.load(path)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(state))
    with pytest.raises(checkpoint.DamagedError, match="does not begin as a checkpoint does"):
        checkpoint.load(tmp_path / "bare.pt")
    assert "boom" not in capsys.readouterr().out
    # The same file does go off where pickles are trusted, so the test means something.
    pickle.loads((tmp_path / "bare.pt").read_bytes())
    assert "boom" in capsys.readouterr().out


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "agent.pt"
    trained(tiny("a2c", 64), path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"agent\.pt") as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)
    sealed.write(path, lambda stream: torch.save({"weights": torch.zeros(2)}, stream))
    with pytest.raises(UsageError, match="not a checkpoint of this project"):
        checkpoint.load(path)


def test_a_checkpoint_of_another_architecture_is_named(tmp_path: Path) -> None:
    config, path = tiny("ppo", 64), tmp_path / "agent.pt"
    trained(config, path)
    wider = replace(config, policy=replace(config.policy, pi=(5,)))
    agent = build.make_agent(wider, build.make_training_env(wider, 0))
    with pytest.raises(UsageError, match="does not fit"):
        checkpoint.restore(agent, checkpoint.load(path))


def test_code_cannot_go_into_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("ppo", 64)
    agent = build.make_agent(config, build.make_training_env(config, 0))
    monkeypatch.setattr(agent, "get_parameters", lambda: {"policy": {"f": print}})
    with pytest.raises(TypeError, match=r"checkpoint\.parameters\.policy\.f"):
        checkpoint.save(tmp_path / "agent.pt", agent, 0.0)
    assert not list(tmp_path.iterdir())


def test_our_checkpoints_hold_no_pickled_code(tmp_path: Path) -> None:
    path = tmp_path / "agent.pt"
    trained(tiny("acktr", 64), path)
    with zipfile.ZipFile(io.BytesIO(sealed.read(path))) as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    imported = {argument.split()[0] for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}
    assert imported
    assert imported <= {"torch", "torch._utils", "collections"}
