"""What breaks while an agent learns: counted by kind, logged, survived, and when it does not stop, the end.

Three sources fill the counts. Environments that restart by themselves tell of their faults in the infos of a step:
`faults`, a list of (kind, what). Environments that do not are watched here, and what is not finite costs the rollout.
The optimizers skip steps that are not finite, by cause.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from acktr.firstorder import FirstOrder
from acktr.optimizer import NaturalGradient

MAX_FAULTS = 10
"""Rollouts or steps in a row that may break before training ends."""
REMEDY = "stable_baselines3's VecCheckNan around the environment tells where the first NaN or Inf comes from"

_log = logging.getLogger("acktr.faults")


class Faults:
    """Counts what breaks.

    Args:
        limit: rollouts in a row that may break before training ends.
    """

    def __init__(self, limit: int = MAX_FAULTS) -> None:
        self.limit = limit
        self.counts: dict[str, int] = {}
        """How often, by kind; logged as `faults/KIND`."""
        self._in_a_row = 0
        self._recorded: dict[str, int] = {}
        self._own: dict[str, int] = {}

    def note(self, kind: str, what: str, alike: bool = False) -> None:
        """Count one fault, and say so at the first of its kind, the second, the fourth, and so on.

        Args:
            kind: what it is counted under.
            what: one line.
            alike: whether all processes that learn together count this one.
        """
        count = self.add(kind)
        if not alike:
            self._own[kind] = self._own.get(kind, 0) + 1
        if count & (count - 1) == 0:
            _log.warning("fault %d of kind '%s', training goes on: %s", count, kind, what)

    def add(self, kind: str) -> int:
        """Count one fault that ends training, and is told elsewhere.

        Args:
            kind: what it is counted under.

        Returns:
            How many there have been of its kind.
        """
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return self.counts[kind]

    def fresh(self) -> dict[str, int]:
        """What this process alone has counted since it was asked last."""
        own, self._own = self._own, {}
        return own

    def hear(self, counts: dict[str, int]) -> None:
        """Count what another process tells of.

        Args:
            counts: of its `fresh`.
        """
        for kind, count in counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count

    def take(self, infos: list[dict[str, Any]]) -> None:
        """Count what the environments of a step tell.

        Args:
            infos: one per environment.
        """
        for info in infos:
            for kind, what in info.get("faults", ()):
                self.note(kind, what)

    def lose(self, what: str, alike: bool = False) -> None:
        """Count a rollout from which nothing is learned.

        Args:
            what: why.
            alike: whether all processes that learn together lose this one.

        Raises:
            FloatingPointError: if it is one too many in a row.
        """
        self.note("rollout", what, alike)
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            times = "" if self.limit == 1 else f", {self.limit} rollouts in a row"
            raise FloatingPointError(f"{what}{times}; nothing was learned from that: {REMEDY}")

    def forgive(self) -> None:
        """A whole rollout was sound."""
        self._in_a_row = 0

    def follow(self, name: str, optimizer: NaturalGradient | FirstOrder, skipped_refreshes: float = 0.0) -> None:
        """Take over an optimizer's counts, which it keeps itself.

        Args:
            name: whose steps.
            optimizer: who takes them.
            skipped_refreshes: decompositions its curvature did without.
        """
        for cause, count in optimizer.causes.items():
            self.counts[f"{name}_{cause}"] = count
        if skipped_refreshes:
            self.counts[f"{name}_refresh"] = int(skipped_refreshes)

    def record(self, record: Callable[[str, Any], None]) -> None:
        """Log all counts; kinds that never came up are left out.

        Args:
            record: the logger's.
        """
        for kind, count in self.counts.items():
            record(f"faults/{kind}", count)
        self._recorded = dict(self.counts)

    @property
    def unrecorded(self) -> bool:
        """Whether anything broke since the counts were last logged."""
        return self.counts != self._recorded

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"counts": dict(self.counts), "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts.

        Args:
            state: what `state_dict` returned.
        """
        self.counts, self._in_a_row = dict(state["counts"]), int(state["in_a_row"])
        self._recorded = dict(self.counts)
