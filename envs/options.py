"""What can be chosen about a world, as plain frozen values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from envs.errors import WorldError


@dataclass(frozen=True)
class AtariOptions:
    """The Atari protocol; the defaults are those of the published deep-RL results.

    The time of all fields is the emulator's frame (1/60 s) unless it says agent steps.

    Raises:
        WorldError: If a field is outside its range.
    """

    frame_skip: int = 4
    """Frames for which one action is held, i.e. frames per agent step; at least 1."""
    frame_stack: int = 4
    """Screens in one observation, oldest first; at least 1."""
    screen_size: int = 84
    """Height and width in pixels of the grey screens the agent sees; at least 1."""
    noop_max: int = 30
    """A game starts after 0 to ``noop_max - 1`` idle frames, drawn uniformly; 0 and 1 always start at once."""
    sticky_actions: float = 0.0
    """Probability in [0, 1] that the console repeats its previous action for a frame; 0.25 in later protocols."""
    episodic_life: bool = True
    """Tell the learner ``terminated`` at the loss of a life; the game and its score go on."""
    clip_rewards: bool = True
    """Give the learner the reward's sign; scores stay unclipped."""
    fire_reset: bool = True
    """Press FIRE at the start of each game that has that button (not after each life: the agent has to learn it)."""
    max_episode_frames: int = 108_000
    """A game is truncated after this many frames (108,000 are half an hour of play)."""
    full_action_space: bool = False
    """Offer all 18 actions of the console rather than those the game reacts to."""
    threads: int | None = None
    """Emulator threads; None for as many as there are cores, at most one per environment."""

    def __post_init__(self) -> None:
        least = {"frame_skip": 1, "frame_stack": 1, "screen_size": 1, "noop_max": 0, "max_episode_frames": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise WorldError(f"atari.{name} must be at least {smallest}, got {getattr(self, name)}")
        if not 0.0 <= self.sticky_actions <= 1.0:
            raise WorldError(f"atari.sticky_actions is a probability in [0, 1], got {self.sticky_actions}")
        if self.threads is not None and self.threads < 1:
            raise WorldError(f"atari.threads must be at least 1, or None for one per core, got {self.threads}")


@dataclass(frozen=True)
class PixelOptions:
    """What an agent sees of a MuJoCo world from images (``pixels/Reacher-v5`` and the like), and from where.

    Grey frames of 84 × 84 are the default. Positions and speeds could be read (by kernel regression) from grey stacks
    nearly as well as from coloured ones, whose first convolution has three times the inputs and so a curvature factor
    of nine times the size; frames of 42 × 42, as in ACKTR's paper, leave the image network one position to look at.

    Raises:
        WorldError: If a field is outside its range.
    """

    size: int = 84
    """Height and width of a frame in pixels, at least 1."""
    frame_stack: int = 4
    """Frames in one observation, oldest first, at least 1; an episode's first frame fills the stack."""
    colour: bool = False
    """Show red, green and blue, three channels a frame; grey, one channel, otherwise."""
    samples: int = 0
    """Samples per pixel that smooth edges; 0 for none, which draws two to three times as fast without a graphics card.

    Smooth edges show movements of less than a pixel: with 4, an inverted pendulum's angular velocity could be read from
    a stack with R² 0.36 rather than 0.19, Hopper's with 0.70 to 0.98 rather than 0.59 to 0.96; Reacher gains nothing.
    """
    follow: bool = True
    """Move the camera along the ground with the model's first body; it stands still otherwise."""
    target: tuple[float, float, float] = (0.0, 0.0, 0.7)
    """Point in the middle of the frame, in metres; x and y count from the first body if the camera follows it."""
    distance: float = 3.0
    """Metres from that point to the camera; more than 0."""
    azimuth: float = 90.0
    """Direction of view around the vertical, in degrees: 0 looks along x, 90 along y."""
    elevation: float = -10.0
    """Direction of view against the ground, in degrees: -90 looks straight down."""

    def __post_init__(self) -> None:
        for name, smallest in {"size": 1, "frame_stack": 1, "samples": 0}.items():
            if getattr(self, name) < smallest:
                raise WorldError(f"pixels.{name} must be at least {smallest}, got {getattr(self, name)}")
        if not 0.0 < self.distance < math.inf:
            raise WorldError(f"pixels.distance must be a positive number of metres, got {self.distance}")
        for name in ("target", "azimuth", "elevation"):
            value = getattr(self, name)
            if not all(map(math.isfinite, value if isinstance(value, tuple) else (value,))):
                raise WorldError(f"pixels.{name} must be finite, got {value}")


@dataclass(frozen=True)
class EnvOptions:
    """What can be chosen about any world; fields that do not apply to a world are refused by ``make``.

    Raises:
        WorldError: If a field is outside its range.
    """

    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Constructor options of the gymnasium environment, e.g. ``{"ctrl_cost_weight": 0.1}``; not for Atari."""
    time_limit: int | None = None
    """Truncate episodes after this many agent steps; None keeps the environment's own limit. Not for Atari."""
    render_mode: str | None = None
    """``"rgb_array"`` makes ``render()`` return RGB pictures; None, the default, draws nothing and costs nothing."""
    backend: Literal["gymnasium", "native"] = "gymnasium"
    """Who computes a MuJoCo task: gymnasium's environments one after the other, or ours for all of them at once.

    The numbers are the same to the last bit. Worlds from images are native ones. Not for other worlds, which have one
    backend each.
    """
    threads: int = 1
    """Simulation threads of the native backend, at least 1; more than one pays only for heavy models or many copies."""
    atari: AtariOptions = field(default_factory=AtariOptions)
    """The Atari protocol; without effect on other worlds."""
    pixels: PixelOptions = field(default_factory=PixelOptions)
    """Frames and camera of MuJoCo worlds from images; without effect on other worlds."""

    def __post_init__(self) -> None:
        if self.backend not in {"gymnasium", "native"}:
            raise WorldError(f"backend must be 'gymnasium' or 'native', got {self.backend!r}")
        if self.render_mode not in {None, "rgb_array"}:
            raise WorldError(f"render_mode must be 'rgb_array' or None for no pictures, got {self.render_mode!r}")
        if self.threads < 1:
            raise WorldError(f"threads must be at least 1, got {self.threads}")
        if self.threads > 1 and self.backend != "native":
            raise WorldError(f"threads ({self.threads}) are for backend 'native'; Atari has atari.threads")
        if self.time_limit is not None and self.time_limit < 1:
            raise WorldError(f"time_limit must be at least 1 step, or None for the world's own, got {self.time_limit}")

    def for_evaluation(self, render_mode: str | None = None) -> EnvOptions:
        """Describe the same world as it is judged: whole games and true rewards.

        Args:
            render_mode: ``"rgb_array"`` for pictures as well, None for none.

        Returns:
            A copy without life-loss terminations and without clipped rewards.
        """
        whole_games = replace(self.atari, episodic_life=False, clip_rewards=False)
        return replace(self, render_mode=render_mode, atari=whole_games)
