"""Block-tridiagonal K-FAC: layers that follow each other know of each other (Martens & Grosse 2015, section 4.3).

Over a chain of layers 1 … ℓ the gradients are modelled as a Gaussian chain from the top down, D_j = Ψ_j D_{j+1} + ε_j,
which is the only one with the Kronecker-factored moments F̃ of each layer and of each pair of neighbours:

    Ψ_j = A_{j,j+1} A_{j+1}⁻¹ ⊗ G_{j,j+1} G_{j+1}⁻¹        Σ_j = F̃_jj − Ψ_j F̃_{j+1,j+1} Ψ_jᵀ,  Σ_ℓ = F̃_ℓℓ
    F̂ = Ξ⁻¹ Σ Ξ⁻ᵀ       F̂⁻¹ = Ξᵀ Σ⁻¹ Ξ       Ξ = I with −Ψ_j beside the diagonal

with A and G over a layer's inputs and output gradients, and A_{j,j+1}, G_{j,j+1} over a pair's. F̂ equals F̃ on the
three diagonals; its inverse has no others.

Damping. It is added to A_j and G_j, in K-FAC's factored form, before Ψ and Σ are made of them: so `solve`'s matrix is
not F̂ + λ, and what an undamped F̂ is must be said. Here it is the limit of that matrix for λ → 0, with Ψ regularised
no more than rounding asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from acktr.curvature.base import MAX_FAILURES, Statistics
from acktr.curvature.kronecker.product import KroneckerBlock
from acktr.curvature.members import Member
from acktr.linalg import DecompositionError, damped_cholesky, split_damping, symmetric_eigen
from acktr.moments import Moment


@dataclass(frozen=True)
class _Regression:
    """Ψ_j, as the product it is."""

    inputs: Tensor
    """A_{j,j+1} A_{j+1}⁻¹, shape [i_j, i_{j+1}]."""
    outputs: Tensor
    """G_{j,j+1} G_{j+1}⁻¹, shape [o_j, o_{j+1}]."""

    def down(self, matrix: Tensor) -> Tensor:
        """Ψ_j V, from layer j + 1 to layer j."""
        return self.outputs @ matrix @ self.inputs.mT

    def up(self, matrix: Tensor) -> Tensor:
        """Ψ_jᵀ V, from layer j to layer j + 1."""
        return self.outputs.mT @ matrix @ self.inputs


@dataclass(frozen=True)
class _Residual:
    """Σ_j⁻¹ by simultaneous diagonalisation: X = K₂ [(K₂ᵀ V K₁) / (1 − s₂ s₁ᵀ)] K₁ᵀ (appendix B)."""

    inputs: Tensor
    """K₁, shape [i, i]."""
    outputs: Tensor
    """K₂, shape [o, o]."""
    scaling: Tensor
    """1 / (1 − s₂ s₁ᵀ), shape [o, i]; for the last layer of a chain 1."""

    def solve(self, matrix: Tensor) -> Tensor:
        """Σ_j⁻¹ V."""
        inner = (self.outputs.mT @ matrix @ self.inputs) * self.scaling
        return self.outputs @ inner @ self.inputs.mT


class TridiagonalChain:
    """The curvature of layers that follow each other.

    Args:
        members: two or more, the first layer first; their blocks hold A_j and G_j.
        ema: weight kept of the old moments per update, as in the blocks.
    """

    failures = 0
    """Decompositions in a row that came to nothing."""
    skipped_refreshes = 0
    """All such decompositions."""

    def __init__(self, members: Sequence[Member], ema: float) -> None:
        self.members = list(members)
        pairs = range(len(self.members) - 1)
        self._moments = [(Moment(ema), Moment(ema)) for _ in pairs]
        self._decomposed: tuple[float, list[_Regression], list[_Residual]] | None = None
        self._undamped: list[_Regression] | None = None

    @property
    def names(self) -> list[str]:
        """The layers' names."""
        return [member.name for member in self.members]

    def _blocks(self) -> list[KroneckerBlock]:
        return [cast(KroneckerBlock, member.block) for member in self.members]

    def update(self, statistics: dict[str, Statistics], refresh: bool) -> None:
        """Average the pairs' moments in, after the blocks took in their own.

        Args:
            statistics: of every layer, the same examples in the same order.
            refresh: whether to decompose anew.

        Raises:
            ValueError: if two neighbours did not see the same rows.
        """
        for (one, other), (inputs, outputs) in zip(pairwise(self.names), self._moments, strict=True):
            left, right = statistics[one], statistics[other]
            if left.output_grads.shape[:3] != right.output_grads.shape[:3]:
                raise ValueError(
                    f"layers '{one}' and '{other}' saw rows of shapes {tuple(left.output_grads.shape[:3])} and "
                    f"{tuple(right.output_grads.shape[:3])} (seeds, examples, places); they are no neighbours"
                )
            rows = left.examples * left.inputs.shape[1]
            inputs.update(left.inputs.flatten(0, 1).mT @ right.inputs.flatten(0, 1) / left.examples)
            outputs.update(left.output_grads.flatten(0, 2).mT @ right.output_grads.flatten(0, 2) / rows)
        self._undamped = None
        if refresh and self._decomposed is not None:
            self._decompose(self._decomposed[0])

    def _decompose(self, damping: float) -> None:
        """Bring the decomposition up to the moments; on failure keep the last good one and count, as blocks do."""
        try:
            self._decomposed = (damping, *self._factors(damping))
        except DecompositionError:
            self.failures += 1
            self.skipped_refreshes += 1
            if self._decomposed is None or self.failures >= MAX_FAILURES:
                raise
        else:
            self.failures = 0

    def _factors(self, damping: float) -> tuple[list[_Regression], list[_Residual]]:
        roots = [self._damped(block, damping) for block in self._blocks()]
        regressions, residuals = [], []
        for k, (inputs, outputs) in enumerate(self._moments):
            (L_A, L_G), (next_A, next_G) = roots[k], roots[k + 1]
            regressions.append(_Regression(_regress(inputs.value, next_A), _regress(outputs.value, next_G)))
            K_1, s_1 = _diagonalised(inputs.value, L_A, next_A)
            K_2, s_2 = _diagonalised(outputs.value, L_G, next_G)
            # What both factors foretell perfectly (the constant 1 of the biases is one half of it) leaves nothing.
            rest = (1 - torch.outer(s_2, s_1)).clamp_min(max(1e-8, 10 * torch.finfo(s_1.dtype).eps))
            residuals.append(_Residual(K_1, K_2, 1 / rest))
        last_A, last_G = (_inverse_root(root) for root in roots[-1])
        residuals.append(_Residual(last_A, last_G, last_A.new_ones(len(last_G), len(last_A))))
        return regressions, residuals

    @staticmethod
    def _damped(block: KroneckerBlock, damping: float) -> tuple[Tensor, Tensor]:
        A, G = block.input_moment.value, block.output_moment.value
        of_outputs, of_inputs = split_damping(G.diagonal().mean(), A.diagonal().mean(), damping)
        return damped_cholesky(A, of_inputs), damped_cholesky(G, of_outputs)

    def solve(self, matrices: Sequence[Tensor], damping: float) -> list[Tensor]:
        """F̂⁻¹ with damped factors, by the three sweeps Ξ, Σ⁻¹, Ξᵀ.

        Args:
            matrices: one per layer, [o_j, i_j].
            damping: λ > 0.

        Returns:
            One per layer.
        """
        if self._decomposed is None or self._decomposed[0] != damping:
            self._decompose(damping)
        assert self._decomposed is not None
        _, regressions, residuals = self._decomposed
        swept = [V - psi.down(above) for V, psi, above in zip(matrices, regressions, matrices[1:], strict=False)]
        solved = [residual.solve(V) for residual, V in zip(residuals, [*swept, matrices[-1]], strict=True)]
        rest = [U - psi.up(below) for U, psi, below in zip(solved[1:], regressions, solved, strict=False)]
        return [solved[0], *rest]

    def multiply(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """F̂ V, undamped: Ξ⁻¹ Σ Ξ⁻ᵀ.

        Args:
            matrices: one per layer, [o_j, i_j].

        Returns:
            One per layer.
        """
        regressions = self._regressions()
        out = [self._residual(k, W) for k, W in enumerate(self._accumulated(matrices))]
        for k in reversed(range(len(regressions))):
            out[k] = out[k] + regressions[k].down(out[k + 1])
        return out

    def quadratic(self, matrices: Sequence[Tensor]) -> Tensor:
        """Vᵀ F̂ V, undamped: Σ_j ⟨W_j, Σ_j W_j⟩ with W = Ξ⁻ᵀ V.

        Args:
            matrices: one per layer, [o_j, i_j].

        Returns:
            Scalar ≥ 0.
        """
        forms = [(W * self._residual(k, W)).sum() for k, W in enumerate(self._accumulated(matrices))]
        # Each is one, and rounding alone makes it less than nothing.
        return torch.stack(forms).clamp_min(0).sum()

    def _accumulated(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Ξ⁻ᵀ V: what every layer has of itself and of all before it."""
        out = [matrices[0]]
        for psi, V in zip(self._regressions(), matrices[1:], strict=True):
            out.append(V + psi.up(out[-1]))
        return out

    def _residual(self, k: int, matrix: Tensor) -> Tensor:
        """Σ_k V, undamped."""
        blocks = self._blocks()
        if k == len(blocks) - 1:
            return blocks[k].multiply(matrix)
        psi = self._regressions()[k]
        return blocks[k].multiply(matrix) - psi.down(blocks[k + 1].multiply(psi.up(matrix)))

    def _regressions(self) -> list[_Regression]:
        """Ψ with as much damping as keeps a Cholesky factorisation going, made once per update."""
        if self._undamped is None:
            self._undamped = [
                _Regression(
                    _regress(inputs.value, _barely_damped(above.input_moment.value)),
                    _regress(outputs.value, _barely_damped(above.output_moment.value)),
                )
                for (inputs, outputs), above in zip(self._moments, self._blocks()[1:], strict=True)
            ]
        return self._undamped

    def state_dict(self) -> dict[str, Any]:
        """The pairs' moments, the decomposition and the counts."""
        decomposed = None
        if self._decomposed is not None:
            damping, regressions, residuals = self._decomposed
            parts = [[p.inputs, p.outputs] for p in regressions], [[s.inputs, s.outputs, s.scaling] for s in residuals]
            decomposed = [damping, *parts]
        return {
            "moments": [[moment.state_dict() for moment in pair] for pair in self._moments],
            "decomposed": decomposed,
            "counts": [self.failures, self.skipped_refreshes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them.

        Args:
            state: what `state_dict` returned.
        """
        for pair, saved in zip(self._moments, state["moments"], strict=True):
            for moment, one in zip(pair, saved, strict=True):
                moment.load_state_dict(one)
        self._decomposed = self._undamped = None
        if state["decomposed"] is not None:
            damping, regressions, residuals = state["decomposed"]
            self._decomposed = (damping, [_Regression(*p) for p in regressions], [_Residual(*s) for s in residuals])
        self.failures, self.skipped_refreshes = state["counts"]


def _regress(cross: Tensor, root: Tensor) -> Tensor:
    """The product cross (L Lᵀ)⁻¹."""
    return torch.cholesky_solve(cross.mT, root).mT


def _inverse_root(root: Tensor) -> Tensor:
    """L⁻ᵀ."""
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    return cast(Tensor, torch.linalg.solve_triangular(root, identity, upper=False)).mT


def _diagonalised(cross: Tensor, root: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """K and s with Kᵀ P K = I and Kᵀ (C Q⁻¹ Cᵀ) K = diag(s), for P = L Lᵀ and Q = L' L'ᵀ.

    The paper takes symmetric square roots P^(−½); any root serves, and Cholesky's costs least.

    Returns:
        K, shape [n, n], and s in [0, 1], shape [n].
    """
    half = torch.linalg.solve_triangular(root, cross, upper=False)
    whitened = torch.linalg.solve_triangular(above, half.mT, upper=False)
    values, vectors = symmetric_eigen(whitened.mT @ whitened)
    return torch.linalg.solve_triangular(root.mT, vectors, upper=True), values.clamp_max(1)


def _barely_damped(moment: Tensor) -> Tensor:
    """A Cholesky factor of a moment that may be singular."""
    finfo = torch.finfo(moment.dtype)
    return damped_cholesky(moment, (10 * finfo.eps * moment.diagonal().sum()).clamp_min(finfo.tiny**0.5))
