"""ACKTR: an advantage actor–critic that steps along natural gradients within trust regions (Wu et al. 2017)."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, TypeVar, cast

import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TensorDict
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from acktr.likelihood import Joint, Outputs, ScalarGaussian
from acktr.optimizer import NaturalGradient
from acktr.passes import SEEDS_APART
from acktr.sb3.checks import check_ranks, check_setup
from acktr.sb3.collect import collect
from acktr.sb3.exploration import Exploration, explored, is_drawn
from acktr.sb3.faults import MAX_FAULTS, Faults
from acktr.sb3.logs import log_rollout, log_steps
from acktr.sb3.meeting import broken_buffer
from acktr.sb3.networks import (
    ActorNetwork,
    CriticNetwork,
    JointNetwork,
    Precision,
    action_likelihood,
    shares_trunk,
)
from acktr.sb3.ranks import part_of, ranks_here
from acktr.sb3.renewal import renew_value
from acktr.sb3.reuse import with_past
from acktr.sb3.rollout import Rollout, flatten_rollout
from acktr.sb3.schedules import Discounting, Schedule, at, moving
from acktr.sb3.settings import ActorSettings, CriticSettings, usual_actor
from acktr.sb3.state import MisfitError, UpdateState
from acktr.sb3.stepper import stepper_of
from acktr.sb3.steps import StepLog, Stepper, actor_steps, critic_steps, joint_steps
from acktr.sb3.watch import hold_noise, try_out_noise

Self = TypeVar("Self", bound="ACKTR")


class ACKTR(Discounting, OnPolicyAlgorithm):
    """Actor–Critic using Kronecker-factored Trust Regions, as a Stable-Baselines3 algorithm.

    Policy and value networks of their own (SB3's `MlpPolicy`) get metrics and radii of their own. A shared trunk
    (SB3's `CnnPolicy`), or any policy with `joint_step`, takes one step in the sum of the policy's Fisher and the
    value's, under `actor`'s settings and within both radii.

    Args:
        policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or an `ActorCriticPolicy` class.
        env: a gymnasium environment, an SB3 `VecEnv`, or an id.
        learning_rate: η_max, largest multiple of the natural gradient; a number or a function of the remaining
            progress. The trust region usually decides before it.
        n_steps: steps per environment and rollout.
        gamma: discount, in [0, 1]; a number or a function of the remaining progress.
        gae_lambda: GAE's λ, in [0, 1], likewise: 0 trusts the critic, 1 the returns.
        ent_coef: weight of the entropy bonus, ≥ 0.
        vf_coef: weight of the value in a shared trunk's objective, > 0; no effect on networks with steps of their own.
        normalize_advantage: whether advantages get mean 0 and variance 1 over each rollout.
        joint_step: whether policy and value take one step together even where they share no layer, as in ACKTR's paper.
        precision: "float32", or "bfloat16" for the features extractor in acting and training; `predict` stays float32.
            "auto" for bfloat16 where the processor multiplies it.
        actor: the policy's steps; None for `ActorSettings()`, or with a CnnPolicy `ActorSettings.for_images()`.
        critic: the value's steps; None for `CriticSettings()`. On a shared trunk only its radius counts.
        stats_window_size: episodes over which `rollout/ep_rew_mean` is taken.
        tensorboard_log: folder for TensorBoard events; None for none.
        policy_kwargs: passed to the policy.
        verbose: 0 silent, 1 information, 2 debugging.
        seed: of everything random; None for none.
        device: "auto", "cpu", "cuda", …
        max_faults: rollouts or steps in a row that may be NaN or Inf before training ends; fewer are skipped, counted
            and logged (`faults/…`).
        _init_setup_model: whether networks are built at once; SB3's own.

    Raises:
        ValueError: for spaces, policies or numbers outside those named above.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: Schedule = 1.0,
        n_steps: int = 256,
        gamma: Schedule = 0.99,
        gae_lambda: Schedule = 0.95,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        normalize_advantage: bool = True,
        joint_step: bool = False,
        precision: Precision = "float32",
        actor: ActorSettings | None = None,
        critic: CriticSettings | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        max_faults: int = MAX_FAULTS,
        _init_setup_model: bool = True,
    ) -> None:
        self.gamma_schedule, self.gae_lambda_schedule = moving(gamma), moving(gae_lambda)
        self.max_faults, self.ranks = max_faults, ranks_here()
        self.normalize_advantage, self.precision = normalize_advantage, precision
        self.joint_step = joint_step
        self.actor, self.critic = actor or usual_actor(self.policy_aliases, policy), critic or CriticSettings()
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=at(gamma, 1.0),
            gae_lambda=at(gae_lambda, 1.0),
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=float("inf"),
            use_sde=False,
            sde_sample_freq=-1,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _setup_model(self) -> None:
        check_setup(self)
        self.part = part_of(self.ranks, self.n_envs)
        check_ranks(self)
        super()._setup_model()
        self.policy.set_training_mode(False)
        self.ranks.begin([*self.policy.parameters(), *self.policy.buffers()], "")
        # Convolutions on the CPU take two thirds of the time with channels last.
        for parameter in self.policy.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.actor.noise.begin(self.policy)
        self.update_state = UpdateState(self.seed or 0, self.ranks)
        self.update_state.attach(self._vec_normalize_env)
        self.faults.limit = self.max_faults
        self._action_dimensions = get_action_dim(self.action_space)
        observations, _ = self.policy.obs_to_tensor(self.observation_space.sample())
        self.action_likelihood = action_likelihood(self.policy)
        self._actor_network = ActorNetwork(self.policy, self.precision)
        self._critic_network = CriticNetwork(self.policy, self.precision)
        together = self.joint_step or shares_trunk(self.policy)
        if together and self.actor.reuse is not None:
            raise ValueError(
                "actor.reuse is for a policy with steps of its own, not for a shared trunk or joint_step; set it None "
                "(reused_rollouts 0 in a configuration)"
            )
        self._joint_network = JointNetwork(self.policy, self.precision) if together else None
        if self._joint_network is not None:
            joint = Joint(self.action_likelihood, ScalarGaussian())
            self.actor_optimizer = stepper_of(self, self._joint_network, joint, self.actor, observations)
        else:
            likelihood = self.action_likelihood
            self.actor_optimizer = stepper_of(self, self._actor_network, likelihood, self.actor, observations)
            self.critic_optimizer = stepper_of(self, self._critic_network, ScalarGaussian(), self.critic, observations)
        for optimizer in self._optimizers():
            optimizer.max_skips = self.max_faults
        self.exploration = Exploration(self) if self.actor.explores else None

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the rollout buffer, by the lean loop of `acktr.sb3.collect`.

        Args:
            env: the agent's environment.
            callback: called as SB3 does.
            rollout_buffer: reset and filled.
            n_rollout_steps: steps per environment.

        Returns:
            Whether the buffer is full; False if a callback stopped it.
        """
        return collect(self, env, callback, rollout_buffer, n_rollout_steps)

    @property
    def acting_network(self) -> ActorNetwork | JointNetwork:
        """The network a step needs: the actor, or the shared trunk with both heads."""
        return self._actor_network if self._joint_network is None else self._joint_network

    def policy_part(self, outputs: Outputs) -> Outputs:
        """What of the acting network's outputs describes the actions.

        Args:
            outputs: of `acting_network`.

        Returns:
            The parameters of the action distribution.
        """
        return outputs if self._joint_network is None else outputs[:-1]

    def values_of(self, observations: Any, outputs: Outputs | None = None) -> Tensor:
        """Values of observations, in one batch.

        Args:
            observations: tensors as SB3 hands them to a policy, [N, ...].
            outputs: those of `acting_network` on the same observations, where they are at hand.

        Returns:
            Shape [N].
        """
        if self._joint_network is not None:
            return (outputs or self._joint_network.forward(observations))[-1]
        return self.critic_optimizer.outputs(observations)[0]

    def train(self) -> None:
        """Update policy and value from the full rollout buffer."""
        buffer = self.rollout_buffer
        # The last rollout may end beyond the total, where linear schedules would turn negative.
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)
        broken = broken_buffer(buffer, self.ranks)
        if broken is not None:
            self.faults.lose(broken, alike=True)
            self._hold_noise()
            return
        self.faults.forgive()
        # What a step moves has to be the same function in both of the passes that measure it: dropout and batch
        # normalisation act as in evaluation.
        self.policy.set_training_mode(False)
        self._update_learning_rate([each for each in self._optimizers() if isinstance(each, NaturalGradient)])
        of_critic = None if self._joint_network is not None else self.critic.curvature_examples
        # The first rows stand for all, unless all do, or drawn policies keep their environments' rows together.
        whole = is_drawn(self.exploration) or (self.actor.curvature_examples, of_critic) == (None, None)
        order = None if whole else self.update_state.generator
        take = None if self.actor.scale is None else partial(self.update_state.spread.take, scale=self.actor.scale)
        rollout = flatten_rollout(buffer, self.device, self.normalize_advantage, order, self.ranks, take)
        rollout = rollout.seen_by(self.acting_network)
        radius = at(self.actor.radius, self._current_progress_remaining) * self._action_dimensions
        self.actor_optimizer.param_groups[0]["radius"] = radius
        if self._joint_network is not None:
            log_steps(self, "train", self._train_jointly(rollout))
        else:
            log_steps(self, "train", self._train_actor(rollout))
            log_steps(self, "critic", self._train_critic(rollout))
        self._hold_noise()
        self._n_updates += 1
        log_rollout(self, rollout)

    def _hold_noise(self) -> None:
        self.actor.noise.keep(self.policy, self._current_progress_remaining, self.update_state.noise_shift)
        hold_noise(self)

    def _setup_learn(self, *arguments: Any, **options: Any) -> tuple[int, BaseCallback]:
        total_timesteps, callback = super()._setup_learn(*arguments, **options)
        if self._n_updates == self.num_timesteps == 0:
            try_out_noise(self)
        elif self._n_updates:  # schedules begin anew with a new total; without this, one rollout late
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            self._current_progress_remaining = max(self._current_progress_remaining, 0.0)
            self._hold_noise()
        return total_timesteps, callback

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed everything; each of several processes with numbers of its own, its environments as if all were in one.

        Args:
            seed: None for nothing.
        """
        own = None if seed is None else (seed + SEEDS_APART * self.ranks.rank) % 2**32
        super().set_random_seed(own)
        if self.ranks.rank and seed is not None and self.env is not None:
            self.env.seed(seed + self.part.first)

    @property
    def faults(self) -> Faults:
        """What broke so far, by kind."""
        return self.update_state.faults

    def _optimizers(self) -> list[Stepper]:
        return [getattr(self, name) for name in self._optimizer_names()]

    def _optimizer_names(self) -> list[str]:
        return ["actor_optimizer"] if self._joint_network is not None else ["actor_optimizer", "critic_optimizer"]

    def _train_actor(self, rollout: Rollout) -> StepLog:
        network, optimizer, generator = self._actor_network, self.actor_optimizer, self.update_state.generator
        if self.actor.reuse is not None:
            rollout = with_past(self, rollout, self.actor.reuse)
        with explored(self.exploration, rollout.observations, self.logger.record) as groups:
            settings = self.part.share(self.actor)
            return actor_steps(network, optimizer, rollout, settings, self.ent_coef, generator, groups)

    def _train_critic(self, rollout: Rollout) -> StepLog:
        renew_value(self)
        radius = at(self.critic.radius, self._current_progress_remaining)
        settings = self.part.share(self.critic)
        return critic_steps(self.critic_optimizer, rollout, settings, radius, self.update_state.generator)

    def _train_jointly(self, rollout: Rollout) -> StepLog:
        network = cast(JointNetwork, self._joint_network)
        radius, generator = at(self.critic.radius, self._current_progress_remaining), self.update_state.generator
        optimizer, settings = self.actor_optimizer, self.part.share(self.actor)
        return joint_steps(network, optimizer, rollout, settings, self.ent_coef, self.vf_coef, radius, generator)

    def learn(
        self: Self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "ACKTR",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Collect rollouts and train until `total_timesteps`; may be called again and again.

        Args:
            total_timesteps: environment steps over all environments.
            callback: SB3 callbacks.
            log_interval: rollouts between two lines of the log.
            tb_log_name: name of the TensorBoard run.
            reset_num_timesteps: False continues the count of the previous call. Schedules go by the share of all
                steps that is still to come, as in SB3: they move back when more steps are asked for.
            progress_bar: whether to show one.

        Returns:
            The agent.
        """
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        if self.faults.unrecorded:  # what broke in the last update, whose log no rollout follows
            self.faults.record(self.logger.record)
            self.logger.dump(self.num_timesteps)
        return self

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Exchange the environment; the statistics that the policy is used to go into its `VecNormalize`.

        Rollouts that were kept for reuse are forgotten: they tell of the former environment.

        Args:
            env: with the same spaces and as many environments.
            force_reset: whether training starts with a reset.
        """
        if self.env is not None:
            self.update_state.past.rollouts.clear()
        super().set_env(env, force_reset)
        self.update_state.attach(self._vec_normalize_env)
        self.update_state.warn_of(self.env)

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: torch.device | str = "auto",
    ) -> None:
        """Take parameters and states from a file or a dictionary, as SB3 does.

        Args:
            load_path_or_dict: the path, or what `get_parameters` returned.
            exact_match: whether every part must be there.
            device: where tensors go.

        Raises:
            MisfitError: if they are of an agent with other settings.
        """
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except ValueError as error:  # which SB3's `load` would take for an old file, and hide
            raise MisfitError(f"these parameters are of an agent with other settings: {error}") from error
        self._set_constants()
        self.update_state.warn_of(self.env)

    def _set_constants(self) -> None:
        """Settings that were given to `load` count more than those of the file, as in SB3."""
        each: tuple[ActorSettings | CriticSettings, ...] = (self.actor, self.critic)
        for optimizer, settings in zip(self._optimizers(), each, strict=False):
            if isinstance(optimizer, NaturalGradient) and optimizer.adaptation is None:
                optimizer.param_groups[0].update(damping=settings.damping, momentum=settings.momentum)

    def _excluded_save_params(self) -> list[str]:
        own = ["_actor_network", "_critic_network", "_joint_network", "actor_optimizer", "critic_optimizer"]
        own += ["action_likelihood", "exploration", "ranks", "part"]
        return [*super()._excluded_save_params(), *own, "update_state"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *self._optimizer_names(), "update_state"], []
