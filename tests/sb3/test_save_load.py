"""Saving and loading an agent loses nothing that an update depends on."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize

from acktr.sb3 import ACKTR, ActorSettings, CriticSettings
from tests.sb3.worlds import (
    IMAGE,
    TINY_CNN,
    TURNS,
    differences,
    noise,
    normalised,
    quiet,
    small_agent,
    vectorised,
)

ROLLOUTS = 10
ACTOR = ActorSettings(radius=lambda progress: 0.02 * progress, n_epochs=2, n_minibatches=2, refresh_period=3)
CRITIC = CriticSettings(radius=lambda progress: 0.1 * progress, n_epochs=2, n_minibatches=2, refresh_period=3)
FIELDS = ("observations", "actions", "rewards", "returns", "episode_starts", "values", "log_probs", "advantages")

WORLDS = {
    "box": ("MlpPolicy", lambda: gym.make("Pendulum-v1", max_episode_steps=20), {}, {}),
    "discrete": ("MlpPolicy", lambda: gym.make("CartPole-v1"), {}, {}),
    "images": ("CnnPolicy", noise(IMAGE, TURNS), {"policy_kwargs": TINY_CNN}, {"norm_obs": False}),
}


class Recorder(BaseCallback):
    """Keeps a copy of every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[dict[str, np.ndarray]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        self.rollouts.append({name: getattr(buffer, name).copy() for name in FIELDS})


def environment(world: str) -> VecNormalize:
    _, make, _, normalisation = WORLDS[world]
    return normalised(make, **normalisation)


def trained(world: str, **kwargs: Any) -> tuple[ACKTR, list[dict[str, np.ndarray]]]:
    policy, _, settings, _ = WORLDS[world]
    linear = {"learning_rate": lambda progress: progress, "actor": ACTOR, "critic": CRITIC}
    agent = small_agent(policy, environment(world), **(linear | settings | kwargs))
    recorder = Recorder()
    agent.learn(ROLLOUTS * agent.n_steps * agent.n_envs, callback=recorder)
    assert len(recorder.rollouts) == ROLLOUTS
    return quiet(agent), recorder.rollouts


def train_on(agent: ACKTR, rollout: dict[str, np.ndarray], progress: float) -> None:
    for name, array in rollout.items():
        setattr(agent.rollout_buffer, name, array.copy())
    normaliser = agent.get_vec_normalize_env()
    if normaliser is not None:
        normaliser._update_reward(rollout["rewards"][0])
        if normaliser.norm_obs:
            normaliser.obs_rms.update(rollout["observations"][0])
    agent._current_progress_remaining = progress
    agent.train()


def state(agent: ACKTR) -> dict[str, Any]:
    settings = {name: (agent.actor, agent.critic)[name == "critic"].radius(0.3) for name in ("actor", "critic")}
    return deepcopy(agent.get_parameters()) | {
        "updates": agent._n_updates,
        "schedules": [agent.lr_schedule(0.3), settings],
    }


def continue_both(left: ACKTR, right: ACKTR, rollouts: list[dict[str, np.ndarray]]) -> list[list[str]]:
    found = [differences(state(left), state(right))]
    for number, rollout in enumerate(rollouts):
        progress = 1 - (number + 1) / (len(rollouts) + 1)
        train_on(left, rollout, progress)
        train_on(right, rollout, progress)
        found.append(differences(state(left), state(right)))
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_a_loaded_agent_continues_bit_for_bit(world, tmp_path):
    agent, rollouts = trained(world)
    agent.save(tmp_path / "agent")
    loaded = quiet(ACKTR.load(tmp_path / "agent", environment(world), device="cpu"))
    before = state(agent)
    assert continue_both(agent, loaded, rollouts) == [[]] * (ROLLOUTS + 1)
    assert differences(before, state(agent)), "nothing was trained, so nothing was compared"


@pytest.mark.parametrize("world", ["box", "images"])
def test_momentum_and_the_previous_step_are_saved(world, tmp_path):
    from acktr.combination import LayerCombination

    actor = ActorSettings(
        radius=ACTOR.radius, momentum=0.5, combination=LayerCombination(previous_step=True), n_minibatches=2, curvature_examples=8
    )
    agent, rollouts = trained(world, actor=actor)
    assert {"momentum_buffer", "previous_step"} <= set(next(iter(agent.actor_optimizer.state.values())))
    agent.save(tmp_path / "agent")
    loaded = quiet(ACKTR.load(tmp_path / "agent", environment(world), device="cpu"))
    assert continue_both(agent, loaded, rollouts[:3]) == [[]] * 4


@pytest.mark.parametrize("lost", ["actor_optimizer", "critic_optimizer", "update_state"])
def test_an_agent_that_loses_a_part_goes_another_way(lost, tmp_path):
    agent, rollouts = trained("box")
    agent.save(tmp_path / "agent")
    loaded = quiet(ACKTR.load(tmp_path / "agent", environment("box"), device="cpu"))
    kept = {name: value for name, value in loaded.get_parameters().items() if name != lost}
    loaded._setup_model()
    loaded.set_parameters(kept, exact_match=False, device="cpu")
    train_on(agent, rollouts[0], 0.5)
    train_on(loaded, rollouts[0], 0.5)
    assert differences(agent.policy.state_dict(), loaded.policy.state_dict())


@pytest.mark.parametrize("part", ["obs_rms", "ret_rms"])
def test_the_normaliser_comes_back_with_the_agent(part, tmp_path):
    agent, _ = trained("box")
    agent.save(tmp_path / "agent")
    fresh = environment("box")
    untouched = getattr(fresh, part).mean.copy()
    loaded = ACKTR.load(tmp_path / "agent", fresh, device="cpu")
    expected, found = getattr(agent.get_vec_normalize_env(), part), getattr(loaded.get_vec_normalize_env(), part)
    for name in ("mean", "var", "count"):
        assert np.array_equal(getattr(expected, name), getattr(found, name)), name
    assert not np.array_equal(untouched, found.mean)


def test_statistics_wait_for_a_normaliser_that_comes_later(tmp_path):
    agent, _ = trained("box")
    agent.save(tmp_path / "agent")
    loaded = ACKTR.load(tmp_path / "agent", device="cpu")
    loaded.save(tmp_path / "again")  # they must also survive an agent without environment
    loaded = ACKTR.load(tmp_path / "again", device="cpu")
    env = environment("box")
    loaded.set_env(env)
    assert np.array_equal(env.obs_rms.mean, agent.get_vec_normalize_env().obs_rms.mean)


def test_an_agent_without_a_normaliser_is_loaded_too(tmp_path):
    agent = small_agent("MlpPolicy", vectorised(noise())).learn(64)
    agent.save(tmp_path / "agent")
    loaded = ACKTR.load(tmp_path / "agent", vectorised(noise()), device="cpu")
    assert differences(agent.get_parameters(), loaded.get_parameters()) == []
    loaded.learn(64)


def test_predictions_survive(tmp_path):
    agent, rollouts = trained("box")
    agent.save(tmp_path / "agent")
    loaded = ACKTR.load(tmp_path / "agent", device="cpu")
    observations = rollouts[-1]["observations"][0]
    expected, _ = agent.predict(observations, deterministic=True)
    assert np.array_equal(expected, loaded.predict(observations, deterministic=True)[0])
    with torch.no_grad():
        next(iter(loaded.policy.mlp_extractor.parameters())).mul_(2)
    assert not np.array_equal(expected, loaded.predict(observations, deterministic=True)[0])
