"""A value function that begins anew."""

from __future__ import annotations

import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from acktr.sb3 import ACKTR, CriticSettings
from tests.sb3.worlds import noise, small_agent, vectorised

N_STEPS, N_ENVS, ROLLOUTS = 16, 2, 8
ROLLOUT = N_STEPS * N_ENVS


class Watch(BaseCallback):
    """Keeps the parameters that each rollout is valued with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.seen.append(value_of(self.model))


def value_of(agent: ACKTR) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.critic_optimizer.parameters.values()])


def agent_with(renewed_at: float | None) -> ACKTR:
    critic = CriticSettings(n_epochs=1, n_minibatches=2, renewed_at=renewed_at)
    return small_agent("MlpPolicy", vectorised(noise(), N_ENVS), n_steps=N_STEPS, critic=critic)


@pytest.mark.parametrize(("share", "expected"), [(0.5, [0, 4]), (0.3, [0, 3]), (None, [0])])
def test_the_value_begins_anew_once(share, expected):
    agent, watch = agent_with(share), Watch()
    first = value_of(agent)
    agent.learn(ROLLOUTS * ROLLOUT, callback=watch)
    assert [n for n, seen in enumerate(watch.seen) if torch.equal(seen, first)] == expected
    agent.learn(ROLLOUTS * ROLLOUT, callback=watch)
    assert sum(torch.equal(seen, first) for seen in watch.seen) == len(expected), "once and for all"


def test_a_loaded_agent_begins_anew_when_the_saved_one_would(tmp_path):
    agent, watch = agent_with(0.8), Watch()
    first = value_of(agent)
    agent.learn(4 * ROLLOUT)
    assert agent.update_state.first_value
    agent.save(tmp_path / "agent")
    loaded = ACKTR.load(tmp_path / "agent", agent.get_env(), device="cpu")
    loaded.learn(4 * ROLLOUT, callback=watch, reset_num_timesteps=False)
    assert [torch.equal(seen, first) for seen in watch.seen] == [False, False, False, True]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_the_time_is_a_share_of_training(share):
    with pytest.raises(ValueError, match=r"critic.renewed_at must be above 0 and at most 1, or None for never, got"):
        agent_with(share)
