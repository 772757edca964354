"""What an optimizer refuses before it is built, and the states it does not take: one line with the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def check_parts(network: object, likelihood: object, curvature: object) -> None:
    """Tell what was given in place of a network, a likelihood or a curvature.

    Args:
        network: a module.
        likelihood: an instance.
        curvature: an instance, or None.

    Raises:
        TypeError: if one is something else.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"a natural gradient needs the network itself, not its parameters; got {network!r:.80}")
    if isinstance(likelihood, type) or not hasattr(likelihood, "sample"):
        raise TypeError(f"the likelihood is an object such as Categorical(), got {likelihood!r:.80}")
    if isinstance(curvature, type):
        raise TypeError(f"the curvature is an object, got the class; write {curvature.__name__}()")


def check_types(parameters: Mapping[str, nn.Parameter]) -> None:
    """Hold parameters' types against what decompositions are made in.

    Args:
        parameters: the trained ones, by dotted name.

    Raises:
        ValueError: if one is in neither single nor double precision.
    """
    for name, parameter in parameters.items():
        if parameter.dtype not in {torch.float32, torch.float64}:
            raise ValueError(
                f"'{name}' is in {parameter.dtype}, and a curvature is decomposed in float32 or float64: keep the "
                "parameters in float32, and run the network under torch.autocast"
            )


def check_numbers(**values: float) -> None:
    """Hold an optimizer's numbers against their ranges.

    Args:
        values: by name: lr, radius, damping, momentum, weight_decay.

    Raises:
        ValueError: if one is out of its range.
    """
    for name in ("damping", "radius"):
        if not values[name] > 0:
            raise ValueError(f"{name} must be positive, got {values[name]}")
    if values["damping"] == math.inf:
        raise ValueError("damping must be finite, got inf; for plain gradient steps take torch.optim")
    if not 0 <= values["momentum"] < 1:
        raise ValueError(f"momentum must be in [0, 1), got {values['momentum']}")
    for name in ("lr", "weight_decay"):
        if not 0 <= values[name] < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {values[name]}")


def identity(choice: object, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """What a state is of.

    Args:
        choice: the curvature that was chosen; of one that ranks share, what each layer gets.
        parameters: the trained ones.

    Returns:
        The curvature's name and the parameters' shapes.
    """
    choice = getattr(choice, "choice", choice)
    return {"curvature": type(choice).__name__, "shapes": {name: list(p.shape) for name, p in parameters.items()}}


def check_identity(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuse a state of another network or curvature.

    Args:
        own: the optimizer's `identity`.
        state: torch's state dictionary.

    Raises:
        ValueError: if they differ; older states, which do not say what they are of, pass.
    """
    if "natural" not in state:
        raise ValueError("this is the state of another kind of optimizer; give it one of a NaturalGradient")
    other = state["natural"].get("identity", own)
    if other["curvature"] != own["curvature"]:
        raise ValueError(f"this is the state of a {other['curvature']}, and the optimizer has a {own['curvature']}")
    for name, shape in own["shapes"].items():
        if other["shapes"].get(name) != shape:
            raise ValueError(
                f"this is the state of another network: its '{name}' has shape {other['shapes'].get(name)}, not {shape}"
            )
