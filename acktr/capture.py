"""What a pass through the network leaves behind: each layer's inputs and the place to ask for its output gradients.

Forward hooks keep a detached input and `torch.autograd.graph.get_gradient_edge(output)`. An edge, unlike the output
tensor, still means the layer's own output after an in-place activation has overwritten it; and asking autograd for
gradients at edges skips every weight gradient and never touches `.grad`. Hooks live only inside `recording()`, so
rollouts pay nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from acktr.layers import Layer
from acktr.likelihood import Outputs
from acktr.still import Draws, generator_states, have_moved
from acktr.tree import take_rows


@dataclass
class Pass(ABC):
    """One recorded forward pass."""

    args: tuple[Any, ...] = ()
    """What the network was called with."""
    outputs: Outputs = ()
    """What it returned, as a tuple, copied."""
    draws: Draws = field(default=(), kw_only=True)
    """States of the generators before the call, if it drew from them (dropout)."""
    taken: bool = field(default=False, kw_only=True)
    """Whether a step was taken from it."""

    @property
    def examples(self) -> int:
        """N, the number of examples in the batch."""
        return self.outputs[0].shape[0]

    @abstractmethod
    def inputs_of(self, layer: str) -> Tensor:
        """What a layer was called with.

        Args:
            layer: its name.

        Returns:
            Shape [N, ...].
        """

    def rows_of(self, layer: str) -> Tensor:
        """What a layer was called with, example by example.

        Args:
            layer: its name.

        Returns:
            Shape [N, ...].

        Raises:
            ValueError: if the first axis is not the batch's: then no row says which example it belongs to.
        """
        inputs = self.inputs_of(layer)
        if inputs.shape[0] != self.examples:
            raise ValueError(
                f"layer '{layer}' was called with shape {list(inputs.shape)}, whose first axis is not that of the "
                f"{self.examples} examples; give it [{self.examples}, ...], batch first and unflattened, or freeze it"
            )
        return inputs

    @abstractmethod
    def pull_back(self, seed: Outputs, layers: Sequence[str], free: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Gradients at the layers' outputs per example, and of parameters summed over examples; `.grad` is not touched.

        Args:
            seed: output gradients, shaped like the outputs.
            layers: names of the layers.
            free: parameters by name.

        Returns:
            By name; the pass can be pulled back again.

        Raises:
            RuntimeError: if the pass was released, or does not hold a layer or a parameter.
        """

    @abstractmethod
    def accumulate(self, seed: Outputs, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the gradient of the parameters to their `.grad`; uses the pass up.

        Args:
            seed: output gradients, shaped like the outputs.
            parameters: the trained ones, by name.
        """

    @abstractmethod
    def part(self, examples: int | None, generator: torch.Generator) -> Pass:
        """Some of the examples, to measure on; it outlives the release of the whole.

        Args:
            examples: how many; None for all.
            generator: source of the choice.

        Returns:
            A pass that cannot be pulled back.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of what pulling back needs; inputs and outputs stay."""


@dataclass
class GraphPass(Pass):
    """One pass with autograd's graph."""

    activations: dict[str, Tensor] = field(default_factory=dict)
    """Each layer's input, by layer name."""
    live_outputs: Outputs = ()
    """The outputs with their graph."""
    edges: dict[str, GradientEdge] = field(default_factory=dict)
    """Where to ask for the gradient of each layer's output."""

    def inputs_of(self, layer: str) -> Tensor:
        """What the hook saw.

        Args:
            layer: its name.

        Returns:
            Shape [N, ...].
        """
        return self.activations[layer]

    def pull_back(self, seed: Outputs, layers: Sequence[str], free: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Ask autograd for gradients at the edges and at the parameters, and for nothing else.

        Args:
            seed: output gradients, shaped like the outputs.
            layers: names of the layers.
            free: parameters by name.

        Returns:
            By name.

        Raises:
            RuntimeError: if the pass was used up, or a layer or a parameter has no part in it.
        """
        if not self.live_outputs:
            raise RuntimeError("the recorded pass was used up by a step; record another before update_curvature()")
        for name in layers:
            if name not in self.edges:
                raise RuntimeError(f"layer '{name}' was not called in the recorded pass; freeze it or leave it out")
        live = [(o, s) for o, s in zip(self.live_outputs, seed, strict=True) if o.requires_grad]
        sources: Any = [*(self.edges[name] for name in layers), *free.values()]
        if not sources:
            return {}
        try:
            grads = torch.autograd.grad(
                [o for o, _ in live], sources, [s for _, s in live], retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError(
                "the pass's graph is gone: call update_curvature() before the loss's backward()"
            ) from error
        found = dict(zip([*layers, *free], grads, strict=True))
        for name, grad in found.items():
            if grad is None:
                raise RuntimeError(f"'{name}' does not reach the network's outputs; freeze it or leave it out")
        return found

    def accumulate(self, seed: Outputs, parameters: Mapping[str, nn.Parameter]) -> None:
        """Run autograd's own backward pass.

        Args:
            seed: output gradients, shaped like the outputs.
            parameters: unused; autograd finds them.
        """
        live = [(o, s) for o, s in zip(self.live_outputs, seed, strict=True) if o.requires_grad]
        torch.autograd.backward([o for o, _ in live], [s for _, s in live])

    def part(self, examples: int | None, generator: torch.Generator) -> GraphPass:
        """Examples drawn at random.

        Args:
            examples: how many; None for all.
            generator: source of the choice.

        Returns:
            Their inputs and outputs.
        """
        if examples is None or examples >= self.examples:
            return GraphPass(self.args, self.outputs, draws=self.draws)
        rows = torch.randperm(self.examples, generator=generator, device=self.outputs[0].device)[:examples]
        return GraphPass(take_rows(self.args, rows), take_rows(self.outputs, rows))

    def release(self) -> None:
        """Let go of the graph."""
        self.live_outputs = ()
        self.edges.clear()
        self.activations.clear()


class Capture:
    """Records the passes of a network through the given layers.

    Args:
        network: the module whose calls are recorded; never changed.
        layers: the layers to watch.
    """

    def __init__(self, network: nn.Module, layers: Sequence[Layer]) -> None:
        self.network = network
        self.layers = layers
        self._pass: Pass | None = None

    @contextmanager
    def recording(self, statistics: bool = True) -> Generator[None]:
        """Record the one call of the network made inside.

        Args:
            statistics: whether the layers are watched; without, inputs and outputs of the network alone are kept, and
                the call may run without gradients.

        Yields:
            Nothing; read the record with `last` after the call.

        Raises:
            RuntimeError: if the network or one of its layers is called twice.
        """
        record = GraphPass()
        handles = [
            self.network.register_forward_pre_hook(_draws_hook(record)),
            self.network.register_forward_hook(_network_hook(record), with_kwargs=True),
        ]
        for layer in self.layers if statistics else ():
            handles.append(layer.module.register_forward_hook(_layer_hook(record, layer.name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not record.outputs:
            raise RuntimeError("nothing was recorded: call the network once inside recording()")
        self._pass = record

    def keep(self, record: Pass) -> None:
        """Take a pass that was recorded otherwise as the latest.

        Args:
            record: the pass.
        """
        self._pass = record

    @property
    def last(self) -> Pass:
        """The latest recorded pass.

        Raises:
            RuntimeError: if there is none.
        """
        if self._pass is None:
            raise RuntimeError("no pass was recorded; call the network inside recording() before the Fisher pass")
        return self._pass

    def take(self) -> Pass:
        """Hand out the latest recorded pass for a step; each one is good for one.

        Returns:
            The pass.

        Raises:
            RuntimeError: if there is none, or a step was taken from it before.
        """
        record = self.last
        if record.taken:
            raise RuntimeError(
                "nothing was recorded since the last step: call the network inside recording(), then "
                "update_curvature(), before each step"
            )
        record.taken = True
        return record

    def release(self) -> None:
        """Let go of the latest pass's graph; its inputs and outputs stay."""
        if self._pass is not None:
            self._pass.release()


def _layer_hook(record: GraphPass, name: str) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if name in record.edges:
            raise RuntimeError(
                f"layer '{name}' was called twice in one pass; its Fisher is that of one call: "
                "use two modules, or call the network once per recording()"
            )
        if not torch.is_grad_enabled() or not output.requires_grad:
            raise RuntimeError(f"layer '{name}' was recorded without gradients; leave no_grad() and eval-only wrappers")
        record.activations[name] = args[0].detach()
        record.edges[name] = get_gradient_edge(output)

    return hook


def _draws_hook(record: GraphPass) -> Any:
    def hook(module: nn.Module, _args: tuple[Any, ...]) -> None:
        record.draws = generator_states(module)

    return hook


def _network_hook(record: GraphPass) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if record.outputs:
            raise RuntimeError("the network was called twice inside recording(); record each batch on its own")
        if kwargs:
            raise RuntimeError(f"the network was called with keywords {sorted(kwargs)}; pass its inputs by position")
        if not have_moved(record.draws, generator_states(module)):
            record.draws = ()
        record.args = args
        record.live_outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        # Copies, because an output may be a view of a parameter (an expanded log-std), which the step then moves.
        record.outputs = tuple(o.detach().clone() for o in record.live_outputs)

    return hook
