"""SENG: the exact block of the batch's examples, solved in the space of examples (Yang et al. 2020, arXiv 2006.05924).

With J one gradient of an example and seed per row over √N, F = JᵀJ has rank R at most, and Woodbury's identity

    (JᵀJ + λ I)⁻¹ V = (V − Jᵀ (J Jᵀ + λ I)⁻¹ J V) / λ

needs one R × R system. For a layer without shared weights J Jᵀ = (a aᵀ) ∘ (g gᵀ): R² (o + i) products, and no J. Where
the matrix has fewer entries than there are rows, JᵀJ itself is the smaller system.

The paper's Fisher is the empirical one. Which gradients the rows are is here the choice of `fisher`, as for every other
curvature: sampled from the model unless `EmpiricalFisher` is asked for. Several seeds are so many more rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from acktr.conjugate import Stop, conjugate_gradient
from acktr.curvature.base import Block, Place
from acktr.curvature.rows.examples import ExampleOperator, PerExample
from acktr.curvature.rows.operators import Batch, RowBlock, RowMemory
from acktr.linalg import DecompositionError, damped_cholesky

REFINEMENTS = 1
"""Corrections of Woodbury's solution by its own residual: V − Jᵀ(…) cancels where λ is small beside F."""


class GramSolver(Protocol):
    """How the system in the space of examples is formed and solved."""

    def gram(self, operator: ExampleOperator, draw: int) -> Tensor:
        """J Jᵀ, an estimate of it, or JᵀJ."""
        ...

    def solve(self, operator: ExampleOperator, factor: Tensor, matrix: Tensor, damping: float) -> Tensor:
        """(JᵀJ + λ)⁻¹ V with the Cholesky factor of gram + λ."""
        ...


@dataclass(frozen=True)
class WholeGram:
    """A direct solve in the smaller of the two spaces, of examples or of the matrix's entries.

    That of examples is solved in float64, whatever the rows are: V − Jᵀ (…) leaves λ / (σ² + λ) of what V has along a
    singular value σ, and of float32's seven digits none is left where inputs are as large as pixels.
    """

    def gram(self, operator: ExampleOperator, draw: int) -> Tensor:
        """J Jᵀ, or JᵀJ where that is smaller.

        Args:
            operator: J.
            draw: unused; nothing is drawn.

        Returns:
            Shape [R, R] or [o · i, o · i].
        """
        if not _wide(operator):
            return _precise(operator).gram()
        rows = operator.explicit()
        return rows.mT @ rows

    def solve(self, operator: ExampleOperator, factor: Tensor, matrix: Tensor, damping: float) -> Tensor:
        """Woodbury's identity, then the same once more on what it left; or the damped JᵀJ's own inverse.

        Args:
            operator: J.
            factor: Cholesky factor of the Gram matrix + λ.
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        if _wide(operator):
            return _back_substituted(factor, matrix.flatten()).view_as(matrix)
        rows, right = _precise(operator), matrix.to(factor.dtype)
        solution = _woodbury(rows, factor, right, damping)
        for _ in range(REFINEMENTS):
            rest = right - rows.multiply(solution) - damping * solution
            solution = solution + _woodbury(rows, factor, rest, damping)
        return solution.to(matrix.dtype)


@dataclass(frozen=True)
class ColumnSketch:
    """J Jᵀ from some of J's columns, for rows too long to multiply: R² k products in place of R² o i.

    The k columns are drawn without replacement at every refresh and multiplied by √(n/k) for n = o · i, so that the
    Gram matrix is unbiased; the reference implementation multiplies by n/k.

    Deviation: the paper puts the sketch in the place of the Gram matrix. Woodbury's identity then no longer gives the
    inverse of anything positive: an example that the sketch misses is stepped along as if its curvature were below 0.
    Here it preconditions conjugate gradients on the true system, whose products cost 2 R o i. After any number of steps
    y minimises the dual ½ yᵀ(JJᵀ + λ)y − yᵀJV over some subspace, so that Vᵀ(V − Jᵀy)/λ > 0: the direction descends.
    """

    columns: int = 256
    """k; as many as the matrix has entries, or more, take it whole."""
    stop: Stop = field(default_factory=lambda: Stop(1e-3, 10))
    """Relative residual in the space of examples, and number of steps."""

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError(f"columns must be at least 1, got {self.columns}")

    def gram(self, operator: ExampleOperator, draw: int) -> Tensor:
        """(n / k) Σ over k columns of their outer products.

        Args:
            operator: J.
            draw: which draw; the same number draws the same columns, so that runs repeat.

        Returns:
            Shape [R, R].
        """
        entries = operator.size[1]
        if self.columns >= entries:
            return operator.gram()
        places = torch.randperm(entries, generator=torch.Generator().manual_seed(draw))[: self.columns]
        sketch = operator.columns(places)
        return (sketch @ sketch.mT) * (entries / self.columns)

    def solve(self, operator: ExampleOperator, factor: Tensor, matrix: Tensor, damping: float) -> Tensor:
        """(V − Jᵀ y) / λ with (J Jᵀ + λ) y = J V solved in a few preconditioned steps.

        Args:
            operator: J.
            factor: Cholesky factor of the sketch + λ.
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].
        """
        system = conjugate_gradient(
            lambda y: operator.along(operator.back(y)) + damping * y,
            operator.along(matrix),
            self.stop,
            precondition=lambda y: _back_substituted(factor, y),
        )
        return (matrix - operator.back(system.tensor)) / damping


class SENGBlock(RowBlock):
    """The rows of the latest refresh are in use, with the Cholesky factor of their Gram matrix.

    Args:
        shape: [o, i].
        model: what is kept of an example.
        memory: how much of the past.
        solver: how the system of examples is solved.
    """

    def __init__(self, shape: tuple[int, int], model: PerExample, memory: RowMemory, solver: GramSolver) -> None:
        super().__init__(shape, model, memory)
        self.solver = solver
        self.sketches = 0
        self._examples: PerExample = model
        self._used: tuple[list[Batch], list[float]] = ([], [])
        self._system: tuple[ExampleOperator, Tensor] | None = None
        self._factor: tuple[float, Tensor] | None = None

    def _decompose(self) -> None:
        used = (list(self.memory.batches), self.memory.weights())
        operator, gram = self._system_of(used, self.sketches + 1)
        # The damping enters the factor itself; before the first `solve` it is not known.
        factor = None if self._factor is None else (self._factor[0], damped_cholesky(gram, self._factor[0]))
        self.sketches += 1
        self._used, self._system, self._factor, self._operator = used, (operator, gram), factor, operator

    def _system_of(self, used: tuple[list[Batch], list[float]], draw: int) -> tuple[ExampleOperator, Tensor]:
        operator = self._examples.operator(*used)
        gram = self.solver.gram(operator, draw)
        if not bool(torch.isfinite(gram).all()):
            raise DecompositionError(f"the Gram matrix of {operator.size[0]} examples is not finite")
        return operator, gram

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(F̂ + λ)⁻¹ V.

        Args:
            matrix: V, shape [o, i].
            damping: λ > 0.

        Returns:
            Shape [o, i].

        Raises:
            RuntimeError: if there was no refresh yet.
        """
        if self._system is None:
            raise RuntimeError("the curvature holds no statistics yet; call refresh() after the first update")
        operator, gram = self._system
        if self._factor is None or self._factor[0] != damping:
            self._factor = (damping, damped_cholesky(gram, damping))
        return self.solver.solve(operator, self._factor[1], matrix, damping)

    def state_dict(self) -> dict[str, Any]:
        """Kept rows and those in use, of which the system is made again."""
        batches, weights = self._used
        return super().state_dict() | {
            "used": [list(batch) for batch in batches],
            "weights": weights,
            "sketches": self.sketches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rows.

        Args:
            state: what `state_dict` returned.
        """
        super().load_state_dict(state)
        self.sketches = state["sketches"]
        self._used = ([tuple(batch) for batch in state["used"]], list(state["weights"]))
        self._factor = None
        if self._used[0]:
            self._system = self._system_of(self._used, self.sketches)
            self._operator = self._system[0]


@dataclass(frozen=True)
class SENG:
    """The exact block of the batch's examples, solved directly in their space."""

    ema: float = 0.95
    """Weight of a kept batch relative to the next newer one."""
    memory: int = 4
    """Batches kept. The paper knows the latest alone; a few more are an average."""
    examples: int | None = 128
    """Most examples kept of a batch, drawn at random; None for all. R = memory · examples · seeds rows take R² (o + i)
    products and R³ / 3 for the decomposition; of several batches they steer a policy more steadily than of one."""
    rank: int | None = None
    """Singular vectors kept of an example's gradient where positions share the weight; None keeps it whole, as layers
    without shared weights always do. The paper takes 16."""
    solver: GramSolver = field(default_factory=WholeGram)
    """`WholeGram()`, or `ColumnSketch()` where rows are very long."""

    def __post_init__(self) -> None:
        RowMemory(self.memory, self.ema, self.examples)  # says what is out of range
        PerExample(self.rank)

    def build(self, place: Place) -> Block:
        """A block over a layer's matrix.

        Args:
            place: which one.

        Returns:
            The block.
        """
        memory = RowMemory(self.memory, self.ema, self.examples)
        return SENGBlock(place.shape, PerExample(self.rank), memory, self.solver)


def _wide(operator: ExampleOperator) -> bool:
    rows, entries = operator.size
    return rows > entries


def _precise(operator: ExampleOperator) -> ExampleOperator:
    """The same rows in float64, where the device has it."""
    return operator if operator.device.type == "mps" else operator.to(torch.float64)


def _woodbury(operator: ExampleOperator, factor: Tensor, matrix: Tensor, damping: float) -> Tensor:
    return (matrix - operator.back(_back_substituted(factor, operator.along(matrix)))) / damping


def _back_substituted(factor: Tensor, vector: Tensor) -> Tensor:
    return torch.cholesky_solve(vector[:, None], factor)[:, 0]
