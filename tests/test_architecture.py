"""The tree keeps the house rules, and every rule catches a source that breaks it."""

from pathlib import Path

import pytest

from tests.architecture import (
    LONGEST_FILE,
    LONGEST_FUNCTION,
    LONGEST_P95,
    ROOMS,
    Module,
    Sources,
    code_among_data,
    forbidden_imports,
    functions_of,
    import_cycle,
    missing_docstrings,
    overlong_files,
    overlong_functions,
    overlong_tail,
    read_sources,
    room_of,
    skipped_tests,
    unfinished_code,
)

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------------- the tree

RULES = [
    forbidden_imports,
    import_cycle,
    overlong_files,
    overlong_functions,
    overlong_tail,
    unfinished_code,
    missing_docstrings,
]


@pytest.fixture(scope="module")
def sources() -> Sources:
    return read_sources(ROOT, ["acktr", "envs", "agents", "scripts"])


def test_the_rooms_are_found(sources):
    assert {room_of(name) for name in sources} == set(ROOMS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule, sources):
    assert rule(sources) == []


def test_no_test_is_skipped():
    assert skipped_tests(read_sources(ROOT, ["tests"])) == []


def test_configs_hold_data_only():
    assert code_among_data(path for path in (ROOT / "configs").rglob("*") if path.is_file()) == []


# ---------------------------------------------------------------------------------------------------- controls


def tree_of(*texts: tuple[str, str]) -> Sources:
    return {name: Module(name, text) for name, text in texts}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("acktr.blocks", "import numpy"),
        ("acktr.blocks", "from stable_baselines3.common import policies"),
        ("acktr.blocks", "import acktr.sb3.settings"),
        ("acktr.blocks", "from . import sb3"),
        ("acktr.blocks", "def f():\n    from acktr.sb3 import settings"),
        ("acktr.blocks", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy"),
        ("acktr.blocks", "import importlib\nimportlib.import_module('acktr.sb3')"),
        ("acktr", "from acktr.sb3 import settings"),
        ("acktr", "import stable_baselines3"),
        ("acktr.sb3.policy", "import envs.make"),
        ("acktr.sb3.policy", "from ...agents import training"),
        ("envs.atari", "import acktr"),
        ("envs.atari", "import torch"),
        ("agents.training", "from scripts.train import main"),
        ("agents.training", "import tests.helpers"),
        ("scripts.train", "import tests"),
    ],
)
def test_a_forbidden_import_is_caught(name, text):
    modules = tree_of((name, text), ("acktr.sb3", ""), ("acktr.sb3.settings", ""))
    assert len(forbidden_imports(modules)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("acktr.blocks", "from __future__ import annotations\nimport math, torch.linalg\nfrom acktr import damping"),
        ("acktr.blocks", "from .curvature import ekfac"),
        ("acktr", "from importlib import import_module\nimport_module('acktr.sb3')"),
        ("acktr.sb3.policy", "import numpy, gymnasium, torch\nfrom acktr import blocks\nfrom .settings import S"),
        ("agents.training", "import tyro, acktr.sb3, envs"),
        ("scripts.train", "from agents import training\nfrom scripts import options"),
    ],
)
def test_a_lawful_import_passes(name, text):
    assert forbidden_imports(tree_of((name, text), ("acktr.sb3", ""))) == []


@pytest.mark.parametrize("lazily", [False, True])
def test_a_cycle_is_caught(lazily):
    back = "def f():\n    from acktr import a" if lazily else "import acktr.a"
    assert import_cycle(tree_of(("acktr.a", "from acktr.b import x"), ("acktr.b", back)))


def test_a_typing_only_import_closes_no_cycle():
    back = "import typing\nif typing.TYPE_CHECKING:\n    from acktr.a import A"
    assert import_cycle(tree_of(("acktr.a", "from acktr import b"), ("acktr.b", back))) == []


def function_of(lines: int) -> str:
    body = '    """Words.\n\n    More words.\n    """\n    # a comment\n\n' + "    x = 1\n" * (lines - 1)
    return f"def f():\n{body}"


def test_length_counts_code_alone():
    assert list(functions_of(tree_of(("acktr.a", function_of(7))))) == [("acktr.a.f", 7)]


@pytest.mark.parametrize(
    ("rule", "largest", "grown"),
    [
        (overlong_files, "\n" * LONGEST_FILE, "\n" * (LONGEST_FILE + 1)),
        (overlong_functions, function_of(LONGEST_FUNCTION), function_of(LONGEST_FUNCTION + 1)),
        (overlong_tail, function_of(LONGEST_P95), function_of(LONGEST_P95 + 1)),
        (unfinished_code, "raise ValueError", "def f():\n    raise NotImplementedError('later')"),
    ],
)
def test_a_size_or_stub_is_caught_at_its_limit(rule, largest, grown):
    assert rule(tree_of(("acktr.a", largest))) == []
    assert len(rule(tree_of(("acktr.a", grown)))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        '"""."""',
        '"""Words."""\nclass Public: pass',
        '"""Words."""\ndef public(): pass',
        '"""Words."""\nclass Public:\n    """Words."""\n    @property\n    def shown(self): pass',
    ],
)
def test_a_missing_docstring_is_caught(text):
    assert len(missing_docstrings(tree_of(("acktr.a", text)))) == 1


def test_private_and_overriding_names_need_no_docstring():
    methods = "    @override\n    def f(self): pass\n    def _g(self): pass"
    text = f'"""Words."""\nclass _Private: pass\nclass Public:\n    """Words."""\n{methods}'
    assert missing_docstrings(tree_of(("acktr.a", text))) == []


@pytest.mark.parametrize(
    "text",
    [
        "@pytest.mark.skip\ndef test_it(): pass",
        "@pytest.mark.skipif(True, reason='slow')\ndef test_it(): pass",
        "pytestmark = [pytest.mark.xfail]",
        "def test_it():\n    pytest.skip('later')",
        "torch = pytest.importorskip('torch')",
        "from pytest import skip",
        "@mark.xfail(strict=True)\ndef test_it(): pass",
    ],
)
def test_a_skipped_test_is_caught(text):
    assert len(skipped_tests(tree_of(("tests.test_a", text)))) == 1


def test_skipping_in_the_program_itself_is_no_skipped_test():
    assert skipped_tests(tree_of(("tests.test_a", "stats.skip(3)\nresult.skipped_refreshes"))) == []


def test_code_in_configs_is_caught():
    assert len(code_among_data([Path("configs/a.yaml"), Path("configs/make.py")])) == 1


def test_the_agent_is_shown_to_type_checkers_alone():
    text = "import typing\nif typing.TYPE_CHECKING:\n    from acktr.sb3 import ACKTR"
    assert forbidden_imports(tree_of(("acktr", text), ("acktr.sb3", ""))) == []
    assert len(forbidden_imports(tree_of(("acktr.blocks", text), ("acktr.sb3", "")))) == 1
