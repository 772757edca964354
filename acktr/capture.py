"""What a pass through the network leaves behind: each layer's inputs and the place to ask for its output gradients.

Forward hooks keep a detached input and `torch.autograd.graph.get_gradient_edge(output)`. An edge, unlike the output
tensor, still means the layer's own output after an in-place activation has overwritten it; and asking autograd for
gradients at edges skips every weight gradient and never touches `.grad`. Hooks live only inside `recording()`, so
rollouts pay nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from acktr.layers import Layer
from acktr.likelihood import Outputs


@dataclass
class Pass:
    """One recorded forward pass."""

    args: tuple[Any, ...]
    """What the network was called with."""
    outputs: Outputs
    """What it returned, as a tuple, copied."""
    live_outputs: Outputs
    """The same tensors with their graph."""
    activations: dict[str, Tensor]
    """Each layer's input, by layer name."""
    edges: dict[str, GradientEdge]
    """Where to ask for the gradient of each layer's output."""

    @property
    def examples(self) -> int:
        """N, the number of examples in the batch."""
        return self.outputs[0].shape[0]


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
        record = Pass((), (), (), {}, {})
        handles = [self.network.register_forward_hook(_network_hook(record), with_kwargs=True)]
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

    @property
    def last(self) -> Pass:
        """The latest recorded pass.

        Raises:
            RuntimeError: if there is none.
        """
        if self._pass is None:
            raise RuntimeError("no pass was recorded; call the network inside recording() before the Fisher pass")
        return self._pass

    def release(self) -> None:
        """Let go of the latest pass's graph; its inputs and outputs stay."""
        if self._pass is not None:
            self._pass.live_outputs = ()
            self._pass.edges.clear()
            self._pass.activations.clear()


def _layer_hook(record: Pass, name: str) -> Any:
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


def _network_hook(record: Pass) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if record.outputs:
            raise RuntimeError("the network was called twice inside recording(); record each batch on its own")
        if kwargs:
            raise RuntimeError(f"the network was called with keywords {sorted(kwargs)}; pass its inputs by position")
        record.args = args
        record.live_outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        # Copies, because an output may be a view of a parameter (an expanded log-std), which the step then moves.
        record.outputs = tuple(o.detach().clone() for o in record.live_outputs)

    return hook
