"""Layers as matrices: how a module's inputs, output gradients and parameters become rows and columns.

One layout everywhere, N examples, S places where the weight is shared (S = 1 for a vector input,
the output positions of a convolution), i inputs (with a trailing 1 for the bias), o outputs:

    inputs        [N, S, i]
    output_grads  [N, S, o]      per example, un-averaged
    matrix        [o, i]         weight, with the bias as its last column

so that an example's gradient is Σ_s output_grads[n, s] ⊗ inputs[n, s].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer:
    """A linear map inside a network, seen through its matrix.

    Args:
        name: the module's dotted name in the network.
        module: the module itself; never changed.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.weight = self._trainable("weight")
        self.bias = self._trainable("bias")
        self.parameters = tuple(p for p in (self.weight, self.bias) if p is not None)
        """The trained ones among weight and bias, in this order."""
        self._weight_shape = cast(Tensor, module.weight).shape

    def _trainable(self, name: str) -> nn.Parameter | None:
        parameter = getattr(self.module, name, None)
        return parameter if isinstance(parameter, nn.Parameter) and parameter.requires_grad else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the module's parameters."""
        return self.parameters[0].dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs, the bias's among them) of the matrix."""
        weight = cast(Tensor, self.module.weight)
        columns = weight[0].numel() if self.weight is not None else 0
        return weight.shape[0], columns + (self.bias is not None)

    @property
    def offsets(self) -> int:
        """Places of a convolution's kernel: the columns but the bias's are channels × offsets, offsets fastest."""
        weight = cast(Tensor, self.module.weight)
        return weight[0, 0].numel() if self.weight is not None else 1

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join tensors shaped like `parameters` into the matrix [o, i].

        Args:
            tensors: one per trained parameter, in the order of `parameters`.

        Returns:
            The matrix.
        """
        columns = [t.unsqueeze(1) if t.dim() == 1 else t.flatten(1) for t in tensors]
        return torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]

    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Split the matrix [o, i] into tensors shaped like `parameters`; the inverse of `pack`.

        Args:
            matrix: shape [o, i].

        Returns:
            One tensor per trained parameter.
        """
        if self.bias is None:
            return (matrix.reshape(self._weight_shape),)
        if self.weight is None:
            return (matrix[:, 0],)
        weight = matrix.narrow(1, 0, matrix.shape[1] - 1)
        return weight.reshape(self._weight_shape), matrix.select(1, -1)

    def inputs(self, activations: Tensor) -> Tensor:
        """Rows the weight multiplies, with a trailing 1 where a bias is trained.

        Args:
            activations: what the module was called with, batch first.

        Returns:
            Shape [N, S, i].
        """
        rows = self._rows(activations)
        columns = [rows] if self.weight is not None else []
        if self.bias is not None:
            columns.append(rows.new_ones(rows.shape[0], rows.shape[1], 1))
        return torch.cat(columns, dim=2) if len(columns) > 1 else columns[0]

    def _rows(self, activations: Tensor) -> Tensor:
        return activations.reshape(activations.shape[0], -1, activations.shape[-1])

    def output_grads(self, grads: Tensor) -> Tensor:
        """Gradients of the module's output as rows.

        Args:
            grads: shaped like the module's output, batch first.

        Returns:
            Shape [N, S, o].
        """
        return grads.reshape(grads.shape[0], -1, grads.shape[-1])


class Conv2dLayer(Layer):
    """A convolution as the linear map from patches to output positions (KFC, Grosse & Martens 2016, section 3).

    Strides, padding of every mode and dilation are those of the module; groups are refused, because one
    weight matrix per group would be another matrix than the one this layout describes.

    Args:
        name: the module's dotted name in the network.
        module: a `Conv2d` with groups = 1.

    Raises:
        ValueError: if the convolution has groups.
    """

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        if module.groups != 1:
            raise ValueError(
                f"layer '{name}' has groups={module.groups}; only groups=1 has a Kronecker-factored Fisher here: "
                "use groups=1 or freeze the layer (requires_grad_(False))"
            )
        super().__init__(name, module)

    def _rows(self, activations: Tensor) -> Tensor:
        conv = cast(nn.Conv2d, self.module)
        padding = conv.padding
        if conv.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            activations = F.pad(activations, conv._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        patches = F.unfold(activations, conv.kernel_size, conv.dilation, padding, conv.stride)
        return patches.transpose(1, 2)

    def output_grads(self, grads: Tensor) -> Tensor:
        """Gradients at the output positions as rows.

        Args:
            grads: shape [N, o, height, width].

        Returns:
            Shape [N, height · width, o].
        """
        return grads.flatten(2).transpose(1, 2)


def as_layer(name: str, module: nn.Module) -> Layer | None:
    """The matrix view of a module, if it has one.

    Args:
        name: the module's dotted name in the network.
        module: any module.

    Returns:
        The layer, or None for a module whose parameters need another kind of block.
    """
    if type(module) is nn.Linear:
        return Layer(name, module)
    if type(module) is nn.Conv2d:
        return Conv2dLayer(name, module)
    return None
