"""The Atari adapter against emulators driven by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ale_py
import numpy as np
import pytest
from ale_py import roms
from stable_baselines3 import A2C
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecNormalize, is_vecenv_wrapped
from stable_baselines3.common.vec_env.vec_transpose import VecTransposeImage

from envs import AtariOptions, AtariVecEnv, WorldError
from envs.atari_screen import ScreenTwin

PLAIN = AtariOptions(noop_max=0, fire_reset=False, threads=1)


def console(game: str, seed: int, sticky: float = 0.0) -> Any:
    """A plain emulator with its game just started."""
    emulator = ale_py.ALEInterface()
    emulator.setFloat("repeat_action_probability", sticky)
    emulator.setInt("random_seed", seed)
    emulator.loadROM(Path(str(roms.get_rom_path(game))))
    emulator.reset_game()
    return emulator


def hold(emulator: Any, action: int, frames: int = 4) -> tuple[int, np.ndarray]:
    """Hold an action until the frames or the game are over; reward and max of the last two grey screens."""
    reward, screens = 0, [emulator.getScreenGrayscale()]
    for _ in range(frames):
        reward += emulator.act(emulator.getMinimalActionSet()[action])
        screens.append(emulator.getScreenGrayscale())
        if emulator.game_over():
            break
    return reward, np.maximum(*screens[-2:])


@cache
def area_weights(size: int, new_size: int) -> np.ndarray:
    """Rows that average each new pixel's share of the old ones, shape (new_size, size)."""
    edges = np.arange(new_size + 1) * size / new_size
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(0) * new_size / size


def shrink(screen: np.ndarray, size: int = 84) -> np.ndarray:
    return area_weights(screen.shape[0], size) @ screen.astype(np.float64) @ area_weights(screen.shape[1], size).T


def made(game: str, n_envs: int, seed: int, options: AtariOptions = PLAIN, **kwargs: Any) -> AtariVecEnv:
    venv = AtariVecEnv(game, n_envs, options, **kwargs)
    venv.seed(seed)
    return venv


def played(
    venv: Any, steps: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]]:
    """Random play from a reset: actions, observations, rewards, dones, infos of each step."""
    rng = np.random.default_rng(seed)
    venv.reset()
    for _ in range(steps):
        actions = rng.integers(0, venv.action_space.n, venv.num_envs)
        yield actions, *venv.step(actions)


def test_spaces_are_an_image_with_channels_first() -> None:
    venv = made("pong", 2, 0)
    assert venv.observation_space.shape == (4, 84, 84)
    assert venv.observation_space.dtype == np.uint8
    assert is_image_space(venv.observation_space, check_channels=False)
    assert is_image_space_channels_first(venv.observation_space)
    assert venv.action_space.n == 6
    assert made("pong", 1, 0, AtariOptions(full_action_space=True)).action_space.n == 18
    observations = venv.reset()
    assert observations.shape == (2, 4, 84, 84)
    assert venv.observation_space.contains(observations[0])
    assert observations[0, :3].max() == 0 < observations[0, 3].max()


@pytest.mark.parametrize("game", ["breakout", "pong"])
def test_observations_are_the_max_pooled_area_averaged_screens(game: str) -> None:
    venv = made(game, 1, 3)
    emulator, frames = console(game, 3), [np.zeros((84, 84))] * 3
    worst, still, before = 0.0, 0.0, None
    for actions, observations, _, _, infos in played(venv, 150):
        frames.append(shrink(hold(emulator, int(actions[0]))[1]))
        if "episode" in infos[0]:
            break
        worst = max(worst, float(np.abs(observations[0] - np.stack(frames[-4:])).max()) if len(frames) > 6 else 0.0)
        if before is not None:
            still = max(still, float(np.abs(observations[0, 3] - shrink(before)).max()))
        before = emulator.getScreenGrayscale()
    assert len(frames) > 60
    assert worst <= 1.0  # one grey level of rounding
    assert still > 20.0  # the previous step's screen would have been noticed


@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_scores_and_ends_are_those_of_the_plain_emulator(sticky: float) -> None:
    venv = made("breakout", 1, 11, AtariOptions(noop_max=0, fire_reset=False, sticky_actions=sticky, threads=1))
    emulator, score, steps, lives, episodes = console("breakout", 11, sticky), 0, 0, 5, 0
    for actions, _, rewards, dones, infos in played(venv, 900):
        reward, _ = hold(emulator, int(actions[0]))
        score, steps = score + reward, steps + 1
        lost_life, lives = emulator.lives() < lives, emulator.lives()
        assert rewards[0] == np.sign(reward)
        assert dones[0] == (lost_life or emulator.game_over())
        assert ("episode" in infos[0]) == emulator.game_over()
        if emulator.game_over():
            assert infos[0]["episode"]["r"] == score
            assert infos[0]["episode"]["l"] == steps
            emulator.reset_game()
            score, steps, lives, episodes = 0, 0, emulator.lives(), episodes + 1
    assert episodes >= 2


def test_clipping_is_for_the_learner_alone() -> None:
    """Space Invaders pays 5 to 30 and more; the clipped sum is far from the score."""
    results = {}
    for clip in (True, False):
        venv = made("space_invaders", 2, 5, AtariOptions(clip_rewards=clip, episodic_life=False, threads=1))
        paid, scores, learnt = set(), [], []
        running = np.zeros(2)
        for _, _, rewards, dones, infos in played(venv, 1000):
            assert rewards.dtype == np.float32
            paid |= set(rewards.tolist())
            running += rewards
            for index in np.flatnonzero(dones):
                scores.append(infos[index]["episode"]["r"])
                learnt.append(running[index])
                running[index] = 0
        assert len(scores) >= 2
        results[clip] = paid, scores, learnt
    assert results[True][0] == {0.0, 1.0}
    assert max(results[False][0]) >= 10.0
    assert results[True][1] == results[False][1] == results[False][2]
    assert results[True][2] != results[True][1]


def test_a_lost_life_ends_the_learners_episode_and_not_the_game() -> None:
    venv = made("breakout", 4, 1, AtariOptions(threads=1))
    life_losses = games = 0
    for _, observations, _, dones, infos in played(venv, 700):
        for index in np.flatnonzero(dones):
            assert infos[index]["TimeLimit.truncated"] is False
            final = infos[index]["terminal_observation"]
            if "episode" in infos[index]:
                games += 1
                assert not np.array_equal(final, observations[index])
                assert observations[index][:3].max() == 0  # a new game's stack starts black
            else:
                life_losses += 1
                np.testing.assert_array_equal(final, observations[index])
        for index in np.flatnonzero(~dones):
            assert infos[index] == {}
    assert games >= 4
    assert life_losses == pytest.approx(4 * games, abs=16)  # five lives a game


def test_without_episodic_life_only_games_end() -> None:
    venv = made("breakout", 4, 1, AtariOptions(episodic_life=False, threads=1))
    ends = [info for *_, dones, infos in played(venv, 500) for done, info in zip(dones, infos, strict=True) if done]
    assert ends
    assert all("episode" in info for info in ends)


def test_the_terminal_observation_goes_on_from_the_last_one() -> None:
    """Its older screens are the previous stack's newer ones, which is not so for the next game's first stack."""
    venv = made("breakout", 4, 2, AtariOptions(threads=1))
    before, ends = venv.reset(), 0
    rng = np.random.default_rng(0)
    for _ in range(500):
        observations, _, dones, infos = venv.step(rng.integers(0, 4, 4))
        for index in np.flatnonzero(dones):
            np.testing.assert_array_equal(infos[index]["terminal_observation"][:3], before[index][1:])
            if "episode" in infos[index]:
                ends += 1
                assert not np.array_equal(observations[index][:3], before[index][1:])
        before = observations
    assert ends >= 3


def test_the_frame_limit_truncates_and_does_not_terminate() -> None:
    venv = made("pong", 2, 0, AtariOptions(max_episode_frames=200, threads=1))
    ends = []
    for step, (_, observations, _, dones, infos) in enumerate(played(venv, 120), start=1):
        for index in np.flatnonzero(dones):
            ends.append(step)
            assert infos[index]["TimeLimit.truncated"] is True
            assert infos[index]["episode"]["l"] == 50
            assert infos[index]["terminal_observation"][0].max() > 0  # the old game's full stack
            assert observations[index][:3].max() == 0
    assert ends == [50, 50, 100, 100]


@pytest.mark.parametrize("frames", [4, 8])
def test_games_of_a_step_or_two_still_count(frames: int) -> None:
    """The next game's no-ops can outlast such a game, so that clocks alone would not show the restart."""
    venv = made("pong", 4, 0, AtariOptions(max_episode_frames=frames, threads=1))
    for step, (_, _, _, dones, infos) in enumerate(played(venv, 24), start=1):
        assert dones.all() == (step % (frames // 4) == 0)
        assert all(info["episode"]["l"] == frames // 4 for info, done in zip(infos, dones, strict=True) if done)


def test_the_seed_decides_everything_whatever_the_threads() -> None:
    def trace(seed: int, threads: int) -> list[np.ndarray]:
        options = AtariOptions(sticky_actions=0.25, threads=threads)
        return [part for _, *step, _ in played(made("breakout", 3, seed, options), 100) for part in step]

    first, second, other = trace(4, 1), trace(4, 2), trace(5, 1)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_copies_differ_and_large_seeds_are_taken() -> None:
    venv = made("pong", 2, 2**32 - 1, AtariOptions(sticky_actions=0.25))
    for _, observations, *_ in played(venv, 60):
        last = observations
    assert not np.array_equal(last[0], last[1])


def test_pictures_show_the_game_that_is_played() -> None:
    venv = made("breakout", 2, 7, AtariOptions(sticky_actions=0.25, threads=1), render_mode="rgb_array")
    games, nearest, other = 0, [], []
    grey = np.array([0.299, 0.587, 0.114])
    for step, (_, observations, _, _, infos) in enumerate(played(venv, 400)):
        games += sum("episode" in info for info in infos)
        if step % 10 == 9:
            pictures = [shrink(np.asarray(picture) @ grey) for picture in venv.get_images()]
            nearest.append(np.abs(np.stack(pictures) - observations[:, 3]).max())
            other.append(np.abs(np.stack(pictures[::-1]) - observations[:, 3]).max())
    assert games >= 2
    assert max(nearest) < 10  # grey levels: the palettes' greys and the order of max and grey differ a little
    assert np.median(other) > 30  # the neighbour's picture would have been noticed
    tiled = venv.render()
    assert tiled is not None
    assert tiled.shape == (420, 160, 3)


def test_pictures_of_another_game_are_noticed() -> None:
    """Negative control of the comparison between the twin and its game."""
    options = AtariOptions(sticky_actions=0.25, threads=1)
    venv = made("breakout", 1, 7, options, render_mode="rgb_array")
    with pytest.raises(RuntimeError, match="the pictures lost the game"):
        for step, _ in enumerate(played(venv, 600)):
            if step == 10:
                stranger = ScreenTwin(Path(str(roms.get_rom_path("breakout"))), options)
                stranger.reset(999, 50)
                venv._twins = [stranger]


def test_works_under_the_wrappers_of_stable_baselines() -> None:
    options = AtariOptions(threads=1)
    stacked = VecFrameStack(made("breakout", 2, 0, options), 2, channels_order="first")
    assert stacked.reset().shape == (2, 8, 84, 84)
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        wrapped = VecNormalize(VecMonitor(made("breakout", 4, 0, options)), norm_obs=False)
    bare = made("breakout", 4, 0, AtariOptions(clip_rewards=False, threads=1))
    normalised = VecNormalize(bare, norm_obs=False)
    plain = [
        info["episode"]["r"]
        for *_, infos in played(made("breakout", 4, 0, options), 220)
        for info in infos
        if "episode" in info
    ]
    raw = [info["episode"]["r"] for *_, infos in played(normalised, 220) for info in infos if "episode" in info]
    assert raw == plain != []
    assert sum(1 for _ in played(wrapped, 20)) == 20


def test_a2c_trains_and_evaluation_reads_raw_scores() -> None:
    venv = made("breakout", 2, 0, AtariOptions(max_episode_frames=120, threads=1))
    model = A2C("CnnPolicy", venv, n_steps=5, seed=0).learn(30)
    assert not is_vecenv_wrapped(model.get_env(), VecTransposeImage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # evaluate_policy warns where scores are not recorded
        scores, lengths = evaluate_policy(model, venv, n_eval_episodes=2, return_episode_rewards=True)
    assert len(scores) == len(lengths) == 2
    assert lengths == [30, 30]


def test_a_reset_starts_new_games_even_between_send_and_receive() -> None:
    venv = made("breakout", 2, 0)
    for _ in played(venv, 20):
        pass
    venv.step_async(np.zeros(2, dtype=np.int64))
    observations = venv.reset()
    assert observations[:, :3].max() == 0
    assert venv.step(np.zeros(2, dtype=np.int64))[0].shape == (2, 4, 84, 84)


def test_misuse_names_the_value_and_the_remedy() -> None:
    venv = made("breakout", 2, 0)
    venv.reset()
    with pytest.raises(WorldError, match=r"shape \(2,\), one per environment, got \(3,\)"):
        venv.step(np.zeros(3, dtype=np.int64))
    with pytest.raises(WorldError, match=r"0 … 3, got \[0, 4\]"):
        venv.step(np.array([0, 4]))
    with pytest.raises(WorldError, match="render_mode='rgb_array'"):
        venv.get_images()
    with pytest.raises(WorldError, match="'human'"):
        AtariVecEnv("breakout", 1, render_mode="human")
    with pytest.raises(WorldError, match="'lives'"):
        venv.set_attr("lives", 3)
    with pytest.raises(WorldError, match="'ram'"):
        venv.env_method("ram")
    venv.close()
    venv.close()
    with pytest.raises(WorldError, match="closed"):
        venv.reset()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("frame_skip", 0, "atari.frame_skip must be at least 1, got 0"),
        ("noop_max", -1, "atari.noop_max must be at least 0, got -1"),
        ("sticky_actions", 1.5, "got 1.5"),
        ("threads", 0, "got 0"),
    ],
)
def test_options_are_checked(field: str, value: Any, words: str) -> None:
    with pytest.raises(WorldError, match=words):
        AtariOptions(**{field: value})
