"""ACKTR as a Stable-Baselines3 algorithm."""

from acktr.sb3.acktr import ACKTR
from acktr.sb3.settings import ActorSettings, CriticSettings, Schedule

__all__ = ["ACKTR", "ActorSettings", "CriticSettings", "Schedule"]
