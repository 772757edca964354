"""Networks that are run again: the same function of their inputs, whatever they draw and learn as they run.

A distance is measured between two passes. What moves outputs between them has to be the step alone, so dropout gets the
masks of the recorded call again, and batch normalisation goes by its batch and learns nothing from the second look.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

Draws = tuple[Tensor, ...]
"""States of torch's generators, the processor's first; empty where nothing was drawn."""


def generator_states(network: nn.Module) -> Draws:
    """Read the generators that a network's modules draw from.

    Args:
        network: the module.

    Returns:
        The states.
    """
    device, own = _device(network), torch.get_rng_state()
    return (own, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (own,)


def have_moved(before: Draws, after: Draws) -> bool:
    """Whether something was drawn.

    Args:
        before: states before a call.
        after: states after it.

    Returns:
        Whether they differ.
    """
    return not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@contextmanager
def still(network: nn.Module, draws: Draws = ()) -> Generator[None]:
    """Run a network again, as it was run before, and leave it and the generators as they were.

    Attention takes its plain form, which can be differentiated forwards.

    Args:
        network: the module.
        draws: the generators' states before the call that is repeated.

    Yields:
        Nothing.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if draws:
                device = _device(network)
                stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
                torch.set_rng_state(draws[0])
                for state in draws[1:]:
                    torch.cuda.set_rng_state(state, device)
            yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _device(network: nn.Module) -> torch.device:
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
