"""A block diagonal whose work several processes share.

Each update is that of one process with everyone's examples:

    rows of this rank's examples -> moments -> mean over ranks -> averages            (statistics)
    refresh: every owner decomposes its layers -> down its column                     (bases)
    scalings of this rank's rows in the bases -> mean over ranks -> averages          (statistics)
    solve: who keeps a layer solves it -> along its row                               (solutions)

Ranks that do not keep a layer whose scalings are measured (EKFAC) are lent its bases for that, one column's at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from acktr.capture import Pass
from acktr.curvature import BlockDiagonal, BlockRule, CurvatureFactory, ParameterBlock, Statistics
from acktr.curvature.members import Member
from acktr.curvature.sharing import Found, Summary
from acktr.distributed.packing import symmetric, triangle
from acktr.distributed.ranks import ProcessRanks
from acktr.distributed.refresh import Decomposed, Refresh, Schedule
from acktr.distributed.shares import HEADER, Share, header_of, shapes_of, shares_of
from acktr.exact import Linearisation
from acktr.likelihood import Outputs
from acktr.linalg import DecompositionError
from acktr.moments import Gram
from acktr.tree import Tensors

_UNDER_WAY = ":refresh"
"""Key of a refresh under way beside the blocks' names in a state dictionary; no module's name has a colon."""


class DistributedBlockDiagonal(BlockDiagonal):
    """One block per layer, each kept by some ranks and decomposed by one.

    `state_dict` is a collective call: all ranks have to make it. What it returns is whole on each of them and fits any
    number of ranks.

    Args:
        network: the module; never changed.
        parameters: the trained parameters among its own, by dotted name.
        factory: builds the layers' blocks.
        rules: blocks for parameters that choose their own, by the parameter's dotted name.
        ranks: the processes.
        refresh: when decompositions are found.

    Raises:
        ValueError: if a layer's block cannot be shared.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        factory: CurvatureFactory,
        rules: Mapping[str, BlockRule],
        ranks: ProcessRanks,
        refresh: Refresh,
    ) -> None:
        super().__init__(network, parameters, factory, rules)
        self.ranks: ProcessRanks = ranks
        self.shares = shares_of(self.members, ranks)
        self._by_name = {share.member.name: share for share in self.shares}
        self._refresh, self._schedule = refresh, Schedule(refresh)

    @property
    def ready(self) -> bool:
        """Whether every block can solve on the ranks that keep it."""
        others = (m.block.ready for m in self.members if m.name not in self._by_name)
        return all(share.found for share in self.shares) and all(others)

    # ------------------------------------------------------------------------------------------- update

    def update(self, record: Pass, seeds: Sequence[Outputs], refresh: bool, generator: Generator | None = None) -> bool:
        """Take in this rank's recorded pass and everyone else's.

        Args:
            record: the pass.
            seeds: output gradients, one backward pass each; as many on every rank.
            refresh: whether to decompose anew.
            generator: source of randomness for subsets of rows, this rank's own.

        Returns:
            False if anything was not finite on any rank; then nothing was taken in.
        """
        statistics, grads = self._pulled_back(record, seeds, generator)
        if not self._average(statistics, grads, record.examples):
            return False
        self._decompose(refresh)
        self._measure(statistics, record.examples)
        self._latest = statistics
        return True

    def _average(self, statistics: dict[str, Statistics], grads: list[Tensors], examples: int) -> bool:
        sound = self._finite(statistics, grads)
        summaries = [share.block.summary(statistics[share.member.name]) for share in self.shares]
        if self.ranks.size > 1:
            flat = [triangle(part.value) if isinstance(part, Gram) else part for s in summaries for part in s]
        else:
            flat = []
        sums = [torch.stack([grad[name].flatten() for grad in grads]) for name in self._free]
        means = self.ranks.means("statistics", [*flat, *(s / examples for s in sums)], examples, sound)
        if means is None:
            return False
        found = iter(means.tensors)
        for share, summary in zip(self.shares, summaries, strict=True):
            whole = _unpacked(summary, found) if self.ranks.size > 1 else summary
            share.block.basis_age += 1
            if share.kept:
                share.block.take(whole)
        for member in self.members:
            if isinstance(member.block, ParameterBlock):
                member.block.update_from_sums(next(found) * means.examples, means.examples)
        return True

    def _measure(self, statistics: dict[str, Statistics], examples: int) -> None:
        """Average in what depends on the bases, lending them to the ranks that do not keep them."""
        shares = [share for share in self._in_columns() if share.found and share.block.basis_shapes]
        measured: list[list[Tensor]] = []
        for column in range(self.ranks.grid.columns):
            mine = [share for share in shares if share.column == column]
            bases = [self._bases(share) for share in mine]
            lent = iter(self.ranks.along_row("bases", [basis for each in bases for basis in each], column))
            for share, own in zip(mine, bases, strict=True):
                measured.append(share.block.measured(statistics[share.member.name], [next(lent) for _ in own]))
        if not measured:
            return
        means = self.ranks.means("statistics", [part for each in measured for part in each], examples)
        assert means is not None
        found = iter(means.tensors)
        for share, each in zip(shares, measured, strict=True):
            whole = [next(found) for _ in each]
            if share.kept:
                share.block.take_measured(whole)

    def _in_columns(self) -> list[Share]:
        return sorted(self.shares, key=lambda share: share.column)

    @staticmethod
    def _bases(share: Share) -> list[Tensor]:
        return share.block.bases() if share.kept else [share.empty(shape) for shape in share.block.basis_shapes]

    # ------------------------------------------------------------------------------------------- refresh

    def _decompose(self, wanted: bool) -> None:
        """First decompositions at once; others as the refresh has it."""
        first = [share for share in self.shares if not share.found]
        if first:
            self._settle(first, self._job(first)(), 0)
        self._schedule.advance()
        self._use_what_is_due()
        later = [share for share in self.shares if share not in first]
        if wanted and later and not self._schedule.under_way:
            self._schedule.begin(self._job(later), [share.member.name for share in later])
            self._use_what_is_due()

    def _use_what_is_due(self) -> None:
        found = self._schedule.due()
        if found is not None:
            shares = [share for share in self.shares if share.member.name in self._schedule.layers]
            self._settle(shares, found, self._refresh.age)

    def _job(self, shares: list[Share]) -> Callable[[], Decomposed]:
        """What decomposes this rank's own layers among the given ones, from their averages as they are now."""
        tasks = {s.member.name: s.block.decomposing() for s in shares if s.owner == self.ranks.rank}
        return lambda: {name: _attempted(task) for name, task in tasks.items()}

    def _settle(self, shares: list[Share], found: Decomposed, age: int) -> None:
        """Bring decompositions from their owners to all ranks that keep the layers, and into use."""
        headers = torch.zeros(len(shares), HEADER, dtype=torch.int64, device=self.ranks.device)
        for row, share in enumerate(shares):
            if share.owner == self.ranks.rank:
                headers[row] = header_of(found[share.member.name])
        self.ranks.sums("decisions", headers)
        shapes = {s.member.name: shapes_of(h) for s, h in zip(shares, headers.tolist(), strict=True)}
        for share in shares:
            if shapes[share.member.name] is None:
                failure = f"no decomposition of '{share.member.name}' was finite on rank {share.owner}, its owner"
                share.block.count_failure(DecompositionError(failure))
        sound = [share for share in shares if shapes[share.member.name] is not None]
        for owner in sorted({share.owner for share in sound if share.kept}):
            self._send([share for share in sound if share.owner == owner], shapes, found, owner)
        for share in sound:
            share.found, share.block.failures, share.block.basis_age = True, 0, age

    def _send(
        self, shares: list[Share], shapes: Mapping[str, list[list[int]] | None], found: Decomposed, owner: int
    ) -> None:
        """One owner's decompositions down its column."""
        parts: list[Found] = []
        for share in shares:
            name = share.member.name
            parts.append(found.get(name) or [share.empty(shape) for shape in shapes[name] or []])
        received = iter(self.ranks.down_column("bases", [tensor for part in parts for tensor in part], owner))
        for share, part in zip(shares, parts, strict=True):
            share.block.adopt([next(received) for _ in part])

    # ------------------------------------------------------------------------------------------- use

    def _keeps(self, member: Member) -> bool:
        return member.name not in self._by_name or self._by_name[member.name].kept

    def _map(self, tensors: Tensors, function: Callable[[Member, Tensor], Tensor]) -> Tensors:
        return self._served({m.name: function(m, m.pack(tensors)) for m in self.members if self._keeps(m)}, tensors)

    def _served(self, matrices: Tensors, like: Tensors) -> Tensors:
        """By parameter what is known by layer, on every rank once those that keep a layer have sent it along."""
        for column in range(self.ranks.grid.columns if self.ranks.grid.columns > 1 else 0):
            shares = [share for share in self.shares if share.column == column]
            mine = [matrices[s.member.name] if s.kept else s.empty(s.block.shape) for s in shares]
            for share, matrix in zip(shares, self.ranks.along_row("solutions", mine, column), strict=True):
                matrices[share.member.name] = matrix
        out: Tensors = {}
        for member in self.members:
            out.update(member.unpack(matrices[member.name], like))
        return {name: out[name] for name in like}

    def solve_with_form(
        self, tensors: Tensors, damping: float, linearisation: Linearisation | None = None
    ) -> tuple[Tensors, Tensor]:
        """The damped solve X and its undamped form Xᵀ F̂ X, each layer's where it is kept.

        Args:
            tensors: one per trained parameter.
            damping: > 0.
            linearisation: not looked at.

        Returns:
            X, shaped like `tensors`, and a scalar tensor.
        """
        matrices, forms = {}, {}
        for m in filter(self._keeps, self.members):
            matrices[m.name], forms[m.name] = m.block.solve_with_form(m.pack(tensors), damping)
        return self._served(matrices, tensors), self._total(forms)

    def quadratic(self, tensors: Tensors, linearisation: Linearisation | None = None) -> Tensor:
        """Undamped tensorsᵀ F̂ tensors, each layer's part from where it is kept.

        Args:
            tensors: one per trained parameter.
            linearisation: not looked at.

        Returns:
            Scalar tensor ≥ 0.
        """
        return self._total({m.name: m.block.quadratic(m.pack(tensors)) for m in filter(self._keeps, self.members)})

    def _total(self, forms: Mapping[str, Tensor]) -> Tensor:
        """Layers' forms from all of the row, and what every rank knows by itself."""
        shared = [form for name, form in forms.items() if name in self._by_name]
        own = [form for name, form in forms.items() if name not in self._by_name]
        zero = torch.zeros_like(next(iter(forms.values()))) if forms else torch.zeros(())
        total = self.ranks.sum_over_row(torch.stack([zero, *shared]).sum())
        return torch.stack([total, *own]).sum()

    def solver_with_batch(
        self, damping: float, weight: float, linearisation: Linearisation | None = None
    ) -> Callable[[Tensors], Tensors]:
        """Refuse: a batch's own curvature is on as many ranks as its rows.

        Args:
            damping: unused.
            weight: unused.
            linearisation: unused.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("the batch's own curvature is not shared between ranks; take WakeSO, or no wake")

    def diagnostics(self) -> dict[str, float]:
        """As `BlockDiagonal` has them, the condition over the blocks that this rank keeps."""
        kept = [m.block.condition() for m in self.members if self._keeps(m) and m.block.ready]
        skipped = sum(member.block.skipped_refreshes for member in self.members)
        age = max(member.block.basis_age for member in self.members)
        return {
            "condition": max(kept, default=math.nan),
            "skipped_refreshes": float(skipped),
            "basis_age": float(age),
        }

    # ------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Every block's state by its name, whoever keeps it, and the refresh under way; to be called on all ranks."""
        names = {s.member.name for s in self.shares if s.owner != self.ranks.rank}
        mine = {m.name: m.block.state_dict() for m in self.members if m.name not in names}
        state: dict[str, Any] = {}
        for each in self.ranks.gathered((mine, self._schedule.state())):
            blocks, under_way = each
            state |= blocks
            if under_way is not None:
                left, found = state.get(_UNDER_WAY, (under_way[0], {}))
                state[_UNDER_WAY] = (left, found | under_way[1])
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the blocks that this rank keeps.

        Args:
            state: what `state_dict` returned, on as many ranks or others; or a `BlockDiagonal`'s.
        """
        super().load_state_dict({name: block for name, block in state.items() if name != _UNDER_WAY})
        for share in self.shares:
            share.found = share.block.ready
            if not share.kept:
                block = share.block
                counts = block.failures, block.skipped_refreshes, block.basis_age
                block.load_state_dict(share.blank)
                block.failures, block.skipped_refreshes, block.basis_age = counts
        self._schedule.restore(state.get(_UNDER_WAY))


def _unpacked(summary: Summary, found: Iterator[Tensor]) -> Summary:
    return [symmetric(next(found), p.rows.shape[1]) if isinstance(p, Gram) else next(found) for p in summary]


def _attempted(task: Callable[[], Found]) -> Found | None:
    try:
        return task()
    except DecompositionError:
        return None
