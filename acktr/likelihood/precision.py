"""A regression's unknown noise: a Gamma distribution over its precision, learned beside the weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from acktr.likelihood.gaussian import ScalarGaussian


class GammaPrecision:
    """q(τ) = Gamma(a, b) over the precision τ of y ~ N(f(x, w), 1/τ), under a Gamma prior.

    Given the weights' posterior the best q is known: a = a₀ + N/2 and b = b₀ + N/2 · E_w[mean squared residual]. So b
    follows the batches' residuals by an exponential average, which is a natural-gradient step on b (Hoffman et al.
    2013), where the noisy natural gradient's own code takes Adam's steps on both. `prior_shape` = `prior_rate` = 0 is
    the point estimate of maximum likelihood, as N grows.

    Args:
        examples: N, all the data.
        prior_shape: a₀ ≥ 0.
        prior_rate: b₀ ≥ 0, in squared units of the target; b₀ / a₀ is the variance expected beforehand, and a noise
            far below 2 b₀ / N cannot be found.
        ema: weight kept of the old residuals per update, in [0, 1).

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, examples: int, *, prior_shape: float = 1.0, prior_rate: float = 0.01, ema: float = 0.99) -> None:
        if examples < 1:
            raise ValueError(f"examples must be at least 1, got {examples}")
        for name, value in (("prior_shape", prior_shape), ("prior_rate", prior_rate)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {ema}")
        self.examples, self.prior_rate, self.ema = examples, prior_rate, ema
        self.shape = prior_shape + examples / 2
        self._residual, self._weight = 0.0, 0.0

    @property
    def rate(self) -> float:
        """b; before the first residuals as if their mean square were 1, which suits standardised targets."""
        residual = self._residual / self._weight if self._weight else 1.0
        return self.prior_rate + self.examples / 2 * residual

    @property
    def likelihood(self) -> ScalarGaussian:
        """The Gaussian whose log-density's gradient is the expected one: its variance is 1/E[τ] = b/a."""
        return ScalarGaussian(max(self.rate / self.shape, 1e-12))

    def update(self, residuals: Tensor) -> None:
        """Take in a batch's residuals at drawn weights; what is not finite is left out.

        Args:
            residuals: y − f(x, w), any shape.
        """
        squared = float(residuals.detach().square().mean())
        if math.isfinite(squared):
            self._residual = self.ema * self._residual + (1 - self.ema) * squared
            self._weight = self.ema * self._weight + 1 - self.ema

    def log_prob(self, values: Tensor, targets: Tensor) -> Tensor:
        """The log-density ln ∫ N(y | f, 1/τ) q(τ) dτ: Student's t with 2a degrees of freedom and scale √(b/a).

        Args:
            values: f, shape [..., N].
            targets: y, shape [N].

        Returns:
            Shape [..., N], nats.
        """
        freedom, variance = 2 * self.shape, max(self.rate / self.shape, 1e-12)
        constant = (
            math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi * variance)
        )
        return constant - (freedom + 1) / 2 * ((targets - values).square() / (freedom * variance)).log1p()

    def state_dict(self) -> dict[str, Any]:
        """The averaged residual."""
        return {"residual": self._residual, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: the averaged residual.
        """
        self._residual, self._weight = state["residual"], state["weight"]
