from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from agents import configfiles
from agents.config import Algorithm
from agents.errors import UsageError
from agents.ranges import check

EXAMPLES = {
    "HalfCheetah-v5": "mujoco.yaml",
    "Walker2d-v5": "mujoco.yaml",
    "Hopper-v5": "mujoco.yaml",
    "InvertedDoublePendulum-v5": "mujoco.yaml",
    "InvertedPendulum-v5": "mujoco.yaml",
    "Reacher-v5": "mujoco.yaml",
    "Swimmer-v5": "mujoco.yaml",
    "Ant-v5": "mujoco.yaml",
    "ALE/Pong-v5": "atari.yaml",
    "pixels/Reacher-v5": "pixels_reacher.yaml",
    "pixels/Hopper-v5": "pixels_hopper.yaml",
    "pixels/Walker2d-v5": "pixels_walker2d.yaml",
    "pixels/InvertedPendulum-v5": "pixels_inverted_pendulum.yaml",
    "pixels/Ant-v5": "pixels.yaml",
    "CartPole-v1": "classic_control.yaml",
    "MountainCarContinuous-v0": "classic_control.yaml",
    "someone:Else-v3": "default.yaml",
}


@pytest.mark.parametrize(("env_id", "name"), EXAMPLES.items())
def test_every_environment_finds_a_complete_configuration(env_id: str, name: str) -> None:
    assert configfiles.file_for(env_id).name == name
    config = configfiles.shipped(env_id)
    check(config)
    assert config.env_id == env_id


@pytest.mark.parametrize("env_id", EXAMPLES)
@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_every_algorithm_has_one_too(env_id: str, algorithm: Algorithm) -> None:
    config = configfiles.shipped(env_id, algorithm)
    check(config)
    assert (config.env_id, config.algorithm) == (env_id, algorithm)


def test_a_peer_may_have_settings_of_its_own() -> None:
    zoo, ours = configfiles.shipped("Hopper-v5", "ppo"), configfiles.shipped("Hopper-v5")
    assert (zoo.ppo.gamma, zoo.policy.pi, zoo.env.n_envs) == (0.999, (256, 256), 1)
    assert (ours.policy.pi, ours.env.n_envs) == ((64, 64), 8)
    trpo = configfiles.shipped("HalfCheetah-v5", "trpo")
    assert (trpo.trpo.target_kl, trpo.trpo.cg_max_steps, trpo.policy.log_std_init) == (0.04, 25, 0.0)
    assert configfiles.shipped("Hopper-v5", "a2c").env == ours.env


ABLATIONS = sorted((configfiles.CONFIGS.parent / "docs" / "results" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_changes_something_of_the_common_configuration(path: Path) -> None:
    config = configfiles.load(path, "Hopper-v5")
    check(config)
    assert config != configfiles.load(configfiles.CONFIGS / "mujoco.yaml", "Hopper-v5")


def test_every_shipped_file_is_reachable_or_a_base() -> None:
    index = yaml.safe_load((configfiles.CONFIGS / "index.yaml").read_text())
    named = {*index.values(), "default.yaml", "index.yaml", "mujoco.yaml", "pixels_legs.yaml"}
    assert {str(path.relative_to(configfiles.CONFIGS)) for path in configfiles.CONFIGS.rglob("*.yaml")} == named


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_holds_only_what_differs(tmp_path: Path) -> None:
    write(tmp_path / "family.yaml", "acktr:\n  actor:\n    radius: 0.5\n  gamma: 0.9\n")
    path = write(tmp_path / "one.yaml", "base: family.yaml\nacktr:\n  actor:\n    damping: 3e-2\n")
    config = configfiles.load(path, "X-v0")
    default = configfiles.load(configfiles.CONFIGS / "default.yaml", "X-v0")
    assert (config.acktr.actor.radius, config.acktr.actor.damping, config.acktr.gamma) == (0.5, 0.03, 0.9)
    assert config.acktr.critic == default.acktr.critic
    assert config.ppo == default.ppo


def test_shipped_files_can_be_inherited_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "base: atari.yaml\nseed: 7\n")
    assert configfiles.load(path).env.n_envs == configfiles.shipped("ALE/Pong-v5").env.n_envs


def test_what_is_dumped_loads_again_without_its_origin(tmp_path: Path) -> None:
    config = replace(configfiles.shipped("Hopper-v5"), seed=5, name="é")
    path = write(tmp_path / "config.yaml", configfiles.dump(config, [{"command": "x"}]))
    assert configfiles.load(path) == config
    assert configfiles.provenance(path) == [{"command": "x"}]
    assert configfiles.identity(path) == ("Hopper-v5", "é", 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acktr:\n  actor:\n    raduis: 1\n", ["acktr.actor.raduis", "acktr.actor.radius"]),
        ("seed: many\n", ["seed", "'many'"]),
        ("seed: 1\nseed: 2\n", ["seed is given twice"]),
        ("!!python/object/apply:os.system ['true']\n", ["YAML"]),
        ("seed: !!python/name:os.system ''\n", ["YAML"]),
        ("seed: [\n", ["YAML"]),
        ("- 1\n", ["mapping"]),
        ("1: 2\n", ["key 1"]),
        ("base: missing.yaml\n", ["missing.yaml"]),
        ("base: bad.yaml\n", ["inherits itself"]),
        ("base: 3\n", ["base", "3"]),
        ("env:\n  options:\n    atari:\n      frame_skips: 3\n", ["frame_skips", "env.options.atari.frame_skip"]),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(UsageError) as caught:
        configfiles.load(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("total_timesteps", 0),
        ("seed", -1),
        ("acktr.gamma", 1.01),
        ("acktr.actor.ema", 1.0),
        ("acktr.actor.radius", 0.0),
        ("acktr.actor.radius", float("nan")),
        ("acktr.critic.damping", 0.0),
        ("env.n_envs", 0),
        ("evaluation.episodes", 0),
        ("policy.pi", (64, 0)),
        ("torch_threads", -1),
    ],
)
def test_numbers_out_of_range_are_named(name: str, value: object) -> None:
    config = configfiles.shipped("CartPole-v1")
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        check(put(config, name, value))


def test_infinite_damping_is_allowed() -> None:
    check(put(configfiles.shipped("CartPole-v1"), "acktr.actor.damping", float("inf")))


def put(config: Any, name: str, value: object) -> Any:
    first, _, rest = name.partition(".")
    return replace(config, **{first: put(getattr(config, first), rest, value) if rest else value})
