"""The tasks, as gymnasium's fifth version defines them."""

from envs.mujoco.tasks.arms import Pusher, Reacher
from envs.mujoco.tasks.legs import Ant, Humanoid, HumanoidStandup
from envs.mujoco.tasks.pendulums import InvertedDoublePendulum, InvertedPendulum
from envs.mujoco.tasks.runners import HalfCheetah, Hopper, Swimmer, Walker2d

__all__ = [
    "Ant",
    "HalfCheetah",
    "Hopper",
    "Humanoid",
    "HumanoidStandup",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "Pusher",
    "Reacher",
    "Swimmer",
    "Walker2d",
]
