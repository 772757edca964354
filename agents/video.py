"""A video of an agent at work."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from gymnasium.error import DependencyNotInstalled
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from agents.errors import UsageError
from agents.evaluation import Evaluation, Predictor, seeded

Frame = NDArray[np.uint8]
"""A picture, [height, width, 3]."""


def record(agent: Predictor, env: VecEnv, episodes: int, *, seed: int, path: Path) -> Evaluation:
    """Play whole episodes and write them as one video (H.264, which every browser plays).

    Args:
        agent: Who acts, deterministically.
        env: A single environment that renders, with fixed normalisation.
        episodes: How many episodes, at least 1.
        seed: Seed of the environment.
        path: The file, written whole or not at all.

    Returns:
        The scores of what is to be seen.

    Raises:
        UsageError: If the environment draws nothing, or a package for it is missing.
    """
    scores: list[tuple[float, int]] = []
    frames = _play(agent, env, episodes, seed, scores)
    try:
        first = next(frames, None)
    except DependencyNotInstalled as error:
        raise UsageError(f"the environment cannot draw: {error}") from None
    if first is None:
        raise UsageError("the environment gave no picture to record; choose one that renders rgb_array")
    temporary = path.with_name(f".{path.stem}.tmp.mp4")
    try:
        # Its methods belong to the format's own class, which type checkers do not see.
        writer: Any = imageio.get_writer(temporary, fps=frame_rate(env), **_H264)
        with writer:
            for frame in chain([first], frames):
                writer.append_data(_even(frame))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Evaluation(tuple(r for r, _ in scores), tuple(n for _, n in scores))


def frame_rate(env: VecEnv) -> float:
    """Find the speed at which an environment looks natural.

    Args:
        env: The environment.

    Returns:
        Pictures per second, 30 if it does not say.
    """
    layer: VecEnv | None = env
    while layer is not None:
        # Wrappers have metadata of their own, which knows nothing of the speed.
        rate = (getattr(layer, "metadata", None) or {}).get("render_fps")
        if rate:
            return float(rate)
        layer = layer.venv if isinstance(layer, VecEnvWrapper) else None
    return 30.0


_H264: dict[str, Any] = {
    "format": "FFMPEG",
    "codec": "libx264",
    "pixelformat": "yuv420p",
    # Players need no multiple of 16, only even sides, and frames are cropped to those.
    "macro_block_size": 1,
    "ffmpeg_log_level": "error",
}


def _even(frame: Frame) -> Frame:
    height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
    return frame[:height, :width]


def _play(agent: Predictor, env: VecEnv, episodes: int, seed: int, scores: list[tuple[float, int]]) -> Iterator[Frame]:
    state, starts = None, np.ones(1, dtype=bool)
    with seeded(seed):
        env.seed(seed)
        observation = env.reset()
        while len(scores) < episodes:
            picture = env.render()
            if picture is None:
                return
            yield np.asarray(picture, dtype=np.uint8)
            action, state = agent.predict(observation, state, starts, True)
            observation, _, starts, infos = env.step(action)
            episode = infos[0].get("episode")
            if episode is not None:
                scores.append((float(episode["r"]), int(episode["l"])))
