"""What advantages are divided by: by hand, in both of a step's halves, and kept with the agent."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from acktr.sb3 import ACKTR, ActorSettings, Reuse, RunningScale
from acktr.sb3.reuse import Collected, weighed
from acktr.sb3.rollout import flatten_rollout
from acktr.sb3.scales import Spread
from tests.sb3.worlds import BOX, PLANE, collected, noise, small_agent, vectorised


def agent_of(**actor: object) -> ACKTR:
    return small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), actor=ActorSettings(**actor))


def test_the_running_variance_by_hand() -> None:
    spread, scale = Spread(), RunningScale(0.75)
    assert not spread.least
    assert spread.take(4.0, scale) == pytest.approx(4.0)  # nothing came before
    assert spread.take(0.0, scale) == pytest.approx(math.sqrt(0.75 * 16))
    assert spread.take(8.0, scale) == pytest.approx(math.sqrt(0.75 * 12 + 0.25 * 64))


def test_a_rollout_in_which_little_happens_keeps_its_small_advantages() -> None:
    agent = collected(agent_of())
    raw = torch.as_tensor(agent.rollout_buffer.advantages)
    alone = flatten_rollout(agent.rollout_buffer, agent.device, True).advantages
    assert float(alone.std()) == pytest.approx(1.0, rel=1e-5)
    for least, expected in ((10 * float(raw.std()), 0.1), (0.1 * float(raw.std()), 1.0)):
        seen = flatten_rollout(agent.rollout_buffer, agent.device, True, take=lambda _, least=least: least).advantages
        assert float(seen.std()) == pytest.approx(expected, rel=1e-4)
        assert float(seen.mean()) == pytest.approx(0.0, abs=1e-6)
        assert torch.allclose(seen, alone * expected, atol=1e-5)


def test_present_and_past_are_divided_by_the_same() -> None:
    agent = collected(agent_of(scale=RunningScale(0.5), reuse=Reuse(1)))
    own = float(np.std(agent.rollout_buffer.advantages, ddof=1))
    agent.update_state.spread.variance = (10 * own) ** 2
    agent.train()
    expected = math.sqrt(0.5 * (10 * own) ** 2 + 0.5 * own**2)
    assert agent.update_state.spread.least == pytest.approx(expected, rel=1e-5)
    (earlier,) = agent.update_state.past.rollouts
    assert isinstance(earlier, Collected)
    again = float(weighed(agent, earlier, Reuse(1, math.inf)).advantages.std())
    assert again < 0.5, "not blown up"
    agent.actor = ActorSettings(reuse=Reuse(1))
    assert float(weighed(agent, earlier, Reuse(1, math.inf)).advantages.std()) > 0.5


def test_a_quiet_rollout_makes_a_shorter_step() -> None:
    kls = []
    for spread in (0.0, 30.0):
        agent = collected(agent_of(scale=RunningScale(0.9), radius=10.0, measure_period=1))
        agent.update_state.spread.variance = spread**2 * float(np.var(agent.rollout_buffer.advantages))
        agent.train()
        kls.append(agent.actor_optimizer.report.kl_measured)
    # The step is the model's minimum, as long as its gradient: KL goes with the square of the scale.
    assert kls[1] < kls[0] / 100


def test_it_is_saved_with_the_agent() -> None:
    agent = agent_of(scale=RunningScale())
    agent.learn(64)
    assert agent.update_state.spread.variance > 0
    file = io.BytesIO()
    agent.save(file)
    file.seek(0)
    again = ACKTR.load(file)
    assert again.update_state.spread.variance == agent.update_state.spread.variance
    assert again.actor.scale == RunningScale()


def test_mistakes_are_told() -> None:
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=rf"scale\.decay must be in \[0, 1\), got {decay}"):
            RunningScale(decay)
    with pytest.raises(TypeError, match=r"actor\.scale must be RunningScale\(\.\.\.\) or None, got 0\.8"):
        agent_of(scale=0.8)
    with pytest.raises(ValueError, match=r"actor\.scale has no say without normalize_advantage"):
        small_agent(
            "MlpPolicy",
            vectorised(noise(BOX, PLANE)),
            actor=ActorSettings(scale=RunningScale()),
            normalize_advantage=False,
        )
