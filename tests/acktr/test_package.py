"""What `import acktr` promises, each seen from a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

import acktr

REMEDY = "pip install 'acktr[sb3]'"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_importing_the_engine_loads_no_reinforcement_learning_library():
    code = (
        "import sys, acktr;"
        "print(sorted({'stable_baselines3', 'gymnasium', 'acktr.sb3', 'tensorboard', 'mujoco'} & set(sys.modules)))"
    )
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("missing", ["stable_baselines3", "gymnasium"])
def test_the_agent_without_its_libraries_is_an_import_error_with_the_remedy(missing):
    result = python(f"import sys; sys.modules[{missing!r}] = None\nfrom acktr import ACKTR")
    last_line = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last_line.startswith("ImportError: ACKTR needs ")
    assert REMEDY in last_line


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'acktr' has no attribute 'ACTKR'"):
        _ = acktr.ACTKR


def test_the_package_is_typed():
    assert (Path(acktr.__file__).parent / "py.typed").is_file()
