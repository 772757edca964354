"""Trying out before training how much noise an environment forgives."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import VecNormalize

from acktr.sb3 import ACKTR, ActorSettings, Forgiveness, ScheduledNoise
from tests.sb3.worlds import BOX, PLANE, small_agent, vectorised

FIRST = float(np.log(0.5))
LIMIT, ENVS = 20, 16


class Brittle(gym.Env):
    """Ends when an action is too large, or after some steps whatever the action; else the time limit cuts it."""

    observation_space, action_space = BOX, PLANE

    def __init__(self, largest: float, falls_after: int = 10**9) -> None:
        self.largest, self.falls_after, self.steps = largest, falls_after, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.full(3, 5.0, np.float32), {}

    def step(self, action):
        self.steps += 1
        falls = float(np.abs(action).max()) > self.largest or self.steps >= self.falls_after
        return np.full(3, 5.0, np.float32), 1.0, falls, self.steps >= LIMIT, {}


# Of 40 draws of standard deviation 0.22 four episodes in nine have one beyond 0.55, of 0.15 one in a hundred.
WORLDS = {
    "forgives everything": (Brittle(2.0), 0.0),
    "forgives little": (Brittle(0.55), -1.6),
    "falls even at rest": (Brittle(0.55, falls_after=9), 0.0),
    "forgives nothing": (Brittle(0.0), 0.0),
}


def agent_in(world: Brittle, forgiveness: Forgiveness | None = None, wrap=lambda env: env) -> ACKTR:
    env = wrap(vectorised(lambda: Brittle(world.largest, world.falls_after), ENVS))
    settings = ActorSettings(noise=ScheduledNoise(-2.0, forgiveness))
    return small_agent("MlpPolicy", env, actor=settings, n_steps=16, policy_kwargs={"log_std_init": FIRST})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WORLDS)
def test_the_largest_noise_that_ends_no_more_episodes_than_rest(name, seed):
    world, shift = WORLDS[name]
    agent = agent_in(world)
    noise = ScheduledNoise(-2.0, Forgiveness(rung=0.4, rungs=4))
    trial = noise.try_out(agent.policy, agent.env, 10**6, torch.Generator().manual_seed(seed))
    assert trial.shift == pytest.approx(shift)
    most = {"forgives everything": LIMIT * ENVS, "falls even at rest": 18 * ENVS}.get(name, 6 * LIMIT * ENVS)
    assert 0 < trial.steps <= most


def test_without_a_time_limit_an_episode_that_lasts_counts_as_survived():
    agent = agent_in(Brittle(2.0))
    noise = ScheduledNoise(-2.0, Forgiveness(longest=7))
    assert noise.try_out(agent.policy, agent.env, 10**6, torch.Generator()).steps == 7 * ENVS


@pytest.mark.parametrize(("total", "tried"), [(10 * LIMIT * ENVS - 1, False), (10 * LIMIT * ENVS, True)])
def test_it_takes_no_more_than_a_tenth_of_training(total, tried):
    agent = agent_in(Brittle(2.0))
    noise = ScheduledNoise(-2.0, Forgiveness(longest=LIMIT))
    assert (noise.try_out(agent.policy, agent.env, total, torch.Generator()).steps > 0) == tried


def test_nothing_is_tried_unless_it_is_wanted():
    agent = agent_in(Brittle(0.55))
    agent.learn(2 * 16 * ENVS)
    assert agent.num_timesteps == 2 * 16 * ENVS
    assert agent.update_state.noise_shift == 0


def test_the_whole_schedule_is_lower_and_the_steps_count(caplog):
    agent = agent_in(Brittle(0.55), Forgiveness(longest=LIMIT))
    agent.learn(80 * 16 * ENVS)
    tried = agent.num_timesteps - agent._n_updates * 16 * ENVS
    assert tried > 0
    assert agent.num_timesteps < 81 * 16 * ENVS, "what trying took is not there for learning"
    assert agent.policy.log_std.detach().numpy() == pytest.approx(-2.0 - 1.6, abs=0.02)
    assert "its standard deviation is now 0.1" in caplog.text
    before = agent.num_timesteps
    agent.learn(16 * ENVS)
    assert agent.num_timesteps == 16 * ENVS, f"it is tried once, and not after {before} steps"


def test_a_normaliser_learns_nothing_from_it():
    agent = agent_in(Brittle(0.55), Forgiveness(longest=LIMIT), VecNormalize)
    normaliser = agent.get_vec_normalize_env()
    before = normaliser.obs_rms.count
    normaliser.reset()
    one_reset = normaliser.obs_rms.count - before
    normaliser.training = True
    agent.learn(80 * 16 * ENVS)
    rollouts, resets = agent._n_updates * 16 * ENVS, 2  # learn's own, and the one after the trial
    assert agent.num_timesteps > rollouts
    assert normaliser.obs_rms.count == pytest.approx(before + (1 + resets) * one_reset + rollouts)
    assert normaliser.training


def test_it_is_saved_with_the_agent(tmp_path):
    agent = agent_in(Brittle(0.55), Forgiveness(longest=LIMIT))
    agent.learn(80 * 16 * ENVS)
    agent.save(tmp_path / "agent")
    again = ACKTR.load(tmp_path / "agent", env=agent.get_env())
    assert again.update_state.noise_shift == agent.update_state.noise_shift == pytest.approx(-1.6)
    assert again.actor.noise == ScheduledNoise(-2.0, Forgiveness(longest=LIMIT))


@pytest.mark.parametrize("wrong", [{"rung": 0.0}, {"rungs": 0}, {"longest": -1}, {"rung": float("nan")}])
def test_what_cannot_be_tried_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
        Forgiveness(**wrong)
