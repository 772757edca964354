"""Inputs of a network as they come: one tensor, or tuples and dictionaries of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""One tensor per trained parameter, by its dotted name, shaped like it."""


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply `function` to every tensor in nested tuples, lists and dictionaries.

    Args:
        function: what is done to each tensor.
        tree: a tensor, a nest of them, or anything else, which is passed through.

    Returns:
        The same nest with each tensor replaced.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def cast_like(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """Bring a nest to where some tensors are, and its floating point numbers to their type, as torch's optimizers do.

    Args:
        tree: nested tuples, lists and dictionaries.
        tensors: whose type and device are wanted; where they differ among themselves, the nest stays as it is.

    Returns:
        The same nest; what fits already is not copied.
    """
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) != 1:
        return tree
    dtype, device = kinds.pop()
    return map_tensors(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), tree)


def take_rows(tree: Any, rows: Tensor | slice) -> Any:
    """Keep the given examples of every tensor in the nest.

    Args:
        tree: tensors of shape [N, ...].
        rows: indices of examples, shape [M]; a slice of them makes no copy.

    Returns:
        The same nest with tensors of shape [M, ...].
    """
    return map_tensors(lambda tensor: _rows(tensor, rows), tree)


def negative(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change the sign of named tensors.

    Args:
        tensors: by name.

    Returns:
        By name.
    """
    return dict(zip(tensors, torch._foreach_neg(list(tensors.values())), strict=True))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Look for NaN and infinity, with one synchronisation for all tensors.

    Args:
        tensors: of any shapes.

    Returns:
        Whether there is none; a sum that overflows counts as infinite.
    """
    sums = [tensor.sum() for tensor in tensors]
    return not sums or math.isfinite(sum(torch.stack(sums).tolist()))


def products_finite(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Look for NaN, infinity and what is too large to be multiplied, with one synchronisation for all pairs.

    Args:
        pairs: rows of two factors, of any shapes.

    Returns:
        Whether ‖left‖² ‖right‖² is finite for each pair, which bounds every second moment of either and of their
        products (Cauchy–Schwarz); a row of 1e20 is finite in float32, its square is not.
    """
    squares = [_square(left) * _square(right) for left, right in pairs]
    return not squares or bool(torch.isfinite(torch.stack(squares)).all())


def size_of(tree: Any) -> int:
    """Count the examples of a nest.

    Args:
        tree: tensors of shape [N, ...].

    Returns:
        N.
    """
    while not isinstance(tree, Tensor):
        tree = next(iter(tree.values() if isinstance(tree, dict) else tree))
    return len(tree)


def _square(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat)  # several times as fast as a norm, and as a sum


def _rows(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    # Selecting takes a third of the time of indexing, but forgets how images lie in memory.
    return tensor[rows] if isinstance(rows, slice) or tensor.dim() > 2 else tensor.index_select(0, rows)
