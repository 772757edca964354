"""One run for several processes: what it leaves, how it stops, goes on, and ends when one of them is lost."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from acktr.ranks import Ranks
from agents import build, checkpoint, rundir
from agents.benchmarks import torment
from agents.errors import UsageError
from agents.ranks import joined, restarts
from scripts import train

ARGUMENTS = [
    *("CartPole-v1", "--env.n-envs", "5", "--acktr.n-steps", "32", "--total-timesteps", "640"),
    *("--checkpoint.period", "160", "--evaluation.period", "0", "--evaluation.episodes", "2", "--seed", "4"),
    *("--acktr.critic.curvature", "factored-kfac", "--acktr.critic.n-epochs", "2"),
]
LONG = [*ARGUMENTS, "--total-timesteps", "1_000_000", "--evaluation.period", "160"]
PATIENCE = 200
pytestmark = pytest.mark.timeout(2 * PATIENCE)


class Job:
    """Processes that torchrun would have started on this machine."""

    def __init__(self, folder: Path, arguments: Sequence[Sequence[str]], environ: Mapping[str, str] = {}) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        size = len(arguments)
        self.logs = [folder / f"rank-{rank}-of-{size}.log" for rank in range(size)]
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), **environ}
        self.processes: list[BaseProcess] = [
            torment.begin(own, log, environ=places | {"RANK": str(rank)})
            for rank, (own, log) in enumerate(zip(arguments, self.logs, strict=True))
        ]

    def wait(self) -> list[int | None]:
        for process in self.processes:
            process.join(PATIENCE)
        late = [process.kill() for process in self.processes if process.is_alive()]
        assert not late, self.said()
        return [process.exitcode for process in self.processes]

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def send(self, which: signal.Signals) -> None:
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, which)


def job(folder: Path, arguments: Sequence[str], size: int, environ: Mapping[str, str] = {}) -> Job:
    return Job(folder, [arguments] * size, environ)


def wait_for_checkpoint(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not checkpoint.listing(rundir.RunDirectory(path)):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with three and two environments."""
    folder = tmp_path_factory.mktemp("whole")
    ranks = job(folder, [*ARGUMENTS, "--run-dir", str(folder / "run")], 2)
    assert ranks.wait() == [0, 0], ranks.said()
    return folder / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped by SIGTERM after a checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    ranks = job(folder, [*LONG, "--run-dir", str(folder / "run")], 2)
    wait_for_checkpoint(folder / "run")
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [130, 130], ranks.said()
    first, second = ranks.said()
    assert "stopped after" in first and "torchrun … -m scripts.train --resume" in first
    assert "stopped after" not in second
    return folder / "run"


def steps_of(path: Path) -> list[int]:
    return [int(row["time/total_timesteps"]) for row in rundir.read_rows(rundir.RunDirectory(path).progress)]


def test_two_processes_leave_one_run(whole: Path) -> None:
    directory = rundir.RunDirectory(whole)
    assert steps_of(whole) == [160, 320, 480, 640]
    assert len(checkpoint.listing(directory)) == 3
    assert all(place.exists() for place in (directory.result, directory.evaluations, directory.model / "sb3.zip"))
    final = checkpoint.load(directory.final)
    assert [len(each["worlds"]["observations"]) for each in ({"worlds": final.worlds}, *final.others)] == [2, 3]
    # Episodes of all environments, in the order in which they ended; steps are everyone's.
    rows = rundir.read_rows(directory.episodes)
    ends = [int(row["timesteps"]) for row in rows]
    assert ends == sorted(ends) and all(end % 5 == 0 for end in ends)
    assert sum(int(row["length"]) for row in rows) > 320


def test_the_run_goes_on_to_the_last_bit_with_as_many_processes(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    ranks = job(tmp_path, [*ARGUMENTS, "--total-timesteps", "320", "--run-dir", str(path)], 2)
    assert ranks.wait() == [0, 0], ranks.said()
    # To 320 and from there, as to 640 at once but for what falls with the total, which here is nothing.
    ranks = job(tmp_path, ["--resume", str(path), "--total-timesteps", "640"], 2)
    assert ranks.wait() == [0, 0], ranks.said()
    left, right = (checkpoint.load(rundir.RunDirectory(each).final) for each in (whole, path))
    for section in (*torment.SECTIONS, "others"):
        assert list(torment.unequal(getattr(left, section), getattr(right, section), section)) == []
    assert (whole / "progress.csv").read_bytes() == (path / "progress.csv").read_bytes()


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_processes_goes_on(stopped: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "run"
    shutil.copytree(stopped, path)
    before = steps_of(path)
    total = str(before[-1] + 320)
    ranks = job(tmp_path, ["--resume", str(path), "--total-timesteps", total], size)
    assert ranks.wait() == [0] * size, ranks.said()
    assert "shared out over 2 processes, and now over" in ranks.said()[0]
    assert steps_of(path) == [*before, before[-1] + 160, before[-1] + 320]
    assert len(checkpoint.load(rundir.RunDirectory(path).final).others) == size - 1


def test_torchrun_s_own_restart_goes_on(stopped: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(stopped, path)
    total = str(steps_of(path)[-1] + 160)
    arguments = [*ARGUMENTS, "--run-dir", str(path), "--total-timesteps", total]
    ranks = job(tmp_path, arguments, 2, {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert ranks.wait() == [0, 0], ranks.said()
    assert steps_of(path)[-1] == int(total)


@pytest.mark.parametrize("which", [0, 2])
def test_a_rank_that_is_killed_ends_the_others_with_one_line(tmp_path: Path, which: int) -> None:
    ranks = job(tmp_path, [*LONG, "--run-dir", str(tmp_path / "run")], 3)
    wait_for_checkpoint(tmp_path / "run")
    victim = ranks.processes[which]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    began = time.monotonic()
    statuses = ranks.wait()
    assert time.monotonic() - began < 30
    assert [status for rank, status in enumerate(statuses) if rank != which] == [1, 1]
    lines = [line for text in ranks.said() for line in text.splitlines() if line.startswith("error: ")]
    # Where no torchrun keeps the store, it goes with rank 0, and nobody knows who spoke.
    assert len(lines) == (1 if which else 2)
    assert f"rank {which} died" in lines[0] if which else "another rank died" in lines[0]
    assert f"--resume {tmp_path / 'run'}" in lines[0]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["--seed", "5"], "rank 1 has seed 5, rank 0 has 4; start all ranks with the same settings"),
        (["--sed", "5"], "rank 1: unknown option --sed; did you mean --seed?"),
        (["--acktr.critic.rank", "3"], "rank 1 has acktr.critic.rank 3, rank 0 has None"),
    ],
)
def test_ranks_that_differ_are_refused_in_one_line(tmp_path: Path, others: list[str], said: str) -> None:
    ranks = Job(tmp_path, [ARGUMENTS, [*ARGUMENTS, *others]])
    assert ranks.wait() == [2, 2]
    first, second = ranks.said()
    assert [line for line in first.splitlines()[1:] if line] == [next(x for x in first.splitlines() if said in x)]
    assert len(second.splitlines()) == 1  # the command
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--env.n-envs", "1"], "env.n_envs 1 cannot be shared out over 2 ranks"),
        (["--algorithm", "ppo"], "ppo learns in one process"),
        (["--acktr.actor.curvature", "seng"], "ranks cannot share"),
        (["--acktr.critic.n-minibatches", "30"], "critic.n_minibatches 30 cuts the rollouts"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_in_one_line(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    ranks = job(tmp_path, [*ARGUMENTS, *arguments, "--run-dir", str(tmp_path / "run")], 2)
    assert ranks.wait() == [2, 2]
    first, second = ranks.said()
    assert said in first and len(first.splitlines()) == 2 and len(second.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "RANK is set but not WORLD_SIZE and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but not RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK '2' of WORLD_SIZE '2'"),
        ({"RANK": "a", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK 'a'"),
    ],
)
def test_half_a_rendezvous_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said), joined(print, environ):
        raise AssertionError("nobody is there")


def test_a_missing_rendezvous_leaves_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert train.main(["CartPole-v1"]) == 2
    assert capsys.readouterr().err.startswith("error: RANK is set but not")


def test_one_rank_is_a_process_by_itself() -> None:
    with joined(print, {"RANK": "0", "WORLD_SIZE": "1"}) as company:
        assert company.ranks.size == 1
    assert not torch.distributed.is_initialized()
    assert restarts({}) == 0 and restarts({"TORCHELASTIC_RESTART_COUNT": "2"}) == 2


class Three(Ranks):
    size = 3

    def __init__(self, rank: int) -> None:
        self.rank = rank


def test_environments_are_shared_out_with_their_seeds() -> None:
    assert [build.seats(8, Three(rank)) for rank in range(3)] == [(0, 2), (2, 3), (5, 3)]
    assert [build.seats(3, Three(rank)) for rank in range(3)] == [(0, 1), (1, 1), (2, 1)]
    with pytest.raises(UsageError, match=r"env\.n_envs 2 cannot be shared out over 3 ranks"):
        build.seats(2, Three(0))
