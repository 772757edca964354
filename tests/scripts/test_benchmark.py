import json
from pathlib import Path
from typing import Any, get_args

import pytest

from agents.benchmarks import engine, engines, throughput, update
from agents.benchmarks.curvature import campaign as curvature
from scripts import benchmark

MISTAKES = {
    "": ["throughput", "update", "engine"],
    "--repeats 2": ["throughput"],
    "throughputs": ["'throughputs'", "throughput?"],
    "throughput --repeats 0": ["--repeats", "0"],
    "throughput --steps -1": ["--steps", "-1"],
    "throughput --n-envs 0": ["--n-envs", "0"],
    "throughput --n-envs -4": ["--n-envs", "-4"],
    "throughput --n-envs 2.5": ["--n-envs", "2.5"],
    "throughput --n-env 2": ["--n-env", "--n-envs?"],
    "throughput --env Nope-v0": ["Nope-v0"],
    "throughput --envs CartPole-v1": ["--envs", "--env?"],
    "update --updates 0": ["--updates", "0"],
    "update --network cnn": ["cnn", "--network"],
    "engine --repeats x": ["--repeats", "'x'"],
    "engine --output file/x": ["file", "--output"],
    "uci --splits 0": ["--splits", "0"],
    "uci --sets boton --data .": ["boton", "boston?"],
    "uci --methods noisy": ["'noisy'", "noisy-kfac?"],
    "curvature --experiments": ["--experiments", "fidelity"],
    "curvature --experiments refreshing": ["refreshing", "refresh"],
    "curvature --methods": ["--methods", "ekfac"],
    "curvature --methods kfak": ["'kfak'", "kfac?"],
    "curvature --seeds 0": ["--seeds", "0"],
    "curvature --epochs 0": ["--epochs", "0"],
    "curvature --scale 0": ["--scale", "0"],
    "curvature --data none": ["none", "--data"],
    "curvature --page file": ["file", "--page"],
    "curvature --summary-only": ["--summary-only"],
    "faults --kills 0": ["--kills", "0"],
    "faults --interruptions 0": ["--interruptions", "0"],
    "faults --corruptions -1": ["--corruptions", "-1"],
    "faults --rollouts 0": ["--rollouts", "0"],
    "together --ranks 3": ["--n-envs 8", "--ranks 3"],
    "together --ranks 1": ["--ranks 1"],
    "together --repeats 0": ["--repeats", "0"],
    "together --env-id CartPol-v1": ["CartPol-v1"],
    "soak --width 0": ["--width", "0"],
    "soak --env-id CartPol-v1": ["CartPol-v1"],
    "faults --environments": ["--environments", "CartPole-v1"],
    "faults --environments CartPol-v1": ["CartPol-v1"],
    "mujoco --environments HalfCheeta-v5": ["HalfCheeta-v5", "'HalfCheetah-v5'"],
    "mujoco --algorithms acktr pppo": ["'pppo'", "ppo?"],
    "mujoco --algorithms": ["--algorithms", "acktr"],
    "mujoco --environments": ["--environments"],
    "mujoco --seeds 0": ["--seeds", "0"],
    "mujoco --peer-seeds -1": ["--peer-seeds", "-1"],
    "mujoco --first-seed -1 --environments CartPole-v1": ["seed", "-1"],
    "mujoco --jobs 0": ["--jobs", "0"],
    "mujoco --output file/x": ["file", "--output"],
    "mujoco --acktr-config none.yaml --environments CartPole-v1": ["none.yaml"],
    "mujoco --summary-only --environments CartPole-v1": ["--summary-only"],
    "atari --episodes 0": ["--episodes", "0"],
    "atari --total-timesteps 0": ["--total-timesteps", "0"],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_told_in_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert benchmark.main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    for word in MISTAKES[line]:
        assert word in captured.err
    assert captured.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "a mistake leaves nothing behind"


def test_help_names_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--help"]) == 0
    out = capsys.readouterr().out
    names = ("throughput", "update", "engine", "uci", "curvature", "faults", "together", "soak", "mujoco", "atari")
    assert all(f"\n  {name} " in out for name in names)


def measured(name: str, *flags: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, Any]:
    assert benchmark.main([name, "--repeats", "1", "--output", str(folder), *flags]) == 0
    (path,) = folder.glob(f"{name}-*.json")
    captured = capsys.readouterr()
    assert captured.out.endswith(f"\n{path}\n")
    data = json.loads(path.read_text())
    assert data["benchmark"] == name
    assert data["settings"]["repeats"] == 1
    assert data["origin"]["command"].startswith(f"python -m scripts.benchmark {name}")
    assert "round 1 of 1" in captured.err
    return captured.out, data


def test_a_short_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--env-id", "CartPole-v1", "--total-timesteps", "10000", "--updates", "40", "--width", "16"]
    benchmark.main(["soak", *flags, "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "CartPole-v1, 10,000 steps" in out and "4 × 16, 40 updates" in out
    data = json.loads(next(tmp_path.glob("soak-*.json")).read_text())
    assert [found["skipped_steps"] for found in data["results"]["soaks"]] == [0, 0]
    assert all(found["resident"] for found in data["results"]["soaks"])


def test_a_short_training_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = measured(
        "together", "--env-id", "CartPole-v1", "--n-envs", "4", "--steps", "4096", folder=tmp_path, capsys=capsys
    )
    assert "one process" in out and "2 ranks" in out
    assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in data["results"]["steps_per_second"].values())


def test_throughput_in_processes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "_available", lambda: (["acktr", "a2c", throughput.BARE], ["a note"]))
    flags = ["--env", "CartPole-v1", "--steps", "64", "--n-envs", "2"]
    out, data = measured("throughput", *flags, folder=tmp_path, capsys=capsys)
    assert all(text in out for text in ("ACKTR (ours)", "SB3 A2C", "environments alone", "ours ÷ this", "a note"))
    for result in data["results"].values():
        assert result["steps_per_second"]["wall"]["median"] > 0
        assert result["rounds"][0]["work"] >= 64
        assert 0 < result["memory_mib"]["imports"]["median"] < result["memory_mib"]["peak"]["median"]
        assert result["rounds"][0]["memory_mib"]["peak"] == result["memory_mib"]["peak"]["median"]
    assert data["results"]["acktr"]["ours_over_this"]["cpu"]["median"] == 1
    assert data["results"]["acktr"]["ours_over_this"]["memory"]["median"] == 1
    assert data["settings"]["n_envs"] == 2
    assert data["results"]["a2c"]["batch"] == {
        "n_envs": 2,
        "n_steps": 5,
        "passes": {"joint": {"epochs": 1, "minibatch": 10}},
    }
    assert "SB3 A2C: 2 × 5 = 10 transitions; joint 1 epoch in minibatches of 10" in data["notes"]


def inline(function: Any, *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


def test_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(update, "isolated", inline)
    out, data = measured("update", "--network", "mlp", "--updates", "1", folder=tmp_path, capsys=capsys)
    assert "64-64 actor and critic" in out
    assert all(phase in out for phase in update.PHASES)
    assert set(data["results"]) == {"64-64 actor and critic", "64-64 actor", "64-64 critic"}
    rounds = data["results"]["64-64 critic"]["rounds"]
    assert set(rounds["ACKTR"][0]["phases"]) == set(update.PHASES)


def test_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine, "isolated", inline)
    monkeypatch.setitem(engine.PROBLEMS, "mlp", lambda seed: engines.mlp(seed, batch=32, width=8))
    out, data = measured("engine", "--network", "mlp", "--updates", "1", folder=tmp_path, capsys=capsys)
    assert "4×512, batch 2048, ekfac, ours" in out
    who = ["ours", *(peer for peer in engines.PEERS if engines.installed(peer))]
    everyone = {f"mlp, {method}, {name}" for name in who for method in engines.methods_of(name)}
    everyone.add("mlp, ekfac, ours, in full")
    assert set(data["results"]["timings"]) == everyone
    assert set(data["results"]["agreement"]) == {name for name in everyone if "ours" not in name}
    assert len(data["notes"]) == 3 - len(who)


def test_curvature_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- measured -->\n<!-- /measured -->\n")
    flags = ["--quick", "--methods", "sgd-momentum", "kfac", "ekfac", "--output", str(tmp_path), "--page", str(page)]
    assert benchmark.main(["curvature", *flags]) == 0
    first = capsys.readouterr()
    assert all(
        text in first.out for text in ("autoencoder", "conv", "teacher", "theorem 3", "the numbers mean nothing")
    )
    assert "cost: kfac, round 1" in first.err
    names = {file.name for file in (tmp_path / "quick").iterdir()}
    stores = {*get_args(curvature.Name), "width_learning"}
    assert names == {f"{name}.csv" for name in stores} | {"curves.png"}
    assert "| EKFAC is never further" in page.read_text()
    (path,) = tmp_path.glob("curvature-*.json")
    data = json.loads(path.read_text())
    assert {claim["agrees"] for claim in data["results"]["fidelity"]["claims"]} <= {True, False}
    assert benchmark.main(["curvature", *flags]) == 0
    again = capsys.readouterr()
    assert again.err == "", "nothing is measured twice"
    assert again.out.splitlines()[:5] == first.out.splitlines()[:5]
