"""What TensorBoard shows of a run."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def shown(folder: Path) -> dict[str, float]:
    """The last value of every scalar in a folder of events."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: float(events.Scalars(tag)[-1].value) for tag in events.Tags()["scalars"]}
