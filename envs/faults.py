"""What is said of an environment that broke, in the infos of the step it broke in.

``infos[i]["faults"]`` lists (kind, what): a kind of `KINDS`, which is what faults are counted by, and one line for the
log. ``infos[i]["broken_off"]`` says that this step's outcome is unknown: its reward is 0 and stands for nothing, and
the observation shown next begins another episode.
"""

from __future__ import annotations

from typing import Any

KINDS = {
    "observation": "an observation was not finite",
    "final_observation": "the last observation of an episode was not finite",
    "reward": "a reward was not finite",
    "raised": "the environment raised an error",
    "died": "the environment's process died",
    "hung": "the environment's process did not answer in time",
}
"""Every kind of fault."""

MAX_FAULTS = 10
"""Faults in a row of one environment, with no whole episode between them, that end a run."""

Fault = tuple[str, str]
"""A kind of `KINDS`, and what happened in one line."""


def told(error: BaseException) -> str:
    """Put an error in one line.

    Args:
        error: The error.

    Returns:
        Its type and message.
    """
    return " ".join(f"{type(error).__name__}: {error}".split())


def broken_off(faults: list[Fault]) -> dict[str, Any]:
    """Describe a step whose outcome is unknown.

    Args:
        faults: What happened.

    Returns:
        The info.
    """
    return {"faults": faults, "broken_off": True}
