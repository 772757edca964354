"""K-FAC with a factor of its own kind on either side: F̂ = Â ⊗ Ĝ, which acts as F̂ V = Ĝ V Â.

Each side decides by its own width whether it keeps all eigenvectors or leading ones; a solve goes factor by factor and
costs O(o i (p + r)) with p and r of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from acktr.curvature.base import Statistics
from acktr.curvature.lowrank.factors import DenseFactor, Factor
from acktr.curvature.lowrank.spectrum import Spectrum
from acktr.curvature.sharing import Found, SharedBlock, Summary
from acktr.linalg import split_damping


class FactorDamping(Protocol):
    """How the damping of a solve enters the factors."""

    def __call__(self, outputs: Spectrum, inputs: Spectrum, damping: float) -> tuple[Tensor, Tensor]:
        """What to add to each factor's eigenvalues.

        Args:
            outputs: of G.
            inputs: of A.
            damping: λ > 0.

        Returns:
            The outputs' and the inputs', scalars > 0.
        """
        ...


@dataclass(frozen=True)
class SplitDamping:
    """√λ/π and π√λ, the factored Tikhonov damping of `FactoredKFAC` (Martens & Grosse 2015, section 6.3)."""

    def __call__(self, outputs: Spectrum, inputs: Spectrum, damping: float) -> tuple[Tensor, Tensor]:
        """Share λ out by the factors' mean eigenvalues.

        Args:
            outputs: of G.
            inputs: of A.
            damping: λ > 0.

        Returns:
            The outputs' and the inputs'.
        """
        return split_damping(outputs.mean, inputs.mean, damping)


@dataclass(frozen=True)
class RelativeDamping:
    """φ d_max for each factor, and no less than its share of λ.

    The randomised K-FACs' author damps by φ d_max alone. The floor is new here: a factor of zeros would have no damping
    at all.
    """

    share: float = 0.1
    """φ, a share of the factor's largest eigenvalue, > 0; the author's falls from 0.1 to 0.01 over training."""

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ValueError(f"share must be positive, got {self.share}; SplitDamping() has none")

    def __call__(self, outputs: Spectrum, inputs: Spectrum, damping: float) -> tuple[Tensor, Tensor]:
        """The larger of φ d_max and the share of λ, for each factor.

        Args:
            outputs: of G.
            inputs: of A.
            damping: λ > 0.

        Returns:
            The outputs' and the inputs'.
        """
        output_floor, input_floor = split_damping(outputs.mean, inputs.mean, damping)
        return (
            torch.maximum(self.share * outputs.largest, output_floor),
            torch.maximum(self.share * inputs.largest, input_floor),
        )


class FactorPairBlock(SharedBlock):
    """Two factors, each with its own last good spectrum.

    Args:
        shape: [o, i].
        outputs: G.
        inputs: A.
        damping: how λ enters them.
    """

    def __init__(self, shape: tuple[int, int], outputs: Factor, inputs: Factor, damping: FactorDamping) -> None:
        self._shape = shape
        self.outputs, self.inputs, self.damping = outputs, inputs, damping

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self._shape

    @property
    def _like(self) -> dict[str, Any]:
        values = self._spectra()[0].values
        return {"dtype": values.dtype, "device": values.device}

    @property
    def ready(self) -> bool:
        """Whether both spectra are there."""
        return self.outputs.spectrum is not None and self.inputs.spectrum is not None

    @property
    def ranks(self) -> tuple[int, int]:
        """Eigenvectors in use of outputs and inputs; the width itself where all are."""
        outputs, inputs = self._spectra()
        return outputs.rank, inputs.rank

    def _spectra(self) -> tuple[Spectrum, Spectrum]:
        if self.outputs.spectrum is None or self.inputs.spectrum is None:
            raise RuntimeError("the block has no bases yet; call refresh() after the first update")
        return self.outputs.spectrum, self.inputs.spectrum

    def update(self, statistics: Statistics) -> None:
        """Average one batch's moments in.

        Args:
            statistics: the layer's rows of this batch.
        """
        self.take(self.summary(statistics))

    def summary(self, statistics: Statistics) -> Summary:
        """A and G of one batch.

        Args:
            statistics: the layer's rows of this batch.

        Returns:
            Both, not multiplied out yet.
        """
        return [statistics.input_moment(), statistics.output_moment()]

    def take(self, summary: Summary) -> None:
        """Let each factor average its moment in.

        Args:
            summary: of `summary`, or the mean of several.
        """
        A, G = summary
        self.inputs.update(A)
        self.outputs.update(G)

    @property
    def shareable(self) -> bool:
        """Whether both factors come from moments; Brand's follow each batch's rows."""
        return super().shareable and len(self._of_moments()) == 2

    def _of_moments(self) -> list[DenseFactor]:
        return [factor for factor in (self.inputs, self.outputs) if isinstance(factor, DenseFactor)]

    def decomposing(self) -> Callable[[], Found]:
        """What decomposes both factors' moments.

        Returns:
            Finds A's values, vectors and trace, then G's.
        """
        inputs, outputs = (factor.decomposing() for factor in self._of_moments())
        return lambda: [*inputs(), *outputs()]

    def adopt(self, found: Found) -> None:
        """Use new eigenpairs from now on.

        Args:
            found: A's values, vectors and trace, then G's.
        """
        inputs, outputs = self._of_moments()
        inputs.adopt(found[:3])
        outputs.adopt(found[3:])

    @property
    def decomposition_cost(self) -> float:
        """Of both factors, each by its kind and width."""
        inputs, outputs = self._of_moments()
        return outputs.cost(self._shape[0]) + inputs.cost(self._shape[1])

    def _decompose(self) -> None:
        # Should the second fail, the first is not taken back: nothing ties one side's basis to the other's.
        self.inputs.refresh()
        self.outputs.refresh()

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(Ĝ + λ_G)⁻¹ V (Â + λ_A)⁻¹.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        outputs, inputs = self._spectra()
        output_damping, input_damping = self.damping(outputs, inputs, damping)
        return inputs.solve(outputs.solve(matrix, output_damping).mT, input_damping).mT

    def solve_rows(self, output_grads: Tensor, inputs: Tensor, damping: float) -> Tensor:
        """`solve` of output_gradsᵀ inputs, a gradient given by its R rows, without forming it.

        Each side is solved on its rows, which costs O(R (o p + i r)): linear in the width. The final product of the two
        is then the only one of the matrix's size. Worth it where R < 2 o i / (o + i), the harmonic mean of the widths.

        Args:
            output_grads: shape [R, o], weights and 1 / N of a mean included.
            inputs: shape [R, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        output_spectrum, input_spectrum = self._spectra()
        output_damping, input_damping = self.damping(output_spectrum, input_spectrum, damping)
        left = output_spectrum.solve(output_grads.mT, output_damping)
        return left @ input_spectrum.solve(inputs.mT, input_damping).mT

    def multiply(self, matrix: Tensor) -> Tensor:
        """Ĝ V Â.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        outputs, inputs = self._spectra()
        return inputs.multiply(outputs.multiply(matrix).mT).mT

    def condition(self) -> float:
        """Largest over mean eigenvalue: the product of the factors'."""
        outputs, inputs = self._spectra()
        mean = outputs.mean * inputs.mean
        return float(outputs.largest * inputs.largest / mean.clamp_min(torch.finfo(mean.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        """Both factors and the counts of failures and of the basis's age."""
        return {
            "outputs": self.outputs.state_dict(),
            "inputs": self.inputs.state_dict(),
            "counts": [self.failures, self.skipped_refreshes, self.basis_age],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both factors and the counts.

        Args:
            state: what `state_dict` returned.
        """
        self.outputs.load_state_dict(state["outputs"])
        self.inputs.load_state_dict(state["inputs"])
        self.failures, self.skipped_refreshes, self.basis_age = state["counts"]
