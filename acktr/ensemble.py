"""Several networks that differ from one by a deviation of their weights, each run on its own rows in one pass.

Rows come in equal groups, one group after the other; group e sees the weights θ + Δ_e. Gradients, statistics and forms
taken through an `Ensemble` are those at every group's own weights, and all of them speak of a step of θ, which all
groups share.
"""

from __future__ import annotations

from copy import copy
from typing import cast

import torch
from torch import Tensor, nn

from acktr.chain import Chain, _Affine
from acktr.tree import Tensors


class _GroupedAffine(_Affine):
    """A linear layer whose weights each group sees with a deviation of its own."""

    def __init__(self, module: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__(module)
        self._deviation, self._bias_deviation = weight, bias

    def _grouped(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(self._deviation), -1, rows.shape[-1])

    def _weight(self) -> Tensor:
        return self._deviation + cast(Tensor, self.module.weight)

    def _bias(self) -> Tensor:
        return (self._bias_deviation + cast(Tensor, self.module.bias)).unsqueeze(1)

    def forward(self, values: Tensor) -> Tensor:
        return torch.baddbmm(self._bias(), self._grouped(values), self._weight().mT).flatten(0, 1)

    def backward(self, grads: Tensor, _inputs: Tensor, _outputs: Tensor) -> Tensor:
        return (self._grouped(grads) @ self._weight()).flatten(0, 1)

    def along(self, tangent: Tensor, _inputs: Tensor, _outputs: Tensor) -> Tensor:
        return (self._grouped(tangent) @ self._weight().mT).flatten(0, 1)

    def along_and(self, moved: Tensor, tangent: Tensor) -> Tensor:
        return moved + self.along(tangent, tangent, tangent)


class _FixedAffine(_GroupedAffine):
    """The same with the weights of today, added up once; for many passes of few rows."""

    def __init__(self, layer: _GroupedAffine) -> None:
        super().__init__(layer.module, layer._deviation, layer._bias_deviation)
        self._transposed = layer._weight().mT.contiguous()
        self._row = layer._bias()

    def forward(self, values: Tensor) -> Tensor:
        return torch.baddbmm(self._row, self._grouped(values), self._transposed).flatten(0, 1)


class Ensemble(Chain):
    """A chain whose linear layers each group of rows sees with weights of its own."""

    @classmethod
    def around(cls, chain: Chain, deviations: Tensors) -> Ensemble:
        """The networks around a chain's own.

        Args:
            chain: of linear layers with biases; its weights are looked up anew in every pass.
            deviations: Δ for every layer's weight [E, o, i] and bias [E, o], by dotted name.

        Returns:
            The ensemble, of E groups.
        """
        ensemble = cls.__new__(cls)
        vars(ensemble).update(vars(chain))
        ensemble._links = list(chain._links)
        for k, (module, name) in enumerate(zip(chain._modules, chain.layers, strict=True)):
            if name is not None:
                weight, bias = deviations[f"{name}.weight"], deviations[f"{name}.bias"]
                ensemble._links[k] = _GroupedAffine(module, weight, bias)
                ensemble.groups = len(weight)
        return ensemble

    @torch.no_grad()
    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Every layer's weights [E, o, i] and bias [E, o] of today, group by group."""
        return [(link._weight(), link._bias().squeeze(1)) for link in self._links if isinstance(link, _GroupedAffine)]

    @torch.no_grad()
    def fixed(self) -> Ensemble:
        """The same networks with the weights of today, for forward passes until the network steps.

        Returns:
            An ensemble of as many groups.
        """
        ensemble = copy(self)
        ensemble._links = [_FixedAffine(k) if isinstance(k, _GroupedAffine) else k for k in self._links]
        return ensemble
