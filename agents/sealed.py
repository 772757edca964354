"""Files that prove to be as they were written: a first line, the content, and a SHA-256 over both.

The first line tells a sealed file from any other, so no damage can turn one into a file that would be read without its
checksum. A seal tells damage, not malice: whoever writes a file can seal it, and its reader has to trust it no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from agents.rundir import write_whole

HEAD = b"acktr sealed file 1\n"
"""The first line."""

_DIGEST = 32
_BLOCK = 1 << 20


class BrokenSealError(ValueError):
    """A file is not as it was written; the message says what is wrong."""


def write(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Write and seal a file, whole or not at all.

    Args:
        path: The file, replaced if it exists.
        fill: Writes the content to the stream it is given, from its beginning to its end.
    """

    def sealing(stream: BinaryIO) -> None:
        sealed = _Sealing(stream)
        sealed.write(HEAD)
        fill(cast(BinaryIO, sealed))
        stream.write(sealed.digest)

    write_whole(path, sealing)


def read(path: Path) -> bytes:
    """Read a sealed file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        BrokenSealError: If it is not whole, or not sealed.
    """
    data = path.read_bytes()
    if not data:
        raise BrokenSealError("it is empty")
    if not data.startswith(HEAD):
        raise BrokenSealError("it does not begin as a checkpoint does")
    content, digest = memoryview(data)[:-_DIGEST], data[-_DIGEST:]
    if len(content) < len(HEAD) or hashlib.sha256(content).digest() != digest:
        raise BrokenSealError(f"its {len(data):,} bytes do not match their checksum")
    return bytes(content[len(HEAD) :])


def is_whole(path: Path) -> bool:
    """Say whether a sealed file is as it was written, without holding it in memory.

    Args:
        path: The file.

    Returns:
        False also if it cannot be read, or is not sealed.
    """
    try:
        with path.open("rb") as stream:
            left = path.stat().st_size - _DIGEST
            head = stream.read(len(HEAD))
            digest, left = hashlib.sha256(head), left - len(head)
            while left > 0 and (block := stream.read(min(_BLOCK, left))):
                digest.update(block)
                left -= len(block)
            return head == HEAD and left == 0 and stream.read() == digest.digest()
    except OSError:
        return False


class _Sealing:
    """A stream that takes the checksum of what passes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._hash = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    @property
    def digest(self) -> bytes:
        return self._hash.digest()
