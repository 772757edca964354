"""A value function that begins anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from acktr.sb3.acktr import ACKTR


def renew_value(agent: ACKTR) -> None:
    """Remember the value's first parameters, and give them back to it when `CriticSettings.renewed_at` has come.

    A network that has followed a farther horizon, whose values are many times as large, learns the nearer one worse
    than a fresh one does. Its curvature and its optimizer's other state stay; they forget by themselves.

    Returns and advantages of the last rollout have been estimated with the old value, and the new one is fitted to
    them before it estimates any: bootstrapped from nothing, it would need dozens of rollouts to find again what lies
    beyond the reach of λ.

    Args:
        agent: between a rollout and the critic's passes over it, with a critic of its own.
    """
    if agent.critic.renewed_at is None:
        return
    state, parameters = agent.update_state, agent.critic_optimizer.parameters
    if agent._n_updates == 0:
        state.first_value = {name: p.detach().cpu().clone() for name, p in parameters.items()}
    elif state.first_value and agent._current_progress_remaining <= 1 - agent.critic.renewed_at:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.first_value[name])
        state.first_value = {}
