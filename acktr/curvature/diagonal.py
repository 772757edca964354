"""Diagonal blocks: the Fisher's diagonal for a layer, for any other parameter, and a known constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.curvature.base import Block, Place, Statistics
from acktr.curvature.sampling import SampledBlock
from acktr.moments import Moment


class DiagonalBlock(SampledBlock):
    """F̂ = diag(S), S = E[(Σ_s g aᵀ)²].

    Args:
        shape: [o, i].
        ema: weight kept of the old diagonal per update.
    """

    def __init__(self, shape: tuple[int, int], ema: float) -> None:
        self._shape = shape
        self.squares = Moment(ema)

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self._shape

    @property
    def _like(self) -> dict[str, Any]:
        value = self.squares.value
        return {"dtype": value.dtype, "device": value.device}

    @property
    def ready(self) -> bool:
        """Whether there was an update."""
        return not self.squares.empty

    def update(self, statistics: Statistics) -> None:
        """Average one batch's squared per-example gradients in.

        Args:
            statistics: the layer's rows of this batch.
        """
        self.squares.update(statistics.squares())

    def _decompose(self) -> None:
        """A diagonal is its own decomposition."""

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """V / (S + λ).

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        return matrix / (self.squares.value + damping)

    def spread(self, noise: Tensor, damping: float) -> Tensor:
        """E / √(S + λ).

        Args:
            noise: E, shape [..., o, i].
            damping: λ > 0.

        Returns:
            Shape [..., o, i].
        """
        return noise * self.spectrum(damping).rsqrt()

    def spectrum(self, damping: float) -> Tensor:
        """S + λ.

        Args:
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        return self.squares.value + damping

    def multiply(self, matrix: Tensor) -> Tensor:
        """V ∘ S.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        return matrix * self.squares.value

    def solver_with_batch(
        self, damping: float, weight: float, statistics: Statistics | None
    ) -> Callable[[Tensor], Tensor]:
        """V ↦ V / (S + w S_B + λ).

        Args:
            damping: λ > 0.
            weight: w ≥ 0.
            statistics: the batch's rows; None takes S for S_B.

        Returns:
            A function of matrices [o, i].
        """
        if statistics is None:
            return super().solver_with_batch(damping, weight, statistics)
        divisor = self.squares.value + weight * statistics.squares() + damping
        return lambda matrix: matrix / divisor

    def multiply_batch(self, matrix: Tensor, statistics: Statistics | None) -> Tensor:
        """V ∘ S_B.

        Args:
            matrix: V, shape [o, i].
            statistics: the batch's rows; None takes S for S_B.

        Returns:
            Shape [o, i].
        """
        return self.multiply(matrix) if statistics is None else matrix * statistics.squares()

    def condition(self) -> float:
        """Largest over mean entry of S."""
        squares = self.squares.value
        return float(squares.max() / squares.mean().clamp_min(torch.finfo(squares.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        """The averaged squares."""
        return {"squares": self.squares.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the averaged squares.

        Args:
            state: what `state_dict` returned.
        """
        self.squares.load_state_dict(state["squares"])


class ParameterBlock(DiagonalBlock):
    """The fallback for a parameter that is no layer's matrix: its Fisher's diagonal from summed scores.

    Scores with independent random signs ε_n have mean zero, so the square of their sum over the batch has the
    expectation of the sum of their squares: S = Σ_k E[(Σ_n ε_n g_kn)²] / N, without per-example gradients and for any
    seeds. Each batch is about one draw of a chi-square with a degree of freedom per seed for each coordinate, so the
    diagonal is averaged with the parameter's mean until many batches are in (weight 1/k after k).

    Args:
        shape: [1, size].
        ema: weight kept of the old diagonal per update.
    """

    def __init__(self, shape: tuple[int, int], ema: float) -> None:
        super().__init__(shape, ema)
        self.batches = 0

    def update(self, statistics: Statistics) -> None:
        """Refuse: this block is fed by `update_from_sums`.

        Args:
            statistics: unused.

        Raises:
            TypeError: always; a parameter without a layer has no rows.
        """
        raise TypeError(f"a block of {self.shape[1]} free parameters is updated from summed scores, not from rows")

    def update_from_sums(self, score_sums: Tensor, examples: int) -> None:
        """Average one batch in.

        Args:
            score_sums: Σ_n ε_n g_kn, shape [K, size], one row per seed.
            examples: N.
        """
        self.batches += 1
        self.squares.update(score_sums.square().sum(0, keepdim=True) / examples)

    def _smoothed(self) -> Tensor:
        squares = self.squares.value
        share = 1 / self.batches
        return (1 - share) * squares + share * squares.mean()

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """V / (S + λ).

        Args:
            matrix: V, shape [1, size].
            damping: λ > 0.

        Returns:
            Shape [1, size].
        """
        return matrix / (self._smoothed() + damping)

    def spectrum(self, damping: float) -> Tensor:
        """S + λ.

        Args:
            damping: λ > 0.

        Returns:
            Shape [1, size].
        """
        return self._smoothed() + damping

    def multiply(self, matrix: Tensor) -> Tensor:
        """V ∘ S.

        Args:
            matrix: V, shape [1, size].

        Returns:
            Shape [1, size].
        """
        return matrix * self._smoothed()

    def state_dict(self) -> dict[str, Any]:
        """The averaged squares and the number of batches."""
        return super().state_dict() | {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the averaged squares and the number of batches.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.batches = state["batches"]


class ConstantBlock(SampledBlock):
    """F̂ = fisher · I, known in closed form: 2 per dimension for a state-independent log standard deviation.

    Args:
        shape: [1, size].
        fisher: the constant, > 0.
    """

    def __init__(self, shape: tuple[int, int], fisher: float) -> None:
        self._shape = shape
        self.fisher = fisher

    @property
    def shape(self) -> tuple[int, int]:
        """[1, size]."""
        return self._shape

    @property
    def _like(self) -> dict[str, Any]:
        return {}

    @property
    def ready(self) -> bool:
        """Always: nothing is estimated."""
        return True

    def update(self, statistics: Statistics) -> None:
        """Nothing to learn from a batch.

        Args:
            statistics: unused.
        """

    def _decompose(self) -> None:
        """Nothing to decompose."""

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """V / (fisher + λ).

        Args:
            matrix: V, shape [1, size].
            damping: λ ≥ 0.

        Returns:
            Shape [1, size].
        """
        return matrix / (self.fisher + damping)

    def multiply(self, matrix: Tensor) -> Tensor:
        """V times the constant.

        Args:
            matrix: V, shape [1, size].

        Returns:
            Shape [1, size].
        """
        return self.fisher * matrix

    def spread(self, noise: Tensor, damping: float) -> Tensor:
        """E / √(fisher + λ).

        Args:
            noise: E, shape [..., 1, size].
            damping: λ ≥ 0.

        Returns:
            Shape [..., 1, size].
        """
        return noise / math.sqrt(self.fisher + damping)

    def spectrum(self, damping: float) -> Tensor:
        """The constant plus λ, as often as there are parameters.

        Args:
            damping: λ ≥ 0.

        Returns:
            Shape [1, size].
        """
        return torch.full(self._shape, self.fisher + damping)

    def condition(self) -> float:
        """Always 1."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore.

        Args:
            state: an empty dictionary.
        """


@dataclass(frozen=True)
class Diagonal:
    """The Fisher's diagonal, per layer."""

    ema: float = 0.95
    """Weight kept of the old diagonal per update."""

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        return DiagonalBlock(place.shape, self.ema)
