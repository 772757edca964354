"""The scaling benchmark: constants out of timings that a known machine would give, and what follows from them."""

from dataclasses import replace

import pytest

from acktr.distributed import CommOpt, Grid
from acktr.distributed.cost import Machine, update_seconds
from acktr.linalg import eigen_cost
from agents.benchmarks import gang, scaling

TRUE = Machine(products=3e9, decompositions=2e9, bandwidth=1e9, latency=5e-5, overhead=2e-3, cores=2)
BATCH = 2048


def told(size: int) -> gang.Told:
    """What processes of the true machine would measure."""
    grid = CommOpt().grid(size)
    batches = (BATCH // 4, BATCH) if size == 1 else (BATCH,)
    seconds = [update_seconds(scaling.task_here(batch), TRUE, grid).whole for batch in batches]
    sums = (0.0, 0.0) if size == 1 else (2 * TRUE.latency, 2 * TRUE.latency + 4 * gang.LARGE / TRUE.bandwidth)
    return gang.Told({"comm-opt": seconds}, *sums, eigen_cost(257) / TRUE.decompositions)


def test_constants_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_cores", lambda: 2)
    found = {size: told(size) for size in (1, 2, 4)}
    here = scaling.constants(found, BATCH)
    for name, value in vars(TRUE).items():
        assert getattr(here, name) == pytest.approx(value, rel=1e-6), name
    assert all(check.foretold == pytest.approx(check.measured) for check in scaling.held(found, here, BATCH))


def test_a_machine_that_is_otherwise_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_cores", lambda: 2)
    found = {size: told(size) for size in (1, 2)}
    slower = replace(found[2], updates={"comm-opt": [2 * found[2].updates["comm-opt"][0]]})
    here = scaling.constants({**found, 2: slower}, BATCH)
    checks = scaling.held({**found, 2: slower}, here, BATCH)
    assert checks[-1].measured == pytest.approx(2 * checks[-1].foretold)


def test_predictions_begin_at_one_and_stay_below_the_gpus() -> None:
    rows = [row for name, task in scaling.tasks().items() for row in scaling.foretold(name, task, (1, 8, 1024))]
    assert {row.gpus for row in rows} == {1, 8, 1024}
    for row in rows:
        if row.gpus == 1:
            assert row.speed_up == pytest.approx(1)
        # Decompositions are shared out too: where they are most of an update, a growing batch gains more than its GPUs.
        layers = len(scaling.tasks()[row.network].layers)
        assert 0 < row.speed_up <= row.gpus * (layers if row.batch == "grows" else 1) * 1.001
    grows = {(row.network, row.placement, row.gpus): row.speed_up for row in rows if row.batch == "grows"}
    assert grows["Atari", "comm-opt", 1024] > 100
    assert "</svg>" in scaling.figure(rows, [scaling.Check(2, "comm-opt", 0.1, 0.1)])


def test_the_atari_network_is_the_one_that_is_trained() -> None:
    import gymnasium as gym
    import numpy as np

    from agents.networks import NatureCNN

    network = NatureCNN(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8))
    task = scaling.tasks()["Atari"]
    assert sum(p.numel() for p in network.parameters()) == sum(layer.matrix for layer in task.layers[:4])
    assert update_seconds(task, scaling.GPU, Grid(1, 1)).traffic == 0
