"""EKFAC of wide layers: the leading eigenvectors of a factor, and one number for all the others.

The linear layer behind the convolutions of an image network has thousands of inputs, of which a few hundred directions
carry nearly all of the activations' energy. With U_A [i, r] leading eigenvectors (and U_G [o, p] likewise), the Fisher
is modelled as diagonal over four parts of the space of matrices: kept ⊗ kept, where EKFAC's scalings stand, and three
with a complement, where every direction gets the mean of what the part holds. The trace is that of EKFAC; a damped
solve costs O(o i (r + p)) in place of O(o i (o + i)), a refresh one product with the moment in place of its
eigendecomposition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.curvature.base import Statistics
from acktr.curvature.kronecker.product import KroneckerBlock
from acktr.curvature.sampling import SampledBlock
from acktr.curvature.sharing import Found, SharedBlock
from acktr.linalg import eigen_cost, leading_eigenvectors
from acktr.moments import Moment


@dataclass(frozen=True)
class Scalings:
    """F̂'s eigenvalues on the four parts; 0 on a part that a full basis leaves empty."""

    kept: Tensor
    """Kept outputs × kept inputs, shape [p, r]."""
    rows: Tensor
    """Kept outputs × other inputs, shape [p]."""
    columns: Tensor
    """Other outputs × kept inputs, shape [r]."""
    rest: Tensor
    """Other outputs × other inputs, scalar."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Scalings:
        """Apply a function of the eigenvalues.

        Args:
            function: of a tensor, entry by entry.

        Returns:
            The mapped eigenvalues.
        """
        return Scalings(function(self.kept), function(self.rows), function(self.columns), function(self.rest))

    def dot(self, other: Scalings) -> Tensor:
        """Sum over all entries of the product with others of the same shapes.

        Args:
            other: eigenvalues, or energies.

        Returns:
            Scalar tensor.
        """
        ends = self.rows @ other.rows + self.columns @ other.columns + self.rest * other.rest
        return (self.kept * other.kept).sum() + ends


@dataclass(frozen=True)
class Projections:
    """A matrix V on the kept eigenvectors."""

    matrix: Tensor
    """V itself, shape [o, i]."""
    left: Tensor
    """U_Gᵀ V, shape [p, i]."""
    both: Tensor
    """U_Gᵀ V U_A, shape [p, r]."""
    right: Tensor | None
    """V U_A, shape [o, r]; None where the kept outputs are all outputs."""

    def energies(self) -> Scalings:
        """V's squared norm on each of the four parts.

        Returns:
            Shaped like the eigenvalues.
        """
        kept, rows = self.both.square(), self.left.square().sum(1)
        columns = kept.sum(0) if self.right is None else self.right.square().sum(0)
        rest = self.matrix.square().sum() - rows.sum() - columns.sum() + kept.sum()
        return Scalings(kept, rows - kept.sum(1), columns - kept.sum(0), rest)


class LowRankEKFACBlock(SampledBlock, KroneckerBlock, SharedBlock):
    """EKFAC in leading bases, refreshed now and then by one step of subspace iteration.

    Args:
        shape: [o, i].
        ema: weight kept of the old moments and energies per update.
        ranks: p and r, eigenvectors kept of outputs and inputs; the width itself keeps all.
    """

    def __init__(self, shape: tuple[int, int], ema: float, ranks: tuple[int, int]) -> None:
        super().__init__(shape, ema)
        self.ranks = ranks
        self.output_basis: Tensor | None = None
        self.input_basis: Tensor | None = None
        self.energies = {name: Moment(ema) for name in ("kept", "rows", "columns", "total")}

    @property
    def ready(self) -> bool:
        """Whether there are bases and scalings in them."""
        return not self.energies["kept"].empty

    def bases(self) -> list[Tensor]:
        """U_G and U_A, which energies are measured in."""
        return list(self._bases())

    @property
    def basis_shapes(self) -> list[tuple[int, int]]:
        """[o, p] and [i, r]."""
        return list(zip(self.shape, self.ranks, strict=True))

    def measured(self, statistics: Statistics, bases: list[Tensor]) -> list[Tensor]:
        """The batch's squared per-example gradients: those in the kept directions, and their sums over all.

        Args:
            statistics: the layer's rows of this batch.
            bases: U_G and U_A.

        Returns:
            Kept, rows, columns and total.
        """
        return list(_energies(statistics, *bases).values())

    def take_measured(self, measured: list[Tensor]) -> None:
        """Average the energies in.

        Args:
            measured: of `measured`, or the mean of several.
        """
        for energy, batch in zip(self.energies.values(), measured, strict=True):
            energy.update(batch)

    def decomposing(self) -> Callable[[], Found]:
        """One step of subspace iteration on both moments, from the present bases.

        Returns:
            Finds U_G [o, p] and U_A [i, r].
        """
        moments, starts = (self.output_moment.value, self.input_moment.value), (self.output_basis, self.input_basis)
        return lambda: [leading_eigenvectors(*side) for side in zip(moments, self.ranks, starts, strict=True)]

    def adopt(self, found: Found) -> None:
        """Use new bases from now on, and carry the energies over into them.

        Args:
            found: U_G and U_A.
        """
        output_basis, input_basis = found
        if self.ready:
            self._carry(output_basis, input_basis)
        self.output_basis, self.input_basis = output_basis, input_basis

    @property
    def decomposition_cost(self) -> float:
        """Of each side one product with the moment and orthonormal columns, or all of its eigenvectors."""
        sides = zip(self.shape, self.ranks, strict=True)
        return sum(eigen_cost(n) if n == r else 2 * n * r * (n + 2 * r) + eigen_cost(r) for n, r in sides)

    def _carry(self, output_basis: Tensor, input_basis: Tensor) -> None:
        """What F̂ in the old bases shows on the diagonal of the new ones; the total turns with nothing."""
        old_output, old_input = self._bases()
        output_turn, input_turn = (old_output.mT @ output_basis).square(), (old_input.mT @ input_basis).square()
        # What of a new direction lay outside the old basis.
        new_outputs, new_inputs = (1 - output_turn.sum(0)).clamp_min(0), (1 - input_turn.sum(0)).clamp_min(0)
        old, (outputs, inputs) = self.scalings(), self._complements()
        rows, columns = old.rows * inputs + old.kept.sum(1), old.columns * outputs + old.kept.sum(0)
        others_by_inputs = input_turn.mT @ old.columns + new_inputs * old.rest
        kept = output_turn.mT @ (old.kept @ input_turn + torch.outer(old.rows, new_inputs))
        self.energies["kept"].replace(kept + torch.outer(new_outputs, others_by_inputs))
        rest_by_outputs = old.rest * inputs + old.columns.sum()
        self.energies["rows"].replace(output_turn.mT @ rows + new_outputs * rest_by_outputs)
        rest_by_inputs = old.rest * outputs + old.rows.sum()
        self.energies["columns"].replace(input_turn.mT @ columns + new_inputs * rest_by_inputs)

    def _bases(self) -> tuple[Tensor, Tensor]:
        if self.output_basis is None or self.input_basis is None:
            raise RuntimeError("the block has no bases yet; call refresh() after the first update")
        return self.output_basis, self.input_basis

    def _complements(self) -> tuple[int, int]:
        return self.shape[0] - self.ranks[0], self.shape[1] - self.ranks[1]

    def scalings(self) -> Scalings:
        """F̂'s eigenvalues, from the averaged energies."""
        kept, rows, columns, total = (self.energies[name].value for name in ("kept", "rows", "columns", "total"))
        outputs, inputs = self._complements()
        rest = total - rows.sum() - columns.sum() + kept.sum()
        return Scalings(
            kept,
            (rows - kept.sum(1)).clamp_min(0) / inputs if inputs else torch.zeros_like(rows),
            (columns - kept.sum(0)).clamp_min(0) / outputs if outputs else torch.zeros_like(columns),
            rest.clamp_min(0) / (inputs * outputs) if inputs and outputs else torch.zeros_like(total),
        )

    def _project(self, matrix: Tensor) -> Projections:
        output_basis, input_basis = self._bases()
        left = output_basis.mT @ matrix
        right = matrix @ input_basis if self._complements()[0] else None
        return Projections(matrix, left, left @ input_basis, right)

    def _apply(self, projections: Projections, values: Scalings) -> Tensor:
        """Σ over the four parts of value × projection."""
        (output_basis, input_basis), (outputs, inputs) = self._bases(), self._complements()
        left, both = projections.left, projections.both
        if not outputs and not inputs:
            return output_basis @ (both * values.kept) @ input_basis.mT
        rows = values.rows if inputs else torch.zeros_like(values.rows)
        columns = values.columns if outputs else torch.zeros_like(values.columns)
        rest = values.rest if inputs and outputs else torch.zeros_like(values.rest)
        both = both * (values.kept - rows[:, None] - columns + rest)
        result = output_basis @ ((rows - rest)[:, None] * left + both @ input_basis.mT)
        if projections.right is not None:
            result += (projections.right * (columns - rest)) @ input_basis.mT + rest * projections.matrix
        return result

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(F̂ + λ)⁻¹ V.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        return self._apply(self._project(matrix), self.scalings().map(lambda values: 1 / (values + damping)))

    def solve_with_form(self, matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """X = (F̂ + λ)⁻¹ V and Xᵀ F̂ X = Σ over the four parts of s / (s + λ)² times V's energy there.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            X, shape [o, i], and a scalar tensor.
        """
        projections, scalings = self._project(matrix), self.scalings()
        solution = self._apply(projections, scalings.map(lambda values: 1 / (values + damping)))
        return solution, projections.energies().dot(scalings.map(lambda values: values / (values + damping).square()))

    def spread(self, noise: Tensor, damping: float) -> Tensor:
        """Each of the four parts by its own 1/√(s + λ).

        Args:
            noise: E, shape [..., o, i].
            damping: λ > 0.

        Returns:
            Shape [..., o, i].
        """
        return self._apply(self._project(noise), self.scalings().map(lambda values: (values + damping).rsqrt()))

    def spectrum(self, damping: float) -> Tensor:
        """Every part's s + λ, as often as the part has directions.

        Args:
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        values, (outputs, inputs) = self.scalings(), self._complements()
        upper = torch.cat([values.kept, values.rows[:, None].expand(-1, inputs)], dim=1)
        lower = torch.cat([values.columns.expand(outputs, -1), values.rest.expand(outputs, inputs)], dim=1)
        return torch.cat([upper, lower]) + damping

    def multiply(self, matrix: Tensor) -> Tensor:
        """F̂ V.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Shape [o, i].
        """
        return self._apply(self._project(matrix), self.scalings())

    def quadratic(self, matrix: Tensor) -> Tensor:
        """Vᵀ F̂ V from the parts' energies, at half the price of F̂ V.

        Args:
            matrix: V, shape [o, i].

        Returns:
            Scalar tensor.
        """
        return self._project(matrix).energies().dot(self.scalings())

    def condition(self) -> float:
        """Largest over mean eigenvalue."""
        mean = self.energies["total"].value / (self.shape[0] * self.shape[1])
        return float(self.scalings().kept.max() / mean.clamp_min(torch.finfo(mean.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        """Moments, bases and energies."""
        return super().state_dict() | {
            "output_basis": self.output_basis,
            "input_basis": self.input_basis,
            "energies": {name: moment.state_dict() for name, moment in self.energies.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments, bases and energies.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.output_basis, self.input_basis = state["output_basis"], state["input_basis"]
        for name, moment in self.energies.items():
            moment.load_state_dict(state["energies"][name])


def _energies(statistics: Statistics, output_basis: Tensor, input_basis: Tensor) -> dict[str, Tensor]:
    """E_n of squared entries of ∇: in both bases, summed over all inputs, over all outputs, and over both."""
    if statistics.inputs.shape[1] == 1:
        # The square of an outer product is the product of the squares, and sums over all directions need no basis.
        norms = torch.linalg.vector_norm(statistics.inputs[:, 0], dim=1).square()
        rows = (statistics.output_grads[:, :, 0] @ output_basis).square().sum(0)
        sizes = torch.linalg.vector_norm(statistics.output_grads, dim=(0, 2, 3)).square()
        columns = (statistics.inputs[:, 0] @ input_basis).square()
        sums = {"kept": rows.mT @ columns, "rows": norms @ rows, "columns": sizes @ columns, "total": sizes @ norms}
    else:
        new = output_basis.new_zeros
        p, r = output_basis.shape[1], input_basis.shape[1]
        sums = {"kept": new(p, r), "rows": new(p), "columns": new(r), "total": new(())}
        for gradients in statistics.gradients():
            left, right = output_basis.mT @ gradients, gradients @ input_basis
            sums["kept"] += (left @ input_basis).square().sum(0)
            sums["rows"] += left.square().sum((0, 2))
            sums["columns"] += right.square().sum((0, 1))
            sums["total"] += gradients.square().sum()
    return {name: part / statistics.examples for name, part in sums.items()}
