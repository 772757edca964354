"""The whole network's curvature, block-tridiagonal along its chains of layers and block-diagonal elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from acktr.capture import Pass
from acktr.curvature.base import BlockRule
from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.kronecker.kfac import FactoredKFAC
from acktr.curvature.members import Member
from acktr.curvature.network import NetworkCurvature
from acktr.curvature.whole.neighbours import chains_in, chains_named
from acktr.curvature.whole.tridiagonal import TridiagonalChain
from acktr.exact import Linearisation
from acktr.likelihood import Outputs
from acktr.tree import Tensors

_log = logging.getLogger(__name__)


class BlockTridiagonal(BlockDiagonal):
    """Chains of linear layers together; heads of a trunk, convolutions and single parameters by themselves.

    Args:
        network: the module; never changed.
        parameters: the trained parameters among its own, by dotted name.
        settings: the choice.
        rules: blocks for parameters that choose their own, by the parameter's dotted name.
        max_rows: as for a block diagonal; the layers of a chain keep the same examples.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        settings: Tridiagonal,
        rules: Mapping[str, BlockRule] | None = None,
        max_rows: int = 2048,
    ) -> None:
        super().__init__(network, parameters, FactoredKFAC(settings.ema), rules, max_rows)
        named = settings.chains
        found = chains_in(network, self.members) if named is None else chains_named(named, self.members)
        if not found:
            _log.warning("no two linear layers follow each other in this network: its curvature is block-diagonal")
        self.chains = [TridiagonalChain(chain, settings.ema) for chain in found]
        chained = {member.name for chain in found for member in chain}
        self._single = [member for member in self.members if member.name not in chained]

    def update(self, record: Pass, seeds: Sequence[Outputs], refresh: bool, generator: Generator | None = None) -> bool:
        """Take in every layer's rows, and what neighbours saw of the same examples under the same seeds.

        Args:
            record: the pass.
            seeds: output gradients, one backward pass each.
            refresh: whether to decompose anew.
            generator: source of randomness for subsets of rows.

        Returns:
            False if anything was not finite; then nothing was taken in.
        """
        if not super().update(record, seeds, refresh, generator):
            return False
        for chain in self.chains:
            chain.update(self._latest, refresh)
        return True

    def solve(self, tensors: Tensors, damping: float, linearisation: Linearisation | None = None) -> Tensors:
        """F̂⁻¹ with damped factors, applied to tensors.

        Args:
            tensors: one per trained parameter.
            damping: > 0.
            linearisation: not looked at.

        Returns:
            Shaped like `tensors`.
        """
        return self._joined(
            tensors,
            lambda chain, matrices: chain.solve(matrices, damping),
            lambda member, matrix: member.block.solve(matrix, damping),
        )

    # The blocks know nothing of the whole, and a sum of two chains is none: a batch's own curvature is taken for F̂.
    solve_with_form = NetworkCurvature.solve_with_form
    solver_with_batch = NetworkCurvature.solver_with_batch
    multiply_batch = NetworkCurvature.multiply_batch

    def multiply(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensors:
        """F̂ applied to tensors, undamped.

        Args:
            tensors: one per trained parameter.
            linearisation: not looked at.

        Returns:
            Shaped like `tensors`.
        """
        return self._joined(
            tensors,
            lambda chain, matrices: chain.multiply(matrices),
            lambda member, matrix: member.block.multiply(matrix),
        )

    def quadratic(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensor:
        """Undamped tensorsᵀ F̂ tensors.

        Args:
            tensors: one per trained parameter.
            linearisation: not looked at.

        Returns:
            Scalar tensor ≥ 0.
        """
        forms = [chain.quadratic([m.pack(tensors) for m in chain.members]) for chain in self.chains]
        forms += [member.block.quadratic(member.pack(tensors)) for member in self._single]
        return torch.stack(forms).sum()

    def _joined(
        self,
        tensors: Tensors,
        chained: Callable[[TridiagonalChain, list[Tensor]], list[Tensor]],
        single: Callable[[Member, Tensor], Tensor],
    ) -> Tensors:
        out: Tensors = {}
        for chain in self.chains:
            matrices = chained(chain, [member.pack(tensors) for member in chain.members])
            for member, matrix in zip(chain.members, matrices, strict=True):
                out.update(member.unpack(matrix, tensors))
        for member in self._single:
            out.update(member.unpack(single(member, member.pack(tensors)), tensors))
        return {name: out[name] for name in tensors}

    def diagnostics(self) -> dict[str, float]:
        """Those of a block diagonal, with the chains' skipped refreshes."""
        found = super().diagnostics()
        found["skipped_refreshes"] += sum(chain.skipped_refreshes for chain in self.chains)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Every block's state by its name, and the chains'."""
        return {"blocks": super().state_dict(), "chains": [[c.names, c.state_dict()] for c in self.chains]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore blocks and chains.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: if it is the state of other blocks or chains.
        """
        names, mine = [names for names, _ in state.get("chains", [])], [chain.names for chain in self.chains]
        if "blocks" not in state or names != mine:
            raise ValueError(f"curvature state is of the chains {names}, this network has {mine}")
        super().load_state_dict(state["blocks"])
        for chain, (_, saved) in zip(self.chains, state["chains"], strict=True):
            chain.load_state_dict(saved)


@dataclass(frozen=True)
class Tridiagonal:
    """Block-tridiagonal K-FAC along the chains of linear layers, with factored damping."""

    ema: float = 0.95
    """Weight kept of the old moments per update."""
    chains: tuple[tuple[str, ...], ...] | None = None
    """Dotted names of layers that follow each other with nothing but elementwise activations between, where a network's
    code does not show it; None looks at its `links()` or its `nn.Sequential`s."""

    def over(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        rules: Mapping[str, BlockRule],
    ) -> NetworkCurvature:
        """The curvature of a network's trained parameters.

        Args:
            network: the module; never changed.
            parameters: the trained ones among its own, by dotted name.
            rules: blocks of parameters that choose their own.

        Returns:
            The curvature.
        """
        return BlockTridiagonal(network, parameters, self, rules)
