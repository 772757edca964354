"""Three implementations of the same curvature behind one face: ours, nngeometry's and curvlinops'.

Each computes the Fisher's statistics of a classifier on one batch, decomposes them, and applies (F̂ + λ)⁻¹ to a
gradient. Nothing is kept from one call to the next but what the library itself keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from acktr.capture import Capture
from acktr.curvature import EKFAC, KFAC, BlockDiagonal, CurvatureFactory, FactoredKFAC
from acktr.curvature.kronecker import kfac
from acktr.curvature.lowrank import ekfac as lowrank
from acktr.fisher import ExactFisher, SampledFisher
from acktr.likelihood import Categorical
from agents.benchmarks.measuring import Phases
from agents.networks import NatureCNN

Method = Literal["kfac", "factored-kfac", "ekfac"]
"""K-FAC with exact and with factored Tikhonov damping, and EKFAC."""
Tensors = dict[str, Tensor]

DAMPING = 0.01
"""λ, the optimizer's default."""
RANK = 64
"""Leading eigenvectors that the shipped configuration of image networks keeps of EKFAC's wide factors."""
OURS, IN_FULL = "ours", "ours, in full"
"""As shipped, where ``BlockDiagonal`` bounds the rows of a layer's statistics and EKFAC has a rank; and with all rows
and all eigenvectors, as the peers do it."""
PEERS = {"nngeometry": "nngeometry", "curvlinops": "curvlinops"}
"""Package to import, by name."""


@dataclass(frozen=True)
class Problem:
    """A classifier and a batch."""

    network: nn.Module
    """Inputs to logits."""
    inputs: Tensor
    """The batch, shape [N, ...]."""
    targets: Tensor
    """Its classes, shape [N]; only curvlinops asks for them, and ignores them."""
    gradient: Tensors
    """What the inverse is applied to, one tensor per parameter."""


class Engine(Protocol):
    """One implementation of one method."""

    def prepare(self) -> None:
        """Compute everything that a solve needs, or leave it to the first solve."""
        ...

    def solve(self) -> Tensors:
        """(F̂ + λ)⁻¹ times the problem's gradient."""
        ...

    def multiply(self) -> Tensors:
        """F̂ times the problem's gradient, undamped."""
        ...


def mlp(seed: int, batch: int = 2048, width: int = 512) -> Problem:
    """Four hidden layers, 64 inputs, 10 classes.

    Args:
        seed: Of weights and batch.
        batch: Examples.
        width: Of the hidden layers.

    Returns:
        The problem.
    """
    torch.manual_seed(seed)
    sizes = [64, width, width, width, width]
    hidden = [m for pair in pairwise(sizes) for m in (nn.Linear(*pair), nn.Tanh())]
    return _problem(nn.Sequential(*hidden, nn.Linear(width, 10)), torch.randn(batch, 64), 10)


def atari(seed: int, batch: int = 640) -> Problem:
    """The Atari policy: three convolutions, a layer of 512, six actions.

    Args:
        seed: Of weights and batch.
        batch: Examples.

    Returns:
        The problem.
    """
    torch.manual_seed(seed)
    network = nn.Sequential(NatureCNN(spaces.Box(0, 255, (4, 84, 84), np.uint8)), nn.Linear(512, 6))
    return _problem(network, torch.rand(batch, 4, 84, 84), 6)


def methods_of(engine: str) -> tuple[Method, ...]:
    """List what an implementation can do.

    Args:
        engine: ``ours``, ``ours, in full`` or a peer.

    Returns:
        Its methods; nngeometry's K-FAC knows factored damping alone.
    """
    return ("factored-kfac", "ekfac") if engine == "nngeometry" else ("kfac", "factored-kfac", "ekfac")


def installed(peer: str) -> bool:
    """Tell whether a peer is there.

    Args:
        peer: Its name.

    Returns:
        Whether its package can be found.
    """
    return find_spec(PEERS[peer]) is not None


def make(engine: str, problem: Problem, method: Method, exact: bool = False) -> Engine:
    """Make an implementation.

    Args:
        engine: ``ours``, ``ours, in full`` or a peer that is installed.
        problem: What to take the curvature of.
        method: Which curvature.
        exact: Take the expectation over all classes, in place of one class drawn per example.

    Returns:
        The implementation.
    """
    if engine == "nngeometry":
        return _Nngeometry(problem, method, exact)
    if engine == "curvlinops":
        return _Curvlinops(problem, method, exact)
    return _Ours(problem, method, exact, in_full=engine == IN_FULL)


def tell_apart(phases: Phases, engine: str) -> None:
    """Put clocks on an implementation's decompositions.

    Args:
        phases: The clocks.
        engine: Whose.
    """
    if engine == "nngeometry":
        seams: list[tuple[Any, str]] = [(torch.linalg, "eigh"), (torch, "inverse")]
    elif engine == "curvlinops":
        import curvlinops.ekfac
        import curvlinops.inverse

        names = ("eigh", "cholesky", "cholesky_inverse")
        seams = [(curvlinops.ekfac, "eigh"), *((curvlinops.inverse, name) for name in names)]
    else:
        seams = [
            (kfac, "symmetric_eigen"),
            (kfac, "damped_inverse"),
            (lowrank, "leading_eigenvectors"),
        ]
    for owner, name in seams:
        phases.wrap(owner, name, "refresh")


class _Ours:
    """Ours; moments and bases go on from call to call, as in training."""

    def __init__(self, problem: Problem, method: Method, exact: bool, in_full: bool) -> None:
        kinds: dict[str, CurvatureFactory] = {
            "kfac": KFAC(),
            "factored-kfac": FactoredKFAC(),
            "ekfac": EKFAC(rank=None if in_full else RANK),
        }
        options: dict[str, Any] = {"max_rows": 2**62} if in_full else {}
        self._problem = problem
        self._fisher = ExactFisher() if exact else SampledFisher()
        parameters = dict(problem.network.named_parameters())
        self._curvature = BlockDiagonal(problem.network, parameters, kinds[method], **options)
        self._capture = Capture(problem.network, self._curvature.layers)
        self._generator = torch.Generator().manual_seed(0)

    def prepare(self) -> None:
        with self._capture.recording():
            self._problem.network(self._problem.inputs)
        record = self._capture.last
        seeds = self._fisher(Categorical(), record.outputs, None, self._generator)
        if not self._curvature.update(record, seeds, True, self._generator):
            raise FloatingPointError("the statistics of our curvature were not finite")
        self._capture.release()

    def solve(self) -> Tensors:
        return self._curvature.solve(self._problem.gradient, DAMPING)

    def multiply(self) -> Tensors:
        return self._curvature.multiply(self._problem.gradient)


class _Nngeometry:
    """Nngeometry's matrices, made anew at every call."""

    def __init__(self, problem: Problem, method: Method, exact: bool) -> None:
        from nngeometry import FIM, FIM_MonteCarlo
        from nngeometry.layercollection import LayerCollection
        from nngeometry.object import PMatEKFAC, PMatKFAC, PVector

        self._ekfac, self._kind = method == "ekfac", PMatEKFAC if method == "ekfac" else PMatKFAC
        self._make, self._network = FIM if exact else FIM_MonteCarlo, problem.network
        data = TensorDataset(problem.inputs)
        self._loader = DataLoader(data, batch_size=None, sampler=_WholeBatch(len(problem.inputs)))
        layers = LayerCollection.from_model(problem.network)
        members = {name: (f"{name}.weight", f"{name}.bias") for name in layers.layers}
        tensors = {name: tuple(problem.gradient[p] for p in pair) for name, pair in members.items()}
        self._members, self._gradient = members, PVector(layers, dict_repr=tensors)
        self._matrix: Any = None

    def prepare(self) -> None:
        self._matrix = self._make(self._network, self._loader, self._kind, variant="classif_logits")
        if self._ekfac:
            self._matrix.update_diag(self._loader)

    def solve(self) -> Tensors:
        if self._ekfac:
            return self._tensors(self._matrix.solve(self._gradient, regul=DAMPING))
        return self._tensors(self._matrix.inverse(regul=DAMPING).mv(self._gradient))

    def multiply(self) -> Tensors:
        return self._tensors(self._matrix.mv(self._gradient))

    def _tensors(self, vector: Any) -> Tensors:
        parts = vector.to_dict()
        return {p: t for name, pair in self._members.items() for p, t in zip(pair, parts[name], strict=True)}


class _Curvlinops:
    """Linear operators of curvlinops, made anew at every call."""

    def __init__(self, problem: Problem, method: Method, exact: bool) -> None:
        from curvlinops import EKFACLinearOperator, KFACLinearOperator

        self._ekfac, self._problem = method == "ekfac", problem
        self._kind = EKFACLinearOperator if self._ekfac else KFACLinearOperator
        self._options = {
            "fisher_type": "type-2" if exact else "mc",
            "separate_weight_and_bias": False,
            "check_deterministic": False,
            "num_per_example_loss_terms": 1,
            "num_data": len(problem.inputs),
        }
        damping = "use_heuristic_damping" if method == "factored-kfac" else "use_exact_damping"
        self._damping = {"damping": DAMPING, damping: True}
        self._operator: Any = None

    def prepare(self) -> None:
        network, data = self._problem.network, [(self._problem.inputs, self._problem.targets)]
        parameters = list(network.parameters())
        self._operator = self._kind(network, nn.CrossEntropyLoss(), parameters, data, **self._options)
        if self._ekfac:
            self._operator.compute_eigenvalue_correction()
        else:
            self._operator.compute_kronecker_factors()

    def solve(self) -> Tensors:
        from curvlinops import KFACInverseLinearOperator

        return self._apply(KFACInverseLinearOperator(self._operator, **self._damping))

    def multiply(self) -> Tensors:
        return self._apply(self._operator)

    def _apply(self, operator: Any) -> Tensors:
        out = operator @ list(self._problem.gradient.values())
        return dict(zip(self._problem.gradient, out, strict=True))


class _WholeBatch(Sampler[slice]):
    """Draws the whole data set at once, without collecting its examples one by one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def __iter__(self) -> Iterator[slice]:
        yield slice(None)

    def __len__(self) -> int:
        return self._size


def _problem(network: nn.Module, inputs: Tensor, classes: int) -> Problem:
    gradient = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    return Problem(network, inputs, torch.randint(0, classes, (len(inputs),)), gradient)
