"""The trained agents that lie beside the code play as well as the tables say."""

from pathlib import Path

import pytest
from stable_baselines3.common.vec_env import VecEnv

from agents import build, configfiles, evaluation, loading, rundir

AGENTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "agents"
LEAST = {
    "Ant-v5": 2500.0,
    "HalfCheetah-v5": 6500.0,
    "Hopper-v5": 3300.0,
    "InvertedDoublePendulum-v5": 9300.0,
    "InvertedPendulum-v5": 1000.0,
    "Reacher-v5": -4.5,
    "Swimmer-v5": 300.0,
    "Walker2d-v5": 4500.0,
}
EPISODES = {"Reacher-v5": 40, "Ant-v5": 10}
"""Where episodes are short or vary much; elsewhere two say enough."""


def test_every_task_of_the_table_has_an_agent() -> None:
    assert sorted(path.name for path in AGENTS.iterdir()) == sorted(LEAST)


@pytest.mark.parametrize("task", LEAST)
def test_a_shipped_agent_plays_well(task: str) -> None:
    count = EPISODES.get(task, 2)
    run = loading.load_run(AGENTS / task, loading.evaluation_envs(count, seed=5), pytest.fail)
    try:
        assert run.config.env_id == task
        assert mean(run.agent, run.env, count) >= LEAST[task]
        untrained = build.make_agent(run.config, run.env)
        assert mean(untrained, run.env, count) < LEAST[task]  # the control
    finally:
        run.env.close()


def mean(agent: object, env: VecEnv, episodes: int) -> float:
    return evaluation.evaluate(agent, env, episodes, seed=5).mean  # type: ignore[arg-type]


@pytest.mark.parametrize("task", LEAST)
def test_a_shipped_agent_says_where_it_comes_from_and_nothing_of_the_machine(task: str) -> None:
    directory = rundir.existing(AGENTS / task)
    (origin,) = configfiles.provenance(directory.config)
    assert origin.keys() == {"started", "git_commit", "git_changed", "python", "packages"}
    assert origin["git_changed"] is False
    assert sorted(p.name for p in directory.path.rglob("*") if p.is_file()) == ["agent.pt", "config.yaml"]
