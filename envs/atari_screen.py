"""Colour pictures of a vectorised Atari game.

The native vector environment keeps its screens to itself: it hands out small grey stacks only. For pictures we
play each game a second time on an emulator of our own, with the same seed and the same buttons. The console is
deterministic given both, sticky actions included, and after every step the twin's clocks and lives are compared
with the game's, so a picture is never of another game.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from envs.options import AtariOptions


class ScreenTwin:
    """A second emulator that repeats one environment's game for the sake of its picture.

    Args:
        rom_path: The game's ROM file.
        options: The protocol of the game to follow.
    """

    def __init__(self, rom_path: Path, options: AtariOptions) -> None:
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._emulator: Any = ale_py.ALEInterface()
        self._emulator.setFloat("repeat_action_probability", options.sticky_actions)
        self._emulator.loadROM(rom_path)
        self._rom_path = rom_path
        self._options = options
        full, minimal = self._emulator.getLegalActionSet(), self._emulator.getMinimalActionSet()
        self._actions = full if options.full_action_space else minimal
        self._presses_fire = options.fire_reset and ale_py.Action.FIRE in self._actions
        self._fire, self._noop = ale_py.Action.FIRE, ale_py.Action.NOOP
        self._frames_played = 0
        self._screens: list[np.ndarray] = []

    def reset(self, seed: int | None, opening_frames: int) -> None:
        """Start a new game.

        Args:
            seed: Seed of the console, in [0, 2³¹); None continues its random stream.
            opening_frames: Frames the game had played when the agent first saw it (FIRE and no-ops).
        """
        if seed is not None:
            self._emulator.setInt("random_seed", seed)
            self._emulator.loadROM(self._rom_path)
        self._emulator.reset_game()
        if self._presses_fire:
            self._emulator.act(self._fire)
        while self._emulator.getEpisodeFrameNumber() < opening_frames:
            self._emulator.act(self._noop)
            if self._emulator.game_over():
                self._emulator.reset_game()
        self._frames_played = 0
        self._screens = [self._emulator.getScreenRGB()]

    def step(self, action: int, *, frame: int, episode_frame: int, lives: int) -> None:
        """Play one agent step, and the start of the next game if that ended this one.

        Args:
            action: Index into the game's actions.
            frame: The followed game's frame counter after the step.
            episode_frame: Its frame counter within the episode.
            lives: Its lives.

        Raises:
            RuntimeError: If the twin then disagrees with the game it follows.
        """
        if self._play(action):
            self.reset(None, episode_frame)
        console = self._emulator
        mine = (console.getFrameNumber(), console.getEpisodeFrameNumber(), console.lives())
        if mine != (frame, episode_frame, lives):
            raise RuntimeError(
                f"the pictures lost the game: frame, episode frame and lives are {mine}, "
                f"the game's are {(frame, episode_frame, lives)}"
            )

    def picture(self) -> np.ndarray:
        """Show the last two frames of the step as one, which also joins sprites drawn on alternate frames.

        Returns:
            RGB screen of shape (height, width, 3), uint8.
        """
        return np.asarray(np.maximum.reduce(self._screens))

    def _play(self, action: int) -> bool:
        """Hold an action for the frame skip.

        Args:
            action: Index into the game's actions.

        Returns:
            Whether the game ended, so that the next one has to be started.
        """
        screens = []
        for frames_left in range(self._options.frame_skip, 0, -1):
            self._emulator.act(self._actions[action])
            self._frames_played += 1
            if self._emulator.game_over() or self._frames_played >= self._options.max_episode_frames:
                return True
            if frames_left <= 2:
                screens.append(self._emulator.getScreenRGB())
        self._screens = screens
        return False
