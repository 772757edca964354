import gzip
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from agents.benchmarks.curvature import campaign, conv, data, fidelity, methods, page, problems, refresh, width
from agents.benchmarks.curvature.experiment import Curve, Setting, by_epoch, by_problem, finals, first_below
from agents.benchmarks.curvature.methods import METHODS, FirstOrder, Natural, Rates
from agents.benchmarks.curvature.store import Store
from agents.benchmarks.curvature.training import Budget, Run, best_of_grid, train
from agents.benchmarks.report import Table
from agents.errors import UsageError
from agents.stepconfig import Curvature


def silent(_: str) -> None:
    pass


def tiny() -> problems.Problem:
    return problems.teacher(16, 200, inputs=8)


# ---------------------------------------------------------------------------------------------------- data


def idx(array: np.ndarray[Any, Any], kind: int = 8) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, kind, array.ndim]) + sizes + array.tobytes()


def test_mnist_is_read_packed_or_not(tmp_path: Path) -> None:
    pictures = np.arange(20 * 28 * 28, dtype=np.int64).reshape(20, 28, 28).astype(np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures)))
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    found = data.digits(tmp_path)
    assert (len(found.train), len(found.test)) == (18, 2)
    assert torch.equal(found.test[1] * 255, torch.from_numpy(pictures[19]).flatten().float())
    assert found.test_classes.tolist() == [8, 9]


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", idx(np.zeros(3, np.uint8))[:-1], idx(np.zeros(3, np.uint8), kind=13)]
)
def test_what_is_no_such_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UsageError, match="IDX"):
        data.read_idx(tmp_path / "x")
    with pytest.raises(UsageError, match="--data"):
        data.read_idx(tmp_path / "missing")


@pytest.mark.parametrize("draw", [data.strokes, data.shapes])
def test_pictures_are_drawn_again_the_same(draw: Any) -> None:
    first, again, other = draw(300), draw(300), draw(300, seed=1)
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)
    assert first.train.shape == (270, 784)
    assert first.test.shape == (30, 784)
    assert 0 <= float(first.train.min()) < 0.01 < 0.9 < float(first.train.max()) <= 1
    assert sorted(set(first.train_classes.tolist())) == list(range(10))
    # Ink on some of the picture and not on most of it.
    assert 0.02 < float(first.train.mean()) < 0.4


def test_smaller_pictures_keep_the_mean() -> None:
    pictures = data.strokes(50)
    assert torch.allclose(pictures.smaller(2).train.mean(1), pictures.train.mean(1), atol=1e-6)
    assert pictures.smaller(7).train.shape == (45, 16)


# ---------------------------------------------------------------------------------------------------- problems


def test_the_autoencoder_is_the_papers() -> None:
    network = problems.autoencoder(data.strokes(20), 1.0).network(0)
    layers = [m for m in network if isinstance(m, torch.nn.Linear)]
    assert [layers[0].in_features, *(m.out_features for m in layers)] == [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    # Sigmoids everywhere but after the code and at the end.
    assert [type(m).__name__ for m in network].count("Sigmoid") == 6
    assert isinstance(network[7], torch.nn.Linear)
    assert all(int((m.weight != 0).sum(1).max()) == 15 for m in layers)


def test_weights_come_from_the_seed_alone() -> None:
    problem, before = tiny(), torch.get_rng_state()
    first, again, other = (problem.network(seed)[0].weight for seed in (0, 0, 1))  # type: ignore[index]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------- methods


def test_every_curvature_of_a_configuration_is_there() -> None:
    names = set(get_args(Curvature)) - {"adam"}
    assert names <= METHODS.keys()
    assert all(isinstance(METHODS[name], Natural) for name in names)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name: str) -> None:
    problem = tiny()
    rates = METHODS[name].rates(problem)[-1]
    rows = list(train(problem, Run(name, 50, 2, rates.lr, rates.damping, 0, 10)))
    assert [row["steps"] for row in rows] == [4 * epoch for epoch in range(11)]
    # A twentieth: what the slowest of all, plain gradients without momentum, manage in 40 steps.
    assert rows[-1]["train_loss"] < 0.95 * rows[0]["train_loss"]
    still = list(train(problem, Run(name, 50, 2, 0.0, rates.damping, 0, 1)))
    assert still[-1]["train_loss"] == pytest.approx(still[0]["train_loss"], rel=1e-6)


def test_a_natural_step_in_a_flat_metric_is_a_step_of_sgd() -> None:
    problem, weights = tiny(), {}
    # Damping of a million leaves of any curvature one part in a million; float32 keeps seven digits.
    for name, rates in (("sgd-momentum", Rates(0.1)), ("kfac", Rates(1e5, 1e6)), ("other", Rates(2e5, 1e6))):
        network = problem.network(0)
        step = METHODS[name if name in METHODS else "kfac"].start(problem, network, rates, 1, 0)
        for _ in range(3):
            step(*problem.train)
        weights[name] = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert torch.allclose(weights["kfac"], weights["sgd-momentum"], atol=1e-5)
    assert not torch.allclose(weights["other"], weights["sgd-momentum"], atol=1e-3)


def test_the_curvature_may_see_a_part_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []
    observe = methods.NaturalGradient.observe

    def spy(self: Any, inputs: Any, targets: Any = None, examples: int | None = None) -> Any:
        seen.append(examples)
        return observe(self, inputs, targets, examples)

    monkeypatch.setattr(methods.NaturalGradient, "observe", spy)
    problem = tiny()
    for name in ("kfac", "kfac-eighth"):
        METHODS[name].start(problem, problem.network(0), Rates(0.1, 0.1), 1, 0)(*problem.train)
    assert seen == [None, 25]


# ---------------------------------------------------------------------------------------------------- runs


def test_measurements_are_made_once(tmp_path: Path) -> None:
    made = []

    def measure() -> list[dict[str, float]]:
        made.append(1)
        return [{"value": 0.5}, {"value": 1.5}]

    rows = Store(tmp_path, "x").once({"method": "a", "lr": 0.1}, measure)
    again = Store(tmp_path, "x")
    assert again.once({"method": "a", "lr": 0.1}, measure) == rows
    assert len(made) == 1
    again.once({"method": "a", "lr": 0.2}, measure)
    assert len(made) == 2
    assert len(Store(tmp_path, "x").rows) == 4
    with pytest.raises(UsageError, match="other columns"):
        again.once({"method": "a", "rate": 0.2}, measure)


def test_the_best_of_the_grid_runs_from_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (1e-6, 0.1, 1e9)  # too small, right, and one that breaks
    monkeypatch.setitem(METHODS, "stub", FirstOrder(lambda p, lr: torch.optim.SGD(p, lr), grid))
    store, said = Store(tmp_path, "runs"), list[str]()
    rows = best_of_grid(store, tiny(), "stub", Budget(3, 2, 2), 50, 1, said.append)
    assert {row["lr"] for row in rows} == {"0.1"}
    assert [row["seed"] for row in finals(rows)] == ["0", "1"]
    assert [row["epoch"] for row in finals(rows)] == ["3", "3"]
    broken = store.of({"lr": 1e9})
    assert (broken[-1]["epoch"], broken[-1]["train_loss"]) == ("1", "inf")
    assert len(said) == 5
    best_of_grid(Store(tmp_path, "runs"), tiny(), "stub", Budget(3, 2, 2), 50, 1, said.append)
    assert len(said) == 5, "nothing was left to do"


def row(**values: Any) -> dict[str, str]:
    usual = {"problem": "p", "stage": "final", "method": "kfac", "batch": 50, "refresh": 1, "seed": 0, "epochs": 1}
    return {name: str(value) for name, value in (usual | {"epoch": 1, "steps": 1, "cpu_seconds": 1} | values).items()}


def test_ways_down_are_medians_over_seeds() -> None:
    losses = {0: [9.0, 9.0, 9.0], 1: [3.0, 5.0, 8.0], 2: [1.0, 2.0, 9.0]}
    rows = [
        row(epoch=e, steps=10 * e, seed=s, train_loss=v) for e, seeds in losses.items() for s, v in enumerate(seeds)
    ]
    way = by_epoch(rows, "kfac")
    assert way == [(0, 1.0, 9.0), (10, 1.0, 5.0), (20, 1.0, 2.0)]
    assert first_below(way, 5.0) == (10, 1.0)
    assert first_below(way, 1.0) is None
    counted: list[int] = []
    mixed = [*rows, row(stage="tuning", epoch=1, train_loss=0), row(problem="q", epoch=1, train_loss=0)]
    by_problem(mixed, lambda group: (counted.append(len(group)), campaign.Finding())[1])
    assert counted == [9, 1]


# ---------------------------------------------------------------------------------------------------- fidelity


def small_world() -> fidelity.World:
    setting = Setting(Path(), None, None, 1.0, True, None, None, silent)
    return fidelity.world(setting, 5)[0]


def test_the_dense_fisher_is_the_mean_over_every_class_of_outer_products() -> None:
    made = small_world()
    part = fidelity.World("", made.network, made.inputs[:4], made.classes[:4])
    total = torch.zeros_like(part.fisher())
    for x in part.inputs:
        p = part.network(x[None]).detach().softmax(1)[0]
        for c in range(len(p)):
            one = fidelity.World("", part.network, x[None], torch.tensor([c]))
            score = one.flat(one.gradient())
            total += p[c] * torch.outer(score, score) / len(part.inputs)
    assert torch.allclose(part.fisher(), total, atol=1e-12)
    assert not torch.allclose(part.fisher(), 1.1 * total, atol=1e-12)


def test_distances_are_none_from_the_fisher_itself_and_shrink_towards_it() -> None:
    made = small_world()
    F = made.fisher()
    # 1e-9: rounding of a few hundred squared terms.
    assert fidelity.distances(F, F, 0.01) == pytest.approx((0, 0), abs=1e-9)
    diagonal = F.diag().diag()
    far, near = (fidelity.distances(F, (1 - t) * diagonal + t * F, 0.01) for t in (0.0, 0.7))
    assert 0 < near[0] < far[0]
    assert 0 < near[1] < far[1]
    # KL of one dimension by hand: ½ (r − 1 − log r) for the ratio r of the variances.
    one, two = torch.ones(1, 1).double(), torch.full((1, 1), 2.0).double()
    assert fidelity.distances(one, two, 1e-12)[1] == pytest.approx(0.5 * (2 - 1 - math.log(2)))


def test_what_is_written_out_is_the_curvature() -> None:
    made = small_world()
    assert torch.equal(fidelity.matrix_of(made, lambda t: t), torch.eye(len(made.fisher())).double())
    optimizer = fidelity.observer(made, "kfac", {})
    optimizer.observe(made.inputs)
    curvature = optimizer.curvature
    F, solve = (fidelity.matrix_of(made, act) for act in (curvature.multiply, lambda t: curvature.solve(t, 0.5)))
    assert torch.allclose(torch.linalg.inv(solve) - 0.5 * torch.eye(len(F)).double(), F, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- findings


def setting_of(folder: Path) -> Setting:
    return Setting(folder, None, None, 1.0, False, None, None, silent)


def put(folder: Path, name: str, rows: list[dict[str, str]]) -> None:
    store = Store(folder, name)
    for number, one in enumerate(rows):
        store.once({"number": number}, lambda one=one: [one])  # type: ignore[misc]


@pytest.mark.parametrize("helps", [True, False])
def test_the_gain_of_scalings_is_read_off_the_table(tmp_path: Path, helps: bool) -> None:
    gain = {(50, 1): 0.0, (50, 100): 0.1, (500, 1): 0.0, (500, 100): 2.0}
    rows = [
        row(method=method, batch=batch, refresh=period, train_loss=5 - (method == "ekfac") * (g if helps else -g))
        for (batch, period), g in gain.items()
        for method in ("kfac", "ekfac")
    ]
    put(tmp_path, "refresh", rows)
    found = refresh.find(setting_of(tmp_path))
    assert [claim.agrees for claim in found.claims] == [helps, helps]
    assert found.tables[0].rows[-1] == ["batch 500, every 100", "5.00", "3.00" if helps else "7.00"]


def test_slopes_are_exponents(tmp_path: Path) -> None:
    rows = [
        {"method": m, "width": str(w), "gradient": "1", "statistics": "1", "refresh": str(1e-9 * w**p), "solve": "0"}
        for m, p in (("kfac", 3), ("rs-kfac", 2))
        for w in (512, 1024, 2048, 4096)
    ]
    assert width.slope(rows, "kfac", [512, 1024, 2048, 4096]) == pytest.approx(3)
    assert width.slope(rows, "rs-kfac", [32, 64]) != width.slope(rows, "rs-kfac", [512, 1024])
    put(tmp_path, "width", rows)
    found = width.find(setting_of(tmp_path))
    told = {claim.paper: (claim.ours, claim.agrees) for claim in found.claims}
    assert told["K-FAC's cost is cubic in the width"] == ("exponent 3.00 between 1024 and 4096", True)
    assert told["RS-KFAC's cost is quadratic in the width"][1]
    assert width.per_step(rows, "kfac", 512) == pytest.approx(2 + 1e-9 * 512**3 / width.PERIOD)


def test_seeds_are_paired() -> None:
    rows = [
        row(method=m, seed=s, test_loss=10 * s + d) for s in range(3) for m, d in ((conv.WAKELESS, 1), ("ekfac", s))
    ]
    differences = conv.paired([*rows, row(method="ekfac", seed=7, test_loss=0)], "ekfac", "test_loss")
    assert differences == [-1, 0, 1]
    # Student's two-sided 95 % quantile for 2 degrees of freedom is 4.303; the deviation is 1.
    assert conv.interval(differences) == pytest.approx((0, 4.303 / math.sqrt(3)), abs=1e-3)
    assert conv.interval([2.0]) == (2.0, math.inf)


def test_a_page_is_written_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for text in ("| first |", "| second |"):
        page.rewrite(path, text)
    assert path.read_text() == f"before\n{page.BEGIN}\n\n| second |\n{page.END}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(UsageError, match="--page"):
        page.parts(path)
    table = Table("Title", ["", "a"], [["row", "1"]])
    assert page.markdown(table).splitlines() == ["**Title**", "", "|  | a |", "| --- | --- |", "| row | 1 |"]


def test_figures_take_logarithms_where_numbers_span_a_decade() -> None:
    curves = [
        Curve("a", "x", [1, 2], [1, 100]),
        Curve("a", "y", [1, 2], [1, math.inf]),
        Curve("b", "x", [0, 1], [1, 2]),
    ]
    first, second = page.draw(curves).axes[:2]
    assert (first.get_xscale(), first.get_yscale()) == ("linear", "log")
    assert (second.get_xscale(), second.get_yscale()) == ("linear", "linear")
    assert [line.get_label() for line in first.get_lines()] == ["x", "y"]
