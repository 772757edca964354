"""Networks that are a plain chain of layers, differentiated without autograd.

On small networks the bookkeeping of modules and of autograd costs as much as the arithmetic. Where a network is nothing
but linear layers and elementwise activations one after the other, its passes are a few matrix products each: forwards,
backwards from any output gradient to every layer's, and along any step of the parameters. All of it is meant to be
called where gradients are off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acktr.capture import Pass
from acktr.likelihood import Outputs

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Links:
    """What a network is made of."""

    modules: Sequence[nn.Module]
    """Applied one after the other; the last one's output is the network's first."""
    expanded: Sequence[nn.Parameter] = ()
    """Each is one more output, the same row for every example (a state-independent log standard deviation)."""


@runtime_checkable
class Linked(Protocol):
    """A network that can say whether it is a chain."""

    def links(self) -> Links | None:
        """Its links, or None if it is more than a chain."""
        ...


class _Affine:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(values, self.module.weight, self.module.bias)  # type: ignore[arg-type]

    def backward(self, grads: Tensor, _inputs: Tensor, _outputs: Tensor) -> Tensor:
        return grads @ self.module.weight  # type: ignore[operator]

    def along(self, tangent: Tensor, _inputs: Tensor, _outputs: Tensor) -> Tensor:
        return tangent @ self.module.weight.mT  # type: ignore[operator]

    def along_and(self, moved: Tensor, tangent: Tensor) -> Tensor:
        return torch.addmm(moved, tangent, self.module.weight.mT)  # type: ignore[arg-type]


def _tanh(values: Tensor) -> Tensor:
    # Of a small network's passes on a processor torch's tanh would be a quarter. 2σ(2x) − 1 is the same function in a
    # quarter of its time, and off by 2e-7 at most.
    if values.requires_grad or values.device.type != "cpu" or values.dtype != torch.float32:
        return torch.tanh(values)
    return torch.sigmoid(2 * values).mul_(2).sub_(1)


class _Elementwise:
    """Its Jacobian is diagonal, so that backwards and along a step it is the same product."""

    rules: ClassVar[dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]]] = {
        nn.Tanh: (_tanh, torch.ops.aten.tanh_backward),
        nn.Sigmoid: (torch.sigmoid, torch.ops.aten.sigmoid_backward),
        nn.ReLU: (torch.relu, lambda grads, outputs: torch.ops.aten.threshold_backward(grads, outputs, 0)),
    }

    def __init__(self, module: nn.Module) -> None:
        self.forward, self._product = self.rules[type(module)]

    def backward(self, grads: Tensor, _inputs: Tensor, outputs: Tensor) -> Tensor:
        return self._product(grads, outputs)

    along = backward


class _Reshape:
    def __init__(self, module: nn.Module) -> None:
        self.forward = module.forward

    def backward(self, grads: Tensor, inputs: Tensor, _outputs: Tensor) -> Tensor:
        return grads.reshape(inputs.shape)

    def along(self, tangent: Tensor, _inputs: Tensor, outputs: Tensor) -> Tensor:
        return tangent.reshape(outputs.shape)


_Link = _Affine | _Elementwise | _Reshape
_KINDS: dict[type[nn.Module], Callable[[nn.Module], _Link]] = {
    nn.Linear: _Affine,
    nn.Flatten: _Reshape,
    nn.Identity: _Reshape,
    **dict.fromkeys(_Elementwise.rules, _Elementwise),
}


class Chain:
    """The links of a network, ready to run.

    Args:
        links: what the network is made of; every module of a type this file knows.
        names: dotted names of the network's modules and parameters, by id.
        network: the network itself, which others would call.
    """

    groups = 1
    """Equal parts of the rows that see weights of their own, one part after the other."""

    def __init__(self, links: Links, names: Mapping[int, str], network: nn.Module) -> None:
        self._modules = list(flat(links.modules))
        self._called = [network, *(m for top in links.modules for m in top.modules() if m is not network)]
        self._links = [_KINDS[type(module)](module) for module in self._modules]
        self.layers = [names[id(m)] if isinstance(m, nn.Linear) else None for m in self._modules]
        """Of every link, its dotted name if it is a layer."""
        self.expanded = {names[id(parameter)]: parameter for parameter in links.expanded}
        self._weights = {names[id(p)] for m in self._modules for p in m.parameters()}
        self._dtype = next(p.dtype for m in self._modules for p in m.parameters())

    @classmethod
    def of(cls, network: nn.Module, trained: Iterable[str]) -> Chain | None:
        """The chain that a network is.

        Args:
            network: an `nn.Sequential`, or a `Linked` network.
            trained: dotted names of its trained parameters.

        Returns:
            None for every other network, for modules of other types (subclasses too), and where a trained parameter
            is no link's, or that of two.
        """
        if isinstance(network, Linked):
            links = network.links()
        else:
            links = Links([network]) if type(network) is nn.Sequential else None
        if links is None or not any(isinstance(m, nn.Linear) for m in flat(links.modules)):
            return None
        if any(type(module) not in _KINDS for module in flat(links.modules)):
            return None
        names = {id(part): name for name, part in (*network.named_modules(), *network.named_parameters())}
        chain = cls(links, names, network)
        whole = len(set(filter(None, chain.layers))) == sum(isinstance(m, nn.Linear) for m in chain._modules)
        held = [id(p) for module in chain._modules for p in module.parameters()]
        whole = whole and len(set(held)) == len(held)
        return chain if whole and set(trained) <= chain._weights | chain.expanded.keys() else None

    def takes(self, args: tuple[Any, ...]) -> bool:
        """Whether a call can go through the chain: vectors of the weights' type, and nobody listening to modules.

        Args:
            args: of the call.

        Returns:
            Whether it can.
        """
        plain = len(args) == 1 and isinstance(args[0], Tensor) and args[0].dtype == self._dtype
        # Layers see two axes here; with more, what is shared over places goes by autograd.
        first = self._modules[0]
        flattened = type(first) is nn.Flatten and (first.start_dim, first.end_dim) == (1, -1)
        flat = plain and (args[0].dim() == 2 or flattened)
        return flat and not any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in self._called
        )

    def outputs(self, inputs: Tensor) -> Outputs:
        """Run the network.

        Args:
            inputs: shape [N, ...].

        Returns:
            What the network returns, as a tuple.
        """
        values = inputs
        for link in self._links:
            values = link.forward(values)
        return self._with_expanded(values)

    def _with_expanded(self, values: Tensor) -> Outputs:
        # Copies: outputs kept from before a step must not follow the parameter.
        rows = (p.detach().expand(len(values), -1).clone() for p in self.expanded.values())
        return values, *rows

    def run(self, inputs: Tensor) -> ChainPass:
        """Run the network and keep what passes over the same inputs need.

        Args:
            inputs: shape [N, ...]; from the first layer on two axes, [N, i].

        Returns:
            The pass.
        """
        values = [inputs]
        for link in self._links:
            values.append(link.forward(values[-1]))
        return ChainPass((inputs,), self._with_expanded(values[-1]), self, values)

    def pull_back(self, values: Sequence[Tensor], seed: Outputs) -> Tensors:
        """Gradients at every layer's output, and of every expanded parameter.

        Args:
            values: the inputs and every link's output.
            seed: output gradients, shaped like the outputs.

        Returns:
            By dotted name.
        """
        found, grads, first = {}, seed[0], self.layers.index(next(filter(None, self.layers)))
        for k in range(len(self._links) - 1, first - 1, -1):
            name = self.layers[k]
            if name is not None:
                found[name] = grads
            if k > first:
                grads = self._links[k].backward(grads, values[k], values[k + 1])
        for (name, parameter), own in zip(self.expanded.items(), seed[1:], strict=True):
            found[name] = own.sum(0).reshape(parameter.shape)
        return found

    def gradient(self, values: Sequence[Tensor], seed: Outputs) -> Tensors:
        """Gradients of every parameter, summed over examples.

        Args:
            values: the inputs and every link's output.
            seed: output gradients, shaped like the outputs.

        Returns:
            By dotted name, biases that a layer has not among them.
        """
        found = self.pull_back(values, seed)
        for name, inputs in zip(self.layers, values, strict=False):
            if name is not None:
                grads = found.pop(name)
                found[f"{name}.weight"], found[f"{name}.bias"] = grads.mT @ inputs, grads.sum(0)
        return found

    def along(self, values: Sequence[Tensor], step: Tensors) -> Outputs:
        """How the outputs change along a step of the parameters.

        Args:
            values: the inputs and every link's output.
            step: tensors for some or all parameters; the others stay.

        Returns:
            Shaped like the outputs.
        """
        tangent: Tensor | None = None
        for k, (link, name) in enumerate(zip(self._links, self.layers, strict=True)):
            moved = None if name is None else _moved(values[k], step.get(f"{name}.weight"), step.get(f"{name}.bias"))
            if tangent is None:
                tangent = moved
            elif moved is not None and isinstance(link, _Affine):
                tangent = link.along_and(moved, tangent)
            else:
                tangent = link.along(tangent, values[k], values[k + 1])
        size = len(values[-1])
        first = torch.zeros_like(values[-1]) if tangent is None else tangent.expand_as(values[-1])
        rows = (step.get(name, torch.zeros_like(p)).expand(size, -1) for name, p in self.expanded.items())
        return first, *rows


@dataclass
class ChainPass(Pass):
    """One pass through a chain."""

    chain: Chain | None = None
    values: list[Tensor] = field(default_factory=list)
    """The inputs, then every link's output."""

    def inputs_of(self, layer: str) -> Tensor:
        """What the link before it put out.

        Args:
            layer: its name.

        Returns:
            Shape [N, i].
        """
        return self.values[self._used().layers.index(layer)]

    def _used(self) -> Chain:
        if self.chain is None:
            raise RuntimeError("the recorded pass was used up by a step; record another before update_curvature()")
        return self.chain

    def pull_back(self, seed: Outputs, layers: Sequence[str], free: Mapping[str, nn.Parameter]) -> Tensors:
        """Multiply backwards.

        Args:
            seed: output gradients, shaped like the outputs.
            layers: names of the layers.
            free: parameters by name.

        Returns:
            By name.
        """
        found = self._used().pull_back(self.values, seed)
        return {name: found[name] for name in (*layers, *free)}

    def accumulate(self, seed: Outputs, parameters: Mapping[str, nn.Parameter]) -> None:
        """Multiply backwards, and every layer's output gradients with its inputs.

        Args:
            seed: output gradients, shaped like the outputs.
            parameters: the trained ones, by name.
        """
        found = self._used().gradient(self.values, seed)
        for name, parameter in parameters.items():
            parameter.grad = found[name] if parameter.grad is None else parameter.grad + found[name]

    def part(self, examples: int | None, generator: torch.Generator) -> ChainPass:
        """Every k-th example, without copies: neighbours in a rollout resemble each other.

        Args:
            examples: how many at least; None for all.
            generator: unused.

        Returns:
            Their inputs and every link's output, which can be pulled back too.
        """
        rows = self.spread(examples)
        values, outputs = [v[rows] for v in self.values], tuple(o[rows] for o in self.outputs)
        return ChainPass((values[0],), outputs, self.chain, values)

    def spread(self, examples: int | None) -> slice:
        """The rows of a part.

        Args:
            examples: how many at least; None for all.

        Returns:
            Every k-th.
        """
        stride = 1 if examples is None else max(1, self.examples // examples)
        if self.chain is not None and self.chain.groups > 1:
            each = self.examples // self.chain.groups
            stride = next(k for k in range(min(stride, each), 0, -1) if each % k == 0)  # groups stay equal
        return slice(None, None, stride)

    def release(self) -> None:
        """Let go of the links' outputs."""
        self.chain = None
        self.values.clear()


def flat(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules one after the other, sequences replaced by what they hold.

    Args:
        modules: any.

    Yields:
        No `nn.Sequential`.
    """
    for module in modules:
        if type(module) is nn.Sequential:
            yield from flat(module)
        else:
            yield module


def _moved(inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if weight is None:
        return None if bias is None else bias.expand(len(inputs), -1)
    return inputs @ weight.mT if bias is None else F.linear(inputs, weight, bias)
