"""What processes of one machine tell each other through common memory."""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from acktr.distributed import slots
from acktr.distributed.slots import SLOT_BYTES, Slots, bytes_of, exchanged, slots_of
from acktr.ranks import LostRankError

CHILD = """
import sys, time
sys.path[:0] = {path!r}
from tests.acktr.test_slots import mapped
other = mapped({file!r}, 1, 2)
print("there", flush=True)
other.tell([2.0])
{then}
other.tell([3.0])
"""


def mapped(file: str, rank: int, size: int) -> Slots:
    descriptor = os.open(file, os.O_RDWR)
    memory = mmap.mmap(descriptor, bytes_of(size))
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, rank)
    return Slots(memory, descriptor, rank, size)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "memory"
    path.write_bytes(bytes(bytes_of(3)))
    return str(path)


def in_threads(file: str, size: int, act) -> list:
    """What every rank found, each in a thread of its own with a mapping of its own."""
    everyone, found = [mapped(file, rank, size) for rank in range(size)], [None] * size

    def run(rank: int) -> None:
        found[rank] = act(everyone[rank], rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_sums_means_and_messages_are_everyones(file):
    def act(own, rank):
        total = torch.full((2, 3), rank + 1.0)
        own.sum(total)
        mean = own.mean(
            [torch.tensor([1.0 * rank]), torch.tensor([[2.0], [rank]], dtype=torch.float64)], rank + 1, True
        )
        sent = own.send(torch.arange(4) * (rank == 2), 2)
        return total, mean, own.mean([torch.ones(1)], 1, rank != 1), sent, own.tell([rank]), exchanged(own, b(rank))

    def b(rank):
        return torch.full((rank * 1000,), rank, dtype=torch.uint8)

    for total, mean, unsound, sent, numbers, messages in in_threads(file, 3, act):
        assert total.tolist() == [[6.0] * 3] * 2
        # Of one, two and three examples: (0 + 2 + 6) / 6; (0 + 2·1 + 3·2) / 6.
        assert mean[0].tolist() == pytest.approx([8 / 6, 2.0, 8 / 6])
        assert mean[1] == 6
        assert unsound is None
        assert sent.tolist() == [0, 1, 2, 3]
        assert numbers == [(0.0,), (1.0,), (2.0,)]
        assert [len(message) for message in messages] == [0, 1000, 2000]
        assert [set(message.tolist()) for message in messages] == [set(), {1}, {2}]


def test_two_slots_in_turn_are_enough_for_who_is_ahead(file):
    """Rank 0 writes as soon as it may, rank 1 reads late: nothing that is still to be read is written over."""

    def act(own, rank):
        heard = []
        for number in range(200):
            everyones = own.exchange(torch.tensor([number % 251, rank], dtype=torch.uint8))
            if rank and number % 50 == 0:
                time.sleep(0.01)
            heard.append(everyones[:, :2].tolist())
        return heard

    for heard in in_threads(file, 2, act):
        assert heard == [[[number % 251, 0], [number % 251, 1]] for number in range(200)]


def test_what_is_too_much_for_one_slot_is_left_to_messages_by_all(file):
    def act(own, rank):
        return exchanged(own, torch.zeros(SLOT_BYTES if rank else 1, dtype=torch.uint8))

    assert in_threads(file, 2, act) == [None, None]
    assert Slots.hold(torch.zeros(1000))
    assert not Slots.hold(torch.zeros(SLOT_BYTES // 8), torch.zeros(SLOT_BYTES // 8))


@pytest.mark.parametrize(("then", "lost"), [("import os; os.kill(os.getpid(), 9)", True), ("time.sleep(0.6)", False)])
def test_who_died_is_missed_within_a_second_and_who_is_slow_is_waited_for(file, then, lost):
    own = mapped(file, 0, 2)
    command = [sys.executable, "-c", CHILD.format(path=sys.path, file=file, then=then)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "there\n"
    assert own.tell([1.0]) == [(1.0,), (2.0,)]
    begun = time.monotonic()
    if lost:
        with pytest.raises(LostRankError, match="rank 1 is gone"):
            own.tell([1.0])
        assert time.monotonic() - begun < 10  # a tenth of a second and the process's end, on whatever machine
    else:
        assert own.tell([1.0]) == [(1.0,), (3.0,)]
        assert time.monotonic() - begun > 0.5
    child.communicate(timeout=30)


def test_elsewhere_there_are_none(monkeypatch, tmp_path):
    """Where memory may be seen in another order, on another machine, and without the folder: all agree on messages."""

    def first(thing):
        return thing

    monkeypatch.setattr(slots, "_ORDERLY", {platform.machine().lower()})
    assert slots_of(0, 1, first, lambda flag: flag) is not None
    before = set(Path("/dev/shm").glob("acktr-*"))
    assert slots_of(0, 2, first, lambda _: False) is None  # another one cannot open it
    assert slots_of(1, 2, lambda _: str(tmp_path / "elsewhere"), lambda flag: flag) is None
    assert set(Path("/dev/shm").glob("acktr-*")) == before
    monkeypatch.setattr(slots, "_FOLDER", str(tmp_path / "none"))
    assert slots_of(0, 1, first, lambda flag: flag) is None
    monkeypatch.setattr(slots, "_ORDERLY", set())
    assert slots_of(0, 1, first, lambda flag: flag) is None
