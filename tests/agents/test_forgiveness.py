"""What the real worlds forgive, with the shipped configuration."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch

from agents import build, configfiles


@pytest.mark.parametrize(
    ("env_id", "least", "most"),
    [
        ("Ant-v5", -2.0, -0.8),  # stands at rest, and falls under the noise of the others
        ("HalfCheetah-v5", 0.0, 0.0),  # cannot fall
        ("Hopper-v5", 0.0, 0.0),  # falls in any case
        ("InvertedPendulum-v5", 0.0, 0.0),
    ],
)
def test_an_ant_alone_is_forgiven_no_common_noise(env_id: str, least: float, most: float) -> None:
    config = replace(configfiles.shipped(env_id), seed=3)
    with closing(build.make_training_env(config, 3)) as env:
        agent: Any = build.make_agent(config, env)
        trial = agent.actor.noise.try_out(agent.policy, env, config.total_timesteps, torch.Generator().manual_seed(3))
    assert least <= trial.shift <= most
    assert 0 < trial.steps < 0.05 * config.total_timesteps
