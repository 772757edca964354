"""Worlds: Atari, MuJoCo from states or pixels, any other gymnasium environment, and toys whose optimum is known."""

from envs.atari import AtariVecEnv
from envs.errors import WorldError
from envs.guard import FiniteGuard
from envs.make import make
from envs.normaliser import RunningNormaliser
from envs.options import AtariOptions, EnvOptions, PixelOptions
from envs.state import Stateful, UnsavedError, load_stack, save_stack
from envs.supervised import SupervisedVecEnv
from envs.toy import register_toys

__all__ = [
    "AtariOptions",
    "AtariVecEnv",
    "EnvOptions",
    "FiniteGuard",
    "PixelOptions",
    "RunningNormaliser",
    "Stateful",
    "SupervisedVecEnv",
    "UnsavedError",
    "WorldError",
    "load_stack",
    "make",
    "register_toys",
    "save_stack",
]
