import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents import configfiles
from agents.benchmarks import engine, engines, measuring, parts, report, throughput, update
from agents.benchmarks.measuring import Phases, Timing, interleave, isolated, ratios, spread
from agents.errors import UsageError


def silent(_: str) -> None:
    pass


# ---------------------------------------------------------------------------------------------------- measuring


def test_ratios_pair_the_rounds() -> None:
    # 2/1, 6/2, 9/9: the median of the quotients is 2, the quotient of the medians would be 6/2 = 3.
    found = ratios([2.0, 6.0, 9.0], [1.0, 2.0, 9.0])
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)
    assert spread([4.0, 1.0]) == measuring.Spread(2.5, 1.0, 4.0)


def test_rounds_begin_with_another_subject() -> None:
    order: list[tuple[str, int]] = []

    def measure(subject: str, number: int) -> int:
        order.append((subject, number))
        return number

    found = interleave(["a", "b", "c"], 4, measure, silent)
    assert [name for name, _ in order] == list("abcbcacababc")
    assert found == {name: [0, 1, 2, 3] for name in "abc"}


def test_rates_and_times_are_inverse() -> None:
    timing = Timing(wall=4.0, cpu=2.0, work=100.0)
    assert (timing.per_unit("wall"), timing.rate("wall"), timing.rate("cpu")) == (0.04, 25.0, 50.0)
    assert timing.unit() + timing.unit() == Timing(0.08, 0.04)


def test_phases_share_time_out_without_counting_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 1, 3, 7, 15, 31, 63])
    monkeypatch.setattr(measuring, "clocks", lambda: (t := float(next(ticks)), 10 * t))
    phases = Phases()
    with phases.phase("outer"):  # from 1
        with phases.phase("inner"):  # 3 to 7
            pass
        with phases.phase("inner"):  # 15 to 31
            pass
    assert phases.seconds == {"outer": (2.0 + 8.0 + 32.0, 420.0), "inner": (4.0 + 16.0, 200.0)}


def test_wrapped_functions_are_given_back() -> None:
    class Owner:
        def work(self) -> int:
            return 7

    owner = Owner()
    with Phases() as phases:
        phases.wrap(owner, "work", "working")
        assert owner.work() == 7
        assert set(phases.seconds) == {"working"}
        phases.clear()
    assert owner.work() == 7
    assert phases.seconds == {}


def test_a_process_of_its_own_hands_its_mistakes_back() -> None:
    assert isolated(Path.exists, Path("/")) is True
    with pytest.raises(UsageError, match="Nope"):
        isolated(configfiles.load, Path("Nope.yaml"))


# ---------------------------------------------------------------------------------------------------- report


def test_tables_line_up() -> None:
    table = report.Table("Title", ["", "a", "bb"], [["row", "1", "2"], ["longer", "100", ""]])
    assert str(table).splitlines() == ["Title", "          a  bb", "row       1   2", "longer  100"]
    assert report.with_range(spread([1.0, 2.0, 4.0]), 1) == "2.0 [1.0–4.0]"
    assert report.with_range(spread([12345.6]), 0) == "12,346 [12,346–12,346]"


def test_reports_are_kept_beside_each_other(tmp_path: Path) -> None:
    now = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    found = report.Report("stub", {"repeats": 1}, [], {"x": spread([1.0])}, ["a note"])
    paths = [report.write(found, tmp_path / "new", ["program"], now) for _ in range(2)]
    assert [path.name for path in paths] == ["stub-20300102-030405.json", "stub-20300102-030405-2.json"]
    data = json.loads(paths[0].read_text())
    assert data["results"] == {"x": {"median": 1.0, "low": 1.0, "high": 1.0}}
    assert data["notes"] == ["a note"]
    assert {"git_commit", "packages", "cpu", "cores", "started", "torch_threads"} <= data["origin"].keys()
    assert data["origin"]["packages"]["torch"] == torch.__version__


def test_the_processor_is_named(tmp_path: Path) -> None:
    table = tmp_path / "cpuinfo"
    table.write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor : 1\n")
    assert report.cpu_model(table) == "Some CPU @ 2 GHz"
    assert report.cpu_model(tmp_path / "none")


def test_output_must_be_a_folder(tmp_path: Path) -> None:
    report.check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file"):
        report.check_folder(tmp_path / "file" / "b")


# ---------------------------------------------------------------------------------------------------- throughput


def test_throughput_compares_rates() -> None:
    ours = [Timing(1.0, 2.0, 100.0), Timing(2.0, 2.0, 100.0), Timing(4.0, 2.0, 100.0)]  # 100, 50, 25 steps/s
    peer = [Timing(2.0, 1.0, 100.0), Timing(2.0, 1.0, 100.0), Timing(2.0, 1.0, 100.0)]  # 50, 50, 50 steps/s
    found = throughput.summarise(throughput.Plan("X-v0", 3, 100), {"acktr": ours, "ppo": peer})
    result = found.results["ppo"]
    assert result["ours_over_this"] == {"wall": spread([2.0, 1.0, 0.5]), "cpu": spread([0.5] * 3)}
    assert result["steps_per_second"] == {"wall": spread([50.0]), "cpu": spread([100.0])}
    assert [row[:2] for row in found.tables[0].rows] == [["ACKTR (ours)", "50 [25–100]"], ["SB3 PPO", "50 [50–50]"]]
    assert found.tables[0].rows[1][3:] == ["1.00 [0.50–2.00]", "0.50 [0.50–0.50]"]


def test_the_window_holds_whole_periods() -> None:
    atari = configfiles.shipped("ALE/Pong-v5")
    period = 32 * 20 * atari.acktr.actor.refresh_period
    assert throughput.window(atari, 1) == period
    assert throughput.window(atari, period + 1) == 2 * period
    assert throughput.window(replace(atari, algorithm="ppo"), 1) == 32 * atari.ppo.n_steps
    assert throughput.learner_config(atari, "acktr").acktr.actor.cold_start == 0


@pytest.mark.parametrize("subject", ["a2c", "trpo", throughput.BARE])
def test_a_learner_is_timed_over_whole_rollouts(subject: str) -> None:
    timing = throughput.measure("CartPole-v1", subject, 50, 0)
    n_steps = {"a2c": 5, "trpo": 128, throughput.BARE: 1}[subject]
    rollout = 8 * n_steps
    assert timing.work == -(-50 // rollout) * rollout
    assert timing.wall > 0


# ---------------------------------------------------------------------------------------------------- update

SMALL = {
    "mlp": update.Case("HalfCheetah-v5", spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), ("actor", "critic")),
    "atari": update.Case("ALE/Pong-v5", spaces.Box(0, 255, (1, 36, 36), np.uint8), spaces.Discrete(3), ("joint",)),
}


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = configfiles.shipped

    def few(env_id: str) -> Any:
        config = shipped(env_id)
        acktr = replace(config.acktr, n_steps=8, critic=replace(config.acktr.critic, n_epochs=2))
        return replace(config, env=replace(config.env, n_envs=4), torch_threads=1, acktr=acktr)

    monkeypatch.setattr(configfiles, "shipped", few)


@pytest.mark.parametrize(("name", "part"), [("mlp", "actor"), ("mlp", "critic"), ("atari", "joint")])
def test_every_phase_of_an_update_takes_time(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    timing = update.measure(SMALL[name], part, update.OURS, 1, 0)
    assert timing.work == {"actor": 1, "critic": 1, "joint": 10}[part], "whole periods of refresh"
    assert set(timing.phases) == set(update.PHASES)
    assert all(wall > 0 for wall, _ in timing.phases.values())
    peer = update.measure(SMALL[name], part, update.PEER, 1, 0)
    assert peer.work == timing.work
    assert not peer.phases


@pytest.mark.parametrize(("name", "part"), [("mlp", "actor"), ("mlp", "critic"), ("atari", "joint")])
def test_both_sides_of_an_update_learn_on_the_same_batches(
    name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    config = configfiles.shipped(SMALL[name].env_id)
    agent = update.make_agent(config, SMALL[name])
    rollout = update.make_rollout(agent, config)
    assert len(rollout) == 32
    network = parts.optimizer_of(agent, part).network
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    before = [p.clone() for p in network.parameters()]
    parts.rmsprop_steps(agent, rollout, part)()
    assert seen == ([8] * 8 if part == "critic" else [32]), "one pass per gradient step"
    assert any(not torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))
    before = [p.clone() for p in network.parameters()]
    parts.natural_steps(agent, rollout, part)()
    assert any(not torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))


def test_updates_are_compared() -> None:
    phases = dict.fromkeys(update.PHASES, (1.0, 2.0))
    found = update.summarise(
        update.Plan("mlp", 2, 4),
        {
            "ACKTR, actor": [Timing(4.0, 8.0, 4.0, phases), Timing(8.0, 8.0, 4.0, phases)],
            "RMSprop, actor": [Timing(1.0, 4.0, 4.0), Timing(1.0, 4.0, 4.0)],
            "ACKTR, critic": [Timing(8.0, 8.0, 2.0, phases), Timing(8.0, 8.0, 2.0, phases)],
            "RMSprop, critic": [Timing(2.0, 2.0, 2.0), Timing(2.0, 2.0, 2.0)],
        },
    )
    against = {name: result["acktr_over_rmsprop"]["wall"] for name, result in found.results.items()}
    assert against["64-64 actor"] == spread([4.0, 8.0])
    assert against["64-64 critic"] == spread([4.0, 4.0])
    # (1 + 4) / (0.25 + 1) and (2 + 4) / (0.25 + 1) seconds an update
    assert against["64-64 actor and critic"] == spread([4.0, 4.8])
    assert found.tables[1].rows[0] == ["64-64 actor", *["500.00 (17%)"] * 6]


# ---------------------------------------------------------------------------------------------------- engine

PRESENT = [peer for peer in engines.PEERS if engines.installed(peer)]  # they come with an extra that tests do not need
EVERYONE = [(who, method) for who in ("ours", engines.ALL_ROWS, *PRESENT) for method in engines.methods_of(who)]


@pytest.mark.parametrize(("who", "method"), EVERYONE)
def test_every_engine_is_timed_in_its_phases(who: str, method: Any) -> None:
    timing = engine.measure_problem(engines.mlp(0, batch=64, width=16), method, who, 2)
    assert timing.work == 2
    assert set(timing.phases) == set(engine.PHASES)
    assert sum(wall for wall, _ in timing.phases.values()) <= timing.wall


@pytest.mark.parametrize(("who", "method"), [pair for pair in EVERYONE if pair[0] != "ours"])
def test_everyone_finds_our_matrices(who: str, method: Any) -> None:
    found = engine.compare(engines.mlp(0, batch=64, width=16), method, who)
    assert found["scale"] == pytest.approx(1, abs=1e-4)
    assert found["product"] < 1e-3
    assert found["solve"] < 1e-3


def test_a_different_method_is_seen_as_different(monkeypatch: pytest.MonkeyPatch) -> None:
    make = engines.make

    def mixed(who: str, problem: Any, method: Any, exact: bool = False) -> Any:
        return make(who, problem, "kfac" if who == "ours" else method, exact)

    monkeypatch.setattr(engines, "make", mixed)
    assert engine.compare(engines.mlp(0, batch=64, width=16), "factored-kfac", "ours")["solve"] > 1e-2


def test_convolutions_agree() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(27, 4)
    )
    gradient = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    problem = engines.Problem(network, torch.randn(40, 1, 8, 8), torch.zeros(40).long(), gradient)
    for who in ("ours", *PRESENT):
        found = engine.compare(problem, "ekfac", who)
        assert found["scale"] == pytest.approx(1, abs=1e-4)
        assert found["solve"] < 1e-3


def test_a_peer_that_fails_or_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(function: Any, *arguments: Any) -> Any:
        _, method, who = arguments[:3]
        if who == "curvlinops" and method == "kfac":
            raise RuntimeError("eigh: did not converge\nmore")
        return Timing(2.0, 2.0, 1.0) if function is engine.measure else {"scale": 1.0, "product": 0.0, "solve": 0.0}

    monkeypatch.setattr(engine, "isolated", stand_in)
    monkeypatch.setattr(engines, "installed", lambda peer: peer == "curvlinops")
    found = engine.run(engine.Plan("mlp", 2, 1), silent)
    assert found.notes == [
        "nngeometry is not installed and was left out: pip install '.[bench]'",
        "mlp, kfac, curvlinops failed: eigh: did not converge",
    ]
    assert list(found.results["timings"]) == [
        "mlp, kfac, ours",
        "mlp, factored-kfac, ours",
        "mlp, factored-kfac, curvlinops",
        "mlp, ekfac, ours",
        "mlp, ekfac, curvlinops",
    ]
    assert found.results["timings"]["mlp, ekfac, curvlinops"]["ours_over_this"]["wall"] == spread([1.0])


def test_our_own_failure_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(function: Any, network: str, method: str, who: str, *rest: Any) -> Any:
        if who == "ours":
            raise RuntimeError("ours")
        return Timing(1.0, 1.0)

    monkeypatch.setattr(engine, "isolated", stand_in)
    monkeypatch.setattr(engines, "installed", lambda _: False)
    with pytest.raises(RuntimeError, match="ours"):
        engine.run(engine.Plan("mlp", 1, 1), silent)


def test_clocks_go_on() -> None:
    first = measuring.clocks()
    time.sleep(0.001)
    assert measuring.clocks()[0] > first[0]
