"""Actions are drawn from the policy, and the short way to them says what the modules say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from acktr.sb3 import ACKTR
from acktr.sb3.acting import RolloutActor, plain_layers
from tests.sb3.worlds import (
    BOX,
    DEVICES,
    IMAGE,
    NAMED,
    PLANE,
    TINY_CNN,
    TURNS,
    collected,
    noise,
    small_agent,
    vectorised,
)

N_ENVS = 4
WIDE = spaces.Box(-np.inf, np.inf, (2, 3), np.float64)
NUMBERED = spaces.Discrete(4)
GREY = spaces.Box(0, 255, (1, 12, 12), np.uint8)

SHORT = {
    "tanh": (BOX, {}),
    "relu": (BOX, {"activation_fn": nn.ReLU}),
    "matrices of float64": (WIDE, {}),
    "linear": (BOX, {"net_arch": []}),
    "three layers": (BOX, {"net_arch": [16, 8, 8]}),
    "images as they are": (GREY, {"normalize_images": False}),
}
LONG = {
    "another activation": (BOX, {"activation_fn": nn.ELU}),
    "classes": (NUMBERED, {}),
    "images to be scaled": (GREY, {}),
    "wide layers": (BOX, {"net_arch": [512, 512]}),
}


def agent_on(
    space: spaces.Space, action_space: spaces.Space = PLANE, policy: str = "MlpPolicy", **kwargs: Any
) -> ACKTR:
    env = vectorised(noise(space, action_space), N_ENVS)
    return small_agent(policy, env, policy_kwargs=kwargs, n_steps=8)


def is_short(agent: ACKTR) -> bool:
    return plain_layers(agent.acting_network, N_ENVS) is not None


def observations_of(space: spaces.Space, n_steps: int) -> list[np.ndarray]:
    space.seed(3)
    return [np.stack([space.sample() for _ in range(N_ENVS)]) for _ in range(n_steps)]


@pytest.mark.parametrize("action_space", [TURNS, PLANE], ids=["discrete", "box"])
@pytest.mark.parametrize("case", SHORT)
def test_the_short_way_says_what_the_modules_say(case, action_space):
    space, policy_kwargs = SHORT[case]
    agent = agent_on(space, action_space, **policy_kwargs)
    agent.learn(64)  # away from initial weights, whose outputs are nearly constant
    assert is_short(agent)
    seen = observations_of(space, 8)
    actor = RolloutActor(agent, 8, N_ENVS)
    actions = [actor.act(step, observations) for step, observations in enumerate(seen)]
    with torch.no_grad():
        expected = agent.acting_network(obs_as_tensor(np.concatenate(seen), agent.device))
    # A sum's rounding grows with its terms, which are as large as the observations.
    rounding = 1e-6 * max(1.0, float(np.abs(seen).max()))
    for ours, theirs in zip(actor.outputs(), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=rounding)
    varied = float(expected[0].std(0).max())
    assert varied > max(1e-3, 10 * rounding), "outputs that do not depend on observations compare nothing"
    assert actions[0].shape == (N_ENVS, *action_space.shape)
    assert actions[0].dtype == (np.float32 if action_space is PLANE else np.int64)


@pytest.mark.parametrize("case", LONG)
def test_anything_else_goes_through_its_modules(case):
    space, policy_kwargs = LONG[case]
    agent = agent_on(space, **policy_kwargs)
    assert not is_short(agent)
    agent.learn(64)


@pytest.mark.parametrize(
    ("policy", "space", "kwargs"), [("CnnPolicy", IMAGE, TINY_CNN), ("MultiInputPolicy", NAMED, {})]
)
def test_other_policies_go_through_their_modules(policy, space, kwargs):
    assert not is_short(agent_on(space, policy=policy, **kwargs))


class Louder(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def hooked(agent: ACKTR) -> None:
    agent.policy.mlp_extractor.policy_net[0].register_forward_hook(lambda _module, _args, output: 2 * output)


def early(agent: ACKTR) -> None:
    agent.policy.action_net.register_forward_pre_hook(lambda _module, args: (2 * args[0],))


def replaced(agent: ACKTR) -> None:
    plain = agent.policy.mlp_extractor.forward_actor
    agent.policy.mlp_extractor.forward_actor = lambda features: 2 * plain(features)


def inherited(agent: ACKTR) -> None:
    agent.policy.action_net.__class__ = Louder


def normed(agent: ACKTR) -> None:
    nn.utils.parametrizations.weight_norm(agent.policy.action_net)


@pytest.mark.parametrize("change", [hooked, early, replaced, inherited, normed])
def test_a_network_that_was_changed_acts_changed(change):
    agent = agent_on(BOX)
    (seen,) = observations_of(BOX, 1)
    assert is_short(agent)
    change(agent)
    assert not is_short(agent)
    actor = RolloutActor(agent, 1, N_ENVS)
    actor.act(0, seen)
    with torch.no_grad():
        assert torch.equal(actor.outputs()[0], agent.acting_network(torch.as_tensor(seen))[0])


def test_a_hook_on_every_module_is_heard():
    agent, calls = agent_on(BOX), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        RolloutActor(agent, 1, N_ENVS).act(0, observations_of(BOX, 1)[0])
    finally:
        handle.remove()
    assert calls and is_short(agent)


def test_the_live_parameters_act():
    agent = agent_on(BOX)
    (seen,) = observations_of(BOX, 1)
    actor = RolloutActor(agent, 2, N_ENVS)
    actor.act(0, seen)
    with torch.no_grad():
        agent.policy.action_net.bias.add_(1)
    actor.act(1, seen)
    before, after = actor.outputs()[0].chunk(2)
    torch.testing.assert_close(after, before + 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["short", "modules"])
def test_points_have_the_policys_mean_and_deviation(policy, device):
    agent = agent_on(BOX, activation_fn=nn.Tanh if policy == "short" else nn.ELU)
    agent.policy.to(device)
    agent.device = torch.device(device)
    with torch.no_grad():
        agent.policy.log_std.copy_(torch.tensor([-1.0, 0.5]))
    (seen,) = observations_of(BOX, 1)
    actor = RolloutActor(agent, 4000, N_ENVS)
    drawn = np.stack([actor.act(step, seen) for step in range(4000)])
    z = (drawn - actor.outputs()[0][:N_ENVS].cpu().numpy()) / np.exp([-1.0, 0.5])
    assert np.abs(z.mean(0)).max() < 5 / np.sqrt(4000)
    assert np.abs(z.var(0) - 1).max() < 5 * np.sqrt(2 / 4000)
    assert abs(np.corrcoef(z[:, 0].T)[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.parametrize("policy", ["short", "modules"])
def test_classes_come_as_often_as_the_policy_says(policy):
    agent = agent_on(BOX, TURNS, activation_fn=nn.Tanh if policy == "short" else nn.ELU)
    with torch.no_grad():
        agent.policy.action_net.bias.copy_(torch.tensor([0.0, 0.0, 1.5]))
    # Noise of the wrong sign would be off by 0.04 here, and not at all between two classes.
    (seen,) = observations_of(BOX, 1)
    actor = RolloutActor(agent, 10_000, N_ENVS)
    drawn = np.stack([actor.act(step, seen) for step in range(10_000)])
    (logits,) = actor.outputs()
    expected = logits[:N_ENVS].softmax(-1).numpy()
    found = np.stack([(drawn == c).mean(0) for c in range(3)], axis=1)
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / 10_000)
    assert found.min() > 0


@pytest.mark.parametrize("action_space", [TURNS, PLANE], ids=["discrete", "box"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ELU], ids=["short", "modules"])
def test_the_buffer_holds_what_the_policy_thought_of_its_actions(action_space, activation):
    agent = collected(agent_on(BOX, action_space, activation_fn=activation))
    buffer = agent.rollout_buffer
    observations, actions = (torch.as_tensor(a).flatten(0, 1) for a in (buffer.observations, buffer.actions))
    with torch.no_grad():
        values, log_probs, _ = agent.policy.evaluate_actions(observations, actions.squeeze(-1))
    torch.testing.assert_close(torch.as_tensor(buffer.log_probs).flatten(), log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.as_tensor(buffer.values).flatten(), values.flatten(), rtol=1e-5, atol=1e-5)
    if action_space is PLANE:
        assert float(actions.abs().max()) > 1, "actions must be as drawn, before clipping"


def test_the_same_seed_draws_the_same_and_the_next_rollout_something_else():
    runs = []
    for _ in range(2):
        agent = collected(agent_on(BOX))
        first = agent.rollout_buffer.actions.copy()
        runs.append((first, collected(agent).rollout_buffer.actions.copy()))
    (first, second), again = runs[0], runs[1]
    assert np.array_equal(first, again[0]) and np.array_equal(second, again[1])
    assert not np.array_equal(first, second)
    assert len(np.unique(first)) == first.size, "noise is used twice"
