"""Adam in the place of the natural gradient: what is left of a step without curvature and without a trust region."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from acktr.likelihood import Likelihood
from acktr.nograd import without_grad
from acktr.objective import Loss
from acktr.passes import Passes, trained_parameters
from acktr.ranks import Ranks
from acktr.step import StepReport
from acktr.tree import all_finite

_UNKNOWN = math.nan


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015) with clipped gradients, to see what the natural gradient is worth."""

    learning_rate: float = 3e-4
    """Step size; PPO's usual one."""
    epsilon: float = 1e-5
    """Added to the root of the second moment; PPO's usual one."""
    max_grad_norm: float = 0.5
    """Longest gradient before it is clipped; PPO's usual one."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class FirstOrder(Passes, torch.optim.Adam):
    """Adam's steps, taken by the calls that a `NaturalGradient` takes.

    `param_groups[0]["radius"]` may be set as it is there, and holds nothing back: there is no trust region.

    Args:
        network: the module; never changed. Its outputs must be what `likelihood` expects.
        likelihood: what the outputs mean.
        settings: of the steps.
        parameters: the trained ones by dotted name; None for all that require gradients.
        seed: of the optimizer's own generator.
        ranks: the processes that train the network together; None for this one alone.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        settings: Adam,
        *,
        parameters: Mapping[str, nn.Parameter] | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._watch(network, likelihood, trained_parameters(network, parameters), [], seed)
        self._max_grad_norm = settings.max_grad_norm
        self.report = StepReport(0.0, _UNKNOWN, _UNKNOWN, _UNKNOWN)
        super().__init__(self._leaves, lr=settings.learning_rate, eps=settings.epsilon)
        self.param_groups[0]["radius"] = math.inf

    @without_grad
    def descend(self, loss: Loss | None = None) -> None:
        """Take a step from the gradients in `.grad`; one that is not finite is skipped and counted.

        Args:
            loss: not looked at again.
        """
        self._capture.release()
        if self._ranks.size > 1 and not self._alike:
            for name, mean in self._ranks.mean_gradient(self._own_gradient(), self._pulled).items():
                self.parameters[name].grad = mean
        self._alike = False
        if not all_finite([p.grad for p in self._leaves if p.grad is not None]):
            self.report = StepReport(0.0, 0.0, 0.0, _UNKNOWN)
            self._count_skip("gradient")
            return
        torch.nn.utils.clip_grad_norm_(self._leaves, self._max_grad_norm)
        self.step()
        self._skipped_in_a_row = 0
        self.report = StepReport(self.param_groups[0]["lr"], _UNKNOWN, _UNKNOWN, _UNKNOWN)

    def state_dict(self) -> dict[str, Any]:
        """Torch's state dictionary with the counters and the generator."""
        own = {
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
        self.skipped, self._skipped_in_a_row = state_dict["own"]["skips"]
        self.causes = dict(state_dict["own"].get("causes", {}))  # older files have none
        self._generator.set_state(state_dict["own"]["generator"].cpu())
