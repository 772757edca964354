"""A discount and GAE's λ that develop over training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from acktr.sb3 import ACKTR, ActorSettings
from acktr.sb3.reuse import Reuse
from tests.sb3.worlds import PLANE, noise, small_agent, vectorised

N_STEPS, N_ENVS, ROLLOUTS = 16, 2, 8
ROLLOUT = N_STEPS * N_ENVS


def nearer(progress: float) -> float:
    return 0.5 + 0.4 * progress


def later(progress: float) -> float:
    return 0.9 - 0.6 * progress


class Watch(BaseCallback):
    """Notes after each rollout what it was discounted with, and its advantages."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, ...]] = []
        self.advantages: list[tuple[np.ndarray, np.ndarray]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        agent, buffer = self.model, self.locals["rollout_buffer"]
        self.seen.append((buffer.gamma, agent.gamma, buffer.gae_lambda, agent.gae_lambda))
        left = 1 - len(self.advantages) / ROLLOUTS
        self.advantages.append((buffer.advantages.copy(), by_hand(agent, buffer, nearer(left), later(left))))


def by_hand(agent, buffer, gamma: float, lam: float) -> np.ndarray:
    """Â_t = Σ_k (γλ)^k δ_{t+k} up to the episode's end, δ = r + γ V(s') − V(s); rewards hold what cut episodes lose."""
    last = agent.policy.predict_values(torch.as_tensor(agent._last_obs)).detach().numpy().T
    ended = np.concatenate((buffer.episode_starts[1:], agent._last_episode_starts[None]))
    deltas = buffer.rewards + gamma * np.concatenate((buffer.values[1:], last)) * (1 - ended) - buffer.values
    found = np.zeros_like(deltas)
    for start, env in np.ndindex(deltas.shape):
        for k, (delta, over) in enumerate(zip(deltas[start:, env], ended[start:, env], strict=True)):
            found[start, env] += (gamma * lam) ** k * delta
            if over:
                break
    return found


def agent_with(**kwargs) -> ACKTR:
    env = vectorised(noise(action_space=PLANE), N_ENVS)
    return small_agent("MlpPolicy", env, n_steps=N_STEPS, policy_kwargs={"net_arch": [8]}, **kwargs)


@pytest.mark.parametrize("scheduled", [True, False], ids=["scheduled", "constant"])
def test_every_rollout_is_discounted_as_its_time_says(scheduled):
    agent = agent_with(**({"gamma": nearer, "gae_lambda": later} if scheduled else {"gamma": 0.9, "gae_lambda": 0.3}))
    watch = Watch()
    agent.learn(ROLLOUTS * ROLLOUT, callback=watch)
    left = [1 - k / ROLLOUTS for k in range(ROLLOUTS)]
    expected = [(nearer(p), nearer(p), later(p), later(p)) for p in left]
    assert np.allclose(watch.seen, expected) == scheduled, "a constant stays where it is, which is the control"
    close = [np.allclose(found, hand, rtol=1e-4, atol=1e-5) for found, hand in watch.advantages]
    assert close == ([True] * ROLLOUTS if scheduled else [True] + [False] * (ROLLOUTS - 1))


@pytest.mark.parametrize("saved", [0.9, nearer], ids=["number", "function"])
def test_what_is_given_to_load_counts_more_than_the_file(saved, tmp_path):
    agent = agent_with(gamma=saved)
    agent.learn(2 * ROLLOUT)
    agent.save(tmp_path / "agent")
    as_saved = ACKTR.load(tmp_path / "agent", agent.get_env(), device="cpu")
    assert as_saved.gamma == agent.gamma
    assert set(as_saved.discounting) == ({"gamma"} if callable(saved) else set())
    number = ACKTR.load(tmp_path / "agent", agent.get_env(), device="cpu", gamma=0.5)
    number.learn(ROLLOUT)
    assert (number.gamma, number.rollout_buffer.gamma, number.discounting) == (0.5, 0.5, {})
    function = ACKTR.load(tmp_path / "agent", agent.get_env(), device="cpu", gamma=later, gae_lambda=later)
    function.learn(ROLLOUT)
    assert (function.gamma, function.gae_lambda) == (later(1.0), later(1.0))
    assert function.rollout_buffer.gamma == later(1.0)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"gamma": 5.0}, r"gamma must be in \[0, 1\], got 5.0"),
        ({"gae_lambda": lambda left: 1 + left}, r"gae_lambda must be in \[0, 1\], got 2"),
        ({"ent_coef": float("nan")}, "ent_coef must be at least 0 and finite, got nan"),
        ({"vf_coef": 0.0}, "vf_coef must be positive and finite, got 0.0"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"max_faults": 0}, "max_faults must be at least 1, got 0"),
    ],
)
def test_numbers_given_to_load_are_held_against_their_ranges(given, complaint, tmp_path):
    agent = agent_with()
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match=complaint):
        ACKTR.load(tmp_path / "agent", agent.get_env(), device="cpu", **given)


def test_a_constant_can_be_set_by_hand_between_two_calls():
    agent = agent_with(gamma=0.9)
    agent.learn(ROLLOUT)
    agent.gamma = agent.rollout_buffer.gamma = 0.7
    agent.learn(ROLLOUT, reset_num_timesteps=False)
    assert (agent.gamma, agent.rollout_buffer.gamma) == (0.7, 0.7)


def test_earlier_rollouts_are_weighed_by_the_discount_of_now(monkeypatch):
    from acktr.sb3 import reuse

    seen, plain = [], reuse.advantages
    monkeypatch.setattr(reuse, "advantages", lambda *args: seen.append(args[4]) or plain(*args))
    agent = agent_with(gamma=nearer, actor=ActorSettings(reuse=Reuse(1)))
    agent.learn(3 * ROLLOUT)
    assert seen == pytest.approx([nearer(2 / 3), nearer(1 / 3)])


def test_a_loaded_agent_goes_on_with_its_schedule(tmp_path):
    agent = agent_with(gamma=nearer)
    agent.learn(4 * ROLLOUT)
    agent.save(tmp_path / "agent")
    loaded = ACKTR.load(tmp_path / "agent", agent.get_env(), device="cpu")
    watch = Watch()
    loaded.learn(4 * ROLLOUT, callback=watch, reset_num_timesteps=False)
    assert [seen[0] for seen in watch.seen] == pytest.approx([nearer(p) for p in (0.5, 0.375, 0.25, 0.125)])


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
@pytest.mark.parametrize("schedule", [lambda p: 2 * p, lambda p: p - 0.1], ids=["start", "end"])
def test_a_schedule_out_of_range_is_refused(name, schedule):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got"):
        agent_with(**{name: schedule})
