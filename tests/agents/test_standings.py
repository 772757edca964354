import json
from dataclasses import asdict

import numpy as np
import pytest

from agents.benchmarks import scoreboard, standings
from agents.benchmarks.outcomes import Outcome, Track


def outcome(
    env_id: str = "E",
    algorithm: str = "acktr",
    scores: dict[str, float] | None = None,
    returns: object = (),
    seed: int = 0,
) -> Outcome:
    """A run whose episodes end every ten steps and every two seconds."""
    values = np.array(returns, dtype=float)
    numbers = np.arange(1.0, len(values) + 1)
    hundreds = numbers[99::100]
    evaluated = Track(10 * hundreds, 1 + values[99::100], 2 * hundreds, np.full(len(hundreds), 10.0))
    means = np.array([values[max(0, end - 100) : end].mean() for end in range(1, len(values) + 1)])
    learned = Track(10 * numbers, means, 2 * numbers, np.minimum(numbers, 100))
    return Outcome(env_id, algorithm, seed, scores or {}, learned, evaluated, 5.0)


def trained(env_id: str, algorithm: str, *scores: float) -> list[Outcome]:
    return [outcome(env_id, algorithm, {"training": score}, seed=seed) for seed, score in enumerate(scores)]


def test_an_estimate_by_hand() -> None:
    scores = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1000.0])
    found = standings.estimate([scores])
    assert found.centre == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert scores.mean() > 100  # the outlier would have ruled
    assert found.low <= found.centre <= found.high
    assert found.runs == 8


def test_seeds_are_drawn_within_each_environment() -> None:
    # All scatter lies between the environments: drawn within them nothing can move, drawn from the heap it does.
    low_task, high_task = np.zeros(5), np.ones(5)
    found = standings.estimate([low_task, high_task])
    assert (found.low, found.centre, found.high) == pytest.approx((0.5, 0.5, 0.5))
    heap = standings.estimate([np.concatenate([low_task, high_task])])
    assert heap.low < 0.5 < heap.high


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    found = [standings.estimate([rng.normal(3.0, 1.0, size=20)]) for _ in range(60)]
    assert np.mean([each.low <= 3.0 <= each.high for each in found]) > 0.85
    # Half of such an interval does not.
    assert np.mean([each.centre <= 3.0 <= each.high for each in found]) < 0.65


def test_shares_rank_negative_returns_rightly() -> None:
    by = standings.scale({"ppo": np.array([-5.0, -3.0]), "a2c": np.array([-20.0])}, random=-44.0)
    assert by == standings.Scale(-44.0, "ppo", -4.0)
    shares = standings.normalise(np.array([-44.0, -4.0, -3.0, -24.0]), by)
    np.testing.assert_allclose(shares, [0.0, 1.0, 41 / 40, 0.5])
    assert -3.0 / -4.0 < 1  # the plain ratio would call the better one worse


def test_without_a_peer_above_random_there_is_no_scale() -> None:
    assert standings.scale({"ppo": np.array([1.0, 1.0])}, random=1.0) is None
    assert standings.scale({}, random=1.0) is None
    assert standings.scale({"ppo": np.array([1.0, 1.0])}, random=0.9) is not None


def test_the_standings_of_two_environments_by_hand() -> None:
    runs = [
        *trained("A", "acktr", 30.0, 30.0),
        *trained("A", "ppo", 20.0, 20.0),
        *trained("A", "trpo", 15.0),
        *trained("B", "acktr", -10.0, -10.0),
        *trained("B", "ppo", -40.0),
        *trained("B", "trpo", -20.0),
    ]
    found = standings.compute(runs, {"A": 10.0, "B": -60.0})
    assert found.returns["A"]["acktr"]["training"].centre == pytest.approx(30.0)
    assert found.against["A"]["training"].scale == standings.Scale(10.0, "ppo", 20.0)
    assert found.against["A"]["training"].share.centre == pytest.approx(20 / 10)
    assert found.against["B"]["training"].scale.peer == "trpo"
    assert found.against["B"]["training"].share.centre == pytest.approx(50 / 40)
    overall = found.overall["acktr"]["training"]
    assert (overall.share.centre, overall.share.runs) == (pytest.approx((2 + 2 + 1.25 + 1.25) / 4), 4)
    assert overall.environments == ("A", "B")
    assert found.overall["ppo"]["training"].share.centre == pytest.approx((1 + 1 + 0.5) / 3)


def test_a_mean_return_needs_a_hundred_episodes() -> None:
    followed = standings.track(outcome(returns=[1000.0] + [0.0] * 100), "training")
    np.testing.assert_array_equal(followed.steps, [1000, 1010])
    np.testing.assert_allclose(followed.means, [10.0, 0.0])
    np.testing.assert_array_equal(followed.seconds, [200, 202])
    # The first one was luck.
    assert standings.seconds_to(outcome(returns=[1000.0] + [0.0] * 100), 11.0, "training") is None
    assert not len(standings.track(outcome(returns=[5.0] * 99), "training"))


def test_seconds_to_a_return_by_hand() -> None:
    run = outcome(returns=[0.0] * 100 + [10.0] * 100)
    # After 150 episodes of two seconds, half of the last hundred paid 10.
    assert standings.seconds_to(run, 5.0, "training") == pytest.approx(300.0)
    assert standings.seconds_to(run, 10.0, "training") == pytest.approx(400.0)
    assert standings.seconds_to(run, 10.1, "training") is None


def test_runs_that_never_get_there_count_as_infinite() -> None:
    fast, slow = outcome(returns=[10.0] * 100), outcome(returns=[0.0] * 100 + [10.0] * 100)
    never = outcome(returns=[0.0] * 200)
    assert standings.sprint([fast, slow, never], 10.0, "training") == standings.Sprint(10.0, 400.0, 2, 3)
    assert standings.sprint([fast, never], 10.0, "training") == standings.Sprint(10.0, None, 1, 2)
    assert standings.sprint([fast, slow], 10.0, "training").median == pytest.approx(300.0)  # without it: a faster team


def test_a_race_by_hand() -> None:
    rival = outcome(algorithm="ppo", returns=[0.0] * 200 + [10.0] * 200)
    ours = outcome(returns=[0.0] * 100 + [20.0] * 300)
    found = standings.race([ours], [rival], "training")
    assert found is not None
    # The rival's mean is 10 after 300 episodes for the first time, ours after 150; an episode has ten steps.
    assert found.mark == pytest.approx(10.0)
    assert found.theirs == pytest.approx(3000, abs=10)
    assert found.ours == pytest.approx(1500, abs=10)
    assert found.ratio == pytest.approx(0.5, abs=0.01)
    lost = standings.race([rival], [ours], "training")
    assert lost is not None
    assert lost.ours is None
    assert lost.ratio is None
    assert standings.race([ours], [outcome(returns=[1.0] * 50)], "training") is None
    assert standings.race([], [rival], "training") is None


def test_a_race_of_evaluations_by_hand() -> None:
    rival = outcome(algorithm="ppo", returns=[0.0] * 200 + [10.0] * 200)
    ours = outcome(returns=[0.0] * 100 + [20.0] * 300)
    found = standings.race([ours], [rival], "deterministic")
    assert found is not None
    # Looked at after 100, 200, 300 and 400 episodes: 1, 1, 11, 11 and 1, 21, 21, 21.
    assert (found.mark, found.theirs, found.ours) == pytest.approx((11.0, 3000.0, 2000.0), abs=5)
    assert standings.seconds_to(ours, 11.0, "deterministic") == pytest.approx(400.0)
    assert standings.race([ours], [outcome(returns=[1.0] * 50)], "deterministic") is None


def test_the_mark_is_the_rivals_final_score_where_it_has_one() -> None:
    looks = [0.0] * 200 + [10.0] * 200
    ours = outcome(returns=[0.0] * 100 + [20.0] * 300)
    rivals = [outcome(algorithm="ppo", scores={"deterministic": score}, returns=looks) for score in (4.0, 6.0)]
    found = standings.race([ours], rivals, "deterministic")
    assert found is not None
    assert (found.mark, found.theirs, found.ours) == pytest.approx((5.0, 3000.0, 2000.0), abs=5)
    # One that no look of its own came up to: the rival needed all of its steps.
    better = outcome(algorithm="ppo", scores={"deterministic": 15.0}, returns=looks)
    found = standings.race([ours], [better], "deterministic")
    assert found is not None
    assert (found.mark, found.theirs, found.ours) == pytest.approx((15.0, 4000.0, 2000.0), abs=5)


def test_a_race_is_run_by_the_interquartile_mean() -> None:
    rival = outcome(algorithm="ppo", returns=[0.0] * 100 + [10.0] * 100)
    good, bad = outcome(returns=[10.0] * 200), outcome(returns=[0.0] * 200)
    most = standings.race([good] * 7 + [bad], [rival], "training")
    few = standings.race([good] + [bad] * 7, [rival], "training")
    assert most is not None
    assert few is not None
    assert most.ours == pytest.approx(1000)
    assert few.ours is None


def test_standings_of_a_part_of_the_runs() -> None:
    alone = standings.compute(trained("A", "acktr", 1.0, 2.0), {"A": 0.0})
    assert alone.returns["A"]["acktr"]["training"].runs == 2
    assert "deterministic" not in alone.returns["A"]["acktr"]  # trained, not evaluated yet
    assert not alone.against
    assert not any(alone.races.values())
    assert [table.columns[0] for table in scoreboard.tables(alone)] == ["environment"]
    peers = standings.compute(trained("A", "ppo", 1.0), {"A": 0.0})
    assert not peers.against
    assert peers.overall["ppo"]["training"].share.centre == pytest.approx(1.0)
    nothing = standings.compute([], {})
    assert scoreboard.tables(nothing) == []


def test_tables_and_plain_numbers() -> None:
    returns = [0.0] * 100 + [5000.0] * 100
    runs = [
        outcome("HalfCheetah-v5", name, {"training": 5000.0 if name == "acktr" else 2500.0, "stochastic": 1.0}, returns)
        for name in ("acktr", "ppo")
    ]
    found = standings.compute(runs, {"HalfCheetah-v5": 0.0})
    text = "\n".join(map(str, scoreboard.tables(found)))
    for part in ("2.00 [2.00, 2.00] PPO", "ACKTR ÷ PPO", "1 of 1", "5,000.0 [5,000.0, 5,000.0]", "4,500", "–"):
        assert part in text
    again = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert again["sprints"]["training"]["HalfCheetah-v5"]["acktr"]["median"] == pytest.approx(380.0)
    assert again["sprints"]["deterministic"]["HalfCheetah-v5"]["acktr"]["median"] == pytest.approx(400.0)
