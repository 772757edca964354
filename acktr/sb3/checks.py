"""What an agent refuses before it is built: one line that names the value and the remedy."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, get_args

import numpy as np
from gymnasium import spaces

from acktr.sb3.networks import Precision
from acktr.sb3.scales import RunningScale
from acktr.sb3.schedules import at
from acktr.sb3.settings import ActorSettings, CriticSettings

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR


_SMALL_RATE = 0.01
"""Below it a learning rate was meant for another algorithm: steps on MuJoCo are mostly 0.1 to 1 times the natural
gradient."""
_ALIKE = (
    *("n_steps", "gamma", "gae_lambda", "ent_coef", "vf_coef", "normalize_advantage", "joint_step", "precision"),
    *("discounting", "actor", "critic", "seed", "max_faults", "observation_space", "action_space"),
)
"""What all processes have to be told alike."""


def _check_numbers(agent: ACKTR) -> None:
    for name in ("n_steps", "max_faults"):
        if not getattr(agent, name) >= 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(agent, name)}")
    for name in ("gamma", "gae_lambda"):
        schedule = agent.discounting.get(name, getattr(agent, name))
        for share in (at(schedule, 1.0), at(schedule, 0.0)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
    if not 0 <= agent.ent_coef < float("inf"):
        raise ValueError(f"ent_coef must be at least 0 and finite, got {agent.ent_coef}")
    if not 0 < agent.vf_coef < float("inf"):
        raise ValueError(f"vf_coef must be positive and finite, got {agent.vf_coef}")


def check_setup(agent: ACKTR) -> None:
    """Hold the numbers against their ranges, and spaces, policy and settings against each other.

    Args:
        agent: before its networks are built, new or loaded.

    Raises:
        TypeError: if settings are of another kind.
        ValueError: if they do not fit.
    """
    _check_numbers(agent)
    for name, settings, kind in (("actor", agent.actor, ActorSettings), ("critic", agent.critic, CriticSettings)):
        if not isinstance(settings, kind):
            raise TypeError(f"{name} must be {kind.__name__}(...), got {settings!r:.80}")
    for space in (agent.observation_space, *getattr(agent.observation_space, "spaces", ())):
        if isinstance(space, spaces.Tuple):
            raise ValueError(f"ACKTR has no policy for observations in {space}; make it a Dict space")
    if not isinstance(agent.action_space, (spaces.Box, spaces.Discrete)):
        raise ValueError(f"ACKTR acts in Box and Discrete spaces, got {agent.action_space}; wrap the environment")
    _check_actions(agent.action_space)
    for name in ("optimizer_class", "optimizer_kwargs"):
        if name in agent.policy_kwargs:
            raise ValueError(
                f"policy_kwargs['{name}'] has no say in ACKTR's steps; leave it out, and see actor and critic"
            )
    if agent.precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {agent.precision!r}")
    if agent.policy_kwargs.get("squash_output"):
        raise ValueError("squash_output=True needs gSDE, which ACKTR has not; leave squash_output out")
    agent.actor.noise.check(agent.action_space)
    for name, settings in (("actor", agent.actor), ("critic", agent.critic)):
        check_settings(name, settings)
    check_actor(agent.actor)
    check_critic(agent.critic)
    if agent.actor.scale is not None and not agent.normalize_advantage:
        raise ValueError("actor.scale has no say without normalize_advantage; set that True, or scale None")
    rate = at(agent.learning_rate, 1.0)
    if not 0 <= rate < float("inf"):
        raise ValueError(f"learning_rate must be at least 0 and finite, got {rate}")
    if 0 < rate < _SMALL_RATE:
        warnings.warn(
            f"learning_rate {rate} holds every step below {rate} times the natural gradient, where next to nothing is "
            "learned; it is no step size as in PPO: leave it at 1, and tune ActorSettings(radius=…)",
            stacklevel=5,
        )
    if agent.normalize_advantage and agent.n_steps * agent.n_envs < 2:
        raise ValueError("a rollout of one transition has no variance: raise n_steps or set normalize_advantage=False")


def _check_actions(space: spaces.Box | spaces.Discrete) -> None:
    """Refuse what Stable-Baselines3's buffers and policies would turn into other actions."""
    if isinstance(space, spaces.Discrete) and space.start != 0:
        raise ValueError(f"ACKTR counts actions from 0, got {space}; wrap the environment so that they begin there")
    if isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating):
        raise ValueError(f"ACKTR's actions in a Box are floats, got {space}; wrap the environment to round them")


def check_ranks(agent: ACKTR) -> None:
    """Hold several processes against each other: the same settings, rollouts of as many minibatches.

    Args:
        agent: before its networks are built.

    Raises:
        ValueError: in all processes, if they cannot learn together.
    """
    if agent.ranks.size == 1:
        return
    agent.ranks.begin([], " ".join(f"{name}={getattr(agent, name)}" for name in _ALIKE))
    if agent.actor.explores:
        raise ValueError("actor.exploration_kl draws policies from a curvature that ranks share; set it to 0")
    for name, settings in (("actor", agent.actor), ("critic", agent.critic)):
        parts = {_parts(agent.n_steps * count, settings.n_minibatches) for count in agent.part.counts}
        if len(parts) > 1:
            raise ValueError(
                f"{name}.n_minibatches {settings.n_minibatches} cuts the rollouts of ranks with {agent.part.counts} "
                f"environments of {agent.n_steps} steps into {sorted(parts)} parts; let it divide n_steps"
            )


def _parts(rows: int, n_minibatches: int) -> int:
    """How many parts of equal size, but for the last, a rollout is cut into."""
    return math.ceil(rows / math.ceil(rows / n_minibatches))


def check_settings(name: str, settings: ActorSettings | CriticSettings) -> None:
    """Hold what actor and critic have in common against its ranges.

    Args:
        name: whose settings.
        settings: the settings.

    Raises:
        ValueError: if a number is out of its range.
    """
    radius = at(settings.radius, 1.0)
    if not radius > 0:
        raise ValueError(f"{name}.radius must be positive, got {radius}")
    for field in ("n_epochs", "n_minibatches", "statistics_period", "refresh_period", "measure_period"):
        if not getattr(settings, field) >= 1:
            raise ValueError(f"{name}.{field} must be at least 1, got {getattr(settings, field)}")
    for field in ("curvature_examples", "exact_examples"):
        few = getattr(settings, field)
        if few is not None and not few >= 1:
            raise ValueError(f"{name}.{field} must be at least 1, or None for the whole batch, got {few}")


def check_critic(settings: CriticSettings) -> None:
    """Hold what the critic has for itself against its ranges.

    Args:
        settings: the settings.

    Raises:
        ValueError: if a number is out of its range.
    """
    if not 0 <= settings.averaged <= 1:
        raise ValueError(f"critic.averaged must be between 0 and 1, got {settings.averaged}")
    if settings.renewed_at is not None and not 0 < settings.renewed_at <= 1:
        raise ValueError(
            f"critic.renewed_at must be above 0 and at most 1, or None for never, got {settings.renewed_at}"
        )


def check_actor(settings: ActorSettings) -> None:
    """Hold what the actor has for itself against its ranges.

    Args:
        settings: the settings.

    Raises:
        TypeError: if a scale is none.
        ValueError: if a number is out of its range.
    """
    if not settings.clip_range > 0:
        raise ValueError(f"actor.clip_range must be positive, got {settings.clip_range}")
    if settings.max_rollout_kl is not None and not settings.max_rollout_kl > 0:
        raise ValueError(f"actor.max_rollout_kl must be positive, or None for no stop, got {settings.max_rollout_kl}")
    if settings.scale is not None and not isinstance(settings.scale, RunningScale):
        raise TypeError(f"actor.scale must be RunningScale(...) or None, got {settings.scale!r:.80}")
    exploration = at(settings.exploration_kl, 1.0)
    if not exploration >= 0:
        raise ValueError(f"actor.exploration_kl must be at least 0, got {exploration}")
    if settings.reuse is not None and settings.explores:
        raise ValueError(
            "actor.reuse weighs actions of the policy itself; set exploration_kl 0, or reuse None "
            "(reused_rollouts 0 in a configuration)"
        )
