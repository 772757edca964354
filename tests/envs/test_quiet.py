"""Building a world says nothing that its user can do nothing about."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_cheetah_is_built_in_silence(tmp_path):
    code = "import envs, gymnasium; envs.make('HalfCheetah-v5', 2, seed=0).close(); print('here')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "here\n"
    assert "WARNING" not in result.stderr
    assert not list(tmp_path.iterdir())  # no log file either
    # Negative control: gymnasium alone is not silent.
    plain = [sys.executable, "-c", "import gymnasium; gymnasium.make('HalfCheetah-v5')"]
    assert "WARNING" in subprocess.run(plain, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
