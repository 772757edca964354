"""Which layers are whose to keep and to decompose, and what is told of a decomposition before it travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.curvature.members import Member
from acktr.curvature.sharing import Found, SharedBlock
from acktr.distributed.assignment import assign
from acktr.distributed.ranks import ProcessRanks
from acktr.layers import Layer

_MOST_TENSORS = 8
HEADER = 2 + 2 * _MOST_TENSORS
"""Integers in a header."""


@dataclass
class Share:
    """One layer, and what of it is this rank's to do."""

    member: Member
    block: SharedBlock
    layer: Layer
    owner: int
    """The rank that decomposes it."""
    column: int
    """The ranks that keep it."""
    kept: bool
    """Whether this rank is one of them."""
    blank: dict[str, Any]
    """The block's state before any statistics."""
    found: bool = False
    """Whether those that keep it have a decomposition."""

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Room for what another rank sends.

        Args:
            shape: of it.

        Returns:
            A tensor of the layer's type, on its device.
        """
        return torch.empty(tuple(shape), dtype=self.layer.dtype, device=self.layer.parameters[0].device)


def shares_of(members: Sequence[Member], ranks: ProcessRanks) -> list[Share]:
    """Assign the layers among a network's members.

    Args:
        members: all of them, in the same order on every rank.
        ranks: the processes.

    Returns:
        One for each layer.

    Raises:
        ValueError: if a layer's block cannot be shared.
    """
    found: list[tuple[Member, SharedBlock, Layer]] = []
    for member in members:
        if member.layer is None:
            continue
        block = member.block
        if not isinstance(block, SharedBlock) or not block.shareable:
            raise ValueError(
                f"'{member.name}' has a {type(block).__name__}, which ranks cannot share; "
                "take KFAC, FactoredKFAC, EKFAC, SREKFAC or RSKFAC"
            )
        found.append((member, block, member.layer))
    owners = assign([block.decomposition_cost for _, block, _ in found], ranks.size)
    columns = [ranks.grid.column_of(owner) for owner in owners]
    mine = ranks.grid.column_of(ranks.rank)
    return [
        Share(*each, owner, column, column == mine, each[1].state_dict())
        for each, owner, column in zip(found, owners, columns, strict=True)
    ]


def header_of(found: Found | None) -> Tensor:
    """Whether there is a decomposition, of how many tensors, and their shapes.

    Args:
        found: the decomposition.

    Returns:
        Integers, all 0 for None; −1 stands for a dimension that a tensor does not have.
    """
    header = torch.zeros(2 + 2 * _MOST_TENSORS, dtype=torch.int64)
    if found is not None:
        header[0], header[1] = 1, len(found)
        for k, tensor in enumerate(found):
            dimensions = [*tensor.shape, -1, -1][:2]
            header[2 + 2 * k : 4 + 2 * k] = torch.tensor(dimensions)
    return header


def shapes_of(header: list[int]) -> list[list[int]] | None:
    """What a header tells.

    Args:
        header: of `header_of`.

    Returns:
        The tensors' shapes; None where there is no decomposition.
    """
    if not header[0]:
        return None
    pairs = (header[2 + 2 * k : 4 + 2 * k] for k in range(header[1]))
    return [[size for size in pair if size >= 0] for pair in pairs]
