"""Gymnasium's MuJoCo tasks, computed for all environments at once; needs the MuJoCo packages to import."""

from envs.mujoco.build import TASKS, make_native
from envs.mujoco.task import State, Task
from envs.mujoco.vecenv import MujocoVecEnv
from envs.mujoco.views import PixelView, StateView, View

__all__ = ["TASKS", "MujocoVecEnv", "PixelView", "State", "StateView", "Task", "View", "make_native"]
