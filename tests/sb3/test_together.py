"""Several processes with a share of the environments each train one agent, over gloo: real ones, on 2 and on 3 ranks.

Four environments on three ranks are shares of 1, 1 and 2. What differs between the numbers of ranks is rounding:
rollouts of the updates are the same, curvatures exact, minibatches whole.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acktr.ranks import Ranks
from acktr.sb3.moments import merged
from acktr.sb3.ranks import Part

WORKER = Path(__file__).with_name("together_worker.py")
UPDATES = ("ekfac and factored-kfac", "kfac", "adam", "joint", "overflow")
ROUNDING = 1e-4
"""Of float32, as a share of the parameters' way; the negative controls are beyond a hundredth."""
PATIENCE = 300
pytestmark = pytest.mark.timeout(2 * PATIENCE)
Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    """What every case left on every rank of 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("together")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    places = [(rank, size) for size in (1, 2, 3) for rank in range(size)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(rank), str(size)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, size in places
    ]
    try:
        told = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), told
    return {
        size: [torch.load(folder / f"found-{size}-{rank}.pt", weights_only=False) for rank in range(size)]
        for size in (1, 2, 3)
    }


def relative(run: dict[str, Any], oracle: dict[str, Any]) -> float:
    went = (oracle["path"] - oracle["path"][0]).norm(dim=1).max()
    return float((run["path"] - oracle["path"]).norm(dim=1).max() / went)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", UPDATES)
def test_updates_equal_those_of_one_process_with_all_environments(found, size, name):
    oracle, runs = found[1][0][name], [each[name] for each in found[size]]
    assert relative(runs[0], oracle) < ROUNDING
    assert all(torch.equal(run["path"], runs[0]["path"]) for run in runs)
    assert torch.allclose(runs[0]["logged"], oracle["logged"], rtol=1e-3, atol=1e-4, equal_nan=True)
    assert all(run["faults"] == oracle["faults"] for run in runs)


def test_a_rollout_that_is_broken_on_one_rank_is_left_out_by_all(found):
    path = found[2][0]["overflow"]["path"]
    assert torch.equal(path[1], path[2])
    assert not torch.equal(path[0], path[1])
    assert found[2][0]["overflow"]["faults"] == {"rollout": 1}


@pytest.mark.parametrize("what", ["advantages", "radius"])
def test_what_is_taken_from_one_rank_alone_shows(found, what):
    assert relative(found[2][0][f"without {what}"], found[1][0][UPDATES[0]]) > 1e-2


@pytest.mark.parametrize("size", [2, 3])
def test_while_they_learn_all_ranks_are_one(found, size):
    oracle, runs = found[1][0]["learned"], [each["learned"] for each in found[size]]
    assert all(torch.equal(run["path"], runs[0]["path"]) for run in runs)  # parameters after each update
    assert len({tuple(step.tolist()) for step in oracle["path"]}) == 3
    for run in runs:
        assert run["timesteps"] == oracle["timesteps"]
        assert run["episodes"] == oracle["episodes"]
        for moment, whole in zip(run["moments"], oracle["moments"], strict=True):
            np.testing.assert_allclose(moment, whole, rtol=1e-12)


def test_normalisers_that_are_not_put_together_show(found):
    run, oracle = found[2][1]["apart"], found[1][0]["learned"]
    assert abs(run["moments"][2] - oracle["moments"][2]) > 10
    assert not np.allclose(run["moments"][0], oracle["moments"][0], rtol=1e-2)


@pytest.mark.parametrize("size", [2, 3])
def test_a_fault_on_one_rank_is_counted_by_all(found, size):
    assert [each["NaN"]["faults"] for each in found[size]] == [{"rollout": 1}] * size
    assert len({each["NaN"]["timesteps"] for each in found[size]}) == 1


@pytest.mark.parametrize("size", [2, 3])
def test_faults_without_end_on_one_rank_end_all(found, size):
    told = {each["NaN for ever"]["broke"] for each in found[size]}
    assert len(told) == 1
    assert told.pop().startswith(f"BrokenRankError: rank {size - 1}: the rollout's rewards are not finite, 10 rollouts")


@pytest.mark.parametrize("size", [2, 3])
def test_how_much_noise_is_forgiven_is_decided_alike(found, size):
    assert len({each["forgiven"] for each in found[size]}) == 1
    assert found[size][0]["forgiven"][0] < 0


def test_ranks_that_cannot_learn_together_are_refused_by_all(found):
    for size in (2, 3):
        assert all(each["refused"] == found[size][0]["refused"] for each in found[size])
    gamma, exploration, minibatches = found[3][0]["refused"]
    assert "ranks [1, 2] were set up otherwise than rank 0" in gamma and "gamma=0.9" in gamma
    assert "exploration_kl" in exploration
    assert "n_minibatches 11" in minibatches and "(1, 1, 2)" in minibatches
    assert "gae_lambda=0.1" in found[2][0]["refused"][2]


def test_moments_are_taken_out_and_put_together():
    rng = np.random.default_rng(0)
    start, *parts = (rng.normal(k, 1 + k, (50 + 10 * k, 2)) for k in range(4))

    def moments(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.tensor(rows.mean(0)), torch.tensor(rows.var(0)), torch.tensor(float(len(rows)))

    after = [moments(np.concatenate([start, part])) for part in parts]
    whole = moments(np.concatenate([start, *parts]))
    for one, other in zip(merged(moments(start), after), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # Who has seen nothing changes nothing.
    assert all(torch.equal(a, b) for a, b in zip(merged(whole, [whole, whole]), whole, strict=True))


def test_shares_of_examples_add_up():
    counts = (1, 1, 2)
    parts = [Part(sum(counts[:rank]), count, counts) for rank, count in enumerate(counts)]
    assert [part.of(10) for part in parts] == [2, 3, 5]
    assert [part.of(None) for part in parts] == [None] * 3
    assert [part.of(1) for part in parts] == [1, 1, 1]


def test_a_process_by_itself_decides_alone():
    ranks = Ranks()
    assert ranks.first("this") == "this"
    assert ranks.any(True) and not ranks.any(False)
