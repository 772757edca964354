"""An SB3 actor–critic policy seen as networks with plain outputs, as the engine wants them."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import Tensor, nn

from acktr.chain import Links
from acktr.likelihood import Categorical, DiagonalGaussian, Outputs, PolicyLikelihood

Precision = Literal["float32", "bfloat16", "auto"]
"""Arithmetic of a features extractor: bfloat16 halves the time of convolutions on processors that have it, and takes
longer on others; auto takes it where the processor has it."""


_BLOCK = 64
"""Images whose bytes become floats at a time."""


class _View(nn.Module):
    """A function of a policy's parameters; it owns none itself.

    Args:
        policy: an SB3 policy, shared with the agent.
        precision: of the features extractor's arithmetic; weights, heads and outputs are float32.
    """

    def __init__(self, policy: ActorCriticPolicy, precision: Precision = "float32") -> None:
        super().__init__()
        self.policy = policy
        self.reduced = precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(policy.device))

    def _features(self, observations: Any, extractor: nn.Module) -> Tensor:
        prepared = self.prepared(observations)
        if not self.reduced:  # entering a context that does nothing takes as long as a small layer
            return cast(Tensor, extractor(prepared)).float()
        with torch.autocast(self.policy.device.type, torch.bfloat16):
            features = cast(Tensor, extractor(prepared))
        return features.float()

    def prepared(self, observations: Any) -> Any:
        """Do once to observations what every call of the network would do to them first.

        Args:
            observations: a batch as SB3 hands it to a policy, or what this method made of it.

        Returns:
            What `prepare` makes of it in this network's precision.
        """
        return prepare(self.policy, observations, torch.bfloat16 if self.reduced else torch.float32)

    def _flattening(self, extractor: nn.Module) -> nn.Module | None:
        """The extractor as a link, if it only flattens vectors and layers follow that are Stable-Baselines3's own."""
        space, own = self.policy.observation_space, type(self.policy.mlp_extractor) is MlpExtractor
        scaled = self.policy.normalize_images and is_image_space(space)
        plain = isinstance(space, spaces.Box) and not scaled and not self.reduced
        return extractor.flatten if plain and own and type(extractor) is FlattenExtractor else None

    def _distribution(self, latent: Tensor) -> Outputs:
        outputs = self.policy.action_net(latent)
        if isinstance(self.policy.action_space, spaces.Discrete):
            return (outputs,)
        # A copy: outputs kept from before a step must not follow the parameter.
        return outputs, self.policy.log_std.expand_as(outputs).clone()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a processor multiplies bfloat16 itself, rather than by way of float32.

    Args:
        device: the processor.

    Returns:
        False also where nothing is known of it: PyTorch tells of CPUs from version 2.13 on.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def prepare(policy: ActorCriticPolicy, observations: Any, images: torch.dtype = torch.float32) -> Any:
    """What Stable-Baselines3 does to observations before a network sees them: images to [0, 1], classes to one-hot.

    What is float32 or `images` already is left alone, so a rollout that is read several times is prepared once.

    Args:
        policy: whose observations they are.
        observations: a batch as SB3 hands it to a policy, or what this function made of it.
        images: type of images that are all there is to observe; others, as parts of dictionaries, are float32.

    Returns:
        Tensors of float32 or `images`; images lie channels last in memory, as the convolutions want them.
    """
    parts = observations.values() if isinstance(observations, dict) else [observations]
    if all(part.dtype in (torch.float32, images) for part in parts):
        return observations
    if isinstance(observations, dict):
        observations = {key: _channels_last(part) for key, part in observations.items()}
    elif policy.normalize_images and observations.dtype == torch.uint8 and is_image_space(policy.observation_space):
        return _scaled(observations, images)
    else:
        observations = _channels_last(observations)
    return preprocess_obs(observations, policy.observation_space, normalize_images=policy.normalize_images)


def _scaled(images: Tensor, dtype: torch.dtype) -> Tensor:
    # To SB3's numbers, since every byte is a bfloat16 too; block by block, so that a cache holds what is on its way.
    blocks = images.shape[0] // _BLOCK + 1
    out = torch.empty_like(images, dtype=dtype, memory_format=torch.channels_last)
    for part, room in zip(images.chunk(blocks), out.chunk(blocks), strict=True):
        room.copy_(_channels_last(part)).div_(255.0)
    return out


def _channels_last(observations: Tensor) -> Tensor:
    # While they are bytes: a quarter of the memory to move. PyTorch stacks them faster than it changes the format.
    if observations.ndim != 4 or observations.is_contiguous(memory_format=torch.channels_last):
        return observations
    return torch.stack(observations.unbind(1), -1).permute(0, 3, 1, 2)


class ActorNetwork(_View):
    """Observations to the parameters of the action distribution."""

    def links(self) -> Links | None:
        """The layers, where the actor is nothing but layers and a log standard deviation."""
        extractor = self._flattening(self.policy.pi_features_extractor)
        if extractor is None:
            return None
        modules = [extractor, self.policy.mlp_extractor.policy_net, self.policy.action_net]
        discrete = isinstance(self.policy.action_space, spaces.Discrete)
        return Links(modules, () if discrete else (self.policy.log_std,))

    def forward(self, observations: Any) -> Outputs:
        """Run the actor's part of the policy.

        Args:
            observations: a batch as SB3 hands it to a policy.

        Returns:
            (logits [N, C],) or (mean [N, D], log_std [N, D]).
        """
        features = self._features(observations, self.policy.pi_features_extractor)
        return self._distribution(self.policy.mlp_extractor.forward_actor(features))


class CriticNetwork(_View):
    """Observations to values."""

    def links(self) -> Links | None:
        """The layers, where the critic is nothing but layers."""
        extractor = self._flattening(self.policy.vf_features_extractor)
        if extractor is None:
            return None
        return Links([extractor, self.policy.mlp_extractor.value_net, self.policy.value_net, nn.Flatten(0)])

    def forward(self, observations: Any) -> Tensor:
        """Run the critic's part of the policy.

        Args:
            observations: a batch as SB3 hands it to a policy.

        Returns:
            Shape [N].
        """
        features = self._features(observations, self.policy.vf_features_extractor)
        return cast(Tensor, self.policy.value_net(self.policy.mlp_extractor.forward_critic(features))).flatten()


class JointNetwork(_View):
    """Observations to action distribution and value; a shared trunk is run once."""

    def forward(self, observations: Any) -> Outputs:
        """Run the whole policy.

        Args:
            observations: a batch as SB3 hands it to a policy.

        Returns:
            The actor's outputs, then the values [N].
        """
        features = self._features(observations, self.policy.pi_features_extractor)
        if self.policy.share_features_extractor:
            latent_actor, latent_critic = self.policy.mlp_extractor(features)
        else:
            latent_actor = self.policy.mlp_extractor.forward_actor(features)
            of_critic = self._features(observations, self.policy.vf_features_extractor)
            latent_critic = self.policy.mlp_extractor.forward_critic(of_critic)
        return *self._distribution(latent_actor), self.policy.value_net(latent_critic).flatten()


def shares_trunk(policy: ActorCriticPolicy) -> bool:
    """Whether actor and critic have parameters in common.

    Args:
        policy: an SB3 policy.

    Returns:
        True for SB3's CNN policies, False for its MLP policies, whose shared extractor only flattens.
    """
    observations, _ = policy.obs_to_tensor(policy.observation_space.sample())
    actor = reached_parameters(ActorNetwork(policy), observations)
    return not actor.keys().isdisjoint(reached_parameters(CriticNetwork(policy), observations))


def reached_parameters(network: nn.Module, observations: Any) -> dict[str, nn.Parameter]:
    """The parameters a network's outputs depend on, found by asking autograd rather than by name.

    Args:
        network: the view.
        observations: any batch.

    Returns:
        Parameters by dotted name.
    """
    with torch.enable_grad():
        outputs = network(observations)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        sums = [o.sum() for o in outputs if o.requires_grad]  # a noise on a schedule has no graph
        grads = torch.autograd.grad(sums, list(named.values()), allow_unused=True)
    return {name: p for (name, p), grad in zip(named.items(), grads, strict=True) if grad is not None}


def action_likelihood(policy: ActorCriticPolicy) -> PolicyLikelihood:
    """The distribution of the policy's actions.

    Args:
        policy: an SB3 policy.

    Returns:
        Categorical for Discrete, DiagonalGaussian for Box.

    Raises:
        ValueError: for any other action space.
    """
    space = policy.action_space
    if isinstance(space, spaces.Discrete):
        return Categorical()
    if isinstance(space, spaces.Box):
        return DiagonalGaussian()
    raise ValueError(f"ACKTR acts in Discrete and Box action spaces, got {space}; wrap the environment to one of them")
