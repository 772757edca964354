"""The processes of one run (ranks): how they begin, agree on what is wrong, and end together.

``torchrun`` starts them and says where they meet. A process by itself is what it always was: nothing here concerns it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from acktr.distributed import Grid, ProcessRanks
from acktr.ranks import LostRankError, Ranks
from agents.errors import UsageError
from envs import WorldError

T = TypeVar("T")

MEETING = timedelta(seconds=60)
"""How long processes wait for each other at the beginning."""
ANSWER = timedelta(minutes=30)
"""How long a collective may take: the first process evaluates and writes while the others wait."""
GRACE = 25.0
"""Seconds from SIGTERM to the end, whatever is waited for; torchrun kills after thirty."""
ROLL_CALL = 5.0
"""Seconds in which processes that lost another say that they are there themselves."""
LOST, MISTAKE = 1, 2
"""Exit statuses: of a process that lost another, and of one that was started wrongly."""

_PLACES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


@dataclass
class Company:
    """The processes of a run."""

    ranks: Ranks = field(default_factory=Ranks)
    """What they compute together."""
    tell: Callable[[str], None] = print
    """Where to say what went wrong."""
    store: Any = None
    """What they know of each other besides; None for a process by itself."""
    remedy: str = "start it again"
    """What to do when one is lost."""

    def lost(self, error: LostRankError) -> NoReturn:
        """End this process, because another is gone; one of those that are left says so.

        Args:
            error: What was noticed.
        """
        for which in (signal.SIGTERM, signal.SIGINT):  # torchrun has noticed too, and must not cut the word off
            signal.signal(which, signal.SIG_IGN)
        try:
            gone = self._gone()
        except RuntimeError:  # the store went with the process that kept it
            gone = "another rank"
        if gone is not None:
            self.tell(f"error: {gone} died or does not answer, so all stop ({error}); {self.remedy}")
        _leave(LOST)

    def _gone(self) -> str | None:
        """Who is lost; None if somebody else says it."""
        self.store.set(f"here-{self.ranks.rank}", "1")
        if self.store.check(["over"]):
            return None
        first = self.store.add("lost", 1) == 1
        if first or self.ranks.rank == 0:  # with rank 0 the store may go, while another asks it
            time.sleep(ROLL_CALL if first else 1.2 * ROLL_CALL)
        if not first:
            return None
        if self.store.check(["over"]):
            return None
        gone = [str(rank) for rank in range(self.ranks.size) if not self.store.check([f"here-{rank}"])]
        return f"rank {' and '.join(gone)}" if gone else "a rank"


@contextmanager
def joined(tell: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> Generator[Company]:
    """Meet the other processes of the run, and end should one of them be lost.

    Args:
        tell: Where to say what went wrong.
        environ: Who this process is and where it meets the others, in torchrun's words.

    Yields:
        The processes; this one alone, where nobody speaks of others.
    """
    place = _place(environ)
    if place is None:
        yield Company(tell=tell)
        return
    rank, size = place
    store = _begin(rank, size, environ)
    _end_with_the_agent(environ)
    if rank:
        logging.basicConfig(format=f"rank {rank}: %(message)s")
    company = Company(ProcessRanks(Grid(size, size)), tell, store)
    _watch_for_the_end(company)
    try:
        yield company
    except LostRankError as error:
        company.lost(error)
    finally:  # who leaves by itself has its own say, and is not lost
        with suppress(RuntimeError):
            store.set("over", "1")
    dist.destroy_process_group()


def alike(company: Company, local: Callable[[], T]) -> T:
    """Do in each process what the others have no part in; a mistake found by one ends all, with one line.

    Args:
        company: The processes.
        local: What to do.

    Returns:
        What came of it here.

    Raises:
        SystemExit: In all processes, if it was a mistake in one.
    """
    ranks = company.ranks
    if ranks.size == 1:
        return local()
    found, complaint = None, None
    try:
        found = local()
    except (UsageError, WorldError) as mistake:
        complaint = " ".join(str(mistake).split())
    told = [(rank, text) for rank, text in enumerate(ranks.gathered(complaint)) if text is not None]
    if not told:
        return found  # type: ignore[return-value]
    if ranks.rank == 0:
        rank, text = told[0]
        company.tell(f"error: rank {rank}: {text}" if rank else f"error: {text}")
    ranks.all(True)  # it is said before anybody leaves
    raise SystemExit(MISTAKE)


def by_first(company: Company, local: Callable[[], T]) -> T:
    """Do something in the first process alone, as ``alike``.

    Args:
        company: The processes.
        local: What to do.

    Returns:
        What came of it there, in all of them.
    """
    found = alike(company, local if company.ranks.rank == 0 else lambda: None)
    return company.ranks.first(found)  # type: ignore[no-any-return]


def check_same(company: Company, settings: Mapping[str, Any]) -> None:
    """Refuse processes that were started with other settings than the first.

    Args:
        company: The processes.
        settings: By name.
    """
    everyones = company.ranks.gathered(dict(settings))

    def compare() -> None:
        first = everyones[0]
        for rank, other in enumerate(everyones):
            for name in sorted(first.keys() | other.keys()):
                one, here = first.get(name), other.get(name)
                if repr(one) != repr(here):
                    raise UsageError(
                        f"rank {rank} has {name} {here!r}, rank 0 has {one!r}; start all ranks with the same settings"
                    )

    alike(company, compare)


def ranks_of(agent: OnPolicyAlgorithm) -> Ranks:
    """Say which processes learn together.

    Args:
        agent: Who learns.

    Returns:
        The agent's; its own process alone where it knows of no others.
    """
    ranks = getattr(agent, "ranks", None)
    return ranks if isinstance(ranks, Ranks) else Ranks()


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """Say how often torchrun has started the run again.

    Args:
        environ: Torchrun's words.

    Returns:
        0 at the first start, and where nobody says.
    """
    count = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdigit() else 0


def _place(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Find this process's place.

    Returns:
        Its rank, and how many there are; None for a process by itself.

    Raises:
        UsageError: If the environment says half of it, or nonsense.
    """
    said = [name for name in _PLACES[:2] if name in environ]
    if not said or environ.get("WORLD_SIZE") == "1":
        return None
    missing = [name for name in _PLACES if not environ.get(name)]
    if missing:
        raise UsageError(
            f"{said[0]} is set but not {' and '.join(missing)}, so the ranks cannot meet; start with torchrun, "
            f"or unset {said[0]}"
        )
    rank, size = environ["RANK"], environ["WORLD_SIZE"]
    if not (rank.isdigit() and size.isdigit() and int(rank) < int(size)):
        raise UsageError(f"RANK {rank!r} of WORLD_SIZE {size!r} is no place; start with torchrun, or unset both")
    return int(rank), int(size)


def _begin(rank: int, size: int, environ: Mapping[str, str]) -> Any:
    """Make torch's process group.

    Returns:
        A store that all processes share.

    Raises:
        UsageError: If they do not meet.
    """
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=MEETING))
        store.set_timeout(MEETING)
        dist.init_process_group(
            _backend(rank, environ),
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=ANSWER,
        )
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
        raise UsageError(
            f"rank {rank} did not meet the {size - 1} others at {where} within {MEETING.seconds} s "
            f"({str(error).splitlines()[0]}); start all of them, with torchrun"
        ) from None
    return PrefixStore("company", store)


def _backend(rank: int, environ: Mapping[str, str]) -> str:
    """What moves numbers: gloo those on processors, NCCL those on GPUs, where each process has one of its own."""
    if not torch.cuda.is_available():
        return "gloo"
    local, count = int(environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
    torch.cuda.set_device(local % count)
    alone = int(environ.get("LOCAL_WORLD_SIZE", count)) <= count and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if alone else "gloo"


def _end_with_the_agent(environ: Mapping[str, str]) -> None:
    """Stop if torchrun itself is killed, which then can stop nobody."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in environ:
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _watch_for_the_end(company: Company) -> None:
    """End some time after SIGTERM or SIGINT in any case.

    Python's handlers run between two of its own instructions, and a process that waits for another comes to none. So
    a thread is told of signals as well.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        with receiver, sender:
            while not {signal.SIGTERM, signal.SIGINT} & set(receiver.recv(64)):
                pass
            time.sleep(GRACE)
            company.tell(f"error: rank {company.ranks.rank} still waited {GRACE:g} s after it was told to stop")
            _leave(LOST)

    threading.Thread(target=wait, daemon=True, name="acktr-end").start()


def _leave(status: int) -> NoReturn:
    # Whatever else there is of clean-up would wait for processes that are gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
