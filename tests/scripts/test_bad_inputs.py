"""Bad input to every command and public constructor: one line that names the value, and no traceback.

What `test_doors.py` and `test_benchmark.py` have already is not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from torch import nn

from acktr import (
    ACKTR,
    EKFAC,
    KFAC,
    Categorical,
    DenseFisher,
    Diagonal,
    NaturalGradient,
    ScalarGaussian,
    StepRule,
    known_fisher,
)
from acktr.combination import LayerCombination
from acktr.curvature import Place
from acktr.damping import GreedyDamping, LevenbergMarquardt
from acktr.firstorder import Adam
from acktr.sb3 import ActorSettings, CriticSettings, LearnedNoise, ScheduledNoise
from acktr.step import Backtracking
from envs import AtariOptions, EnvOptions, FiniteGuard, PixelOptions, SupervisedVecEnv, make
from scripts import benchmark, evaluate, export, plot, record, train

NAN, INF = float("nan"), float("inf")
DOORS = {
    "train": train,
    "evaluate": evaluate,
    "record": record,
    "export": export,
    "plot": plot,
    "benchmark": benchmark,
}

# ------------------------------------------------------------------------------------- commands

FILES = {
    "bad.yaml": b"a: [1\n",
    "list.yaml": b"- 1\n",
    "nan.yaml": b"seed: .nan\n",
    "type.yaml": b"acktr: 3\n",
    "bytes.yaml": b"\xff\xfe\x00",
    "self.yaml": b"base: self.yaml\n",
    "option.yaml": b"env: {options: {env_kwargs: {nonsense: 1}}}\n",
    "tag.yaml": b"seed: !!python/object/apply:os.system ['touch owned']\n",
    "curves.csv": b"x,y\n1,2\n",
    "empty.csv": b"",
    "file": b"",
}
COMMANDS = [
    ("train CartPole-v1 --seed 2147483648", "2147483648"),
    ("train CartPole-v1 --seed 1.5", "1.5"),
    ("train CartPole-v1 --total-timesteps -5", "-5"),
    ("train CartPole-v1 --total-timesteps 1e-6", "1e-6"),
    ("train CartPole-v1 --total-timesteps 1e400", "1e400"),
    ("train CartPole-v1 --env.n-envs 0", "n_envs"),
    ("train CartPole-v1 --torch-threads -1", "torch_threads"),
    ("train CartPole-v1 --max-faults 0", "max_faults"),
    ("train CartPole-v1 --policy.activation gelu", "gelu"),
    ("train CartPole-v1 --policy.pi -64 64", "-64"),
    ("train CartPole-v1 --policy.log-std-init nan", "nan"),
    ("train CartPole-v1 --normalisation.clip-rewards nan", "clip_rewards"),
    ("train CartPole-v1 --evaluation.episodes 0", "evaluation.episodes"),
    ("train CartPole-v1 --checkpoint.keep 0", "checkpoint.keep"),
    ("train CartPole-v1 --checkpoint.period -2", "-2"),
    ("train CartPole-v1 --acktr.gamma 1.01", "1.01"),
    ("train CartPole-v1 --acktr.gamma nan", "nan"),
    ("train CartPole-v1 --acktr.gamma-init 1.01", "acktr.gamma_init must be between 0 and 1, got 1.01"),
    ("train CartPole-v1 --acktr.horizon-share 0", "acktr.horizon_share must be above 0 and at most 1, got 0"),
    ("train CartPole-v1 --acktr.learning-rate inf", "inf"),
    ("train CartPole-v1 --acktr.actor.radius 0", "acktr.actor.radius"),
    ("train CartPole-v1 --acktr.actor.damping -1", "acktr.actor.damping"),
    ("train CartPole-v1 --acktr.actor.momentum 1", "acktr.actor.momentum"),
    ("train CartPole-v1 --acktr.actor.ema 1", "acktr.actor.ema"),
    ("train CartPole-v1 --acktr.actor.curvature kfacc", "kfacc"),
    ("train CartPole-v1 --acktr.actor.rank 0", "acktr.actor.rank"),
    ("train CartPole-v1 --acktr.actor.noise-min 1", "noise_min"),
    ("train CartPole-v1 --acktr.actor.log-std-final -2", "log_std_final"),
    ("train HalfCheetah-v5 --acktr.actor.log-std-final nan", "log_std_final"),
    ("train CartPole-v1 --acktr.critic.radius -2", "acktr.critic.radius"),
    ("train CartPole-v1 --acktr.precision float16", "float16"),
    ("train CartPole-v1 --env.options.backend native", "native"),
    ("train CartPole-v1 --config list.yaml", "list.yaml"),
    ("train CartPole-v1 --config bad.yaml", "bad.yaml"),
    ("train CartPole-v1 --config nan.yaml", "nan"),
    ("train CartPole-v1 --config type.yaml", "type.yaml"),
    ("train CartPole-v1 --config bytes.yaml", "bytes.yaml"),
    ("train CartPole-v1 --config self.yaml", "self.yaml"),
    ("train CartPole-v1 --config option.yaml", "nonsense"),
    ("train CartPole-v1 --config tag.yaml", "tag.yaml"),
    ("train CartPole-v1 --config folder", "folder"),
    ("train CartPole-v1 --run-dir file", "file"),
    ("train CartPole-v1 --resume folder", "folder"),
    ("train CartPole-v1 --algorithm trpo --trpo.target-kl 0", "target_kl"),
    ("train ALE/Nope-v5", "Nope"),
    ("train ALE/Pong-v5 --env.options.time-limit 5", "5"),
    ("train ALE/Pong-v5 --env.options.atari.sticky-actions 2", "2"),
    ("train CartPole-v1 --env.options.time-limit 0", "error: time_limit must be at least 1 step"),
    ("train CartPole-v1 --env.options.render-mode human", "render_mode must be 'rgb_array' or None"),
    ("train pixels/Foo-v5", "unknown environment 'pixels/Foo-v5'"),
    ("train Blackjack-v1", "Blackjack"),
    ("evaluate file", "file"),
    ("evaluate folder --episodes x", "x"),
    ("evaluate folder --seed 99999999999", "99999999999"),
    ("evaluate folder --nonsense", "--nonsense"),
    ("evaluate folder folder", "folder"),
    ("record folder --output x.avi", "x.avi"),
    ("record folder --output none/x.mp4", "none"),
    ("export folder --output new", "folder"),
    ("export folder", "--output"),
    ("plot curves.csv --output x.png", "curves.csv"),
    ("plot empty.csv --output x.png", "empty.csv"),
    ("plot file --output x.png", "file"),
    ("plot folder --output none/x.png", "folder"),
    ("plot folder --csv file", "file"),
    ("benchmark throughput --n-envs x", "x"),
    ("benchmark update --network huge", "huge"),
    ("benchmark curvature --scale 5", "5"),
]


@pytest.mark.parametrize(("line", "word"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_commands_tell_it_in_one_line(
    line: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    Path("folder").mkdir()
    door, *arguments = line.split()
    assert DOORS[door].main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    assert word in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "folder"}, "a mistake leaves nothing behind"


# ------------------------------------------------------------------------------------- constructors


def optimizer(**choices: Any) -> Callable[[], Any]:
    return lambda: NaturalGradient(nn.Linear(3, 2), Categorical(), **choices)


def block(factory: Any) -> Callable[[], Any]:
    return lambda: factory().build(Place((2, 3)))


def agent(policy: str = "MlpPolicy", env: Any = "CartPole-v1", **choices: Any) -> Callable[[], Any]:
    return lambda: ACKTR(policy, env, **choices)


def actor(**choices: Any) -> Callable[[], Any]:
    return lambda: ACKTR("MlpPolicy", "CartPole-v1", actor=ActorSettings(**choices))


def critic(**choices: Any) -> Callable[[], Any]:
    return lambda: ACKTR("MlpPolicy", "CartPole-v1", critic=CriticSettings(**choices))


def world(
    env_id: str = "CartPole-v1", n_envs: int = 1, seed: int | None = 0, max_faults: int = 10, **options: Any
) -> Any:
    return lambda: make(env_id, n_envs, seed=seed, options=EnvOptions(**options), max_faults=max_faults)


CONSTRUCTORS: list[tuple[Callable[[], Any], str]] = [
    (optimizer(lr=-1), "lr must be at least 0 and finite, got -1"),
    (optimizer(lr=NAN), "lr must be .* got nan"),
    (optimizer(radius=0), "radius must be positive, got 0"),
    (optimizer(radius=NAN), "radius must be positive, got nan"),
    (optimizer(damping=NAN), "damping must be positive, got nan"),
    (optimizer(momentum=1.0), r"momentum must be in \[0, 1\), got 1"),
    (optimizer(weight_decay=-0.1), "weight_decay must be at least 0 and finite, got -0.1"),
    (optimizer(curvature="ekfac"), "curvature .* 'ekfac'"),
    (optimizer(fisher="exact"), "fisher .* 'exact'"),
    (lambda: NaturalGradient(nn.Linear(3, 2).requires_grad_(False), Categorical()), "no parameter that requires"),
    (lambda: known_fisher(0.0), "fisher must be positive .* got 0.0"),
    (block(lambda: EKFAC(ema=1.0)), r"ema must be in \[0, 1\), got 1.0"),
    (block(lambda: EKFAC(rank=0)), "rank must be at least 1, .* got 0"),
    (block(lambda: KFAC(ema=-1.0)), r"ema must be in \[0, 1\), got -1.0"),
    (block(lambda: Diagonal(ema=NAN)), r"ema must be in \[0, 1\), got nan"),
    (optimizer(curvature=DenseFisher(ema=2.0)), r"ema must be in \[0, 1\), got 2.0"),
    (lambda: ScalarGaussian(0.0), "variance must be positive and finite, got 0.0"),
    (lambda: StepRule(corrections=-1), "corrections must be at least 0, got -1"),
    (lambda: StepRule(examples=0), "examples must be at least 1, .* got 0"),
    (lambda: Backtracking(attempts=0), "attempts must be at least 1, got 0"),
    (lambda: Backtracking(shrink=1.0), "shrink must be between 0 and 1, got 1.0"),
    (lambda: LayerCombination(ridge=-1.0), "ridge must be .* got -1.0"),
    (lambda: LevenbergMarquardt(start=0.0), "start must lie between"),
    (lambda: GreedyDamping(period=0), "period must be at least 1, got 0"),
    (lambda: Adam(learning_rate=0.0), "learning_rate must be positive, got 0.0"),
    (agent(n_steps=0), "n_steps must be at least 1, got 0"),
    (agent(gamma=1.5), r"gamma must be in \[0, 1\], got 1.5"),
    (agent(gae_lambda=NAN), r"gae_lambda must be in \[0, 1\], got nan"),
    (agent(ent_coef=NAN), "ent_coef must be at least 0 and finite, got nan"),
    (agent(vf_coef=INF), "vf_coef must be positive and finite, got inf"),
    (agent(max_faults=0), "max_faults must be at least 1, got 0"),
    (agent(precision="float8"), "precision must be one of .* 'float8'"),
    (agent(learning_rate=-1.0), "learning_rate must be .* got -1.0"),
    (agent(policy="MlpPolicyy"), "MlpPolicyy"),
    (agent(policy_kwargs={"squash_output": True}), "squash_output=True"),
    (actor(radius=0.0), "actor.radius must be positive, got 0.0"),
    (actor(radius=NAN), "actor.radius must be positive, got nan"),
    (actor(damping=-1.0), "damping must be positive, got -1.0"),
    (actor(refresh_period=0), "refresh_period must be at least 1, got 0"),
    (actor(n_epochs=0), "actor.n_epochs must be at least 1, got 0"),
    (actor(n_minibatches=0), "actor.n_minibatches must be at least 1, got 0"),
    (actor(clip_range=0.0), "actor.clip_range must be positive, got 0.0"),
    (actor(max_rollout_kl=-1.0), "actor.max_rollout_kl must be positive, .* got -1.0"),
    (actor(noise=LearnedNoise(1.0)), "a least noise .* is for Box actions"),
    (actor(noise=LearnedNoise(-1.0)), "the least noise must be at least 0, got -1.0"),
    (actor(noise=ScheduledNoise(-1.0)), "scheduled noise .* is for Box actions"),
    (actor(exploration_kl=-1.0), "actor.exploration_kl must be at least 0, got -1.0"),
    (actor(curvature_examples=0), "actor.curvature_examples must be at least 1, .* got 0"),
    (actor(curvature="ekfac"), "curvature .* 'ekfac'"),
    (critic(radius=NAN), "critic.radius must be positive, got nan"),
    (critic(n_epochs=-1), "critic.n_epochs must be at least 1, got -1"),
    (critic(curvature_examples=-1), "critic.curvature_examples must be at least 1, .* got -1"),
    (world(n_envs=0), "n_envs must be at least 1, got 0"),
    (world(seed=-1), "seed must be at least 0, .* got -1"),
    (world("Nope-v0"), "Nope-v0"),
    (world(max_faults=0), "max_faults must be at least 1, got 0"),
    (world(env_kwargs={"nope": 1}), "no option 'nope'"),
    (world(env_kwargs={"render_mode": "human"}), "env_kwargs must not hold 'render_mode'"),
    (world(backend="native"), "backend 'native' is for MuJoCo"),
    (world("Hopper-v5", backend="native", env_kwargs={"nope": 1}), "nope"),
    (lambda: EnvOptions(backend="gpu"), "backend must be .* 'gpu'"),  # type: ignore[arg-type]
    (lambda: AtariOptions(sticky_actions=NAN), "sticky_actions is a probability .* got nan"),
    (lambda: PixelOptions(distance=INF), "distance must be a positive number of metres, got inf"),
    (lambda: FiniteGuard(make("CartPole-v1", 1, seed=0), 0), "max_faults must be at least 1, got 0"),
    (lambda: SupervisedVecEnv([lambda: gym.make("CartPole-v1")], timeout=0), "timeout must be a positive .* got 0"),
]


@pytest.mark.parametrize(("build", "pattern"), CONSTRUCTORS, ids=[pattern for _, pattern in CONSTRUCTORS])
def test_constructors_tell_it_in_one_line(build: Callable[[], Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as error:
        build()
    assert "\n" not in str(error.value)


def test_they_are_many_and_distinct() -> None:
    assert len({line for line, _ in COMMANDS}) + len({pattern for _, pattern in CONSTRUCTORS}) >= 115


def test_good_input_passes() -> None:
    """The builders above refuse for the value's sake alone."""
    optimizer(lr=0.5, radius=0.1, damping=0.1, momentum=0.5, weight_decay=0.1, seed=3)()
    block(lambda: EKFAC(ema=0.5))()
    assert agent(n_steps=8, gamma=0.5)().n_steps == 8
    actor(radius=0.1, n_epochs=2, n_minibatches=4, clip_range=0.1, max_rollout_kl=0.1, curvature_examples=4)()
    critic(radius=0.1, n_epochs=2, curvature_examples=4)()
    world()().close()
