"""SB3's policies seen as networks: the same outputs, the right parameters, the spaces that are served."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.utils import obs_as_tensor

from acktr.likelihood import Categorical, DiagonalGaussian, Joint
from acktr.sb3.networks import ActorNetwork, CriticNetwork, JointNetwork, prepare, reached_parameters, shares_trunk
from tests.sb3.worlds import (
    BOX,
    DEVICES,
    IMAGE,
    NAMED,
    PLANE,
    TINY_CNN,
    TURNS,
    TinyCNN,
    noise,
    small_agent,
    vectorised,
)

OWN_CNN = TINY_CNN | {"share_features_extractor": False}
DOUBLE = spaces.Box(-1, 1, (3,), np.float64)
MIXED = spaces.Dict({"view": spaces.Box(0, 255, (1, 36, 36), np.uint8), "here": BOX})

POLICIES = {
    "mlp": ("MlpPolicy", BOX, {}, False),
    "mlp on doubles": ("MlpPolicy", DOUBLE, {}, False),
    "mlp, own extractors": ("MlpPolicy", BOX, {"share_features_extractor": False}, False),
    "mlp, layers of the user": ("MlpPolicy", BOX, {"net_arch": {"pi": [8], "vf": [8, 4]}}, False),
    "linear": ("MlpPolicy", BOX, {"net_arch": [], "activation_fn": torch.nn.ReLU}, False),
    "mlp on classes": ("MlpPolicy", spaces.Discrete(4), {}, False),
    "mlp on lists of classes": ("MlpPolicy", spaces.MultiDiscrete([2, 3]), {}, False),
    "cnn": ("CnnPolicy", IMAGE, TINY_CNN, True),
    "cnn, own extractors": ("CnnPolicy", IMAGE, OWN_CNN, False),
    "dictionary": ("MultiInputPolicy", NAMED, {}, False),
    "mlp policy with a trained extractor": ("MlpPolicy", IMAGE, TINY_CNN, True),
    "class": (ActorCriticPolicy, BOX, {"ortho_init": False}, False),
}


def agent_of(name, action_space, **kwargs):
    policy, space, policy_kwargs, _ = POLICIES[name]
    return small_agent(policy, vectorised(noise(space, action_space)), policy_kwargs=policy_kwargs, **kwargs)


def batch_for(agent, size=6):
    space = agent.observation_space
    space.seed(5)
    samples = [space.sample() for _ in range(size)]
    if isinstance(space, spaces.Dict):
        return obs_as_tensor({key: np.stack([s[key] for s in samples]) for key in space.spaces}, agent.device)
    return obs_as_tensor(np.stack(samples), agent.device)


def distribution_parameters(policy, observations):
    distribution = policy.get_distribution(observations).distribution
    if isinstance(distribution, torch.distributions.Categorical):
        return (distribution.logits,)
    return distribution.mean, distribution.stddev.log()


def normal_form(outputs):
    return tuple(o.log_softmax(-1) for o in outputs) if len(outputs) == 1 else tuple(outputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("action_space", [TURNS, PLANE], ids=["discrete", "box"])
@pytest.mark.parametrize("name", POLICIES)
def test_networks_say_what_sb3_says_and_learn(name, action_space, device):
    agent = agent_of(name, action_space, device=device)
    agent.learn(32)  # away from the initial weights, whose outputs are nearly constant
    policy, observations = agent.policy, batch_for(agent)
    with torch.no_grad():
        expected = distribution_parameters(policy, observations)
        values = policy.predict_values(observations).flatten()
        actor, critic = ActorNetwork(policy)(observations), CriticNetwork(policy)(observations)
        *joint_actor, joint_value = JointNetwork(policy)(observations)
    torch.testing.assert_close(normal_form(joint_actor), expected)
    torch.testing.assert_close(joint_value, values)
    torch.testing.assert_close(normal_form(actor), expected)
    torch.testing.assert_close(critic, values)
    assert float(values.std()) > 0
    assert not torch.allclose(critic, values.flip(0))
    assert all(torch.isfinite(p).all() for p in policy.parameters())
    assert next(policy.parameters()).device.type == device


@pytest.mark.parametrize("action_space", [TURNS, PLANE], ids=["discrete", "box"])
@pytest.mark.parametrize("name", POLICIES)
def test_parameters_are_shared_out(name, action_space):
    agent = agent_of(name, action_space)
    policy, observations = agent.policy, batch_for(agent)
    every = {id(p) for p in policy.parameters()}
    actor, critic = (
        {id(p) for p in reached_parameters(view(policy), observations).values()}
        for view in (ActorNetwork, CriticNetwork)
    )
    shared = POLICIES[name][3]
    assert actor | critic == every
    assert bool(actor & critic) == shared == shares_trunk(policy)
    trained = [{id(p) for p in optimizer.parameters.values()} for optimizer in agent._optimizers()]
    assert trained == ([every] if shared else [actor, critic])
    if shared:
        assert {id(p) for p in reached_parameters(JointNetwork(policy), observations).values()} == every
        assert isinstance(agent.actor_optimizer.likelihood, Joint)


def test_only_what_requires_gradients_is_trained():
    agent = agent_of("cnn", TURNS)
    for parameter in agent.policy.features_extractor.parameters():
        parameter.requires_grad_(False)
    assert not shares_trunk(agent.policy)
    names = reached_parameters(ActorNetwork(agent.policy), batch_for(agent))
    assert names and not any("features_extractor" in name for name in names)


def test_pictures_beside_numbers_share_a_trunk():
    agent = small_agent("MultiInputPolicy", vectorised(noise(MIXED, PLANE)))
    assert shares_trunk(agent.policy)
    with torch.no_grad():
        observations = batch_for(agent)
        mean, log_std, value = JointNetwork(agent.policy)(observations)
        expected = distribution_parameters(agent.policy, observations)
        torch.testing.assert_close((mean, log_std), expected)
        torch.testing.assert_close(value, agent.policy.predict_values(observations).flatten())


@pytest.mark.parametrize(("space", "kind"), [(TURNS, Categorical), (PLANE, DiagonalGaussian)])
def test_the_distribution_follows_the_action_space(space, kind):
    assert isinstance(agent_of("mlp", space).actor_optimizer.likelihood, kind)


def test_images_are_scaled_as_sb3_scales_them():
    agent = agent_of("cnn", TURNS)
    seen = []
    agent.policy.features_extractor.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    JointNetwork(agent.policy)(torch.full((1, 1, 12, 12), 255, dtype=torch.uint8))
    assert torch.equal(seen[0], torch.ones(1, 1, 12, 12))


@pytest.mark.parametrize("shape", [(1, 12, 12), (4, 12, 12)])
@pytest.mark.parametrize("as_they_come", [True, False])
def test_images_are_prepared_to_sb3s_numbers(shape, as_they_come):
    space = spaces.Box(0, 255, shape, np.uint8)
    policy = small_agent("CnnPolicy", vectorised(noise(space)), policy_kwargs=TINY_CNN).policy
    images = torch.randint(0, 256, (5, *shape), dtype=torch.uint8)
    images = images if as_they_come else images.contiguous(memory_format=torch.channels_last)
    kept = images.clone()
    prepared = prepare(policy, images)
    assert torch.equal(prepared, preprocess_obs(images, space))
    assert prepared.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, kept)
    assert prepare(policy, prepared) is prepared
    policy.normalize_images = False
    assert torch.equal(prepare(policy, images), images.float())


def test_channels_last_images_are_transposed_by_sb3():
    last = spaces.Box(0, 255, (12, 12, 1), np.uint8)
    agent = small_agent("CnnPolicy", vectorised(noise(last)), policy_kwargs=TINY_CNN).learn(32)
    assert isinstance(agent.policy.features_extractor, TinyCNN)
    assert agent.observation_space.shape == (1, 12, 12)


@pytest.mark.parametrize("space", [spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(3)])
def test_action_spaces_that_are_not_served_are_named(space):
    with pytest.raises(ValueError, match=r"Box and Discrete .*" + type(space).__name__) as error:
        small_agent("MlpPolicy", vectorised(noise(BOX, space)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("space", [spaces.Tuple((BOX, BOX))])
def test_observation_spaces_that_are_not_served_are_named(space):
    with pytest.raises(ValueError, match=r"Tuple.*Dict"):
        small_agent("MlpPolicy", noise(space)())


def test_dictionaries_need_the_policy_for_them():
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        small_agent("MlpPolicy", vectorised(noise(NAMED)))


def test_squashed_outputs_are_refused():
    with pytest.raises(ValueError, match="squash_output"):
        small_agent("MlpPolicy", vectorised(noise(BOX, PLANE)), policy_kwargs={"squash_output": True})


def test_actions_of_any_shape_are_flattened_and_restored():
    square = spaces.Box(-1, 1, (2, 2), np.float32)
    agent = small_agent("MlpPolicy", vectorised(noise(BOX, square))).learn(64)
    action, _ = agent.predict(BOX.sample())
    assert action.shape == (2, 2) and square.contains(action)


def test_reduced_precision_is_the_extractor_s_alone():
    """Features are rounded to 8 bits of mantissa; weights, heads, outputs and curvature stay float32."""
    agents = [agent_of("cnn", TURNS, precision=precision, seed=1) for precision in ("float32", "bfloat16")]
    observations = batch_for(agents[0], 32)
    with torch.no_grad():
        full, reduced = (agent.acting_network(observations) for agent in agents)
    for ours, theirs in zip(full, reduced, strict=True):
        assert theirs.dtype == torch.float32
        assert not torch.equal(ours, theirs), "the setting does nothing"
        assert float((ours - theirs).norm() / ours.norm()) < 2**-5  # a few roundings of 2^-8, layer after layer
    agent = agents[1]
    agent.learn(64)
    state = agent.actor_optimizer.curvature.state_dict()
    moments = [block["input_moment"]["sum"] for block in state.values() if "input_moment" in block]
    assert moments
    assert all(m.dtype == torch.float32 for m in moments)
    assert all(p.dtype == torch.float32 for p in agent.policy.parameters())
    assert agent.actor_optimizer.skipped == 0


@pytest.mark.parametrize(
    ("known", "reduced"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False), (None, False)],
)
def test_the_processor_decides_if_asked(monkeypatch, known, reduced):
    if known is None:  # PyTorch before 2.13
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    agent = agent_of("cnn", TURNS, precision="auto")
    assert agent.acting_network.prepared(batch_for(agent, 2)).dtype == (torch.bfloat16 if reduced else torch.float32)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, auto, got 'half'"):
        agent_of("cnn", TURNS, precision="half")
