"""What a Stable-Baselines3 user has at hand works with ACKTR as it is."""

from __future__ import annotations

import csv

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    ProgressBarCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import acktr
from acktr.sb3 import ACKTR, ActorSettings
from tests.sb3.worlds import IMAGE, TINY_CNN, Nothing, noise, normalised, small_agent, vectorised


def cartpole():
    return gym.make("CartPole-v1")


def test_the_package_offers_the_agent():
    assert acktr.ACKTR is ACKTR


def test_checkpoints_are_written_and_can_be_trained_on(tmp_path):
    agent = small_agent("MlpPolicy", normalised(cartpole))
    callback = CheckpointCallback(32, str(tmp_path), name_prefix="pole", save_vecnormalize=True)
    agent.learn(128, callback=callback)
    assert {p.name for p in tmp_path.glob("*.zip")} == {"pole_64_steps.zip", "pole_128_steps.zip"}
    statistics = VecNormalize.load(str(tmp_path / "pole_vecnormalize_128_steps.pkl"), vectorised(cartpole))
    loaded = ACKTR.load(tmp_path / "pole_64_steps", statistics, device="cpu")
    assert loaded.num_timesteps == 64
    assert loaded.learn(64, reset_num_timesteps=False).num_timesteps == 128


def test_evaluation_during_training_keeps_the_best_agent(tmp_path):
    agent = small_agent("MlpPolicy", normalised(cartpole))
    env = normalised(cartpole, 1, training=False, norm_reward=False)
    callback = EvalCallback(
        env, best_model_save_path=str(tmp_path), log_path=str(tmp_path), eval_freq=16, n_eval_episodes=2, verbose=0
    )
    agent.learn(96, callback=callback)
    with np.load(tmp_path / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [32, 64, 96]
        best = evaluations["results"].mean(1).max()
    assert callback.best_mean_reward == pytest.approx(best)
    assert np.array_equal(env.obs_rms.mean, agent.get_vec_normalize_env().obs_rms.mean)
    ACKTR.load(tmp_path / "best_model", device="cpu")


@pytest.mark.parametrize(("threshold", "steps"), [(1.0, 32), (1e9, 320)])
def test_training_stops_at_a_reward(threshold, steps):
    agent = small_agent("MlpPolicy", vectorised(cartpole))
    stop = StopTrainingOnRewardThreshold(threshold, verbose=0)
    callback = EvalCallback(vectorised(cartpole, 1), callback_on_new_best=stop, eval_freq=16, verbose=0)
    agent.learn(320, callback=callback)
    assert agent.num_timesteps == steps


class Counter(Nothing):
    """Counts the calls SB3 promises to a callback."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"training_start": 0, "rollout_start": 0, "step": 0, "rollout_end": 0, "training_end": 0}

    def _on_training_start(self) -> None:
        self.calls["training_start"] += 1

    def _on_rollout_start(self) -> None:
        self.calls["rollout_start"] += 1

    def _on_step(self) -> bool:
        assert {"rewards", "dones", "infos", "new_obs", "actions", "clipped_actions"} <= set(self.locals)
        self.calls["step"] += 1
        return True

    def _on_rollout_end(self) -> None:
        assert self.locals["rollout_buffer"].full
        self.calls["rollout_end"] += 1

    def _on_training_end(self) -> None:
        self.calls["training_end"] += 1


def test_callbacks_in_a_list_each_see_every_event():
    first, second = Counter(), Counter()
    small_agent("MlpPolicy", vectorised(cartpole)).learn(96, callback=CallbackList([first, second]))
    assert first.calls == second.calls
    assert first.calls == {"training_start": 1, "rollout_start": 3, "step": 48, "rollout_end": 3, "training_end": 1}


def test_a_callback_can_stop_in_the_middle_of_a_rollout():
    class Stop(Nothing):
        def _on_step(self) -> bool:
            return self.num_timesteps < 40

    agent = small_agent("MlpPolicy", vectorised(cartpole)).learn(320, callback=Stop())
    assert agent.num_timesteps == 40
    assert agent._n_updates == 1


@pytest.mark.parametrize("way", ["argument", "callback"])
@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
def test_the_progress_bar_reaches_its_end(way, capsys):
    agent = small_agent("MlpPolicy", vectorised(cartpole))
    if way == "argument":
        agent.learn(64, progress_bar=True)
    else:
        agent.learn(64, callback=ProgressBarCallback())
    out = "".join(capsys.readouterr())
    assert "64/64" in out


def test_evaluate_policy_counts_the_rewards():
    agent = small_agent("MlpPolicy", vectorised(cartpole)).learn(64)
    rewards, lengths = evaluate_policy(agent, vectorised(cartpole, 1), n_eval_episodes=3, return_episode_rewards=True)
    assert rewards == lengths and len(rewards) == 3 and min(rewards) >= 8


def test_monitor_files_hold_every_episode(tmp_path):
    env = DummyVecEnv([lambda n=n: Monitor(cartpole(), str(tmp_path / str(n))) for n in range(2)])
    agent = small_agent("MlpPolicy", env).learn(256)
    # Stable-Baselines3's load_results would need pandas; the first line of a monitor file is its header.
    rows = [row for n in range(2) for row in csv.DictReader(list((tmp_path / f"{n}.monitor.csv").open())[1:])]
    assert len(agent.ep_info_buffer) == len(rows) > 2
    assert sorted(e["r"] for e in agent.ep_info_buffer) == pytest.approx(sorted(float(row["r"]) for row in rows))


def test_the_normaliser_follows_training_and_rests_in_evaluation():
    agent = small_agent("MlpPolicy", normalised(cartpole)).learn(64)
    env = agent.get_vec_normalize_env()
    assert env.obs_rms.count == pytest.approx(64, abs=3)
    assert float(np.abs(agent.rollout_buffer.observations).max()) <= env.clip_obs
    env.training = False
    count = env.obs_rms.count
    evaluate_policy(agent, env, n_eval_episodes=1)
    assert env.obs_rms.count == count


def scalars(folder):
    accumulator = EventAccumulator(str(next(folder.rglob("events.*")).parent))
    accumulator.Reload()
    return {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


PROMISED = {
    "rollout/ep_rew_mean",
    "time/fps",
    "train/kl_predicted",
    "train/kl_measured",
    "train/trust_region_scale",
    "train/damping",
    "train/explained_variance",
    "train/entropy",
    "curvature/condition",
    "curvature/skipped_refreshes",
    "curvature/basis_age",
}


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_tensorboard_shows_what_is_promised(trunk, tmp_path):
    actor = ActorSettings(refresh_period=3)
    if trunk == "own":
        agent = small_agent("MlpPolicy", vectorised(cartpole), tensorboard_log=str(tmp_path), actor=actor)
    else:
        env = vectorised(noise(IMAGE))
        agent = small_agent("CnnPolicy", env, tensorboard_log=str(tmp_path), actor=actor, policy_kwargs=TINY_CNN)
    agent.learn(6 * 32)
    assert (tmp_path / "ACKTR_1").is_dir()
    written = scalars(tmp_path)
    assert set(written) >= PROMISED
    for tag in PROMISED - {"rollout/ep_rew_mean"}:
        assert len(written[tag]) == (6 if tag == "time/fps" else 5), tag  # SB3 writes an update with the next rollout
        assert np.isfinite(written[tag]).all(), tag
    assert written["curvature/basis_age"] == [0, 1, 2, 0, 1]
    assert written["train/damping"] == pytest.approx([actor.damping] * 5)
    assert all(0 < scale <= 1 for scale in written["train/trust_region_scale"])
    assert max(written["train/kl_measured"]) <= 1.5 * actor.radius


def test_the_logged_entropy_is_that_of_the_policy(tmp_path):
    agent = small_agent("MlpPolicy", vectorised(cartpole), n_steps=256, tensorboard_log=str(tmp_path)).learn(1024)
    assert scalars(tmp_path)["train/entropy"][0] == pytest.approx(np.log(2), abs=0.01)
    assert torch.isfinite(torch.as_tensor(agent.rollout_buffer.log_probs)).all()
