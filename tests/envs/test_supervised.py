"""Worlds in processes and in this one, which raise, die and hang: each is replaced, and the others do not notice."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from envs import EnvOptions, FiniteGuard, SupervisedVecEnv, WorldError, make
from envs.inprocess import InProcessVecEnv

LENGTH = 6


class Mortal(gym.Env[Any, np.int64]):
    """Counts steps, and does as it is told: 0 nothing, 1 raise, 2 be killed, 3 hang, 4 end and raise at the reset."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gym.spaces.Discrete(5)
        self._steps, self._sick = 0, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if self._sick:
            raise OSError("the arm is stuck")
        self._steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.int64) -> Any:
        self._steps += 1
        if action == 1:
            raise ValueError("the arm is stuck")
        if action == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if action == 3:
            time.sleep(1000)
        self._sick = bool(action == 4)
        return np.full(1, self._steps, np.float32), 1.0, self._steps == LENGTH or self._sick, False, {}


BUILD = lambda: Monitor(Mortal())  # ruff: ignore[lambda-assignment] - a builder


def counts(
    venv: Any, plan: np.ndarray, breaking: tuple[int, ...] = (1, 2, 3)
) -> tuple[dict[str, int], list[list[float]], int]:
    """Faults by kind, scores by environment, and how often one that was not meant was touched."""
    venv.seed(0)
    venv.reset()
    found, scores, disturbed = dict[str, int](), [list[float]() for _ in range(venv.num_envs)], 0
    steps = np.zeros(venv.num_envs, int)
    for actions in plan:
        observations, rewards, dones, infos = venv.step(actions)
        steps += 1
        for index, info in enumerate(infos):
            faults = info.get("faults", ())
            for kind, _ in faults:
                found[kind] = found.get(kind, 0) + 1
            broken = bool(info.get("broken_off"))
            assert broken == bool(actions[index] in breaking)
            over = broken or steps[index] == LENGTH or actions[index] == 4
            steps[index] = 0 if over else steps[index]
            disturbed += bool(dones[index]) != over or observations[index, 0] != steps[index]
            assert bool(rewards[index]) != broken
            scores[index] += [info["episode"]["r"]] if "episode" in info else []
    return found, scores, disturbed


def plan_of(rng: np.random.Generator, n_steps: int, n_envs: int, kinds: dict[int, int]) -> np.ndarray:
    """Random places for so many actions of each kind."""
    flat = np.zeros(n_steps * n_envs, np.int64)
    places = iter(rng.choice(len(flat), sum(kinds.values()), replace=False))
    for action, count in kinds.items():
        for _ in range(count):
            flat[next(places)] = action
    return flat.reshape(n_steps, n_envs)


def test_worlds_of_this_process_that_raise_are_reset_or_built_anew() -> None:
    plan = plan_of(np.random.default_rng(0), 120, 3, {1: 20, 4: 12})
    venv = FiniteGuard(InProcessVecEnv([BUILD] * 3), max_faults=40)
    found, scores, disturbed = counts(venv, plan)
    assert found == {"raised": 32}
    assert disturbed == 0
    assert all(1.0 <= score <= LENGTH for each in scores for score in each)


def test_the_faults_are_real() -> None:
    venv = DummyVecEnv([BUILD])
    venv.reset()
    with pytest.raises(ValueError, match="the arm is stuck"):
        venv.step(np.array([1]))
    worker = SubprocVecEnv([BUILD], start_method="fork")
    worker.reset()
    with pytest.raises((EOFError, ConnectionResetError)):
        worker.step(np.array([2]))
    worker.waiting = False
    worker.remotes[0].close()


def test_workers_that_raise_and_die_are_replaced() -> None:
    plan = plan_of(np.random.default_rng(1), 60, 3, {1: 12, 2: 12, 4: 10})
    venv = FiniteGuard(SupervisedVecEnv([BUILD] * 3, "fork"), max_faults=40)
    # A worker whose reset raises dies of it, before it has told of the step.
    found, scores, disturbed = counts(venv, plan, (1, 2, 4))
    venv.close()
    assert found == {"raised": 12, "died": 12 + 10}
    assert disturbed == 0
    assert all(score <= LENGTH for each in scores for score in each)


def test_a_dead_worker_asked_for_an_attribute_is_told_and_leaves_no_answer_behind() -> None:
    venv = SupervisedVecEnv([BUILD] * 3, "fork")
    venv.reset()
    assert [space.n for space in venv.get_attr("action_space")] == [5] * 3
    assert venv.env_is_wrapped(Monitor) == [True] * 3
    assert venv.env_method("get_wrapper_attr", "_steps", indices=[2, 0]) == [0, 0]
    assert venv.has_attr("_steps") and not venv.has_attr("nonsense")
    os.kill(venv.processes[1].pid, signal.SIGKILL)
    for question in (lambda: venv.get_attr("action_space"), lambda: venv.env_is_wrapped(Monitor)):
        with pytest.raises(WorldError, match=r"the process of environment 1 died .*; reset the environments"):
            question()
    assert venv.reset().shape == (3, 1)
    assert len(venv.get_attr("action_space")) == 3
    venv.close()


def test_workers_that_hang_are_replaced_all_at_once() -> None:
    plan = np.zeros((12, 5), np.int64)
    plan[3], plan[8] = 3, 3
    venv = FiniteGuard(SupervisedVecEnv([BUILD] * 5, "fork", timeout=1.5))
    began = time.monotonic()
    found, _, disturbed = counts(venv, plan)
    assert found == {"hung": 10}
    assert disturbed == 0
    assert time.monotonic() - began < 10  # the five of a step share its time
    venv.close()
    assert not any(process.is_alive() for process in venv.venv.processes)


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda fns: InProcessVecEnv(fns, 3), "the arm is stuck"),
        (lambda fns: SupervisedVecEnv(fns, "fork", max_faults=3), "died"),
    ],
    ids=["in process", "worker"],
)
def test_a_world_that_cannot_be_restarted_ends_the_run_in_one_line(build: Any, what: str) -> None:
    sick = []

    def builder() -> gym.Env[Any, Any]:
        world = Mortal()
        world._sick = len(sick) > 0
        sick.append(1)
        return world

    venv = FiniteGuard(build([builder]))
    venv.reset()
    if isinstance(venv.venv, SupervisedVecEnv):
        sick.append(1)
        venv.venv.processes[0].kill()
    else:
        venv.venv.envs[0]._sick = True
    with pytest.raises(WorldError, match="environment 0 could not be restarted in 4 tries") as error:
        venv.step(np.array([1]))
    assert what in str(error.value) and "\n" not in str(error.value)
    venv.close()


def test_spaces_that_nobody_tells() -> None:
    def broken() -> gym.Env[Any, Any]:
        raise ValueError("no such arm")

    with pytest.raises(WorldError, match="environment 0 died before it told its spaces"):
        SupervisedVecEnv([broken], "fork")


@pytest.mark.parametrize("name", ["Hopper-v5", "Ant-v5"])
def test_native_worlds_that_mujoco_resets_are_broken_off(name: str) -> None:
    """MuJoCo sets a simulation that diverges back to its model's own positions, and says so in a counter alone."""
    rng = np.random.default_rng(0)
    venv = make(name, 3, seed=0, options=EnvOptions(backend="native"), max_faults=40)
    twin = make(name, 3, seed=0, options=EnvOptions(backend="native"))
    quiet = np.zeros((3, *venv.action_space.shape), np.float32)
    venv.reset()
    twin.reset()
    broken, apart = 0, np.zeros(3, bool)
    for _ in range(60):
        victim = rng.integers(3) if broken < 12 and rng.random() < 0.4 else None
        if victim is not None:
            simulations = venv.venv._simulations
            qvel = simulations._batch.bind("qvel") if hasattr(simulations, "_batch") else None
            (simulations._data[victim].qvel if qvel is None else qvel[victim])[:] = 1e300
        observations, rewards, dones, infos = venv.step(quiet)
        others, same_rewards, _, _ = twin.step(quiet)
        faulty = [index for index, info in enumerate(infos) if "faults" in info]
        assert faulty == ([] if victim is None else [victim])
        broken += len(faulty)
        apart[faulty] = True
        assert np.isfinite(observations).all()
        for index in np.flatnonzero(~apart):  # who was never touched has the twin's numbers to the last bit
            assert np.array_equal(observations[index], others[index]) and rewards[index] == same_rewards[index]
        for index in faulty:
            assert dones[index] and rewards[index] == 0 and "reset it" in infos[index]["faults"][0][1]
    assert broken == 12


def test_an_error_of_mujoco_concerns_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from mujoco.batch import SimulationError

    venv = make("Hopper-v5", 3, seed=0, options=EnvOptions(backend="native"))
    venv.reset()
    batch = venv.venv._simulations._batch
    step = batch.step

    def failing(**kwargs: Any) -> None:
        step(**kwargs)
        raise SimulationError(np.array([1]), "stack overflow")

    monkeypatch.setattr(batch, "step", failing)
    monkeypatch.setattr(type(batch), "error", lambda self, sim: "stack\noverflow")
    _, rewards, dones, infos = venv.step(np.zeros((3, 3), np.float32))
    assert (dones.tolist(), rewards[1]) == ([False, True, False], 0.0)
    assert infos[1]["faults"] == [("raised", "environment 1: stack overflow")]
