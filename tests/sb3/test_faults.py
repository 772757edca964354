"""Faults at random points of real training runs: each is counted, none is learned from, and no run is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

import acktr.curvature.kronecker.kfac
from acktr.linalg import DecompositionError
from acktr.optimizer import NaturalGradient
from acktr.sb3 import ACKTR
from acktr.sb3.faults import Faults
from acktr.sb3.watch import WIDEST_LOG_STD
from agents.faults import log_of
from envs import FiniteGuard, RunningNormaliser
from envs.inprocess import InProcessVecEnv
from tests.sb3.worlds import BOX, PLANE, TURNS, collected, differences, noise, small_agent, vectorised

LENGTH, N_ENVS, N_STEPS = 12, 2, 16
NAN = float("nan")


class Scheduled(gym.Env):
    """Numbers of order one in episodes of twelve steps; at given steps of its life something breaks."""

    def __init__(self, schedule: dict[int, str], action_space: gym.Space = PLANE) -> None:
        self.observation_space, self.action_space = BOX, action_space
        self.schedule, self.lived, self.steps = schedule, 0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert np.isfinite(action).all()
        self.lived, self.steps = self.lived + 1, self.steps + 1
        observation, reward = self.np_random.uniform(-1, 1, 3).astype(np.float32), float(np.mean(action))
        over = self.steps == LENGTH
        what = self.schedule.get(self.lived, "")
        if what == "raised":
            raise RuntimeError("the motor is off")
        if what == "observation":
            observation[self.lived % 3] = (np.nan, np.inf, -np.inf)[self.lived % 3]
        if what == "final_observation":
            observation[:], over = np.nan, True
        if what == "reward":
            reward = (np.nan, np.inf, -np.inf)[self.lived % 3]
        # An observation that breaks at the end of an episode, by chance, is a final one.
        return observation, reward, False, over, {}


def schedules(seed: int, kinds: list[str], each: int, steps: int) -> list[dict[int, str]]:
    """Random steps for `each` faults of every kind, in one of the environments' lives."""
    rng = np.random.default_rng(seed)
    places = rng.choice(N_ENVS * (steps - 2), len(kinds) * each, replace=False)
    plans: list[dict[int, str]] = [{} for _ in range(N_ENVS)]
    for kind, place in zip(np.repeat(kinds, each), places, strict=True):
        plans[place % N_ENVS][int(place // N_ENVS) + 1] = str(kind)
    return plans


class Memory(KVWriter):
    """Keeps every row of the log."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass

    @property
    def faults(self) -> dict[str, int]:
        return {k.removeprefix("faults/"): v for k, v in self.rows[-1].items() if k.startswith("faults/")}


def logged(agent: Any) -> Memory:
    memory = Memory()
    agent.set_logger(Logger(None, [memory]))
    return memory


def guarded(plans: list[dict[int, str]], action_space: gym.Space = PLANE, max_faults: int = 100) -> RunningNormaliser:
    worlds = [lambda plan=plan: Monitor(Scheduled(plan, action_space)) for plan in plans]
    return RunningNormaliser(FiniteGuard(InProcessVecEnv(worlds), max_faults))


def sound(agent: ACKTR) -> bool:
    """Whether everything that is kept is finite."""

    def tensors(tree: Any) -> list[torch.Tensor]:
        if isinstance(tree, torch.Tensor):
            return [tree]
        parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else []
        return [tensor for part in parts for tensor in tensors(part)]

    return all(bool(torch.isfinite(t).all()) for t in tensors(agent.get_parameters()) if t.is_floating_point())


# ------------------------------------------------------------------------------------- environments


@pytest.mark.parametrize("action_space", [PLANE, TURNS], ids=["box", "discrete"])
@pytest.mark.parametrize("seed", [0, 1])
def test_faults_of_environments_are_counted_and_none_is_learned_from(action_space, seed):
    kinds, each, updates = ["observation", "final_observation", "reward", "raised"], 12, 40
    plans = schedules(seed, kinds, each, updates * N_STEPS)
    env = guarded(plans, action_space)
    agent = small_agent("MlpPolicy", env, n_steps=N_STEPS)
    memory, episodes = logged(agent), []
    agent.learn(
        updates * N_STEPS * N_ENVS,
        lambda local, _: episodes.extend(i["episode"] for i in local["infos"] if "episode" in i) or True,
    )
    found = memory.faults
    assert sum(found.values()) == len(kinds) * each
    assert (found["reward"], found["raised"]) == (each, each)
    assert found["observation"] + found["final_observation"] == 2 * each
    assert agent._n_updates == updates
    assert sound(agent)
    assert np.isfinite(env.obs_rms.mean).all() and np.isfinite(env.obs_rms.var).all() and np.isfinite(env.ret_rms.var)
    assert {episode["l"] for episode in episodes} == {LENGTH}  # whole episodes alone
    assert np.isfinite([episode["r"] for episode in episodes]).all()


def test_without_the_guard_a_normaliser_is_poisoned():
    env = RunningNormaliser(InProcessVecEnv([lambda: Monitor(Scheduled({3: "observation"}))]))
    env.reset()
    for _ in range(4):
        env.step(np.zeros((1, 2), np.float32))
    assert not np.isfinite(env.obs_rms.mean).all()


def test_a_step_of_unknown_outcome_has_no_advantage_and_no_target():
    agent = small_agent("MlpPolicy", guarded([{5: "reward"}, {}]), n_steps=N_STEPS)
    collected(agent)
    buffer = agent.rollout_buffer
    assert abs(buffer.advantages[4, 0]) < 1e-6
    assert buffer.returns[4, 0] == pytest.approx(buffer.values[4, 0], abs=1e-6)
    assert (buffer.episode_starts[5, 0], buffer.episode_starts[5, 1]) == (1, 0)
    # The step before looks ahead to the value of the last sound observation, and no further.
    delta = buffer.rewards[3, 0] + agent.gamma * buffer.values[4, 0] - buffer.values[3, 0]
    assert buffer.advantages[3, 0] == pytest.approx(delta, abs=1e-6)
    assert abs(buffer.advantages[4, 1]) > 1e-6  # the other environment's is untouched


def test_peers_of_stable_baselines_survive_and_count_too():
    plans = schedules(3, ["observation", "reward", "raised"], 12, 320)
    agent = A2C("MlpPolicy", guarded(plans), seed=0, device="cpu")
    memory = logged(agent)
    agent.learn(640, log_of(agent).callbacks, log_interval=1)
    assert sum(memory.faults.values()) == 36
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


def test_a_monitor_around_the_guard_records_no_broken_episode():
    plans = schedules(2, ["observation"], 10, 300)
    env = VecMonitor(FiniteGuard(DummyVecEnv([lambda plan=plan: Scheduled(plan) for plan in plans]), 40))
    agent = small_agent("MlpPolicy", env, n_steps=N_STEPS)
    memory = logged(agent)
    agent.learn(600)
    assert memory.faults["observation"] > 5
    assert {episode["l"] for episode in agent.ep_info_buffer} == {LENGTH}


# ------------------------------------------------------------------------------------- without a guard


@pytest.mark.parametrize("normaliser", [None, VecNormalize])
def test_an_environment_that_nobody_guards_costs_rollouts(normaliser):
    rng = np.random.default_rng(4)
    # Steps of the environment's life go on over rollouts that are lost: one fault in each of ten.
    plan = {int(k * 40 + rng.integers(1, 30)): ("observation", "reward")[k % 2] for k in range(10)}
    plan = {step + (step % LENGTH == 0): what for step, what in plan.items()}
    env = DummyVecEnv([lambda: Monitor(Scheduled(plan)), lambda: Monitor(Scheduled({}))])
    env = env if normaliser is None else normaliser(env)
    agent = small_agent("MlpPolicy", env, n_steps=N_STEPS)
    memory = logged(agent)
    agent.learn(2 * 450)
    found = memory.faults
    assert found.get("rollout", 0) + found.get("final_observation", 0) == 10
    assert sound(agent)
    assert normaliser is None or np.isfinite(env.obs_rms.mean).all()


# ------------------------------------------------------------------------------------- numbers


def broken_at(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, at: set[int], spoil: Callable[..., Any]
) -> list[int]:
    """Spoil some calls of a method; returns the calls so far."""
    real, calls = getattr(target, name), []

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        return spoil(real, args, kwargs) if calls[-1] in at else real(*args, **kwargs)

    monkeypatch.setattr(target, name, spoiled)
    return calls


def nan_gradient(real: Any, args: Any, kwargs: Any) -> Any:
    return {name: torch.full_like(tensor, NAN) for name, tensor in real(*args, **kwargs).items()}


def nan_seeds(real: Any, args: Any, kwargs: Any) -> Any:
    curvature, record, seeds, *rest = args
    return real(curvature, record, [tuple(torch.full_like(s, NAN) for s in seed) for seed in seeds], *rest, **kwargs)


def nan_output(real: Any, args: Any, kwargs: Any) -> Any:
    record = real(*args, **kwargs)
    for output in record.outputs:
        output.detach().fill_(NAN)
    return record


def no_step(real: Any, args: Any, kwargs: Any) -> Any:
    raise torch.linalg.LinAlgError("singular")


@pytest.mark.parametrize(
    ("name", "spoil", "cause"),
    [
        ("_gradient", nan_gradient, "gradient"),
        ("_descent", no_step, "direction"),
        ("run", nan_output, "output"),
    ],
)
def test_steps_that_break_are_skipped_and_counted(name, spoil, cause, monkeypatch):
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), n_steps=N_STEPS)
    memory, updates = logged(agent), 16
    steps = updates * 5  # one of the actor, four of the critic
    at = {int(k) for k in np.random.default_rng(5).choice(steps, 12, replace=False)}
    if name == "run":
        for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
            broken_at(monkeypatch, optimizer._chain, "run", {3, 5, 8, 9, 11, 14}, nan_output)
    else:
        broken_at(monkeypatch, NaturalGradient, name, at, spoil)
    before = agent.actor_optimizer._steps
    agent.learn(updates * N_STEPS * 2)
    found = memory.faults
    assert found.get(f"actor_{cause}", 0) + found.get(f"critic_{cause}", 0) == 12
    assert set(found) <= {f"actor_{cause}", f"critic_{cause}"}
    skipped = agent.actor_optimizer.skipped + agent.critic_optimizer.skipped
    assert skipped == 12
    assert agent.actor_optimizer._steps + agent.critic_optimizer._steps == steps - 12 + before
    assert sound(agent)


def test_statistics_that_break_leave_parameters_and_curvature_as_they_were(monkeypatch):
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), n_steps=N_STEPS)
    agent.learn(N_STEPS * 2)
    collected(agent)
    before = agent.get_parameters()
    kept = {k: v for k, v in before.items() if k != "update_state"}
    kept = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, kept)
    curvature = type(agent.actor_optimizer.curvature)
    broken_at(monkeypatch, curvature, "update", set(range(100)), nan_seeds)
    agent.train()
    after = agent.get_parameters()
    assert agent.faults.counts == {"actor_statistics": 1, "critic_statistics": 4}
    assert differences(kept["policy"], after["policy"]) == []
    for name in ("actor_optimizer", "critic_optimizer"):
        assert differences(kept[name]["natural"]["curvature"], after[name]["natural"]["curvature"]) == []


@pytest.mark.parametrize("spoil", [{"rewards": NAN}, {"advantages": 1e30}, {"returns": np.inf}], ids=str)
def test_a_broken_rollout_leaves_everything_as_it_was(spoil):
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), n_steps=N_STEPS)
    agent.learn(N_STEPS * 2)
    collected(agent)
    ((name, value),) = spoil.items()
    getattr(agent.rollout_buffer, name)[3, 1] = value
    copy = lambda: torch.utils._pytree.tree_map(  # ruff: ignore[lambda-assignment]
        lambda t: t.clone() if isinstance(t, torch.Tensor) else t,
        {k: v for k, v in agent.get_parameters().items() if k != "update_state"},
    )
    before = copy()
    agent.train()
    assert agent.faults.counts == {"rollout": 1}
    assert differences(before, copy()) == []


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_a_decomposition_that_fails_once_costs_nothing(how, monkeypatch):
    """Once in a while a rung of the ladder breaks; the next holds."""
    real, calls = torch.linalg.eigh, []

    def eigh(matrix: torch.Tensor) -> Any:
        calls.append(matrix.dtype)
        if len(calls) % 7 == 1:
            if how == "raise":
                raise torch.linalg.LinAlgError("did not converge")
            return torch.full_like(matrix[0], NAN), torch.full_like(matrix, NAN)
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), n_steps=N_STEPS)
    memory = logged(agent)
    agent.learn(8 * N_STEPS * 2)
    assert calls.count(torch.float64) >= 10
    assert memory.faults == {}
    assert agent._n_updates == 8 and sound(agent)


def test_refreshes_that_fail_are_done_without_and_counted(monkeypatch):
    real, calls, failed = acktr.curvature.kronecker.kfac.symmetric_eigen, [], []
    rng = np.random.default_rng(6)

    def eigen(matrix: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == 1 or rng.random() < 0.15:  # the first of all: a block that has no basis to keep
            failed.append(1)
            raise DecompositionError("nothing was finite")
        return real(matrix)

    monkeypatch.setattr(acktr.curvature.kronecker.kfac, "symmetric_eigen", eigen)
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), n_steps=N_STEPS)
    memory = logged(agent)
    agent.learn(12 * N_STEPS * 2)
    found = memory.faults
    assert found["actor_refresh"] + found["critic_refresh"] == len(failed) >= 10
    assert found["actor_decomposition"] >= 1  # the steps for which there was no basis at all
    assert agent._n_updates == 12 and sound(agent)


def test_decompositions_that_always_fail_end_training_with_a_word(monkeypatch):
    def eigen(matrix: torch.Tensor) -> Any:
        raise DecompositionError(f"no eigendecomposition of a {tuple(matrix.shape)} moment was finite")

    monkeypatch.setattr(acktr.curvature.kronecker.kfac, "symmetric_eigen", eigen)
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), n_steps=N_STEPS)
    before = {name: tensor.clone() for name, tensor in agent.get_parameters()["policy"].items()}
    with pytest.raises(DecompositionError, match="no eigendecomposition of a"):
        agent.learn(20 * N_STEPS * 2)
    assert sound(agent)
    assert differences(before, agent.get_parameters()["policy"]) == [], "there was never a direction"


@pytest.mark.parametrize("action_space", [PLANE, TURNS], ids=["box", "discrete"])
@pytest.mark.parametrize("wrap", [vectorised, lambda make: VecNormalize(vectorised(make))], ids=["raw", "normalised"])
@pytest.mark.parametrize("world", ["rewards of 1e8", "a constant observation", "zeros", "badly scaled", "rank one"])
def test_worlds_at_the_edge_are_trained_on(world, wrap, action_space):
    class Edge(Scheduled):
        def reset(self, **kwargs: Any) -> Any:
            return self.shown(super().reset(**kwargs)[0]), {}

        def step(self, action: Any) -> Any:
            observation, reward, *rest = super().step(action)
            return self.shown(observation), reward * 1e8 if world == "rewards of 1e8" else reward, *rest

        def shown(self, observation: Any) -> Any:
            scales = {
                "a constant observation": 0 * observation + 0.5,
                "zeros": 0 * observation,
                "badly scaled": observation * np.array([1e-12, 1.0, 1e6], np.float32),
                "rank one": np.full_like(observation, observation[0]),
            }
            return scales.get(world, observation)

    agent = small_agent("MlpPolicy", wrap(lambda: Edge({}, action_space)), n_steps=N_STEPS)
    agent.learn(8 * N_STEPS * 2)
    assert agent._n_updates == 8
    assert agent.faults.counts == {}
    assert sound(agent)
    assert agent.actor_optimizer._steps == 8


@pytest.mark.parametrize("log_std", [-200.0, -30.0, 30.0, 200.0])
def test_noise_that_runs_away_is_held(log_std):
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), n_steps=N_STEPS)
    agent.learn(N_STEPS * 2)
    collected(agent)
    with torch.no_grad():
        agent.policy.log_std[1] = log_std
    agent.train()
    assert agent.faults.counts["log_std"] == 1
    assert float(agent.policy.log_std.detach().abs().max()) <= WIDEST_LOG_STD
    agent.learn(4 * N_STEPS * 2)
    assert sound(agent)


@pytest.mark.parametrize("size", [1e3, 1e10, 1e18])
@pytest.mark.parametrize("action_space", [PLANE, TURNS], ids=["box", "discrete"])
def test_a_policy_that_saturates_does_not_poison_anything(size, action_space):
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, action_space)), n_steps=N_STEPS)
    with torch.no_grad():
        agent.policy.action_net.weight.mul_(size)
    agent.learn(6 * N_STEPS * 2)
    assert agent._n_updates == 6
    assert sound(agent)


def test_an_input_whose_square_overflows_reaches_no_factor():
    """1e25 is finite in float32; its square is not, and would stay in a running moment for ever."""
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), n_steps=N_STEPS)
    agent.learn(N_STEPS * 2)
    collected(agent)
    agent.rollout_buffer.observations[4, 0] = 1e25
    agent.train()
    assert agent.faults.counts["actor_statistics"] == 1
    assert sound(agent)


def test_counts_are_saved_with_the_agent(tmp_path):
    agent = small_agent("MlpPolicy", guarded([{5: "reward"}, {}]), n_steps=N_STEPS)
    agent.learn(2 * N_STEPS * 2)
    agent.save(tmp_path / "agent")
    assert ACKTR.load(tmp_path / "agent").faults.counts == agent.faults.counts == {"reward": 1}


def test_the_limit_can_be_chosen():
    faults = Faults(3)
    for _ in range(2):
        faults.lose("it broke")
    faults.forgive()
    for _ in range(2):
        faults.lose("it broke")
    with pytest.raises(FloatingPointError, match="it broke, 3 rollouts in a row; nothing was learned"):
        faults.lose("it broke")
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), max_faults=4)
    assert (agent.faults.limit, agent.actor_optimizer.max_skips, agent.critic_optimizer.max_skips) == (4, 4, 4)
