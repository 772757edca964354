"""One random generator per environment, seeded as gymnasium seeds its own, and readable as plain numbers."""

from __future__ import annotations

import numpy as np
from gymnasium.utils.seeding import np_random
from numpy.typing import NDArray

_HALF = 2**64


def generator(seed: int | None) -> np.random.Generator:
    """Make the generator a gymnasium environment has after ``reset(seed=seed)``.

    Args:
        seed: At least 0; None for a random one.

    Returns:
        A PCG64 generator.
    """
    return np_random(seed)[0]


def pack(generators: list[np.random.Generator]) -> NDArray[np.uint64]:
    """Write the states of generators down.

    Args:
        generators: As ``generator`` makes them.

    Returns:
        Shape (n, 6): high and low half of state and increment, then the kept half of a 32-bit draw and whether there
        is one.
    """
    rows = []
    for one in generators:
        state = one.bit_generator.state
        numbers = state["state"]
        halves = (*divmod(numbers["state"], _HALF), *divmod(numbers["inc"], _HALF))
        rows.append((*halves, state["uinteger"], state["has_uint32"]))
    return np.array(rows, dtype=np.uint64)


def unpack(rows: NDArray[np.uint64]) -> list[np.random.Generator]:
    """Rebuild generators from ``pack``'s rows.

    Args:
        rows: Shape (n, 6).

    Returns:
        Generators that go on where the packed ones were.
    """
    generators = []
    for row in rows.tolist():
        bits = np.random.PCG64()
        bits.state = {
            "bit_generator": "PCG64",
            "state": {"state": row[0] * _HALF + row[1], "inc": row[2] * _HALF + row[3]},
            "uinteger": row[4],
            "has_uint32": row[5],
        }
        generators.append(np.random.Generator(bits))
    return generators
