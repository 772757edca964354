"""Agents that several processes train together, each in the terms of what one process sees; started by test_together.

    python together_worker.py FOLDER RANK SIZE

runs every case on its rank and saves what came out; with one rank a case is the oracle of the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from acktr import EKFAC, KFAC, ExactFisher, FactoredKFAC
from acktr.firstorder import Adam
from acktr.ranks import BrokenRankError
from acktr.sb3 import ACKTR, ActorSettings, CriticSettings, Forgiveness, meeting
from acktr.sb3 import acktr as module
from acktr.sb3.forgiveness import try_noise

ENVS, STEPS = 4, 16


class World(gym.Env):
    """Observations and rewards of its own generator, whatever the action; each has episodes of its own length."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, index: int) -> None:
        self.index, self.steps, self.all_steps = index, 0, 0
        self.poison: dict[int, float] = {}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps, self.all_steps = self.steps + 1, self.all_steps + 1
        reward = self.poison.get(self.all_steps, float(self.np_random.normal()) + self.index)
        # Noise throws it over, from the third step on.
        falls = bool(np.abs(action).max() > 0.99) and self.steps >= 3 and self.index < 0
        return self._seen(), reward, falls, self.steps >= 5 + abs(self.index), {}

    def _seen(self) -> np.ndarray:
        return self.np_random.normal(self.index, 1 + abs(self.index), 3)


def counts(size: int) -> list[int]:
    return [ENVS * (rank + 1) // size - ENVS * rank // size for rank in range(size)]


def worlds(rank: int, size: int, fragile: bool = False) -> DummyVecEnv:
    """This rank's of four."""
    first = sum(counts(size)[:rank])
    indices = range(first, first + counts(size)[rank])
    return DummyVecEnv([lambda index=index: Monitor(World(-index - 1 if fragile else index)) for index in indices])


def agent_of(env: Any, **settings: Any) -> ACKTR:
    actor = ActorSettings(fisher=ExactFisher(), curvature=settings.pop("curvature", EKFAC()), radius=0.05)
    critic = CriticSettings(curvature=settings.pop("critic_curvature", FactoredKFAC()), n_epochs=2, n_minibatches=1)
    actor, critic = settings.pop("actor", actor), settings.pop("critic", critic)
    kwargs = {"net_arch": {"pi": [8], "vf": [8]}}
    agent = ACKTR(
        "MlpPolicy",
        env,
        n_steps=STEPS,
        seed=3,
        device="cpu",
        actor=actor,
        critic=critic,
        policy_kwargs=kwargs,
        **settings,
    )
    agent.set_logger(Logger(None, []))
    return agent


def parameters(agent: ACKTR) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in agent.policy.parameters()])


# ---------------------------------------------------------------------------------------------------- the update


def put_rollout(agent: ACKTR, update: int, rank: int, size: int) -> None:
    """This rank's environments' share of a rollout that is the same however many ranks there are."""
    rng, buffer = np.random.default_rng(update), agent.rollout_buffer
    first = sum(counts(size)[:rank])
    mine = slice(first, first + counts(size)[rank])
    buffer.reset()
    buffer.observations[:] = rng.normal(size=(STEPS, ENVS, 3))[:, mine]
    buffer.actions[:] = rng.normal(size=(STEPS, ENVS, 2))[:, mine]
    # Environments differ, so that a rank's own mean and variance are not everyone's.
    buffer.advantages = (rng.normal(size=(STEPS, ENVS)) * [1, 2, 3, 4] + [0, 3, 5, 9])[:, mine].astype(np.float32)
    buffer.returns = (rng.normal(size=(STEPS, ENVS)) + np.array([0, 1, 4, 9]))[:, mine].astype(np.float32)
    observations = torch.as_tensor(buffer.observations).flatten(0, 1).float()
    with torch.no_grad():
        outputs = agent.acting_network(observations)
        actions = torch.as_tensor(buffer.actions).flatten(0, 1)
        log_probs = agent.action_likelihood.log_prob(agent.policy_part(outputs), (actions,))
        buffer.log_probs[:] = log_probs.view(STEPS, -1).numpy()
        buffer.values[:] = agent.values_of(observations).view(STEPS, -1).numpy()
    buffer.pos, buffer.full = STEPS, True


LOGGED = ("train/loss", "critic/loss", "train/explained_variance", "train/entropy", "train/kl_measured")


def updates(rank: int, size: int, overflow: bool = False, **settings: Any) -> dict[str, Any]:
    """Three updates; before the second one, the last of all environments may have an advantage beyond its square."""
    agent = agent_of(worlds(rank, size), **settings)
    path, logged = [parameters(agent)], []
    for update in range(3):
        put_rollout(agent, update, rank, size)
        if overflow and update == 1 and rank == size - 1:
            agent.rollout_buffer.advantages[0, -1] = 1e30
        agent.train()
        path.append(parameters(agent))
        logged.append([float(agent.logger.name_to_value.get(name, np.nan)) for name in LOGGED])
    logs = torch.tensor(logged, dtype=torch.float64)
    return {"path": torch.stack(path), "logged": logs, "faults": dict(agent.faults.counts)}


def without(what: str, rank: int, size: int) -> dict[str, Any]:
    """The update with one thing taken from one rank's examples alone."""
    if what == "advantages":
        real = module.flatten_rollout
        module.flatten_rollout = lambda *a: real(*a[:4])
        try:
            return updates(rank, size)
        finally:
            module.flatten_rollout = real
    real = module.critic_steps

    module.critic_steps = lambda optimizer, *rest: real(Stepping(optimizer), *rest)
    try:
        return updates(rank, size)
    finally:
        module.critic_steps = real


class Stepping:
    """An optimizer that hears of rank 0's loss alone."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def average(self, value: torch.Tensor) -> float:
        self._optimizer.average(value)
        # Each rank's own would have them take other numbers of passes, and wait.
        return self._optimizer.ranks.agreed(float(value))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


UPDATES: dict[str, dict[str, Any]] = {
    "ekfac and factored-kfac": {},
    "kfac": {"curvature": KFAC(), "critic_curvature": KFAC()},
    "adam": {"curvature": Adam(), "critic_curvature": Adam()},
    "joint": {"joint_step": True, "actor": ActorSettings(fisher=ExactFisher(), radius=0.05, max_rollout_kl=1.0)},
}

# ---------------------------------------------------------------------------------------------------- learning


class Watch(BaseCallback):
    """Parameters at the beginning of every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[torch.Tensor] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.path.append(parameters(self.model))


def learned(rank: int, size: int, prepare: Callable[[VecNormalize], None] = lambda _: None) -> dict[str, Any]:
    env = VecNormalize(worlds(rank, size), gamma=0.9)
    agent, watch = agent_of(env), Watch()
    prepare(env)
    broke = ""
    try:
        agent.learn(3 * ENVS * STEPS, watch)
    except (FloatingPointError, BrokenRankError) as error:
        broke = f"{type(error).__name__}: {error}"
    return {
        "path": torch.stack(watch.path),
        "moments": [np.asarray(x) for s in (env.obs_rms, env.ret_rms) for x in (s.mean, s.var, s.count)],
        "episodes": [(info["r"], info["l"]) for info in agent.ep_info_buffer],
        "timesteps": agent.num_timesteps,
        "faults": dict(agent.faults.counts),
        "broke": broke,
    }


def poisoned(steps: dict[int, float]) -> Callable[[VecNormalize], None]:
    """Rewards of the last of all environments at some of its steps."""

    def prepare(env: VecNormalize) -> None:
        for world in env.venv.envs:
            if world.unwrapped.index == ENVS - 1:
                world.unwrapped.poison = steps

    return prepare


def apart(rank: int, size: int) -> dict[str, Any]:
    """Normalisers that are never put together."""
    real = meeting.put_moments
    meeting.put_moments = lambda *_: None
    try:
        return learned(rank, size)
    finally:
        meeting.put_moments = real


def forgiven(rank: int, size: int) -> tuple[float, int]:
    env, how = worlds(rank, size, fragile=True), Forgiveness(longest=20, share=1.0)
    env.seed(5 + sum(counts(size)[:rank]))
    generator = torch.Generator().manual_seed(rank)
    trial = try_noise(env, 0.5, how, 10**6, generator, module.ranks_here())
    return trial.shift, trial.steps


def refused(rank: int, size: int) -> list[str]:
    told = []
    few = CriticSettings(n_minibatches=11)
    for settings in (
        {"gamma": 0.9 if rank else 0.8},
        {"actor": replace(ActorSettings(), exploration_kl=0.1)},
        {"critic": few} if size == 3 else {"gae_lambda": 0.1 * rank},
    ):
        try:
            agent_of(worlds(rank, size), **settings)
        except ValueError as error:
            told.append(str(error))
    return told


def main(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{size}", rank=rank, world_size=size)
    found: dict[str, Any] = {name: updates(rank, size, **settings) for name, settings in UPDATES.items()}
    found["learned"] = learned(rank, size)
    found["NaN"] = learned(rank, size, poisoned({20: float("nan")}))
    found["overflow"] = updates(rank, size, overflow=True)
    found["NaN for ever"] = learned(rank, size, poisoned(dict.fromkeys(range(1, 1000), float("nan"))))
    found["forgiven"] = forgiven(rank, size)
    if size > 1:
        found["refused"] = refused(rank, size)
        found |= {f"without {what}": without(what, rank, size) for what in ("advantages", "radius")}
        found["apart"] = apart(rank, size)
    torch.save(found, folder / f"found-{size}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
