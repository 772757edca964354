"""The house rules, read from the source: who may import whom, how long things may be, what must be written down.

Each rule is a function from parsed sources to the complaints it has; an empty list is a pass.
"""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

ANY = frozenset({"*"})


@dataclass(frozen=True)
class Room:
    """What one room may import beside the standard library and itself."""

    rooms: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset()


ROOMS = {
    "acktr": Room(libraries=frozenset({"torch"})),
    "acktr.sb3": Room(
        rooms=frozenset({"acktr"}), libraries=frozenset({"torch", "numpy", "gymnasium", "stable_baselines3"})
    ),
    "envs": Room(libraries=frozenset({"numpy", "gymnasium", "ale_py", "mujoco", "stable_baselines3", "OpenGL"})),
    "agents": Room(rooms=frozenset({"acktr", "acktr.sb3", "envs"}), libraries=ANY),
    "scripts": Room(rooms=frozenset({"acktr", "acktr.sb3", "envs", "agents"}), libraries=ANY),
}
ON_DEMAND = {("acktr", "acktr.sb3"), ("acktr", "stable_baselines3")}
"""The agent's name in the engine's package, imported when it is asked for: (module, what it may import so)."""
OWN_FOLDERS = {"acktr", "envs", "agents", "scripts", "tests", "configs", "docs"}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_P95 = 400, 60, 30
DATA_SUFFIXES = {".yaml", ".md"}


@dataclass(frozen=True)
class Module:
    """One parsed source file."""

    name: str
    text: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


@dataclass(frozen=True)
class Import:
    """One imported dotted name; `name` is the part after `import` in a from-import."""

    base: str
    name: str | None
    line: int
    kind: Literal["plain", "typing", "on demand"]


Sources = dict[str, Module]


# ---------------------------------------------------------------------------------------------------- reading


def read_sources(root: Path, folders: Iterable[str]) -> Sources:
    modules = {}
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, path.read_text(encoding="utf-8"), is_package)
    return modules


def typing_only_nodes(tree: ast.AST) -> set[ast.AST]:
    guards = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ]
    return {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def imports_of(module: Module) -> Iterator[Import]:
    tree = module.tree
    typing_only = typing_only_nodes(tree)
    for node in ast.walk(tree):
        kind = "typing" if node in typing_only else "plain"
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, node.lineno, kind) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = from_base(node, module)
            yield from (Import(base, alias.name, node.lineno, kind) for alias in node.names)
        elif isinstance(node, ast.Call) and is_import_call(node):
            yield Import(node.args[0].value, None, node.lineno, "on demand")


def from_base(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    package = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
    return ".".join([*package, *([node.module] if node.module else [])])


def is_import_call(node: ast.Call) -> bool:
    name = ast.unparse(node.func).split(".")[-1]
    return name in {"import_module", "__import__"} and bool(node.args) and isinstance(node.args[0], ast.Constant)


def target_of(imported: Import, modules: Iterable[str]) -> str:
    full = f"{imported.base}.{imported.name}"
    return full if full in modules else imported.base


def room_of(name: str) -> str:
    if name == "acktr.sb3" or name.startswith("acktr.sb3."):
        return "acktr.sb3"
    return name.split(".")[0]


# ---------------------------------------------------------------------------------------------------- rules


def forbidden_imports(modules: Sources) -> list[str]:
    return [
        f"{module.name}:{imported.line} imports {target_of(imported, modules)}"
        for module in modules.values()
        for imported in imports_of(module)
        if not is_allowed(module.name, imported, target_of(imported, modules))
    ]


def is_allowed(importer: str, imported: Import, target: str) -> bool:
    if imported.kind != "plain" and (importer, target) in ON_DEMAND:
        return True
    room, rules = room_of(target), ROOMS[room_of(importer)]
    if room == room_of(importer) or room in sys.stdlib_module_names:
        return True
    if room in OWN_FOLDERS or room in ROOMS:
        return room in rules.rooms
    return rules.libraries == ANY or room in rules.libraries


def import_cycle(modules: Sources) -> list[str]:
    graph = {
        module.name: {
            target
            for imported in imports_of(module)
            if imported.kind != "typing" and (target := target_of(imported, modules)) in modules
            if (module.name, target) not in ON_DEMAND
        }
        for module in modules.values()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def functions_of(modules: Sources) -> Iterator[tuple[str, int]]:
    """Every function's name and its lines of code: no docstring, no comment, no blank line."""
    for module in modules.values():
        lines = module.text.splitlines()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = docstring_lines(node)
                code = [
                    number
                    for number in range(node.lineno, node.end_lineno + 1)
                    if number not in docstring and is_code(lines[number - 1])
                ]
                yield f"{module.name}.{node.name}", len(code)


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> range:
    if ast.get_docstring(node) is None:
        return range(0)
    return range(node.body[0].lineno, node.body[0].end_lineno + 1)


def is_code(line: str) -> bool:
    return bool(line.strip()) and not line.strip().startswith("#")


def overlong_files(modules: Sources) -> list[str]:
    lengths = {module.name: len(module.text.splitlines()) for module in modules.values()}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > LONGEST_FILE]


def overlong_functions(modules: Sources) -> list[str]:
    return [f"{name} has {length} lines" for name, length in functions_of(modules) if length > LONGEST_FUNCTION]


def overlong_tail(modules: Sources) -> list[str]:
    lengths = sorted(length for _, length in functions_of(modules))
    p95 = lengths[math.ceil(0.95 * len(lengths)) - 1] if lengths else 0
    return [f"5% of the functions have {p95} lines or more"] if p95 > LONGEST_P95 else []


def unfinished_code(modules: Sources) -> list[str]:
    return [
        f"{module.name}:{node.lineno} raises NotImplementedError"
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name) and node.id == "NotImplementedError"
    ]


def missing_docstrings(modules: Sources) -> list[str]:
    return [
        f"{name} has no docstring"
        for module in modules.values()
        for name, node in public_definitions(module.tree, module.name)
        if not any(letter.isalpha() for letter in ast.get_docstring(node) or "")
    ]


def public_definitions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """The module or class and its public classes, functions and methods; what overrides inherits its words."""
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and is_public(child):
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child, f"{name}.{child.name}")
            else:
                yield f"{name}.{child.name}", child


def is_public(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    return not node.name.startswith("_") and not decorators & {"overload", "override", "setter"}


def skipped_tests(modules: Sources) -> list[str]:
    words = {
        "skip",
        "skipif",
        "skipIf",
        "skipUnless",
        "skipTest",
        "SkipTest",
        "xfail",
        "importorskip",
        "expectedFailure",
    }
    return [
        f"{module.name}:{node.lineno} uses {word}"
        for module in modules.values()
        for node in ast.walk(module.tree)
        for word in sorted(marked_words(node) & words)
    ]


def marked_words(node: ast.AST) -> set[str]:
    if isinstance(node, ast.ImportFrom) and node.module in {"pytest", "unittest"}:
        return {alias.name for alias in node.names}
    if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in {
        "pytest",
        "mark",
        "unittest",
        "self",
    }:
        return {node.attr}
    return set()


def code_among_data(paths: Iterable[Path]) -> list[str]:
    return [f"{path} is not data" for path in paths if path.suffix not in DATA_SUFFIXES]
