"""Everything that defines a training run, as typed frozen dataclasses.

The fields have no defaults: values live in ``configs/`` alone, where ``default.yaml`` holds one for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from agents.stepconfig import ActorConfig, CriticConfig, Decay
from envs import EnvOptions

Algorithm = Literal["acktr", "ppo", "a2c", "trpo"]
"""Who learns: ours, or a peer of Stable-Baselines3 and sb3-contrib."""


@dataclass(frozen=True)
class EnvConfig:
    """The training environments."""

    n_envs: int
    """Environments that run side by side, on all processes together."""
    options: EnvOptions
    """How they are built."""


@dataclass(frozen=True)
class PolicyConfig:
    """The networks."""

    kind: Literal["auto", "mlp", "cnn", "multi-input"]
    """Network for the observations; auto looks at their space."""
    pi: tuple[int, ...]
    """Widths of the policy's hidden layers."""
    vf: tuple[int, ...]
    """Widths of the value function's hidden layers."""
    activation: Literal["tanh", "relu", "elu", "silu"]
    """Nonlinearity of the hidden layers."""
    log_std_init: float
    """Logarithm of the first standard deviation of continuous actions."""
    ortho_init: bool
    """Orthogonal first weights."""
    last_conv_channels: int
    """Channels of the last convolution of the image network (ACKTR's paper: 32, DQN's: 64)."""


@dataclass(frozen=True)
class NormalisationConfig:
    """Running normalisation of what the learner sees; recorded scores stay raw."""

    observations: bool
    """Centre and scale vector observations (images and discrete observations are left alone)."""
    rewards: bool
    """Divide rewards by the running standard deviation of the discounted return."""
    clip_observations: float
    """Largest absolute value of a normalised observation."""
    clip_rewards: float
    """Largest absolute value of a normalised reward."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Test episodes with the deterministic policy."""

    episodes: int
    """Episodes per evaluation."""
    period: int
    """Environment steps between two evaluations; 0 evaluates only at the end."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Snapshots to go on from."""

    period: int
    """Environment steps between two checkpoints; 0 writes only the last."""
    keep: int
    """Newest checkpoints that stay on disk."""


@dataclass(frozen=True)
class AcktrConfig:
    """ACKTR: natural-gradient steps inside a trust region."""

    learning_rate: float
    """Largest factor on a natural-gradient step."""
    learning_rate_decay: Decay
    """How that factor develops."""
    n_steps: int
    """Steps of each environment per rollout."""
    gamma: float
    """Discount."""
    gamma_init: float | None
    """Discount at the start of training; null for gamma from the start."""
    gae_lambda: float
    """Decay of generalised advantage estimation."""
    gae_lambda_init: float | None
    """That decay at the start of training; null for gae_lambda from the start."""
    horizon_share: float
    """Share of training after which gamma_init and gae_lambda_init have come to gamma and gae_lambda."""
    ent_coef: float
    """Weight of the entropy bonus."""
    vf_coef: float
    """Weight of the value loss on shared layers."""
    normalize_advantage: bool
    """Standardise the advantages of a rollout."""
    joint_step: bool
    """Policy and value take one step together even where they share no layer, as in ACKTR's paper."""
    precision: Literal["float32", "bfloat16", "auto"]
    """Arithmetic of the features extractor; bfloat16 is faster on images where the processor has it, which auto finds
    out."""
    actor: ActorConfig
    """The policy's steps."""
    critic: CriticConfig
    """The value function's steps."""


@dataclass(frozen=True)
class PpoConfig:
    """PPO of Stable-Baselines3."""

    learning_rate: float
    """Adam's step size."""
    learning_rate_decay: Decay
    """How the step size develops."""
    n_steps: int
    """Steps of each environment per rollout."""
    n_minibatches: int
    """Parts of a rollout, one Adam step each."""
    n_epochs: int
    """Passes over each rollout."""
    gamma: float
    """Discount."""
    gae_lambda: float
    """Decay of generalised advantage estimation."""
    clip_range: float
    """Clip of the importance ratio."""
    ent_coef: float
    """Weight of the entropy bonus."""
    vf_coef: float
    """Weight of the value loss."""
    max_grad_norm: float
    """Longest gradient before it is clipped."""
    normalize_advantage: bool
    """Standardise the advantages of a minibatch."""


@dataclass(frozen=True)
class A2cConfig:
    """A2C of Stable-Baselines3."""

    learning_rate: float
    """RMSprop's step size."""
    learning_rate_decay: Decay
    """How the step size develops."""
    n_steps: int
    """Steps of each environment per rollout."""
    gamma: float
    """Discount."""
    gae_lambda: float
    """Decay of generalised advantage estimation."""
    ent_coef: float
    """Weight of the entropy bonus."""
    vf_coef: float
    """Weight of the value loss."""
    max_grad_norm: float
    """Longest gradient before it is clipped."""
    normalize_advantage: bool
    """Standardise the advantages of a rollout."""


@dataclass(frozen=True)
class TrpoConfig:
    """TRPO of sb3-contrib."""

    learning_rate: float
    """Step size of the value function's Adam; the policy's steps need none."""
    learning_rate_decay: Decay
    """How the step size develops."""
    n_steps: int
    """Steps of each environment per rollout."""
    n_minibatches: int
    """Parts of a rollout, one step of the value function each."""
    n_critic_updates: int
    """Passes of the value function over each rollout."""
    gamma: float
    """Discount."""
    gae_lambda: float
    """Decay of generalised advantage estimation."""
    target_kl: float
    """Largest KL of one step of the policy, in nats."""
    cg_max_steps: int
    """Steps of the conjugate gradient at most."""
    cg_damping: float
    """Added to the Fisher's eigenvalues."""
    line_search_max_iter: int
    """Shorter steps to try before a rollout's step is given up."""
    line_search_shrinking_factor: float
    """Factor from one try to the next."""
    sub_sampling_factor: int
    """Use every n-th transition for the Fisher."""
    normalize_advantage: bool
    """Standardise the advantages of a rollout."""


Learner = AcktrConfig | PpoConfig | A2cConfig | TrpoConfig
"""The settings of one algorithm."""


@dataclass(frozen=True)
class RanksConfig:
    """Several processes with one run (torchrun); without effect on one by itself."""

    placement: Literal["comm-opt", "hybrid-opt", "mem-opt"]
    """Which of them keep a layer's curvature: all, half of them, or one."""
    refresh_age: int | None
    """Updates of the curvature after which decompositions made in the background come into use; None makes them at
    once."""


@dataclass(frozen=True)
class RunConfig:
    """A whole training run."""

    env_id: Annotated[Positional[str], arg(metavar="ENV_ID")]
    """Environment to learn, for example HalfCheetah-v5 or ALE/Pong-v5."""
    algorithm: Algorithm
    """Who learns."""
    name: str
    """Label of the run in plots; empty takes the algorithm's name."""
    total_timesteps: int
    """Environment steps to train for, summed over the environments."""
    seed: int
    """Seed of the networks, the actions and the environments."""
    max_faults: int
    """Faults in a row that end the run with a checkpoint: of one environment with no whole episode between, of rollouts
    or of steps with none that was sound. Fewer are survived, counted and logged (docs/faults.md)."""
    device: Literal["auto", "cpu", "cuda"]
    """Where the networks live; auto takes a GPU for images and the CPU for vectors."""
    torch_threads: int
    """Threads of PyTorch on the CPU; 0 leaves the choice to PyTorch. Small networks want 1."""
    ranks: RanksConfig
    """Several processes."""
    env: EnvConfig
    """The training environments."""
    policy: PolicyConfig
    """The networks."""
    normalisation: NormalisationConfig
    """Running normalisation."""
    evaluation: EvaluationConfig
    """Test episodes."""
    checkpoint: CheckpointConfig
    """Snapshots."""
    acktr: AcktrConfig
    """Settings of ACKTR."""
    ppo: PpoConfig
    """Settings of PPO."""
    a2c: A2cConfig
    """Settings of A2C."""
    trpo: TrpoConfig
    """Settings of TRPO."""

    @property
    def learner(self) -> Learner:
        """The settings of the algorithm that was chosen."""
        match self.algorithm:
            case "acktr":
                return self.acktr
            case "ppo":
                return self.ppo
            case "a2c":
                return self.a2c
            case "trpo":
                return self.trpo

    @property
    def label(self) -> str:
        """The name that plots group runs by."""
        return self.name or self.algorithm
