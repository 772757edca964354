"""Networks whose weights are drawn: in place for the passes of a training step, put back for everything else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator as Iteration
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from acktr.capture import Pass
from acktr.likelihood import Outputs
from acktr.passes import Passes
from acktr.tree import Tensors


@dataclass(frozen=True)
class Evidence:
    """What a variational posterior is weighed against: N data under a prior N(0, η I).

    The objective is E_q[Σ_n log p(y_n | x_n, w)] − λ KL(q ‖ prior), the evidence lower bound at λ = 1.
    """

    examples: int
    """N, all the data of which batches are drawn."""
    kl_weight: float = 1.0
    """λ ≥ 0; below 1 the posterior is colder (narrower) than Bayes' rule, and at 0 no noise and no prior are left."""
    prior_variance: float = 1.0
    """η > 0."""

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ValueError(f"examples must be at least 1, got {self.examples}")
        if not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"kl_weight must be at least 0 and finite, got {self.kl_weight}")
        if not 0 < self.prior_variance < float("inf"):
            raise ValueError(f"prior_variance must be positive and finite, got {self.prior_variance}")

    @property
    def scale(self) -> float:
        """λ/N, by which the inverse of a mean curvature becomes a covariance."""
        return self.kl_weight / self.examples

    @property
    def damping(self) -> float:
        """γ_in = λ/(N η), what the prior adds to the mean curvature."""
        return self.scale / self.prior_variance


class Draws(Passes):
    """Weights drawn around the mean that the network holds otherwise.

    Between draws the network's parameters are the mean: what is evaluated, saved or copied then is the mean, and
    nothing has to be done for it.
    """

    evidence: Evidence
    """What the posterior is weighed against."""
    _mean: list[Tensor] | None = None
    _draws = 0
    _total: Sequence[Tensor] = ()
    _deviation: Tensors

    @abstractmethod
    def _noise(self, generator: Generator) -> Tensors:
        """A deviation from the mean, one tensor per trained parameter."""

    @property
    @abstractmethod
    def divergence(self) -> float:
        """KL(posterior ‖ prior) in nats."""

    @contextmanager
    def sampled(self) -> Iteration[None]:
        """Draw weights for the passes inside, forwards and backwards; the mean is back afterwards.

        Entered several times before a step, the step takes the mean over the draws of the gradients that add up in
        `.grad`; the first of them clears what was there, and nobody else may in between. A draw that an exception ends
        counts for nothing.

        Yields:
            Nothing.
        """
        if not self._draws:
            for p in self._leaves:
                p.grad = None
        whole = self._draws, self._total, [None if p.grad is None else p.grad.clone() for p in self._leaves]
        self._deviation = self._noise(self._generator)
        with self._moved(self._deviation):
            self._draws += 1
            before = self._total or [torch.zeros_like(p) for p in self._leaves]
            self._total = [total + p.detach() for total, p in zip(before, self._leaves, strict=True)]
            try:
                yield
            except BaseException:
                self._draws, self._total, grads = whole
                for p, grad in zip(self._leaves, grads, strict=True):
                    p.grad = grad
                raise

    @contextmanager
    def _moved(self, noise: Tensors) -> Iteration[None]:
        if self._mean is not None:
            raise RuntimeError("weights are drawn already; leave sampled() before drawing others")
        self._mean = [p.detach().clone() for p in self._leaves]
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.add_(noise[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, mean in zip(self._leaves, self._mean, strict=True):
                    p.copy_(mean)
            self._mean = None

    @torch.no_grad()
    def predict(self, *args: Any, samples: int = 100, seed: int = 0) -> Outputs:
        """Outputs under weights drawn from the posterior; training's own draws are not disturbed.

        Args:
            args: what the network is called with.
            samples: S, how many draws.
            seed: of the draws.

        Returns:
            The network's outputs, shape [S, N, ...] each.
        """
        generator = torch.Generator(device=self._leaves[0].device).manual_seed(seed)
        drawn = []
        for _ in range(samples):
            with self._moved(self._noise(generator)):
                drawn.append(self.outputs(*args))
        return tuple(torch.stack(output) for output in zip(*drawn, strict=True))

    @torch.no_grad()
    def pull_back(self, output_grads: Outputs, passes: Sequence[Pass] = ()) -> None:
        """Put the objective's gradient into `.grad`, and add it up over the draws of one step.

        Args:
            output_grads: of the objective, mean over examples included, shaped like the outputs.
            passes: several calls, if the objective's batch was run in parts; None for the latest call alone.
        """
        before = [p.grad for p in self._leaves] if self._draws > 1 else []
        super().pull_back(output_grads, passes)
        for p, earlier in zip(self._leaves, before, strict=False):
            if earlier is not None:
                p.grad = earlier if p.grad is None else p.grad + earlier

    def _gradient_over_draws(self) -> Tensors:
        """The loss's gradient, averaged over the draws."""
        self._check_mean()
        draws = max(self._draws, 1)
        return {name: torch.zeros_like(p) if p.grad is None else p.grad / draws for name, p in self.parameters.items()}

    def _weights_over_draws(self) -> Tensors:
        """The drawn weights, averaged over the draws; the mean, where there were none."""
        if not self._draws:
            return {name: p.detach() for name, p in self.parameters.items()}
        return {name: total / self._draws for name, total in zip(self.parameters, self._total, strict=True)}

    def _check_mean(self) -> None:
        if self._mean is not None:
            raise RuntimeError("the network holds drawn weights; leave sampled() first, which puts the mean back")

    def _forget_draws(self) -> None:
        self._draws, self._total, self._deviation = 0, (), {}
