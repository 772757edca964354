from pathlib import Path

import numpy as np
import pytest

from agents import curves
from agents.errors import UsageError


def test_interquartile_mean_by_hand() -> None:
    scores = np.array([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [1000.0]])
    assert curves.iqm(scores)[0] == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert scores.mean() > 100  # the outlier would have ruled
    assert curves.iqm(np.array([[1.0], [2.0], [6.0]]))[0] == pytest.approx(3.0)


def test_smoothing_by_hand() -> None:
    ends, returns = np.array([10.0, 20.0, 30.0, 40.0]), np.array([1.0, 3.0, 5.0, 9.0])
    timesteps, values = curves.smooth(ends, returns, window=2, points=4)
    np.testing.assert_array_equal(timesteps, ends)
    np.testing.assert_allclose(values, [1.0, 2.0, 4.0, 7.0])


def test_smoothing_counts_episodes_that_end_together() -> None:
    _, values = curves.smooth(np.array([5.0, 5.0, 9.0]), np.array([2.0, 4.0, 9.0]), window=100, points=2)
    np.testing.assert_allclose(values, [3.0, 5.0])


def test_bootstrap_band_holds_the_centre_and_shrinks_with_seeds() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(size=(5, 3)), rng.normal(size=(80, 3))
    widths = []
    for scores in (few, many):
        low, high = curves.stratified_bootstrap([scores], resamples=300)
        assert (low <= curves.iqm(scores)).all()
        assert (curves.iqm(scores) <= high).all()
        widths.append((high - low).mean())
    assert widths[1] < widths[0] / 2


def test_every_resample_keeps_every_task() -> None:
    # All scatter lies between the tasks, so a resample that keeps both cannot move.
    low, high = curves.stratified_bootstrap([np.zeros((4, 1)), np.ones((4, 1))], resamples=50)
    assert low == high == pytest.approx(0.5)
    low, high = curves.stratified_bootstrap([np.array([[0.0]] * 4 + [[1.0]] * 4)], resamples=50)
    assert low < high


def test_curves_survive_their_file(tmp_path: Path) -> None:
    curve = curves.Curve("A/B-v1", "acktr, wide", 3, np.array([1.0, 2.0]), np.array([-1.5, 2.25]))
    path = tmp_path / "c.csv"
    path.write_text(curves.to_csv([curve]))
    (back,) = curves.read(path)
    assert (back.env_id, back.label, back.seed) == (curve.env_id, curve.label, curve.seed)
    np.testing.assert_array_equal(back.timesteps, curve.timesteps)
    np.testing.assert_array_equal(back.returns, curve.returns)


def test_two_runs_of_one_seed_stay_two_curves_in_their_file(tmp_path: Path) -> None:
    first = curves.Curve("A-v1", "acktr", 1, np.array([1.0, 5.0, 9.0]), np.array([1.0, 2.0, 3.0]))
    second = curves.Curve("A-v1", "acktr", 1, np.array([2.0, 6.0]), np.array([-1.0, -2.0]))
    path = tmp_path / "c.csv"
    path.write_text(curves.to_csv([first, second]))
    back = curves.read(path)
    assert [curve.timesteps.tolist() for curve in back] == [[1, 5, 9], [2, 6]]
    assert [curve.returns.tolist() for curve in back] == [[1, 2, 3], [-1, -2]]


def test_a_band_covers_what_all_seeds_have_reached() -> None:
    def line(end: float, slope: float) -> curves.Curve:
        return curves.Curve("E", "l", 0, np.array([0.0, end]), np.array([0.0, end * slope]))

    band = curves.summarise([line(10, 1), line(20, 3)])
    assert (band.timesteps[0], band.timesteps[-1], band.seeds) == (0, 10, 2)
    np.testing.assert_allclose(band.centre, 2 * band.timesteps)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "env_id,label,seed,timesteps,return\nE,l,x,1,2\n"])
def test_files_that_hold_no_curves_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"c\.csv"):
        curves.read(path)
