"""A process group's collectives in the terms of training: means over all examples, decisions, bases; counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from acktr.distributed.packing import as_bytes, buckets, from_bytes, joined, taken_apart, widest
from acktr.distributed.placement import Grid
from acktr.distributed.slots import MOST_NUMBERS, Slots, exchanged, slots_of
from acktr.ranks import LostRankError, Ranks
from acktr.tree import Tensors

_met: list[tuple[Any, Slots | None]] = []
"""The process group, and the memory that its processes share."""

Kind = Literal["statistics", "bases", "gradients", "solutions", "decisions"]
"""What travels: moments and scalings; decompositions; the objective's; damped solves; numbers that steps depend on."""
MOST_BYTES = 32 * 2**20
"""Of one collective."""


class Means(NamedTuple):
    """Means over everyone's examples."""

    tensors: list[Tensor]
    examples: int
    """How many are behind them."""


def running() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ProcessRanks(Ranks):
    """The processes of the default process group; where there is none, or one process, nothing travels.

    Args:
        grid: rows and columns.
        most_bytes: of one collective; larger sums travel as several, all under way at once.
    """

    _slots: Slots | None = None

    def __init__(self, grid: Grid, most_bytes: int = MOST_BYTES) -> None:
        self.size, self.rank = (dist.get_world_size(), dist.get_rank()) if running() else (1, 0)
        if grid.size != self.size:
            raise ValueError(f"a grid of {grid.size} ranks for a process group of {self.size}")
        self.grid, self.most_bytes = grid, most_bytes
        self.traffic: Counter[str] = Counter()
        """Bytes by kind that this rank gave to collectives or got from them, each buffer counted once."""
        self._columns = [self._group(grid.in_column(column)) for column in range(grid.columns)]
        self._rows = [self._group(grid.in_row(row)) for row in range(grid.rows)]
        gpu = running() and dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self._slots = self._common_slots()

    def _common_slots(self) -> Slots | None:
        """The memory that the processes share, found once for a process group."""
        if self.size == 1:
            return None
        group = dist.group.WORLD
        if not _met or _met[0][0] is not group:
            _met[:] = [(group, slots_of(self.rank, self.size, self.first, self._all))]
        return _met[0][1]

    def _group(self, ranks: list[int]) -> Any:
        """Torch's group of these ranks: every process takes part in making each; None for the default one."""
        return dist.new_group(ranks) if 1 < len(ranks) < self.size else None

    # ------------------------------------------------------------------------------------------- for the optimizer

    def begin(self, tensors: Sequence[Tensor], settings: str) -> None:
        """Start from rank 0's parameters, after a look at whether all ranks were set up alike.

        Args:
            tensors: parameters and buffers, overwritten in place.
            settings: a description of how this rank was set up.

        Raises:
            ValueError: on every rank, if one was set up otherwise than rank 0.
        """
        if self.size == 1:
            return
        settings = re.sub(r" at 0x[0-9a-f]+", "", settings)
        told = self.gathered(settings)
        others = [rank for rank, other in enumerate(told) if other != told[0]]
        if others:
            first, other = _difference(told[0], told[others[0]])
            raise ValueError(
                f"ranks {others} were set up otherwise than rank 0: '{other}' there, '{first}' here; "
                "start every rank with the same settings"
            )
        with torch.no_grad():
            for tensor in tensors:
                start = tensor.detach().contiguous()
                with _answered():
                    dist.broadcast(start, 0)
                tensor.copy_(start)

    def mean(self, value: Tensor, examples: int) -> Tensor:
        """As `Ranks` has it, in float64.

        Args:
            value: of any shape, alike on every rank.
            examples: how many are behind it.

        Returns:
            Shaped like the value.
        """
        if self.size == 1:
            return value
        *totals, count = self._totals([*(x * examples for x in value.flatten().tolist()), examples])
        return value.new_tensor([total / count for total in totals]).view(value.shape)

    def mean_gradient(self, gradient: Tensors, examples: int) -> Tensors:
        """As `Ranks` has it.

        Args:
            gradient: of the mean over this rank's examples.
            examples: how many these are.

        Returns:
            By name, the same on every rank to the last bit.
        """
        means = self.means("gradients", list(gradient.values()), examples)
        assert means is not None
        return dict(zip(gradient, means.tensors, strict=True))

    def agreed(self, value: float) -> float:
        """Rank 0's number.

        Args:
            value: what it is here.

        Returns:
            What it is there.
        """
        if self.size == 1:
            return value
        self._count("decisions", 1, torch.float64)
        if self._slots is not None:
            return self._slots.tell([value])[0][0]
        number = torch.tensor([value], dtype=torch.float64, device=self._device)
        with _answered():
            dist.broadcast(number, 0)
        return float(number)

    def all(self, flag: bool) -> bool:
        """Whether something holds on every rank.

        Args:
            flag: whether it holds here.

        Returns:
            Whether it does.
        """
        return flag if self.size == 1 else self._all(flag)

    def _all(self, flag: bool) -> bool:
        return self._totals([0.0 if flag else 1.0]) == [0.0]

    def _totals(self, numbers: list[float]) -> list[float]:
        """Sums over all processes."""
        if self._slots is not None and len(numbers) <= MOST_NUMBERS:
            self._count("decisions", len(numbers), torch.float64)
            return [sum(each) for each in zip(*self._slots.tell(numbers), strict=True)]
        flat = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        self._sum("decisions", flat)
        totals: list[float] = flat.tolist()
        return totals

    def total(self, number: float) -> float:
        """As `Ranks` has it.

        Args:
            number: what it is here.

        Returns:
            The sum.
        """
        return number if self.size == 1 else self._totals([number])[0]

    def gathered(self, thing: Any) -> list[Any]:
        """Every rank's; not counted, because it is for starts and checkpoints.

        Args:
            thing: what can be pickled.

        Returns:
            One for each rank.
        """
        if self.size == 1:
            return [thing]
        # Not by torch's own collectives for objects, which want numpy.
        own = as_bytes(thing).to(self._device)
        if self._slots is not None and (told := exchanged(self._slots, own)) is not None:
            return [from_bytes(each, self._device) for each in told]
        sizes = torch.zeros(self.size, dtype=torch.int64, device=self._device)
        sizes[self.rank] = len(own)
        with _answered():
            dist.all_reduce(sizes)
            longest = int(sizes.max())
            everyones = [own.new_empty(longest) for _ in range(self.size)]
            dist.all_gather(everyones, torch.nn.functional.pad(own, (0, longest - len(own))))
        pairs = zip(everyones, sizes.tolist(), strict=True)
        return [from_bytes(buffer[:size], self._device) for buffer, size in pairs]

    def first(self, thing: Any) -> Any:
        """Rank 0's; not counted either.

        Args:
            thing: what can be pickled; looked at there alone.

        Returns:
            What it is there.
        """
        if self.size == 1:
            return thing
        own = as_bytes(thing).to(self._device) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(own)], device=self._device)
        with _answered():
            dist.broadcast(size, 0)
            buffer = own if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device=self._device)
            dist.broadcast(buffer, 0)
        return thing if self.rank == 0 else from_bytes(buffer, self._device)

    # ------------------------------------------------------------------------------------------- for the curvature

    def means(self, kind: Kind, tensors: Sequence[Tensor], examples: int, sound: bool = True) -> Means | None:
        """Means over everyone's examples of many tensors that are means over this rank's, in few collectives.

        Args:
            kind: what they are.
            tensors: alike on every rank.
            examples: how many are behind these.
            sound: whether the tensors are worth anything.

        Returns:
            As many, the same on every rank to the last bit; None if they are worth nothing on some rank.
        """
        if self.size == 1:
            return Means(list(tensors), examples) if sound else None
        if not tensors:
            return Means([], examples) if self.all(sound) else None
        if self._slots is not None and self._slots.hold(*tensors):
            self._count(kind, sum(tensor.numel() for tensor in tensors) + 2, widest(tensors))
            found = self._slots.mean(tensors, examples, sound)
            return found and Means(taken_apart(found[0], tensors), found[1])
        # Ends in the number of examples, and in how many processes have nothing of worth.
        flat = joined([*tensors, tensors[0].new_tensor([1.0, 0.0 if sound else 1.0])])
        flat[:-1] *= examples
        self._sum(kind, flat)
        count, broken = flat[-2:].tolist()
        return None if broken else Means(taken_apart(flat[:-2] / count, tensors), int(count))

    def sums(self, kind: Kind, tensor: Tensor) -> None:
        """Add up in place, over all ranks.

        Args:
            kind: what it is.
            tensor: on the processes' device or the backend's, alike on every rank.
        """
        if self.size > 1:
            self._sum(kind, tensor)

    def sum_over_row(self, value: Tensor) -> Tensor:
        """The sum over this rank's row.

        Args:
            value: scalar.

        Returns:
            Scalar.
        """
        if self.grid.columns == 1:
            return value
        total, group = value.reshape(1).to(self._device, copy=True), self._rows[self.grid.row_of(self.rank)]
        if group is None:
            self._sum("decisions", total)
        else:
            self._count("decisions", 1, total.dtype)
            with _answered():
                dist.all_reduce(total, group=group)
        return total.to(value.device).view(value.shape)

    def down_column(self, kind: Kind, tensors: Sequence[Tensor], source: int) -> list[Tensor]:
        """Send from a rank to the others of its column; call it on all of these, and on no other.

        Args:
            kind: what is sent.
            tensors: what they are at the source; of the same shapes and types elsewhere.
            source: the rank.

        Returns:
            What they are at the source.
        """
        column = self.grid.column_of(source)
        return self._send(kind, tensors, source, self._columns[column], self.grid.rows)

    def along_row(self, kind: Kind, tensors: Sequence[Tensor], column: int) -> list[Tensor]:
        """Send from this row's rank of a column to the whole row; call it on all ranks.

        Args:
            kind: what is sent.
            tensors: what they are at the source; of the same shapes and types elsewhere.
            column: the source's.

        Returns:
            What they are at the source.
        """
        row = self.grid.row_of(self.rank)
        return self._send(kind, tensors, self.grid.in_row(row)[column], self._rows[row], self.grid.columns)

    @property
    def device(self) -> torch.device:
        """Where numbers that the backend moves have to be."""
        return self._device

    def _send(self, kind: Kind, tensors: Sequence[Tensor], source: int, group: Any, receivers: int) -> list[Tensor]:
        if receivers == 1 or not tensors:
            return list(tensors)
        flat = joined(tensors)
        self._count(kind, len(flat), flat.dtype)
        if group is None and self._slots is not None and self._slots.hold(flat):
            return taken_apart(self._slots.send(flat, source), tensors)
        with _answered():
            dist.broadcast(flat, source, group=group)
        # The source goes on with what it sent: a decomposition's own tensors may lie in memory in another order, in
        # which products are rounded otherwise.
        return taken_apart(flat, tensors)

    def _sum(self, kind: Kind, flat: Tensor) -> None:
        self._count(kind, flat.numel(), flat.dtype)
        if self._slots is not None and self._slots.hold(flat):
            self._slots.sum(flat)
            return
        with _answered():
            under_way = [dist.all_reduce(bucket, async_op=True) for bucket in buckets(flat, self.most_bytes)]
            for work in under_way:
                work.wait()

    def _count(self, kind: Kind, numbers: int, dtype: torch.dtype) -> None:
        self.traffic[kind] += numbers * dtype.itemsize


@contextmanager
def _answered() -> Generator[None]:
    """Collectives, which fail where another process is gone.

    Yields:
        Nothing.

    Raises:
        LostRankError: if they fail.
    """
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0])  # without the place in a library's source
        raise LostRankError(reason.split(". ", 1)[0]) from error


def _difference(first: str, other: str) -> tuple[str, str]:
    """The surroundings of the first place in which two descriptions differ."""
    place = next((k for k, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))
    begin = max(0, place - 30)
    return first[begin : place + 30], other[begin : place + 30]
