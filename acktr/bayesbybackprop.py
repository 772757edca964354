"""Bayes by Backprop: the reparameterised diagonal Gaussian, by first-order steps (Blundell et al. 2015).

The baseline of noisy natural gradients: mean and deviation are trained like any other parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Generator as Iteration
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from acktr.draws import Draws, Evidence
from acktr.likelihood import Likelihood
from acktr.passes import trained_parameters
from acktr.tree import Tensors, all_finite


class BayesByBackprop(Draws, torch.optim.Adam):
    """The posterior N(θ, diag σ²), both stepped by Adam; takes the calls that a `NoisyNaturalGradient` takes.

    With w = θ + σ ε and g = ∇ −log p(y | x, w), the gradients per datum are g + γ_in θ and, by log σ,
    σ ε g + λ/N (σ²/η − 1): the divergence to the prior enters in closed form.

    Deviation from the paper: log σ in the place of a softplus, whose gradient vanishes with σ.

    Args:
        network: the module; never changed. Its parameters are θ, but inside `sampled()`.
        likelihood: what its outputs mean; may be replaced between steps.
        evidence: N, λ and η.
        lr: Adam's step size.
        betas: Adam's averages.
        initial_std: the first σ of every weight, > 0.
        parameters: the trained ones by dotted name; None for all that require gradients.
        seed: of the optimizer's own generator.

    Raises:
        ValueError: if `initial_std` is not positive.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        evidence: Evidence,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        initial_std: float = 0.05,
        parameters: Mapping[str, nn.Parameter] | None = None,
        seed: int = 0,
    ) -> None:
        if not initial_std > 0:
            raise ValueError(f"initial_std must be positive, got {initial_std}")
        self.evidence = evidence
        trained = trained_parameters(network, parameters)
        self._watch(network, likelihood, trained, [], seed)
        self.log_stds = {name: nn.Parameter(torch.full_like(p, math.log(initial_std))) for name, p in trained.items()}
        """log σ by the parameter's dotted name."""
        self._slopes: Tensors = {}
        super().__init__([*self._leaves, *self.log_stds.values()], lr=lr, betas=betas)

    @torch.no_grad()
    def _noise(self, generator: Generator) -> Tensors:
        out: Tensors = {}
        for name, log_std in self.log_stds.items():
            out[name] = log_std.exp() * torch.empty_like(log_std).normal_(generator=generator)
        return out

    @contextmanager
    def sampled(self) -> Iteration[None]:
        """As `Draws` has it; what a draw adds to `.grad`, times its deviation, is the gradient by log σ.

        Yields:
            Nothing.
        """
        before = {name: p.grad.clone() for name, p in self.parameters.items() if self._draws and p.grad is not None}
        with super().sampled():
            yield
        for name, p in self.parameters.items():
            if p.grad is not None:
                own = p.grad - before[name] if name in before else p.grad
                self._slopes[name] = self._slopes.get(name, torch.zeros_like(own)) + own * self._deviation[name]

    @property
    def divergence(self) -> float:
        """KL(posterior ‖ prior) in nats."""
        prior, total = self.evidence.prior_variance, 0.0
        for p, log_std in zip(self._leaves, self.log_stds.values(), strict=True):
            ratio = (2 * log_std.detach().double()).exp() / prior
            total += 0.5 * float((ratio - 1 - ratio.log() + p.detach().double().square() / prior).sum())
        return total

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step mean and deviation from the gradients in `.grad`; one that is not finite is skipped and counted.

        Args:
            closure: recomputes the loss and its gradients, as in torch.optim; rarely needed here.

        Returns:
            The closure's loss, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.descend()
        return loss

    @torch.no_grad()
    def descend(self) -> None:
        """Take the step, as `step` does."""
        # The divergence's gradient is taken at the mean, where it is known, and not at the draws.
        prior, gradient, slopes = self.evidence.damping, self._gradient_over_draws(), self._std_gradient()
        gradient = {name: g.add(self.parameters[name], alpha=prior) for name, g in gradient.items()}
        self._capture.release()
        self._forget_draws()
        self._slopes = {}
        if not all_finite([*gradient.values(), *slopes.values()]):
            self._count_skip("gradient")
            return
        for name, p in self.parameters.items():
            p.grad, self.log_stds[name].grad = gradient[name], slopes[name]
        super().step()
        self._skipped_in_a_row = 0

    def _std_gradient(self) -> Tensors:
        scale, prior, draws = self.evidence.scale, self.evidence.prior_variance, max(self._draws, 1)
        out: Tensors = {}
        for name, log_std in self.log_stds.items():
            own: Tensor = scale * ((2 * log_std).exp() / prior - 1)
            out[name] = own + self._slopes[name] / draws if name in self._slopes else own
        return out

    def state_dict(self) -> dict[str, Any]:
        """Torch's state dictionary with the deviations, the counters and the generator; between two steps."""
        self._check_mean()
        own = {
            "log_stds": {name: log_std.detach().clone() for name, log_std in self.log_stds.items()},
            "skips": [self.skipped, self._skipped_in_a_row],
            "causes": dict(self.causes),
            "generator": self._generator.get_state(),
        }
        return super().state_dict() | {"own": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, to the last bit.

        Args:
            state_dict: of an optimizer of the same network.
        """
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "own"})
        own = state_dict["own"]
        with torch.no_grad():
            for name, log_std in self.log_stds.items():
                log_std.copy_(own["log_stds"][name])
        self.skipped, self._skipped_in_a_row = own["skips"]
        self.causes = dict(own.get("causes", {}))  # older files have none
        self._generator.set_state(own["generator"].cpu())
