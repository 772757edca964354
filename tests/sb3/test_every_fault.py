"""Every kind of fault in one training, ten times or more at random points: TensorBoard counts what was done to it."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor

import acktr.curvature.kronecker.kfac as kfac
import acktr.sb3.steps
from acktr.linalg import DecompositionError
from acktr.optimizer import NaturalGradient
from acktr.sb3 import ACKTR
from acktr.search import Search
from envs import FiniteGuard, RunningNormaliser, SupervisedVecEnv
from tests.events import shown
from tests.sb3.worlds import BOX, PLANE, noise, small_agent, vectorised

N_ENVS, N_STEPS, UPDATES, LENGTH, EACH = 3, 8, 160, 12, 12
NAN = float("nan")
OF_ENVIRONMENTS = ("observation", "final_observation", "reward", "raised", "died")
OF_STEPS = ("output", "statistics", "gradient", "loss", "direction", "distance", "refresh")
ELSEWHERE = {"decomposition", "disk", "memory"}
"""Injected below, and in tests/agents/test_disk.py: the first of all refreshes, and the machine."""


class Victim(gym.Env):
    """Numbers of order one in episodes of twelve steps; what breaks when is set down by the steps of its life."""

    def __init__(self, plan: dict[int, str], lived: Any) -> None:
        self.observation_space, self.action_space = BOX, PLANE
        self.plan, self.lived, self.steps = plan, lived, 0  # `lived` outlives the process

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.lived.value, self.steps = self.lived.value + 1, self.steps + 1
        observation, what = self.np_random.uniform(-1, 1, 3).astype(np.float32), self.plan.get(self.lived.value, "")
        if what == "raised":
            raise RuntimeError("the motor is off")
        if what == "died":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hung":
            time.sleep(1000)
        broken = what in {"observation", "final_observation"}
        observation[int(self.lived.value) % 3] = NAN if broken else 0.5
        # An observation that breaks at the end of an episode, by chance, is a final one: such episodes go on.
        over = what == "final_observation" or (self.steps >= LENGTH and what != "observation")
        return observation, NAN if what == "reward" else float(np.mean(action)), False, over, {}


def plans(rng: np.random.Generator) -> list[dict[int, str]]:
    """What befalls which environment at which step; those that hang do so together, and share the waiting."""
    found: list[dict[int, str]] = [{} for _ in range(N_ENVS)]
    steps = rng.permutation(np.arange(2, (UPDATES - 3) * N_STEPS))
    hanging, others = steps[: EACH // N_ENVS], steps[EACH // N_ENVS :]
    for step in hanging:
        for plan in found:
            plan[int(step)] = "hung"
    for step, kind in zip(others, OF_ENVIRONMENTS * EACH, strict=False):
        found[rng.integers(N_ENVS)][int(step)] = kind
    return found


def worlds(rng: np.random.Generator) -> RunningNormaliser:
    lives = [multiprocessing.Value("q", 0) for _ in range(N_ENVS)]
    builders = [lambda p=plan, n=life: Monitor(Victim(p, n)) for plan, life in zip(plans(rng), lives, strict=True)]
    return RunningNormaliser(FiniteGuard(SupervisedVecEnv(builders, "fork", timeout=1.5), max_faults=100))


class Saboteur:
    """Breaks at most one thing of each optimizer's step, and remembers what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
        kinds = [kind for kind in OF_STEPS for _ in range(EACH)]
        steps = rng.choice(np.arange(20, 5 * (UPDATES - EACH - 3)), len(kinds), replace=False)
        self.plan = {int(step): kind for step, kind in zip(steps, kinds, strict=True)}
        self.waiting: list[str] = []
        self.patch, self.passed, self.kind, self.done = monkeypatch, 0, "", Counter[str]()
        self.spoil(NaturalGradient, "update_curvature", self.update_curvature)
        self.spoil(NaturalGradient, "_gradient", self.gradient)
        self.spoil(NaturalGradient, "_descent", self.descent)
        self.spoil(Search, "move_measured", self.move_measured)
        self.spoil(kfac, "symmetric_eigen", self.symmetric_eigen)
        self.spoil(acktr.sb3.steps, "policy_loss", self.policy_loss)

    def spoil(self, target: Any, name: str, by: Callable[..., Any]) -> None:
        real = getattr(target, name)
        self.patch.setattr(target, name, lambda *args, **kwargs: by(real, *args, **kwargs))

    def strikes(self, kind: str) -> bool:
        """Whether this is the moment."""
        if self.kind != kind:
            return False
        self.kind = ""
        self.done[kind] += 1
        return True

    def update_curvature(self, real: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        self.passed += 1
        # What finds no occasion in its step (losses are the actor's alone) waits for one, and others wait for it.
        self.waiting += [self.plan[self.passed]] if self.passed in self.plan else []
        self.kind = self.kind or (self.waiting.pop(0) if self.waiting else "")
        if self.strikes("output"):
            for output in optimizer._capture.last.outputs:
                output.detach().fill_(NAN)
        with pytest.MonkeyPatch.context() as patched:
            if self.kind == "statistics":
                network, real_update = type(optimizer.curvature), type(optimizer.curvature).update
                patched.setattr(network, "update", lambda *a, **k: self.statistics(real_update, *a, **k))
            return real(optimizer, *args, **kwargs)

    def statistics(self, real: Any, curvature: Any, record: Any, seeds: Any, *args: Any, **kwargs: Any) -> Any:
        if self.strikes("statistics"):
            seeds = [tuple(torch.full_like(part, NAN) for part in seed) for seed in seeds]
        return real(curvature, record, seeds, *args, **kwargs)

    def gradient(self, real: Any, optimizer: Any) -> Any:
        spoiled = self.strikes("gradient")
        return {name: tensor * NAN if spoiled else tensor for name, tensor in real(optimizer).items()}

    def policy_loss(self, real: Any, *args: Any) -> Any:
        return real(*args) * (NAN if self.strikes("loss") else 1.0)

    def descent(self, real: Any, *args: Any) -> Any:
        if self.strikes("direction"):
            raise torch.linalg.LinAlgError("singular")
        return real(*args)

    def move_measured(self, real: Any, search: Any, descent: Any, bounds: Any, record: Any, *rest: Any) -> Any:
        if self.strikes("distance"):
            rest = SimpleNamespace(distance=lambda *_: NAN), *rest[1:]
        return real(search, descent, bounds, record, *rest)

    def symmetric_eigen(self, real: Any, matrix: Any) -> Any:
        if self.strikes("refresh"):
            raise DecompositionError("nothing was finite")
        return real(matrix)


def spoil_updates(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> Counter[str]:
    """Whole rollouts with a NaN in them, and noise that runs away."""
    real_train, real_hold, done = ACKTR.train, ACKTR._hold_noise, Counter[str]()
    moments = rng.choice(np.arange(2, UPDATES - 2), 2 * EACH, replace=False)
    rollouts, noises = set(moments[:EACH].tolist()), set(moments[EACH:].tolist())
    updates = [0]

    def train(agent: Any) -> None:
        updates[0] += 1
        if updates[0] in rollouts:
            agent.rollout_buffer.rewards[rng.integers(N_STEPS), rng.integers(N_ENVS)] = NAN
            done["rollout"] += 1
        real_train(agent)

    def hold(agent: Any) -> None:
        if updates[0] in noises:
            with torch.no_grad():
                agent.policy.log_std[1] = (-1) ** updates[0] * 200.0
            done["log_std"] += 1
        real_hold(agent)
        if updates[0] in noises:
            with torch.no_grad():  # held at its bound it would be found there again and again
                agent.policy.log_std[1] = 0.0

    monkeypatch.setattr(ACKTR, "train", train)
    monkeypatch.setattr(ACKTR, "_hold_noise", hold)
    return done


def counted(folder: Path) -> Counter[str]:
    """The last count of each kind in TensorBoard, the actor's and the critic's together."""
    found = Counter[str]()
    for tag, value in shown(folder).items():
        if tag.startswith("faults/"):
            found[tag.removeprefix("faults/").removeprefix("actor_").removeprefix("critic_")] += int(value)
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_everything_breaks_and_is_counted(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    env = worlds(rng)
    agent = small_agent("MlpPolicy", env, n_steps=N_STEPS, max_faults=100, seed=seed)
    agent.set_logger(configure(str(tmp_path), ["tensorboard"]))
    saboteur, of_updates = Saboteur(monkeypatch, rng), spoil_updates(monkeypatch, rng)
    agent.learn(UPDATES * N_STEPS * N_ENVS)
    env.close()
    agent.logger.close()
    done = Counter(dict.fromkeys(OF_ENVIRONMENTS, EACH)) + Counter(hung=EACH) + saboteur.done + of_updates
    assert min(done[kind] for kind in (*OF_STEPS, "rollout", "log_std")) >= 10, done
    done["gradient"] += done.pop("loss")  # a loss is seen by its gradient
    assert counted(tmp_path) == done
    assert agent._n_updates == UPDATES - done["rollout"]
    assert all(torch.isfinite(parameter).all() for parameter in agent.policy.parameters())
    assert np.isfinite(env.obs_rms.mean).all() and np.isfinite(env.ret_rms.var)


def test_a_first_decomposition_that_fails_costs_the_steps_that_it_is_missing_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, real, before, skipped = np.random.default_rng(0), kfac.symmetric_eigen, Counter[str](), 0
    for number in range(10):
        failures, calls = int(rng.integers(1, 4)), []

        def eigen(matrix: Any, failures: int = failures, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) <= failures:
                raise DecompositionError("nothing was finite")
            return real(matrix)

        monkeypatch.setattr(kfac, "symmetric_eigen", eigen)
        agent = small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), n_steps=N_STEPS, seed=number)
        agent.set_logger(configure(str(tmp_path / str(number)), ["tensorboard"]))
        agent.learn(8 * N_STEPS * 2)
        agent.logger.close()
        before += counted(tmp_path / str(number)) + Counter(injected=failures)
        skipped += agent.actor_optimizer.skipped + agent.critic_optimizer.skipped
    assert before["refresh"] == before["injected"]
    assert before["decomposition"] == skipped >= 10
    assert set(before) == {"refresh", "decomposition", "injected"}


def test_the_page_of_faults_lists_what_is_injected() -> None:
    page = Path(__file__).parents[2] / "docs" / "faults.md"
    cells = [line.split("|")[2] for line in page.read_text(encoding="utf-8").splitlines() if line.count("|") == 5]
    kinds = {name.lstrip("…_") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    listed = {kind.removeprefix("actor_").removeprefix("critic_") for kind in kinds}
    ours = {*OF_ENVIRONMENTS, *OF_STEPS, *ELSEWHERE, "hung", "rollout", "log_std"} - {"loss"}
    assert ours == listed
