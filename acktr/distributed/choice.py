"""A choice of curvature for several processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import nn

from acktr.curvature import EKFAC, BlockRule, CurvatureFactory, NetworkCurvature, curvature_over
from acktr.distributed.blockdiagonal import DistributedBlockDiagonal
from acktr.distributed.placement import CommOpt, Grid, Placement
from acktr.distributed.ranks import ProcessRanks, running
from acktr.distributed.refresh import Refresh, Synchronous


@dataclass(frozen=True)
class Distributed:
    """A choice by layer, its work shared between the ranks of the process group."""

    choice: CurvatureFactory = field(default_factory=EKFAC)
    """What every layer gets: `KFAC`, `EKFAC`, `SREKFAC`, `RSKFAC`, or one of these by name or width."""
    placement: Placement = field(default_factory=CommOpt)
    """Which ranks keep a layer: `CommOpt`, `MemOpt` or `HybridOpt`."""
    refresh: Refresh = field(default_factory=Synchronous)
    """When decompositions are found: `Synchronous` or `Background`, which serves one process as well."""

    def over(
        self, network: nn.Module, parameters: Mapping[str, nn.Parameter], rules: Mapping[str, BlockRule]
    ) -> NetworkCurvature:
        """The curvature of a network; made on every rank at once.

        Args:
            network: the module; never changed.
            parameters: the trained ones, by dotted name; the same on every rank.
            rules: blocks for parameters that choose their own.

        Returns:
            The curvature; that of the choice itself where nothing is to be shared.

        Raises:
            ValueError: if the choice is for whole networks, or a layer's block cannot be shared.
        """
        if not hasattr(self.choice, "build"):
            raise ValueError(f"ranks share curvatures by layer, such as EKFAC(), got {self.choice!r}")
        alone = curvature_over(self.choice, network, parameters, rules)  # with the choice's own checks
        if not running() and isinstance(self.refresh, Synchronous):
            return alone
        grid = self.placement.grid(dist.get_world_size()) if running() else Grid(1, 1)
        return DistributedBlockDiagonal(network, parameters, self.choice, rules, ProcessRanks(grid), self.refresh)
