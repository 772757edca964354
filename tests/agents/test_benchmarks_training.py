import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C

from acktr.optimizer import EAGER_PASSES
from agents import build, configfiles
from agents.benchmarks import parts, throughput, update
from agents.benchmarks.batches import Batch, Passes, batch_of
from agents.benchmarks.measuring import Timing, spread
from agents.benchmarks.memory import Memory
from agents.benchmarks.throughput import Measured

SMALL = {
    "mlp": update.Case("HalfCheetah-v5", spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), ("actor", "critic")),
    "atari": update.Case("ALE/Pong-v5", spaces.Box(0, 255, (1, 36, 36), np.uint8), spaces.Discrete(3), ("joint",)),
}


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = configfiles.shipped

    def few(env_id: str) -> Any:
        config = shipped(env_id)
        critic = replace(config.acktr.critic, n_epochs=2, measure_period=2, statistics_period=2, refresh_period=4)
        acktr = replace(config.acktr, n_steps=8, critic=critic)
        return replace(config, env=replace(config.env, n_envs=4), torch_threads=1, acktr=acktr)

    monkeypatch.setattr(configfiles, "shipped", few)


def critic_counters(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """How often the critics made from now on update their curvature, and decompose it."""
    updates, refreshes, make = [0], [0], build.make_agent

    def counted(*arguments: Any) -> Any:
        agent = make(*arguments)
        curvature = agent.critic_optimizer.curvature
        count_calls(curvature, "update", updates)
        count_calls(curvature.members[0].block, "refresh", refreshes)
        return agent

    monkeypatch.setattr(build, "make_agent", counted)
    return updates, refreshes


def count_calls(owner: Any, name: str, counter: list[int]) -> None:
    original = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        counter[0] += 1
        return original(*arguments, **options)

    setattr(owner, name, counted)


# ---------------------------------------------------------------------------------------------------- throughput


def test_throughput_compares_rates_and_memory() -> None:
    batch = Batch(2, 3, {"joint": Passes(1, 6)})
    times = [Timing(1.0, 2.0, 100.0), Timing(2.0, 2.0, 100.0), Timing(4.0, 2.0, 100.0)]  # 100, 50, 25 steps/s
    ours = [Measured(timing, Memory(200.0, 600.0), batch) for timing in times]
    peer = [Measured(Timing(2.0, 1.0, 100.0), Memory(200.0, peak)) for peak in (300.0, 600.0, 400.0)]  # 50 steps/s
    found = throughput.summarise(throughput.Plan("X-v0", 3, 100), {"acktr": ours, "ppo": peer})
    result = found.results["ppo"]
    assert result["ours_over_this"] == {
        "wall": spread([2.0, 1.0, 0.5]),
        "cpu": spread([0.5] * 3),
        "memory": spread([2.0, 1.0, 1.5]),
    }
    assert result["steps_per_second"] == {"wall": spread([50.0]), "cpu": spread([100.0])}
    assert result["memory_mib"] == {"peak": spread([300.0, 600.0, 400.0]), "imports": spread([200.0])}
    assert [each["memory_mib"].peak for each in result["rounds"]] == [300.0, 600.0, 400.0]
    (mine, theirs), columns = found.tables[0].rows, found.tables[0].columns
    assert len(mine) == len(theirs) == len(columns)
    assert [mine[:2], theirs[:2]] == [["ACKTR (ours)", "50 [25–100]"], ["SB3 PPO", "50 [50–50]"]]
    assert theirs[3:5] == ["1.00 [0.50–2.00]", "0.50 [0.50–0.50]"]
    assert theirs[5:] == ["400 [300–600]", "200 [200–200]", "1.50 [1.00–2.00]"]
    assert mine[3:5] == ["", ""] and mine[7] == ""
    assert found.notes == ["ACKTR (ours): 2 × 3 = 6 transitions; joint 1 epoch in minibatches of 6"]


def test_a_kernel_that_tells_no_memory_leaves_its_columns_empty() -> None:
    timing = Measured(Timing(1.0, 1.0, 100.0))
    found = throughput.summarise(throughput.Plan("X-v0", 1, 100, 7), {"acktr": [timing], "a2c": [timing]})
    assert [row[5:] for row in found.tables[0].rows] == [["", "", ""]] * 2
    assert "memory_mib" not in found.results["a2c"]
    assert "7 × X-v0" in found.tables[0].title


def agent_of(case: update.Case, n_envs: int = 4, **critic: int) -> Any:
    config = configfiles.shipped(case.env_id)
    acktr = replace(config.acktr, n_steps=8, critic=replace(config.acktr.critic, **critic))
    config = replace(config, env=replace(config.env, n_envs=n_envs), acktr=acktr)
    return update.make_agent(config, case)


def test_the_window_holds_whole_periods() -> None:
    cases = [(4, 4, 1, 40, 2), (1, 4, 1, 40, 1), (2, 10, 1, 1, 20), (3, 2, 2, 8, 3), (1, 1, 1, 7, 1), (4, 2, 10, 8, 5)]
    for s, r, m, passes, updates in cases:
        periods = {"statistics_period": s, "refresh_period": r, "measure_period": m}
        agent = agent_of(SMALL["mlp"], **periods, n_epochs=passes, n_minibatches=1)
        assert parts.period(agent, "critic") == updates, "as few updates as hold whole periods"
        rollouts = np.lcm(updates, parts.period(agent, "actor"))
        assert throughput.window(agent, 1) == 32 * rollouts
        assert throughput.window(agent, 32 * rollouts + 1) == 64 * rollouts
    joint = agent_of(SMALL["atari"], refresh_period=7)
    actor = configfiles.shipped("ALE/Pong-v5").acktr.actor
    assert parts.networks_of(joint) == ("joint",)
    whole = np.lcm(actor.statistics_period * actor.refresh_period, actor.measure_period)
    assert throughput.window(joint, 1) == 32 * whole, "it has no critic"


def test_the_eager_phase_is_left_at_the_beginning_of_a_period() -> None:
    agent = agent_of(SMALL["mlp"], statistics_period=4, refresh_period=4, measure_period=8)
    optimizer = parts.optimizer_of(agent, "critic")
    for before in (1, EAGER_PASSES + 15):
        optimizer._passes = before
        parts.leave_eager_phase(agent, "critic")
        after = optimizer._passes
        assert optimizer._steps == after, "steps measure eagerly, too"
        assert after >= max(EAGER_PASSES, before)
        assert after % 16 == 0
        assert after - max(EAGER_PASSES, before) < 16
        assert optimizer.statistics_due
        optimizer._passes += 1
        assert not optimizer.statistics_due


def test_the_eager_phase_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = throughput.learner_config(configfiles.shipped("CartPole-v1"), "acktr")
    critic = replace(config.acktr.critic, n_epochs=10, n_minibatches=4, statistics_period=4, refresh_period=4)
    acktr = replace(config.acktr, n_steps=16, critic=critic)
    config = replace(config, env=replace(config.env, n_envs=4), acktr=acktr)

    def count() -> tuple[int, int]:
        updates, refreshes = critic_counters(monkeypatch)
        assert throughput._learner(config, 1).timing.work == 2 * 64
        return updates[0], refreshes[0]

    # One eager rollout of 40 steps, then a window of two: 80 steps, 20 statistics, 5 refreshes.
    assert count() == (40 + 20, 10 + 5)
    monkeypatch.setattr(parts, "leave_eager_phase", lambda *_: None)
    assert count()[0] > 60, "without the move the window would hold eager steps"


def test_our_cold_start_is_not_measured() -> None:
    atari = configfiles.shipped("ALE/Pong-v5")
    assert atari.acktr.actor.cold_start > 0
    assert throughput.learner_config(atari, "acktr").acktr.actor.cold_start == 0


@pytest.mark.parametrize("subject", ["a2c", "trpo", throughput.BARE])
def test_a_learner_is_timed_over_whole_rollouts(subject: str) -> None:
    found = throughput.measure("CartPole-v1", subject, 50, 0)
    n_steps = {"a2c": 5, "trpo": 128, throughput.BARE: 1}[subject]
    rollout = 8 * n_steps
    assert found.timing.work == -(-50 // rollout) * rollout
    assert found.timing.wall > 0
    assert (found.batch is None) == (subject == throughput.BARE)


def test_everyone_gets_as_many_environments_as_asked_for() -> None:
    found = {s: throughput.measure("CartPole-v1", s, 12, 0, n_envs=3) for s in throughput.SUBJECTS}
    config = configfiles.shipped("CartPole-v1")
    batches = {subject: each.batch for subject, each in found.items()}
    assert batches[throughput.BARE] is None
    critic, size = config.acktr.critic, 3 * config.acktr.n_steps
    assert batches["acktr"] == Batch(
        3,
        config.acktr.n_steps,
        {"actor": Passes(1, size), "critic": Passes(critic.n_epochs, -(-size // critic.n_minibatches))},
    )
    assert batches["a2c"] == Batch(3, 5, {"joint": Passes(1, 15)})
    assert batches["ppo"] == Batch(3, 128, {"joint": Passes(config.ppo.n_epochs, 384 // config.ppo.n_minibatches)})
    critic_passes = Passes(config.trpo.n_critic_updates, 384 // config.trpo.n_minibatches)
    assert batches["trpo"] == Batch(3, 128, {"actor": Passes(1, 384), "critic": critic_passes})
    assert found[throughput.BARE].timing.work == 12
    assert all(each.timing.work % 3 == 0 for each in found.values())


@pytest.mark.parametrize(("name", "policy"), [("mlp", "MlpPolicy"), ("atari", "CnnPolicy")])
def test_a2c_has_the_defaults_of_sb3(name: str, policy: str) -> None:
    shipped = configfiles.shipped(SMALL[name].env_id)
    tuned = replace(shipped, a2c=replace(shipped.a2c, n_steps=99, ent_coef=0.5, learning_rate_decay="linear"))
    for config in (shipped, tuned):
        config = throughput.learner_config(config, "a2c")
        agent = build.make_agent(config, agent_of(SMALL[name]).env)
        plain = A2C(policy, agent.env)
        for option in set(inspect.signature(A2C).parameters) & vars(plain).keys() - SPACES_AND_SEEDS:
            assert getattr(agent, option) == getattr(plain, option), option
        assert agent.lr_schedule(0.1) == plain.lr_schedule(1.0)
        assert type(agent.policy.optimizer) is type(plain.policy.optimizer)
        assert batch_of("a2c", agent) == Batch(4, 5, {"joint": Passes(1, 20)})


SPACES_AND_SEEDS = {"env", "policy", "policy_kwargs", "seed", "learning_rate", "device"}
"""Where the benchmark's networks and environments show; learning rates are compared as the functions they become."""


# ---------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize(("name", "part"), [("mlp", "actor"), ("mlp", "critic"), ("atari", "joint")])
def test_every_phase_of_an_update_takes_time(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    timing = update.measure(SMALL[name], part, update.OURS, 1, 0)
    agent = update.make_agent(configfiles.shipped(SMALL[name].env_id), SMALL[name])
    assert timing.work == parts.period(agent, part), "whole periods of statistics and refreshes"
    assert set(timing.phases) == set(update.PHASES)
    assert all(wall > 0 for wall, _ in timing.phases.values())
    peer = update.measure(SMALL[name], part, update.PEER, 1, 0)
    assert peer.work == timing.work
    assert not peer.phases


def test_an_update_is_not_measured_in_its_eager_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    updates, refreshes = critic_counters(monkeypatch)
    timing = update.measure(SMALL["mlp"], "critic", update.OURS, 1, 0)
    # Eight eager steps, eight timed with statistics at every second, and as many again for the phases.
    assert (timing.work, updates[0], refreshes[0]) == (1, 8 + 4 + 4, 2 + 1 + 1)
    monkeypatch.setattr(parts, "leave_eager_phase", lambda *_: None)
    updates, _ = critic_counters(monkeypatch)
    update.measure(SMALL["mlp"], "critic", update.OURS, 1, 0)
    assert updates[0] == 24, "without the move all of them would"


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
