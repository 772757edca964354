"""A value function that begins anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

import acktr.sb3.acktr
from acktr import NaturalGradient
from acktr.sb3 import ACKTR, CriticSettings
from acktr.sb3.steps import StepLog, critic_steps
from tests.sb3.worlds import noise, small_agent, vectorised

N_STEPS, N_ENVS, ROLLOUTS = 16, 2, 8
ROLLOUT = N_STEPS * N_ENVS


class Watch(BaseCallback):
    """Keeps the parameters with which each rollout is valued."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.seen.append(value_of(self.model))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The parameters from which the critic's passes over each rollout begin."""
    seen: list[torch.Tensor] = []

    def noted(optimizer: NaturalGradient, *arguments: Any) -> StepLog:
        seen.append(flat(optimizer.parameters.values()))
        return critic_steps(optimizer, *arguments)

    monkeypatch.setattr(acktr.sb3.acktr, "critic_steps", noted)
    return seen


def value_of(agent: ACKTR) -> torch.Tensor:
    return flat(agent.critic_optimizer.parameters.values())


def flat(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


def agent_with(renewed_at: float | None) -> ACKTR:
    critic = CriticSettings(n_epochs=1, n_minibatches=2, renewed_at=renewed_at)
    return small_agent("MlpPolicy", vectorised(noise(), N_ENVS), n_steps=N_STEPS, critic=critic)


@pytest.mark.parametrize(("share", "expected"), [(0.5, [0, 3]), (0.3, [0, 2]), (None, [0])])
def test_the_value_begins_anew_once(share, expected, begun):
    agent = agent_with(share)
    first = value_of(agent)
    agent.learn(ROLLOUTS * ROLLOUT)
    assert [n for n, seen in enumerate(begun) if torch.equal(seen, first)] == expected
    agent.learn(ROLLOUTS * ROLLOUT)
    assert sum(torch.equal(seen, first) for seen in begun) == len(expected), "once and for all"


def test_no_rollout_is_valued_by_the_new_value_before_it_has_learned():
    agent, watch = agent_with(0.5), Watch()
    first = value_of(agent)
    agent.learn(ROLLOUTS * ROLLOUT, callback=watch)
    assert [torch.equal(seen, first) for seen in watch.seen] == [True] + [False] * (ROLLOUTS - 1)


def test_a_loaded_agent_begins_anew_when_the_saved_one_would(tmp_path, begun):
    agent = agent_with(0.8)
    first = value_of(agent)
    agent.learn(ROLLOUTS * ROLLOUT, callback=lambda *_: agent.num_timesteps <= 4 * ROLLOUT)
    assert agent.update_state.first_value
    agent.save(tmp_path / "agent")
    loaded = ACKTR.load(tmp_path / "agent", agent.get_env(), device="cpu")
    begun.clear()
    loaded.learn(4 * ROLLOUT, reset_num_timesteps=False)
    assert [torch.equal(seen, first) for seen in begun] == [False, False, True, False]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_the_time_is_a_share_of_training(share):
    with pytest.raises(ValueError, match=r"critic.renewed_at must be above 0 and at most 1, or None for never, got"):
        agent_with(share)
