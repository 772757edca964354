import inspect
import json
import resource
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acktr.curvature import BlockDiagonal
from acktr.curvature.kronecker.ekfac import EKFACBlock
from agents import configfiles
from agents.benchmarks import engine, engines, measuring, memory, report, soak
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
    # A build's own name (2.13.0+cu130) is in torch's version and not always in its package's.
    assert torch.__version__.startswith(data["origin"]["packages"]["torch"])


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


# ---------------------------------------------------------------------------------------------------- memory

MIB = 2**20


def allocate(mib: int) -> tuple[float, float, float, float]:
    before, start = memory.peak(), memory.resident()
    held = np.ones(mib * MIB, dtype=np.uint8)
    del held
    found = memory.since_imports(start)
    assert before is not None and start is not None and found is not None
    inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return before, found.imports, found.peak, inherited


def test_memory_is_that_of_the_process_alone() -> None:
    held = np.ones(1000 * MIB, dtype=np.uint8)  # far more than the measuring process holds
    before, imports, peak, inherited = isolated(allocate, 200)
    assert before < held.nbytes / MIB - 300, "a process begins without the memory of the one that started it"
    assert inherited > held.nbytes / MIB, "which the obvious number does not, or there would be no need for ours"
    assert 195 < peak - imports < 260, "what was given back still counts"


def test_systems_without_the_kernels_numbers_are_told_apart(tmp_path: Path) -> None:
    assert memory._read("VmRSS", tmp_path / "none") is None
    table = tmp_path / "status"
    table.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert (memory._read("VmHWM", table), memory._read("VmRSS", table)) == (2.0, 1.0)
    assert memory._read("VmNone", table) is None
    assert memory.since_imports(None) is None


# ---------------------------------------------------------------------------------------------------- long runs


FLAT = [300.0 + 0.01 * (number % 7) for number in range(100)]


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (soak.Soak("a run", FLAT), None),
        (soak.Soak("a run", [number * 30.0 for number in range(10)] + FLAT[10:]), None),
        (
            soak.Soak("a run", [300.0 + 0.1 * number for number in range(100)]),
            "a run: the memory grew from 301.4 to 309.4",
        ),
        (soak.Soak("a run", FLAT, skipped_refreshes=1), "a run: 0 steps and 1 refreshes were skipped"),
        (soak.Soak("a run", failures=["it ended"]), "a run: it ended"),
    ],
    ids=["flat", "flat after a tenth", "growing", "skipped", "ended"],
)
def test_long_runs_are_judged(found: soak.Soak, complaint: str | None) -> None:
    assert [line[: len(complaint or "")] for line in soak.complaints(found)] == ([complaint] if complaint else [])


def test_a_wide_net_learns_while_it_is_watched() -> None:
    found = soak.wide_net(soak.Plan(updates=60, width=32))
    assert soak.complaints(found) == []
    assert len(found.resident) == 60
    assert found.in_the_end > 50


# ---------------------------------------------------------------------------------------------------- engine

OURS = (engines.OURS, engines.IN_FULL)
PRESENT = [peer for peer in engines.PEERS if engines.installed(peer)]  # they come with an extra that tests do not need
EVERYONE = [(who, method) for who in ("ours", engines.IN_FULL, *PRESENT) for method in engines.methods_of(who)]


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


def test_ours_bounds_the_rows_as_the_library_does() -> None:
    default = inspect.signature(BlockDiagonal).parameters["max_rows"].default
    rows = {who: engines.make(who, engines.mlp(0, 8, 8), "ekfac")._curvature.max_rows for who in OURS}
    assert rows[engines.OURS] == default
    assert rows[engines.IN_FULL] > 10**12
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"at most {default} rows per layer" in " ".join(text.split())


def test_ours_keeps_as_many_eigenvectors_as_the_shipped_configuration() -> None:
    assert configfiles.shipped("ALE/Pong-v5").acktr.actor.rank == engines.RANK
    blocks = {who: engines.make(who, engines.mlp(0, 8, 512), "ekfac")._curvature.members[1].block for who in OURS}
    assert blocks[engines.OURS].ranks == (engines.RANK, engines.RANK)
    assert isinstance(blocks[engines.IN_FULL], EKFACBlock)


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
        "mlp, ekfac, ours, in full",
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
