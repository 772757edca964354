"""A factor that is updated by its batches' rows and never formed (Brand 2006; B-KFAC, Puiu 2022).

An average of moments changes by few directions at a time, K' = ρ K + (1 − ρ) C Cᵀ with one column of C per row of the
batch. From K ≈ U D Uᵀ the new eigenpairs follow without K, at a cost linear in its width: with C = U P + Q R,

    K' = [U Q] M [U Q]ᵀ,   M = [[ρ D + P' P'ᵀ, P' R'ᵀ], [R' P'ᵀ, R' R'ᵀ]],   P' = √(1 − ρ) P, R' likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from acktr.curvature.lowrank.factors import Factor, Sketch
from acktr.curvature.lowrank.spectrum import Spectrum
from acktr.linalg import DecompositionError, ritz_pairs, symmetric_eigen
from acktr.moments import Gram, Moment

DRIFT = 100
"""Largest entry of UᵀU − I and UᵀQ, in units of rounding, before the whole frame is orthogonalised again."""


def brand_update(basis: Tensor, values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of U D Uᵀ + C Cᵀ, exact; a DecompositionError where there are none that are finite.

    Args:
        basis: U, orthonormal, shape [n, m].
        values: D ≥ 0, shape [m].
        columns: C, shape [n, c], with m + c ≤ n.

    Returns:
        Orthonormal vectors [n, m + c] and values [m + c], ascending.
    """
    frame, coordinates = _frame(basis, columns)
    weights = torch.cat([values, values.new_ones(columns.shape[1])])
    values, turn = symmetric_eigen((coordinates * weights) @ coordinates.mT)
    return frame @ turn, values


def _frame(basis: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal frame that spans U and C, and [U C] in its coordinates."""
    rank, count = basis.shape[1], columns.shape[1]
    inside = basis.mT @ columns
    outside = columns - basis @ inside
    again = basis.mT @ outside  # what rounding left inside
    new, corner = torch.linalg.qr(outside - basis @ again)
    frame = torch.cat([basis, new], dim=1)
    identity = torch.eye(rank, rank + count, dtype=basis.dtype, device=basis.device)
    drift = (basis.mT @ frame - identity).abs().max() if rank else 0.0
    # Updates add up to a drift; and where C lies inside U nothing is left for QR, whose columns then point anywhere.
    if not drift <= DRIFT * torch.finfo(basis.dtype).eps:
        frame, coordinates = torch.linalg.qr(torch.cat([basis, columns], dim=1))
        return frame, coordinates
    top = torch.cat([identity[:, :rank], inside + again], dim=1)
    return frame, torch.cat([top, torch.cat([corner.new_zeros(len(corner), rank), corner], dim=1)])


class Repair(Protocol):
    """What a maintained moment is used for, now and then."""

    @property
    def period(self) -> int:
        """Updates between two repairs."""
        ...

    def __call__(self, matrix: Tensor, basis: Tensor, values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Better eigenpairs.

        Args:
            matrix: the moment, shape [n, n].
            basis: U, shape [n, m].
            values: D, shape [m], ascending.
            seed: of what is drawn at random.

        Returns:
            Vectors and values, ascending.
        """
        ...


@dataclass(frozen=True)
class Overwrite:
    """Replace everything by a sketch of the moment (B-R-KFAC)."""

    period: int
    """Updates between two repairs."""
    rank: int
    """Eigenvectors to look for."""
    sketch: Sketch
    """How they are looked for, from the present basis."""

    def __call__(self, matrix: Tensor, basis: Tensor, values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Sketch the moment.

        Args:
            matrix: the moment, shape [n, n].
            basis: U, shape [n, m].
            values: not looked at.
            seed: of the sketch's random columns.

        Returns:
            `rank` vectors and values.
        """
        found, vectors = self.sketch(matrix, self.rank, basis, seed)
        return vectors[:, -self.rank :], found[-self.rank :]


@dataclass(frozen=True)
class Correction:
    """One Rayleigh–Ritz step within a random subset of the columns (B-KFAC-C)."""

    period: int
    """Updates between two repairs."""
    share: float
    """Of the columns, in (0, 1]; 1 is the best that the basis's space can do."""

    def __call__(self, matrix: Tensor, basis: Tensor, values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Turn the subset into the moment's Ritz vectors.

        Args:
            matrix: the moment, shape [n, n].
            basis: U, shape [n, m].
            values: D, shape [m].
            seed: of the subset.

        Returns:
            As many vectors and values as before.
        """
        order = _shuffled(len(values), seed, basis.device)
        few, others = order.tensor_split([max(1, round(self.share * len(values)))])
        found, vectors = ritz_pairs(matrix, basis[:, few])
        values, by_size = torch.cat([values[others], found]).sort()
        return torch.cat([basis[:, others], vectors], dim=1)[:, by_size], values


class BrandFactor(Factor):
    """Leading eigenvectors that follow their batches' rows.

    The meter `gap` comes for free: updates are exact and truncation only takes away, so K − U D Uᵀ is never negative,
    and its trace, the nuclear norm of the error, is what was discarded and not yet forgotten. Its mean over the
    directions outside of the basis is the spectrum's tail.

    Args:
        width: n.
        ema: weight kept of the old moment per update.
        rank: r, eigenvectors that an update starts from; between updates there are up to r + c.
        columns: c, most rows of a batch that enter; beyond, a random subset stands for all, and CCᵀ stays unbiased.
        repair: use of a maintained moment; None never forms one.
    """

    def __init__(self, width: int, ema: float, rank: int, columns: int, repair: Repair | None = None) -> None:
        if rank + columns >= width:
            raise ValueError(f"rank + columns must be less than the width {width}, got {rank} + {columns}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {ema}")
        self.width, self.ema, self.rank, self.columns, self.repair = width, ema, rank, columns, repair
        self.moment = None if repair is None else Moment(ema)
        self.gap: Tensor | None = None
        self.updates = self.unrepaired = 0
        self._weight = 0.0
        self._failed = False

    def update(self, batch: Gram | Tensor) -> None:
        """Take in one batch's rows; where no finite eigenpairs come out, leave them out and let the refresh say so.

        Args:
            batch: its rows.

        Raises:
            TypeError: if they were multiplied out.
        """
        if not isinstance(batch, Gram):
            raise TypeError(f"a Brand factor follows a batch's rows; got a moment of shape {tuple(batch.shape)}")
        self.updates, self.unrepaired = self.updates + 1, self.unrepaired + 1
        if self.moment is not None:
            self.moment.update(batch)
        # Weights of a debiased average, as in `Moment`: the first batch counts whole.
        weight = self.ema * self._weight + (1 - self.ema)
        kept = self.ema * self._weight / weight
        try:
            self._absorb((1 - kept) ** 0.5 * self._columns(batch), kept)
        except DecompositionError:
            self._failed = True
        else:
            self._failed, self._weight = False, weight

    def _columns(self, batch: Gram) -> Tensor:
        rows, share = batch.rows, 1 / batch.count
        if len(rows) > self.columns:
            share *= len(rows) / self.columns
            rows = rows[_shuffled(len(rows), self.updates, rows.device)[: self.columns]]
        columns: Tensor = share**0.5 * rows.mT
        return columns

    def _absorb(self, columns: Tensor, kept: float) -> None:
        if self.spectrum is None or self.gap is None:
            basis, values, gap = columns.new_zeros(self.width, 0), columns.new_zeros(0), columns.new_zeros(())
        else:
            basis, values = self.spectrum.basis[:, -self.rank :], self.spectrum.values[-self.rank :]
            # Discarded before it is scaled by ρ, so that the trace stays that of the average.
            gap = kept * (self.gap + self.spectrum.values[: -self.rank].sum())
        self._adopt(*brand_update(basis, kept * values, columns), gap)

    def _adopt(self, basis: Tensor, values: Tensor, gap: Tensor) -> None:
        self.gap = gap
        self.spectrum = Spectrum(basis, values, gap / (self.width - len(values)), values.sum() + gap)

    def refresh(self) -> None:
        """Repair, if it is due.

        Raises:
            DecompositionError: if the last batch could not be taken in, or the repair failed.
        """
        if self._failed or self.spectrum is None:
            raise DecompositionError(f"no finite update of a factor of width {self.width} by its latest rows")
        if self.repair is None or self.moment is None or self.unrepaired < self.repair.period:
            return
        matrix = self.moment.value
        basis, values = self.repair(matrix, self.spectrum.basis, self.spectrum.values, self.updates)
        self._adopt(basis, values, (matrix.trace() - values.sum()).clamp_min(0))
        self.unrepaired = 0

    def state_dict(self) -> dict[str, Any]:
        """Spectrum, meter, counters, and the moment where there is one."""
        return super().state_dict() | {
            "gap": self.gap,
            "moment": None if self.moment is None else self.moment.state_dict(),
            "counts": [self.updates, self.unrepaired, self._weight, self._failed],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore spectrum, meter, counters and moment.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.gap = state["gap"]
        if self.moment is not None:
            self.moment.load_state_dict(state["moment"])
        self.updates, self.unrepaired, self._weight, self._failed = state["counts"]


def _shuffled(count: int, seed: int, device: torch.device) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device)
