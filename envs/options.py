"""What can be chosen about a world, as plain frozen values."""

from __future__ import annotations

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

    The numbers are the same to the last bit. Not for other worlds, which have one backend each.
    """
    threads: int = 1
    """Simulation threads of the native backend, at least 1; more than one pays only for heavy models or many copies."""
    atari: AtariOptions = field(default_factory=AtariOptions)
    """The Atari protocol; without effect on other worlds."""

    def __post_init__(self) -> None:
        if self.backend not in {"gymnasium", "native"}:
            raise WorldError(f"backend must be 'gymnasium' or 'native', got {self.backend!r}")
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
