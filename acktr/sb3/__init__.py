"""ACKTR as a Stable-Baselines3 algorithm."""

from acktr.sb3.acktr import ACKTR
from acktr.sb3.forgiveness import Forgiveness
from acktr.sb3.noise import LearnedNoise, Noise, ScheduledNoise
from acktr.sb3.reuse import Reuse
from acktr.sb3.scales import RunningScale
from acktr.sb3.schedules import Schedule
from acktr.sb3.settings import ActorSettings, CriticSettings

__all__ = [
    "ACKTR",
    "ActorSettings",
    "CriticSettings",
    "Forgiveness",
    "LearnedNoise",
    "Noise",
    "Reuse",
    "RunningScale",
    "Schedule",
    "ScheduledNoise",
]
