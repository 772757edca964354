"""Bayesian regression sets are read, divided and scored as the published table was."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.benchmarks import regression, uci
from agents.errors import UsageError


def folder_of(path: Path, rows: int = 60) -> Path:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, 3)) * [1, 10, 0] + [0, 5, 7]
    target = 100 + 20 * np.tanh(inputs[:, 0]) + rng.normal(size=rows)
    text = "\n".join("  ".join(f"{number:.6f}" for number in row) for row in np.column_stack([inputs, target]))
    (path / "yacht_hydrodynamics.data").write_text(text + "\n\n")
    return path


def test_a_split_is_standardised_by_its_training_part(tmp_path: Path) -> None:
    table = regression.load("yacht", folder_of(tmp_path))
    assert table.shape == (60, 4)
    first, second = regression.splits(table, 2)
    assert len(first.targets) == 54
    assert len(first.test_targets) == 6
    assert float(first.targets.mean()) == pytest.approx(0, abs=1e-5)
    assert float(first.targets.std(unbiased=False)) == pytest.approx(1, rel=1e-5)
    assert float(first.inputs[:, 1].std(unbiased=False)) == pytest.approx(1, rel=1e-4)
    assert not first.inputs[:, 2].any(), "a constant column stays finite"
    assert abs(float(first.test_targets.mean())) > 1e-3
    assert not torch.equal(first.targets, second.targets)
    assert torch.equal(first.targets, next(regression.splits(table, 1)).targets)


def test_scores_are_in_the_target_s_own_unit(tmp_path: Path) -> None:
    (split,) = regression.splits(regression.load("yacht", folder_of(tmp_path)), 1)
    off = split.test_targets + 0.5
    assert split.rmse(off) == pytest.approx(0.5 * split.unit)
    assert split.unit > 5
    log_probs = torch.distributions.Normal(off, 0.3).log_prob(split.test_targets).repeat(4, 1)
    own = torch.distributions.Normal(off * split.unit, 0.3 * split.unit).log_prob(split.test_targets * split.unit)
    assert split.log_likelihood(log_probs) == pytest.approx(float(own.mean()), rel=1e-5)
    # A mixture's density is the mean of the densities, not of their logarithms.
    two = torch.tensor([[-1.0] * 6, [-3.0] * 6])
    expected = math.log((math.exp(-1) + math.exp(-3)) / 2) - math.log(split.unit)
    assert split.log_likelihood(two) == pytest.approx(expected)


def test_mistakes_are_the_users(tmp_path: Path) -> None:
    folder_of(tmp_path)
    with pytest.raises(UsageError, match="did you mean yacht"):
        regression.load("yach", tmp_path)
    with pytest.raises(UsageError, match=r"holds no housing\.data"):
        regression.load("boston", tmp_path)
    (tmp_path / "housing.data").write_text("a b c\n")
    with pytest.raises(UsageError, match="no table of numbers"):
        regression.load("boston", tmp_path)
    (tmp_path / "housing.data").write_text("1 2 nan\n1 2 3\n")
    with pytest.raises(UsageError, match="finite numbers"):
        regression.load("boston", tmp_path)
    with pytest.raises(UsageError, match="did you mean noisy-adam"):
        uci.run(uci.Plan(methods=("noisy-adm",)), lambda _: None)


def test_friedman_s_set_depends_on_five_inputs() -> None:
    table = regression.friedman1(2000, seed=1)
    assert table.shape == (2000, 11)
    assert np.array_equal(table, regression.friedman1(2000, seed=1))
    slopes = np.abs(np.corrcoef(table.T)[-1, :-1])
    assert slopes[3] > 0.3
    assert slopes[5:].max() < 0.1


@pytest.mark.parametrize("method", uci.METHODS)
def test_every_method_fits(method: str, tmp_path: Path) -> None:
    (split,) = regression.splits(regression.load("yacht", folder_of(tmp_path, rows=120)), 1)
    untrained = uci.fit(split, method, uci.Recipe(steps=2, samples=20), 0)
    fitted = uci.fit(split, method, uci.Recipe(steps=300, samples=20), 0)
    assert fitted[0] < 0.5 * split.rmse(torch.zeros(len(split.test_targets)))
    assert fitted[0] < untrained[0]
    assert fitted[1] > untrained[1]
    assert uci.fit(split, method, uci.Recipe(steps=2, samples=20), 0) == untrained


def test_the_report_says_what_data_it_is_of(tmp_path: Path) -> None:
    folder_of(tmp_path)
    told: list[str] = []
    plan = uci.Plan(data=tmp_path, sets=("yacht",), methods=("noisy-kfac", "bayes-by-backprop"), splits=2, steps=2)
    report = uci.run(plan, told.append)
    assert len(told) == 4
    (table,) = report.tables
    assert "0.827" in str(table)
    assert "2 splits" in str(table)
    rows = list(csv.DictReader(io.StringIO(report.attachments[".csv"])))
    assert [row["method"] for row in rows] == ["noisy-kfac", "bayes-by-backprop"] * 2
    assert [row["split"] for row in rows] == ["0", "0", "1", "1"]
    assert float(rows[0]["rmse"]) > 0
    assert str(tmp_path) in report.notes[0]
    generated = uci.run(uci.Plan(methods=("noisy-adam",), splits=1, steps=2), told.append)
    assert "was generated" in generated.notes[0]
    assert "friedman1" in str(generated)
