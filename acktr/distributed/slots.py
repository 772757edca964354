"""Memory that the processes of one machine share, each with a slot of its own, for what is small and cannot wait.

A message costs a process that sleeps and is woken, a tenth of a millisecond or more, several times in one sum; a step
of a small network takes one or two milliseconds. So processes of one machine write into a slot that all of them see,
and look until the others have written as well.
"""

from __future__ import annotations

import logging
import mmap
import os
import platform
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acktr.distributed.packing import widest
from acktr.ranks import LostRankError

if sys.platform != "win32":
    import fcntl

SLOT_BYTES = 256 * 1024
"""What a process can say at once."""
MOST_NUMBERS = 8
"""As many as the head of a slot has place for."""

_LINE = 64  # bytes of a cache line: no two counters in one
_LOOKS, _YIELDS = 200, 20_000  # at a counter before the core is offered to others, and before sleeping
_NAP, _ROLL_CALL, _ANSWER = 2e-4, 0.1, 1800.0  # seconds: a sleep, between two looks at who lives, before giving up
_FOLDER = "/dev/shm"
_ORDERLY = {"x86_64", "amd64"}
"""Processors on which others see writes in the order in which they were made."""

_log = logging.getLogger(__name__)


class Slots:
    """One slot for each process; in every exchange all of them write theirs, and read everyone's.

    There are two of each, in turn: who writes for the next exchange but one has seen that everyone began the next one,
    and so was done with reading.

    Args:
        memory: the same for all.
        file: where it is mapped from; each process holds a lock on its byte of it as long as it lives.
        rank: this process.
        size: how many there are.
    """

    def __init__(self, memory: mmap.mmap, file: int, rank: int, size: int) -> None:
        self._file, self._rank, self._size, self._exchanges = file, rank, size, 0
        # Words of eight bytes are written and read at once.
        self._counters = memoryview(memory)[: size * _LINE].cast("q")
        everything = torch.frombuffer(memory, dtype=torch.uint8)[size * _LINE :]
        self._slots = everything.view(2, size, SLOT_BYTES)
        self._memory = memory
        begins = [size * _LINE + place * SLOT_BYTES for place in range(2 * size)]
        self._places = begins[:size], begins[size:]
        self._typed: dict[tuple[int, torch.dtype], Sequence[Tensor]] = {}

    def exchange(self, own: Tensor) -> Tensor:
        """Tell everyone, and hear everyone; a call for all.

        Args:
            own: bytes, at most `SLOT_BYTES`.

        Returns:
            Everyone's slots, [processes, SLOT_BYTES], which begin with what each said; until the next exchange.
        """
        slots = self._slots[(self._exchanges + 1) % 2]
        slots[self._rank, : len(own)] = own
        self._meet()
        return slots

    def _meet(self) -> None:
        """Say that this process's slot is written, and wait until everyone's are."""
        self._exchanges += 1
        self._counters[self._rank * _LINE // 8] = self._exchanges
        for other in range(self._size):
            self._wait_for(other)

    def tell(self, numbers: Sequence[float]) -> list[tuple[float, ...]]:
        """Tell everyone a few numbers, and hear everyone's; a call for all.

        Args:
            numbers: as many everywhere, at most `MOST_NUMBERS`.

        Returns:
            Everyone's.
        """
        form = struct.Struct(f"{len(numbers)}d")
        places = self._places[(self._exchanges + 1) % 2]
        form.pack_into(self._memory, places[self._rank], *numbers)
        self._meet()
        return [form.unpack_from(self._memory, place) for place in places]

    def mean(self, tensors: Sequence[Tensor], examples: int, sound: bool) -> tuple[Tensor, int] | None:
        """Average over all examples what are means over this process's; a call for all.

        Args:
            tensors: alike everywhere.
            examples: how many are behind them.
            sound: whether they are worth anything.

        Returns:
            Their entries in a row, and everyone's examples; None if some process's are worth nothing.
        """
        count = sum(tensor.numel() for tensor in tensors)
        rows = self._rows((self._exchanges + 1) % 2, widest(tensors))
        torch.cat([tensor.reshape(-1) for tensor in tensors], out=rows[self._rank][:count])
        told = self.tell([examples, sound])
        if not all(sound for _, sound in told):
            return None
        total = sum(examples for examples, _ in told)
        # One after the other, so that every process rounds alike.
        mean = rows[0][:count] * (told[0][0] / total)
        for row, (number, _) in zip(rows[1:], told[1:], strict=True):
            mean.add_(row[:count], alpha=number / total)
        return mean, int(total)

    def _rows(self, turn: int, dtype: torch.dtype) -> Sequence[Tensor]:
        """Everyone's slots behind their heads, as numbers."""
        if (turn, dtype) not in self._typed:
            self._typed[turn, dtype] = self._slots[turn, :, _LINE:].view(dtype).unbind()
        return self._typed[turn, dtype]

    @staticmethod
    def hold(*tensors: Tensor) -> bool:
        """Whether a slot is enough for tensors.

        Args:
            tensors: any.

        Returns:
            Whether their entries are in the processor's memory, and few enough.
        """
        entries = sum(tensor.numel() for tensor in tensors)
        return tensors[0].device.type == "cpu" and entries * widest(tensors).itemsize <= SLOT_BYTES - _LINE

    def sum(self, tensor: Tensor) -> None:
        """Add up in place, over all processes; a call for all.

        Args:
            tensor: of one shape and type everywhere.
        """
        own = tensor.contiguous().view(-1)
        # One after the other, so that every process rounds alike.
        total, *others = self.exchange(own.view(torch.uint8))[:, : own.nbytes].view(own.dtype)
        tensor.copy_(total.view(tensor.shape))
        for other in others:
            tensor += other.view(tensor.shape)

    def send(self, tensor: Tensor, source: int) -> Tensor:
        """Tell everyone what one process has; a call for all.

        Args:
            tensor: of one shape and type everywhere.
            source: whose it is.

        Returns:
            What it is there, in one dimension.
        """
        own = tensor.contiguous().view(-1).view(torch.uint8)
        everyones = self.exchange(own if self._rank == source else own[:0])
        return everyones[source, : len(own)].clone().view(tensor.dtype)

    def _wait_for(self, other: int) -> None:
        counters, place, exchange = self._counters, other * _LINE // 8, self._exchanges
        for _ in range(_LOOKS):
            if counters[place] >= exchange:
                return
        for _ in range(_YIELDS):
            os.sched_yield()
            if counters[place] >= exchange:
                return
        begun = looked = time.monotonic()
        while counters[place] < exchange:
            time.sleep(_NAP)
            now = time.monotonic()
            if now > looked + _ROLL_CALL:
                looked = now
                self._call_the_roll()
            if now > begun + _ANSWER:
                raise LostRankError(f"rank {other} did not answer for {_ANSWER:g} s")

    def _call_the_roll(self) -> None:
        """Miss who is gone; not the awaited one alone, for that one may be waiting for another."""
        gone = [other for other in range(self._size) if not (self._has_answered(other) or self._lives(other))]
        # Who answered and left since then is none of them.
        missed = [str(other) for other in gone if not self._has_answered(other)]
        if missed:
            raise LostRankError(f"rank {' and '.join(missed)} is gone")

    def _has_answered(self, other: int) -> bool:
        return self._counters[other * _LINE // 8] >= self._exchanges

    def _lives(self, other: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, other)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, other)
        return False


def exchanged(slots: Slots, own: Tensor) -> list[Tensor] | None:
    """Tell everyone bytes of any number; a call for all.

    Args:
        slots: the processes'.
        own: bytes.

    Returns:
        What each said; None, alike everywhere, if that was too much for someone's slot.
    """
    number = torch.tensor([len(own)], dtype=torch.int64).view(torch.uint8)
    everyones = slots.exchange(torch.cat([number, own[: SLOT_BYTES - len(number)]]))
    sizes = [int(slot[: len(number)].view(torch.int64)) for slot in everyones]
    if max(sizes) > SLOT_BYTES - len(number):
        return None
    return [slot[len(number) :][:size].clone() for slot, size in zip(everyones, sizes, strict=True)]


def slots_of(rank: int, size: int, first: Callable[[Any], Any], everyone: Callable[[bool], bool]) -> Slots | None:
    """Find memory that all processes share; a call for all of them.

    Args:
        rank: this process.
        size: how many there are.
        first: tells what the first process says.
        everyone: whether something holds everywhere.

    Returns:
        Theirs; None if they have none, because they are on several machines, or on one of another kind.
    """
    file, path = _made(size) if rank == 0 else (-1, None)
    path = first(path)
    if path is None:
        return None
    memory = None
    try:
        file = file if rank == 0 else os.open(path, os.O_RDWR)
        memory = mmap.mmap(file, bytes_of(size))
        fcntl.lockf(file, fcntl.LOCK_EX, 1, rank)  # before anybody may ask for it
    except OSError as error:
        _log.info("rank %d sends what is small by messages: %s", rank, error)
    try:
        common = everyone(memory is not None)
    finally:
        if rank == 0:
            Path(path).unlink()
    return Slots(memory, file, rank, size) if common and memory is not None else None


def _made(size: int) -> tuple[int, str | None]:
    """A new file in memory; no name where there can be none."""
    if platform.machine().lower() not in _ORDERLY or not Path(_FOLDER).is_dir():
        return -1, None
    file, path = -1, None
    try:
        file, path = tempfile.mkstemp(prefix="acktr-", dir=_FOLDER)
        os.posix_fallocate(file, 0, bytes_of(size))
    except OSError as error:
        _log.info("what is small is sent by messages: %s", error)
        if path is not None:
            os.close(file)
            Path(path).unlink()
        return -1, None
    return file, path


def bytes_of(size: int) -> int:
    """What the memory of some processes takes.

    Args:
        size: how many they are.

    Returns:
        Bytes.
    """
    return size * (_LINE + 2 * SLOT_BYTES)
