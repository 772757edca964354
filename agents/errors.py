"""What can go wrong by the user's hand."""

from __future__ import annotations


class UsageError(ValueError):
    """A mistake of the user's: one line that names the value and the remedy.

    The doors in ``scripts`` print the line and leave with status 2, without a traceback.
    """
