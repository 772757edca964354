"""The policy during a rollout: its noise drawn at once, and small networks walked without their modules.

At a handful of rows the arithmetic of a small network takes a few microseconds, and PyTorch's calls take ten times as
long. So where the actor is a plain chain of layers, numpy multiplies its live weights; any other runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from acktr.ensemble import Ensemble
from acktr.likelihood import Outputs
from acktr.sb3.networks import ActorNetwork

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR

Floats = NDArray[np.float32]
Layer = tuple[Floats, Floats, Callable[[Floats], Any]]
"""Weight [in, out] and bias [out], which share the parameters' memory, and what follows, in place."""

LARGEST_PRODUCT = 2**18
"""Multiplications in one layer: with more, calls no longer weigh, and numpy would start threads of its own."""

_ACTIVATIONS: dict[type[nn.Module], Callable[[Floats], Any]] = {
    nn.Tanh: lambda rows: np.tanh(rows, out=rows),
    nn.ReLU: lambda rows: np.maximum(rows, 0, out=rows),
}


class RolloutActor:
    """Draws the actions of one rollout, and remembers the outputs of the network they were drawn from.

    Args:
        agent: whose policy acts; its standard deviation is read now, so parameters stay until the rollout's end.
        n_steps: of the rollout.
        n_envs: actions per step.
    """

    def __init__(self, agent: ACKTR, n_steps: int, n_envs: int) -> None:
        layers = plain_layers(agent.acting_network, n_envs)
        ensemble = agent.exploration.ensemble if agent.exploration is not None else None
        self._forward: _Forward
        if layers is None:
            self._forward = _Modules(agent) if ensemble is None else _Drawn(ensemble, agent.device)
        elif ensemble is None:
            self._forward = _Chain(layers, agent.policy, n_steps, n_envs)
        else:
            self._forward = _DrawnChain(_own_layers(layers, ensemble), agent.policy, n_steps, n_envs)
        self._discrete = isinstance(agent.action_space, spaces.Discrete)
        self._shape = agent.action_space.shape or ()
        self._noise = _noise(agent.policy, n_steps, n_envs)

    def act(self, step: int, observations: Any) -> NDArray[Any]:
        """Draw one action per environment. That a network is not finite shows in the outputs.

        Args:
            step: of the rollout; each in turn, from 0.
            observations: an array [n_envs, ...], or a dictionary of such.

        Returns:
            int64 [n_envs], or float32 [n_envs, ...], which bounds of the action space do not hold.
        """
        actions: NDArray[Any] = self._forward(step, observations) + self._noise[step]
        return np.asarray(actions.argmax(1)) if self._discrete else actions.reshape(-1, *self._shape)

    def outputs(self) -> Outputs:
        """What the acting network put out at all steps.

        Returns:
            Tensors [n_steps · n_envs, ...], time running slowest.
        """
        return self._forward.outputs()


def _noise(policy: ActorCriticPolicy, n_steps: int, n_envs: int) -> Floats:
    # Added to means it makes points; added to logits, as Gumbel noise, scores whose largest is the class. It is drawn
    # on the CPU wherever the network lives, so that the stream is the same on every device.
    space = policy.action_space
    if isinstance(space, spaces.Discrete):
        waits = torch.empty(n_steps, n_envs, int(space.n)).exponential_()
        noise = waits.clamp_(min=torch.finfo(waits.dtype).tiny).log_().neg_()
    else:
        std = policy.log_std.detach().exp().cpu()
        noise = torch.randn(n_steps, n_envs, len(std)).mul_(std)
    return noise.numpy()


class _Forward(Protocol):
    """From observations to means or logits on the host, [n_envs, K]."""

    def __call__(self, step: int, observations: Any) -> Floats: ...

    def outputs(self) -> Outputs: ...


class _Modules:
    """Any network, as it is."""

    def __init__(self, agent: ACKTR) -> None:
        self._network, self._device = agent.acting_network, agent.device
        self._outputs: list[Outputs] = []

    @torch.no_grad()
    def __call__(self, step: int, observations: Any) -> Floats:
        outputs: Outputs = self._network(obs_as_tensor(observations, self._device))
        self._outputs.append(outputs)
        return outputs[0].cpu().numpy()

    def outputs(self) -> Outputs:
        return tuple(torch.stack(steps).flatten(0, 1) for steps in zip(*self._outputs, strict=True))


class _Drawn:
    """Every environment's own policy."""

    def __init__(self, ensemble: Ensemble, device: torch.device) -> None:
        self._run, self._device = ensemble.fixed(), device
        self._outputs: list[Outputs] = []

    @torch.no_grad()
    def __call__(self, step: int, observations: NDArray[Any]) -> Floats:
        outputs = self._run.outputs(torch.as_tensor(observations, dtype=torch.float32, device=self._device))
        self._outputs.append(outputs)
        return outputs[0].cpu().numpy()

    def outputs(self) -> Outputs:
        return tuple(torch.stack(steps).flatten(0, 1) for steps in zip(*self._outputs, strict=True))


class _Chain:
    """A chain of layers, with rooms for what they put out that serve at every step."""

    def __init__(self, layers: list[Layer], policy: ActorCriticPolicy, n_steps: int, n_envs: int) -> None:
        *hidden, (self._weight, self._bias, _) = layers
        self._hidden = [(*layer, np.empty((n_envs, layer[1].shape[-1]), np.float32)) for layer in hidden]
        self._heads = np.empty((n_steps, n_envs, self._bias.shape[-1]), np.float32)
        box = isinstance(policy.action_space, spaces.Box)
        self._log_std = policy.log_std.detach().clone() if box else None

    def __call__(self, step: int, observations: NDArray[Any]) -> Floats:
        rows = observations.reshape(len(observations), -1)
        if rows.dtype != np.float32:
            rows = rows.astype(np.float32)
        for weight, bias, activate, room in self._hidden:
            self._multiply(rows, weight, room)
            np.add(room, bias, out=room)
            activate(room)
            rows = room
        heads: Floats = self._heads[step]
        self._multiply(rows, self._weight, heads)
        np.add(heads, self._bias, out=heads)
        return heads

    @staticmethod
    def _multiply(rows: Floats, weight: Floats, out: Floats) -> None:
        np.dot(rows, weight, out=out)

    def outputs(self) -> Outputs:
        heads = torch.from_numpy(self._heads).flatten(0, 1)
        return (heads,) if self._log_std is None else (heads, self._log_std.expand_as(heads))


class _DrawnChain(_Chain):
    """The same, each row by weights [in, out] and biases of its own."""

    @staticmethod
    def _multiply(rows: Floats, weight: Floats, out: Floats) -> None:
        np.matmul(rows[:, None], weight, out=out[:, None])


def _own_layers(layers: list[Layer], ensemble: Ensemble) -> list[Layer]:
    # Contiguous, or the products take several times as long.
    own = [(np.ascontiguousarray(w.numpy().swapaxes(1, 2)), b.numpy()) for w, b in ensemble.weights()]
    return [(*pair, function) for pair, (_, _, function) in zip(own, layers, strict=True)]


def plain_layers(network: nn.Module, n_envs: int) -> list[Layer] | None:
    """The actor as numpy can walk it.

    Args:
        network: that acts.
        n_envs: rows it will see.

    Returns:
        Its layers; None if it is anything but SB3's small float32 perceptron on vectors on the CPU, with no hook that
        would have to run.
    """
    if type(network) is not ActorNetwork or network.links() is None:
        return None
    extractor, perceptron = network.policy.pi_features_extractor, network.policy.mlp_extractor
    modules = [*perceptron.policy_net, network.policy.action_net]
    linear, between = modules[::2], [type(module) for module in modules[1::2]]
    if len(modules) % 2 == 0 or not all(kind in _ACTIVATIONS for kind in between):
        return None
    if not all(_is_small(layer, n_envs) for layer in linear):
        return None
    if any(map(_is_altered, (network, extractor, extractor.flatten, perceptron, perceptron.policy_net, *modules))):
        return None
    functions = [*(_ACTIVATIONS[kind] for kind in between), lambda rows: rows]
    arrays = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in linear]
    return [(*pair, function) for pair, function in zip(arrays, functions, strict=True)]


def _is_small(layer: nn.Module, n_envs: int) -> bool:
    return (
        type(layer) is nn.Linear
        and n_envs * layer.weight.numel() <= LARGEST_PRODUCT
        and all(
            type(p) is nn.Parameter and p.dtype == torch.float32 and p.device.type == "cpu"
            for p in (layer.weight, layer.bias)
        )
    )


def _is_altered(module: nn.Module) -> bool:
    # Somebody wants to see the calls, or has put another forward in the place of the class's own.
    hooked = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()  # type: ignore[no-untyped-call]
    return bool(hooked) or not vars(module).keys().isdisjoint({"forward", "forward_actor"})
