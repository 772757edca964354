"""The one error a world raises at its user, and the hint that finishes its sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WorldError(ValueError):
    """A world cannot be built or has broken: one line that names the value and the remedy."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Finish an error message with the known names nearest to a mistyped one.

    Args:
        name: The name that was not found.
        known: Every name that would have been accepted.

    Returns:
        ``"; did you mean 'a' or 'b'?"`` with up to three names, nearest first, or ``""`` if none is near.
    """
    by_folded = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=3, cutoff=0.7)
    if not near:
        return ""
    return f"; did you mean {' or '.join(repr(by_folded[folded]) for folded in near)}?"
