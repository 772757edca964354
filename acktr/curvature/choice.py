"""From a choice of curvature to a network's curvature."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from acktr.curvature.base import BlockRule, CurvatureFactory
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.network import NetworkCurvature, NetworkCurvatureFactory

Curvature = CurvatureFactory | NetworkCurvatureFactory
"""A choice by layer, or one for the whole network."""


def curvature_over(
    choice: Curvature,
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rules: Mapping[str, BlockRule] | None = None,
) -> NetworkCurvature:
    """Build the curvature of a network; a choice by layer becomes a block diagonal.

    Args:
        choice: which approximation.
        network: the module; never changed.
        parameters: the trained parameters among its own, by dotted name.
        rules: blocks for parameters that choose their own, by the parameter's dotted name.

    Returns:
        The curvature, without statistics yet.

    Raises:
        ValueError: if the choice is none.
    """
    if hasattr(choice, "over"):
        return choice.over(network, parameters, rules or {})
    if not hasattr(choice, "build"):
        raise ValueError(f"curvature must be a choice such as EKFAC() or DenseFisher(), got {choice!r}")
    return BlockDiagonal(network, parameters, choice, rules)
