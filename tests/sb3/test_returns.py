"""What the update is fed: returns, advantages, and the order of the flat rollout."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback

from acktr.sb3.returns import estimate
from acktr.sb3.rollout import flatten_rollout
from tests.sb3.worlds import BOX, NAMED, PLANE, TURNS, Ones, collected, noise, small_agent, vectorised

CPU = torch.device("cpu")


@pytest.mark.parametrize("ends", ["truncated", "terminated"])
def test_a_time_limit_is_no_death(ends):
    """Reward 1 for ever is worth 1 / (1 − γ) = 10; of an episode that dies after 8 steps at most 5.7 are left."""
    agent = small_agent("MlpPolicy", vectorised(lambda: Ones(8, ends), 4), gamma=0.9, n_steps=32, learning_rate=100.0)
    agent.learn(15 * 128)
    values = []
    for _ in range(40):  # the critic cannot tell how long is left to live, and steps to and fro
        agent.learn(128, reset_num_timesteps=False)
        values.append(agent.policy.predict_values(torch.ones(1, 1)).item())
    value = np.mean(values)
    if ends == "truncated":
        assert value == pytest.approx(10, rel=0.03)
    else:
        lives = [(1 - 0.9**left) / 0.1 for left in range(1, 9)]
        assert value == pytest.approx(np.mean(lives), rel=0.15)
        assert value < 5.7


class Transitions(BaseCallback):
    """Notes how each step ended, as the environment told it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        names = ("rewards", "dones", "infos", "new_obs")
        self.steps.append({name: np.copy(self.locals[name]) for name in names})
        return True


def gae_by_hand(agent: Any, steps: list[dict[str, Any]], index: int, bootstrap: bool = True) -> np.ndarray:
    """Â_t = Σ_k (γλ)^k δ_{t+k} up to the episode's end, δ = r + γ V(s') − V(s), V(s') = 0 at a death only."""

    def value(observation: np.ndarray) -> float:
        return agent.policy.predict_values(torch.as_tensor(observation[None])).item()

    observations = agent.rollout_buffer.observations[:, index]
    deltas = []
    for t, step in enumerate(steps):
        info, done = step["infos"][index], step["dones"][index]
        following = info["terminal_observation"] if done else step["new_obs"][index]
        lives = not done or (bootstrap and info["TimeLimit.truncated"])
        next_value = value(following) if lives else 0.0
        deltas.append(step["rewards"][index] + agent.gamma * next_value - value(observations[t]))
    advantages, decay = [], agent.gamma * agent.gae_lambda
    for t in range(len(steps)):
        total, weight = 0.0, 1.0
        for k in range(t, len(steps)):
            total += weight * deltas[k]
            weight *= decay
            if steps[k]["dones"][index]:
                break
        advantages.append(total)
    return np.array(advantages)


@pytest.mark.parametrize("world", ["truncated", "terminated"])
def test_gae_equals_the_sum_written_out(world):
    makes = {
        "truncated": lambda: gym.make("Pendulum-v1", max_episode_steps=7),
        "terminated": lambda: gym.make("CartPole-v1"),
    }
    env = vectorised(makes[world])
    env.seed(3)
    agent = small_agent("MlpPolicy", env, n_steps=40, gamma=0.9, gae_lambda=0.8)
    record = Transitions()
    _, callback = agent._setup_learn(80, record)
    agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)
    assert any(step["dones"].any() for step in record.steps)
    rollout = flatten_rollout(agent.rollout_buffer, CPU, standardise=False)
    expected = np.concatenate([gae_by_hand(agent, record.steps, index) for index in range(2)])
    np.testing.assert_allclose(rollout.advantages.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rollout.returns.numpy(), expected + rollout.values.numpy(), rtol=1e-4, atol=1e-4)
    without = np.concatenate([gae_by_hand(agent, record.steps, index, bootstrap=False) for index in range(2)])
    assert np.allclose(without, expected) == (world == "terminated")


def full_buffer(kind: type[RolloutBuffer] = RolloutBuffer, **kwargs: Any) -> tuple[RolloutBuffer, dict[str, Any]]:
    rng = np.random.default_rng(2)
    buffer = kind(50, BOX, PLANE, "cpu", n_envs=3, **kwargs)
    buffer.rewards[:], buffer.values[:] = rng.normal(size=(2, 50, 3)) * 100
    buffer.episode_starts[:] = rng.random((50, 3)) < 0.1
    return buffer, {"last_values": torch.randn(3, 1), "ends": np.array([True, False, False])}


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.998, 0.97), (0.9, 0.0), (1.0, 1.0)])
def test_estimates_are_sb3s_to_the_last_bit(gamma, gae_lambda):
    buffer, ending = full_buffer(gamma=gamma, gae_lambda=gae_lambda)
    buffer.compute_returns_and_advantage(ending["last_values"], ending["ends"])
    expected = [(array.dtype, array.tobytes()) for array in (buffer.advantages, buffer.returns)]
    buffer.advantages, buffer.returns = np.zeros((2, 50, 3), np.float32)
    estimate(buffer, **ending)
    assert [(array.dtype, array.tobytes()) for array in (buffer.advantages, buffer.returns)] == expected


def test_a_buffer_with_estimates_of_its_own_is_asked():
    class Own(RolloutBuffer):
        def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: np.ndarray) -> None:
            self.advantages[:] = 7

    buffer, ending = full_buffer(Own)
    estimate(buffer, **ending)
    assert (buffer.advantages == 7).all()


@pytest.mark.parametrize("action_space", [TURNS, PLANE], ids=["discrete", "box"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_order_is_that_of_sb3s_own_minibatches(action_space, n_envs):
    agent = collected(small_agent("MlpPolicy", vectorised(noise(BOX, action_space), n_envs)))
    buffer = agent.rollout_buffer
    rollout = flatten_rollout(buffer, CPU, standardise=False)
    names = ("observations", "actions", "log_probs", "advantages", "returns", "values")
    for name in names:
        theirs = torch.as_tensor(buffer.swap_and_flatten(getattr(buffer, name)))
        ours = getattr(rollout, name)
        assert torch.equal(ours.reshape(theirs.shape).to(theirs.dtype), theirs), name
    wrong = torch.as_tensor(buffer.log_probs).flatten()
    assert torch.equal(rollout.log_probs, wrong) == (n_envs == 1)
    assert len(rollout) == n_envs * agent.n_steps


def test_actions_are_class_numbers_or_points():
    discrete = collected(small_agent("MlpPolicy", vectorised(noise(BOX, TURNS))))
    actions = flatten_rollout(discrete.rollout_buffer, CPU, standardise=True).actions
    assert actions.dtype == torch.int64 and actions.shape == (32,)
    assert set(actions.tolist()) == {0, 1, 2}
    box = collected(small_agent("MlpPolicy", vectorised(noise(BOX, PLANE))))
    actions = flatten_rollout(box.rollout_buffer, CPU, standardise=True).actions
    assert actions.dtype == torch.float32 and actions.shape == (32, 2)
    assert float(actions.abs().max()) > 1, "actions must be as drawn, before clipping to the space"


def test_stored_log_probs_are_those_of_the_stored_actions():
    for action_space in (TURNS, PLANE):
        agent = collected(small_agent("MlpPolicy", vectorised(noise(BOX, action_space))))
        rollout = flatten_rollout(agent.rollout_buffer, CPU, standardise=False)
        values, log_probs, _ = agent.policy.evaluate_actions(rollout.observations, rollout.actions)
        torch.testing.assert_close(log_probs, rollout.log_probs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values.flatten(), rollout.values, rtol=1e-4, atol=1e-5)


def test_advantages_are_standardised_over_the_rollout_if_asked():
    buffer = collected(small_agent("MlpPolicy", vectorised(noise()))).rollout_buffer
    raw, standard = (flatten_rollout(buffer, CPU, flag) for flag in (False, True))
    assert float(standard.advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(standard.advantages.std()) == pytest.approx(1, abs=1e-5)
    assert float(raw.advantages.std()) != pytest.approx(1, abs=1e-2)
    expected = (raw.advantages - raw.advantages.mean()) / raw.advantages.std()
    torch.testing.assert_close(standard.advantages, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(standard.returns, raw.returns)


def test_dictionaries_stay_dictionaries():
    agent = collected(small_agent("MultiInputPolicy", vectorised(noise(NAMED))))
    rollout = flatten_rollout(agent.rollout_buffer, CPU, standardise=True)
    assert {name: tuple(t.shape) for name, t in rollout.observations.items()} == {"here": (32, 3), "there": (32, 2)}
    part = rollout.rows(torch.tensor([4, 2]))
    assert torch.equal(part.observations["there"], rollout.observations["there"][[4, 2]])
    assert torch.equal(part.returns, rollout.returns[[4, 2]])
