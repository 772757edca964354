"""A trained agent from its run directory, for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

import envs
from agents import build, checkpoint, configfiles, rundir
from agents.config import RunConfig
from agents.errors import UsageError
from agents.ranges import check
from envs.catalogue import PIXELS

MANY = 50
"""Environments of an evaluation, where they cost little."""


@dataclass(frozen=True)
class LoadedRun:
    """A run that was read back."""

    directory: rundir.RunDirectory
    """Where it lies."""
    config: RunConfig
    """Its configuration."""
    agent: OnPolicyAlgorithm
    """The trained agent."""
    env: VecEnv
    """Environments to show it in, normalised with the training's statistics."""
    timesteps: int
    """Environment steps it has been trained for."""


def load_config(path: Path) -> tuple[rundir.RunDirectory, RunConfig]:
    """Read a run's configuration.

    Args:
        path: The run directory.

    Returns:
        The directory and its configuration.

    Raises:
        UsageError: If it names no environment.
    """
    directory = rundir.existing(path)
    config = configfiles.load(directory.config)
    if not config.env_id:
        raise UsageError(f"{directory.config} names no environment; it is damaged: restore it, or train the run again")
    check(config)
    return directory, config


def load_run(path: Path, make_env: Callable[[RunConfig], VecEnv], tell: Callable[[str], None]) -> LoadedRun:
    """Rebuild a trained agent, on the CPU.

    The agent is built anew from ``config.yaml``, and only tensors are read from the checkpoint.

    Args:
        path: The run directory.
        make_env: Makes the raw environments from the configuration.
        tell: Where to name files that are damaged, and what is used in their place.

    Returns:
        The run.
    """
    directory, stored = load_config(path)
    # One minibatch fits any number of environments, and nothing is learnt here.
    ppo, trpo = replace(stored.ppo, n_minibatches=1), replace(stored.trpo, n_minibatches=1)
    config = replace(stored, device="cpu", ppo=ppo, trpo=trpo)
    state = newest(directory, tell)
    set_threads(config)
    env = build.frozen(make_env(config), config)
    try:
        agent = build.make_agent(config, env)
        checkpoint.restore_policy(agent, state)
    except BaseException:
        env.close()
        raise
    return LoadedRun(directory, config, agent, env, state.timesteps)


def evaluation_envs(episodes: int, seed: int) -> Callable[[RunConfig], VecEnv]:
    """Say how to make environments for an evaluation.

    Args:
        episodes: How many episodes will be played.
        seed: Seed of the environments.

    Returns:
        A function from a configuration to environments.
    """

    def make(config: RunConfig) -> VecEnv:
        most = max(config.env.n_envs, MANY) if _are_light(config) else config.env.n_envs
        return envs.make(config.env_id, min(episodes, most), seed=seed, options=config.env.options.for_evaluation())

    return make


def _are_light(config: RunConfig) -> bool:
    """Whether environments are made in no time, and one step of many costs hardly more than one step of a few."""
    return config.env.options.backend == "native" and not config.env_id.startswith(PIXELS)


def video_env(seed: int) -> Callable[[RunConfig], VecEnv]:
    """Say how to make an environment for a video.

    Args:
        seed: Seed of the environment.

    Returns:
        A function from a configuration to a single environment that renders.
    """

    def make(config: RunConfig) -> VecEnv:
        return envs.make(config.env_id, 1, seed=seed, options=config.env.options.for_evaluation("rgb_array"))

    return make


def newest(directory: rundir.RunDirectory, tell: Callable[[str], None]) -> checkpoint.Checkpoint:
    """Read the best trained state of a run: its final agent, or a newer checkpoint if it went on after that.

    Args:
        directory: The run.
        tell: Where to name files that are damaged, and what is used in their place.

    Returns:
        The state.

    Raises:
        UsageError: If the run holds none.
    """
    found = checkpoint.latest(directory, tell)
    if found is None:
        raise UsageError(f"{directory.path} holds no trained agent yet; train it to its first checkpoint")
    return found


def set_threads(config: RunConfig) -> None:
    """Set PyTorch's threads; small matrix products on many threads are far slower than on one.

    Args:
        config: The run.
    """
    if config.torch_threads:
        torch.set_num_threads(config.torch_threads)
