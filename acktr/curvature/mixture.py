"""Another choice of curvature for some of the layers: by their width, or by their name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from acktr.curvature.base import Block, BlockRule, CurvatureFactory, Place
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.kronecker.ekfac import EKFAC
from acktr.curvature.lowrank.randomised import SREKFAC
from acktr.curvature.network import NetworkCurvature


@dataclass(frozen=True)
class ByWidth:
    """One choice for wide layers, another for the rest.

    `SREKFAC` and `BKFAC` go on to decide by factor: of a layer with 3136 inputs and 64 outputs they sketch the one
    and decompose the other.
    """

    wide: CurvatureFactory = field(default_factory=SREKFAC)
    """For layers whose wider side is as wide as `width` or more."""
    narrow: CurvatureFactory = field(default_factory=EKFAC)
    """For all others."""
    width: int = 1024
    """From which number of inputs (the bias's included) or outputs on a layer is wide."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")

    @property
    def ema(self) -> float:
        """Of parameters that are no layer's: as for narrow layers."""
        return _ema(self.narrow)

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        return (self.wide if max(place.shape) >= self.width else self.narrow).build(place)


@dataclass(frozen=True)
class ByName:
    """A choice for each pattern of layers' dotted names, another for the rest."""

    choices: Mapping[str, CurvatureFactory]
    """By pattern, as for files: `trunk.*`, or a whole name; the first that fits a layer is taken."""
    otherwise: CurvatureFactory = field(default_factory=EKFAC)
    """For all others."""

    @property
    def ema(self) -> float:
        """Of parameters that are no layer's: as for the layers without a pattern."""
        return _ema(self.otherwise)

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        fitting = (choice for pattern, choice in self.choices.items() if fnmatchcase(place.name, pattern))
        return next(fitting, self.otherwise).build(place)

    def over(
        self, network: nn.Module, parameters: Mapping[str, nn.Parameter], rules: Mapping[str, BlockRule]
    ) -> NetworkCurvature:
        """The block diagonal of these choices.

        Args:
            network: the module.
            parameters: the trained ones, by dotted name.
            rules: blocks for parameters that choose their own.

        Returns:
            The curvature.

        Raises:
            ValueError: if a pattern fits no layer.
        """
        curvature = BlockDiagonal(network, parameters, self, rules)
        names = [layer.name for layer in curvature.layers]
        for pattern in self.choices:
            if not any(fnmatchcase(name, pattern) for name in names):
                nearest = get_close_matches(pattern, names, 1, 0.0) or ["none"]
                raise ValueError(f"no layer is called '{pattern}'; the nearest is '{nearest[0]}' of {names}")
        return curvature


def _ema(choice: CurvatureFactory) -> float:
    return float(getattr(choice, "ema", 0.95))
