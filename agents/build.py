"""From a configuration to environments and an agent."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn

import envs
from acktr.ranks import Ranks
from agents.config import A2cConfig, PolicyConfig, PpoConfig, RunConfig, TrpoConfig
from agents.errors import UsageError
from agents.networks import NatureCNN
from agents.schedules import schedule

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}
ALONE = Ranks()
"""A process by itself."""
_POLICIES = {"mlp": "MlpPolicy", "cnn": "CnnPolicy", "multi-input": "MultiInputPolicy"}
_SMALLEST_IMAGE = 36  # the three convolutions leave nothing of a smaller one


def make_training_env(config: RunConfig, seed: int, ranks: Ranks = ALONE) -> VecEnv:
    """Make the environments to learn from, normalised as configured.

    Args:
        config: The run.
        seed: Seed of the environments.
        ranks: The processes that share them out; the seeds are those that one process would give them.

    Returns:
        This process's environments; ``infos[i]["episode"]`` holds raw scores.
    """
    first, count = seats(config.env.n_envs, ranks)
    raw = envs.make(config.env_id, count, seed=seed + first, options=config.env.options, max_faults=config.max_faults)
    return normalised(raw, config)


def seats(n_envs: int, ranks: Ranks) -> tuple[int, int]:
    """Share environments out over processes.

    Args:
        n_envs: How many in all.
        ranks: The processes.

    Returns:
        How many come before those of this process, and how many it has; they differ by one at most.

    Raises:
        UsageError: If there is not one for each.
    """
    if n_envs < ranks.size:
        raise UsageError(
            f"env.n_envs {n_envs} cannot be shared out over {ranks.size} ranks; raise --env.n-envs, or start fewer"
        )
    begin, end = (n_envs * place // ranks.size for place in (ranks.rank, ranks.rank + 1))
    return begin, end - begin


def normalised(env: VecEnv, config: RunConfig) -> VecEnv:
    """Wrap environments in the running normalisation that a configuration asks for.

    Args:
        env: The raw environments.
        config: The run.

    Returns:
        The environments inside a ``VecNormalize``, or themselves if there is nothing to normalise.
    """
    wanted = config.normalisation
    keys = _vector_keys(env.observation_space)
    observations = wanted.observations and keys != []
    if not (observations or wanted.rewards):
        return env
    return envs.RunningNormaliser(
        env,
        norm_obs=observations,
        norm_reward=wanted.rewards,
        clip_obs=wanted.clip_observations,
        clip_reward=wanted.clip_rewards,
        gamma=config.learner.gamma,
        norm_obs_keys=keys if observations else None,
    )


def frozen(env: VecEnv, config: RunConfig, source: VecNormalize | None = None) -> VecEnv:
    """Wrap environments for evaluation: fixed statistics, raw rewards.

    Args:
        env: The raw environments.
        config: The run.
        source: Whose observation statistics to share, live; None starts fresh ones to be filled later.

    Returns:
        The environments, normalised as in training but learning nothing.
    """
    wrapped = normalised(env, config)
    if isinstance(wrapped, VecNormalize):
        wrapped.training = False
        wrapped.norm_reward = False
        if source is not None and wrapped.norm_obs:
            wrapped.obs_rms = source.obs_rms
    return wrapped


def make_agent(config: RunConfig, env: VecEnv, ranks: Ranks = ALONE) -> OnPolicyAlgorithm:
    """Make the agent of a configuration, untrained.

    Args:
        config: The run.
        env: The environments, which give the spaces.
        ranks: The processes that learn together; all of them make it at once.

    Returns:
        The agent.

    Raises:
        UsageError: If the agent cannot act in such an environment, its settings contradict each other, or the
            device is not there.
    """
    _check_spaces(config, env)
    if ranks.size > 1 and config.algorithm != "acktr":
        raise UsageError(f"{config.algorithm} learns in one process; leave torchrun out, or take --algorithm acktr")
    common: dict[str, Any] = {
        "policy": _POLICIES[policy_kind(config.policy, env.observation_space)],
        "env": env,
        "policy_kwargs": _policy_kwargs(config.policy, env),
        "seed": config.seed,
        "device": pick_device(config, env.observation_space),
        "n_steps": config.learner.n_steps,
        "gamma": config.learner.gamma,
        "gae_lambda": config.learner.gae_lambda,
        "normalize_advantage": config.learner.normalize_advantage,
        "learning_rate": schedule(config.learner.learning_rate, config.learner.learning_rate_decay),
    }
    learner = config.learner
    if isinstance(learner, TrpoConfig):
        return _make_trpo(learner, env.num_envs, common)
    common |= {"ent_coef": learner.ent_coef, "vf_coef": learner.vf_coef}
    if isinstance(learner, PpoConfig):
        return _make_ppo(learner, env.num_envs, common)
    if isinstance(learner, A2cConfig):
        return A2C(max_grad_norm=learner.max_grad_norm, **common)
    # Imported late: the peers need nothing of it.
    from agents.natural import make_acktr

    try:
        shared = config.ranks if ranks.size > 1 else None
        agent: OnPolicyAlgorithm = make_acktr(learner, common | {"max_faults": config.max_faults}, shared)
    except ValueError as error:
        # The library holds its arguments against each other in more ways than the configuration knows of.
        raise UsageError(f"acktr cannot be built for {config.env_id}: {error}") from error
    return agent


def policy_kind(policy: PolicyConfig, space: spaces.Space[Any]) -> str:
    """Say which network reads the observations.

    Args:
        policy: The settings, whose ``kind`` may be auto.
        space: The observation space.

    Returns:
        ``mlp``, ``cnn`` or ``multi-input``.

    Raises:
        UsageError: If the network that was asked for cannot read such observations.
    """
    is_dict = isinstance(space, spaces.Dict)
    fitting = "multi-input" if is_dict else "cnn" if is_image_space(space) else "mlp"
    if policy.kind == "auto":
        return fitting
    if policy.kind != fitting and not (policy.kind == "mlp" and not is_dict):
        raise UsageError(f"policy.kind {policy.kind} cannot read observations {space}; use {fitting} or auto")
    return policy.kind


def pick_device(config: RunConfig, space: spaces.Space[Any]) -> str:
    """Choose where the networks live.

    Args:
        config: The run.
        space: The observation space; small networks on vectors are faster on the CPU than on a GPU.

    Returns:
        ``cpu`` or ``cuda``.

    Raises:
        UsageError: If a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda is not available here; use --device cpu, or install a CUDA build of torch")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() and policy_kind(config.policy, space) == "cnn" else "cpu"
    return config.device


def _make_ppo(learner: PpoConfig, n_envs: int, common: dict[str, Any]) -> PPO:
    batch = _minibatch("ppo", learner, n_envs)
    if batch == 1 and learner.normalize_advantage:
        raise UsageError(
            f"ppo.n_minibatches {learner.n_minibatches} leaves one transition to a minibatch, whose advantages cannot "
            "be standardised; take fewer minibatches, or --ppo.normalize-advantage False"
        )
    return PPO(
        batch_size=batch,
        n_epochs=learner.n_epochs,
        clip_range=learner.clip_range,
        max_grad_norm=learner.max_grad_norm,
        **common,
    )


def _make_trpo(learner: TrpoConfig, n_envs: int, common: dict[str, Any]) -> OnPolicyAlgorithm:
    try:
        from sb3_contrib import TRPO
    except ImportError:
        raise UsageError("trpo needs sb3-contrib; install it with: pip install '.[workbench]'") from None
    agent: OnPolicyAlgorithm = TRPO(
        batch_size=_minibatch("trpo", learner, n_envs),
        n_critic_updates=learner.n_critic_updates,
        target_kl=learner.target_kl,
        cg_max_steps=learner.cg_max_steps,
        cg_damping=learner.cg_damping,
        line_search_max_iter=learner.line_search_max_iter,
        line_search_shrinking_factor=learner.line_search_shrinking_factor,
        sub_sampling_factor=learner.sub_sampling_factor,
        **common,
    )
    return agent


def _minibatch(name: str, learner: PpoConfig | TrpoConfig, n_envs: int) -> int:
    batch, rest = divmod(learner.n_steps * n_envs, learner.n_minibatches)
    if rest:
        raise UsageError(
            f"{name}.n_minibatches must divide the rollout of {n_envs} × {learner.n_steps} steps, "
            f"got {learner.n_minibatches}"
        )
    return batch


def _policy_kwargs(policy: PolicyConfig, env: VecEnv) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "net_arch": {"pi": list(policy.pi), "vf": list(policy.vf)},
        "activation_fn": _ACTIVATIONS[policy.activation],
        "log_std_init": policy.log_std_init,
        "ortho_init": policy.ortho_init,
    }
    if policy_kind(policy, env.observation_space) == "cnn":
        kwargs["features_extractor_class"] = NatureCNN
        kwargs["features_extractor_kwargs"] = {"last_channels": policy.last_conv_channels}
    return kwargs


def _vector_keys(space: spaces.Space[Any]) -> list[str] | None:
    # Keys of a Dict space, None for the whole of a plain vector, [] for nothing to normalise.
    if isinstance(space, spaces.Dict):
        return [key for key, part in space.spaces.items() if _is_vector(part)]
    return None if _is_vector(space) else []


def _is_vector(space: spaces.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and not is_image_space(space)


def _check_spaces(config: RunConfig, env: VecEnv) -> None:
    env_id = config.env_id
    actions, observations = env.action_space, env.observation_space
    supported = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    choices = supported[:2] if config.algorithm == "acktr" else supported
    if not isinstance(actions, choices):
        names = ", ".join(choice.__name__ for choice in choices)
        raise UsageError(f"{env_id}: {config.algorithm} cannot choose actions {actions}; wrap them to one of {names}")
    parts = list(observations.spaces.values()) if isinstance(observations, spaces.Dict) else [observations]
    for part in parts:
        if not isinstance(part, supported):
            raise UsageError(
                f"{env_id}: observations {observations} are not supported; wrap them to Box or a Dict of Boxes"
            )
    if policy_kind(config.policy, observations) == "cnn" and sorted(observations.shape or ())[-2] < _SMALLEST_IMAGE:
        raise UsageError(
            f"{env_id}: images of shape {observations.shape} are too small for the convolutions; "
            f"resize them to at least {_SMALLEST_IMAGE} × {_SMALLEST_IMAGE}, or use --policy.kind mlp"
        )
