"""Tensors in a row: symmetric ones as triangles, many as one, one as many of bounded size; and whatever as bytes."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def triangle(matrix: Tensor) -> Tensor:
    """A symmetric matrix's entries on and above the diagonal, row after row.

    Args:
        matrix: shape [n, n].

    Returns:
        Shape [n (n + 1) / 2].
    """
    return matrix.flatten()[_places(len(matrix), matrix.device)[0]]


def symmetric(entries: Tensor, width: int) -> Tensor:
    """The matrix of a triangle.

    Args:
        entries: shape [n (n + 1) / 2].
        width: n.

    Returns:
        Shape [n, n], symmetric to the last bit.
    """
    above, below = _places(width, entries.device)
    matrix = entries.new_empty(width * width)
    matrix[above] = entries
    matrix[below] = entries
    return matrix.view(width, width)


@lru_cache(maxsize=64)
def _places(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(width, width, device=device)
    return rows * width + columns, columns * width + rows


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of all tensors, one after the other; of one type, and float32 in place of half precision.

    Args:
        tensors: at least one, of any shapes.

    Returns:
        One dimension.
    """
    dtype = widest(tensors)
    return torch.cat([tensor.flatten().to(dtype) for tensor in tensors])


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """A type that holds every entry.

    Args:
        tensors: any.

    Returns:
        At least float32.
    """
    dtype = torch.float32
    for other in {tensor.dtype for tensor in tensors}:
        dtype = torch.promote_types(dtype, other)
    return dtype


def taken_apart(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that `joined` joined.

    Args:
        flat: one dimension.
        like: of the right shapes and types.

    Returns:
        As many.
    """
    pieces = torch.split(flat, [tensor.numel() for tensor in like])
    return [piece.to(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def buckets(flat: Tensor, most_bytes: int) -> Iterator[Tensor]:
    """Views of a row of entries, each no larger than stated: the first may travel while the next is prepared.

    Args:
        flat: one dimension.
        most_bytes: of each.

    Yields:
        The views, which cover it.
    """
    yield from torch.split(flat, max(1, most_bytes // flat.element_size()))


def as_bytes(thing: Any) -> Tensor:
    """Anything that torch saves.

    Args:
        thing: tensors, numbers, names, and collections of them.

    Returns:
        Bytes, in the processor's memory.
    """
    file = io.BytesIO()
    torch.save(thing, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def from_bytes(data: Tensor, device: torch.device) -> Any:
    """What `as_bytes` took.

    Args:
        data: bytes, from a process that is trusted.
        device: where tensors of another process's GPU go.

    Returns:
        The thing.
    """
    data = data.cpu()
    file = io.BytesIO(ctypes.string_at(data.data_ptr(), len(data)))

    def located(storage: Any, where: str) -> Any:
        return storage if where == "cpu" else storage.to(device=device)

    return torch.load(file, located, weights_only=False)
