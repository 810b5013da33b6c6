"""The rules of the house: who may import whom, how long files are, what `import moelab` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

import moelab

TOP = Path(__file__).parent.parent
PACKAGE = TOP / "moelab"
HEAVY = (
    *("torch", "transformers", "numba", "pandas", "IPython", "ipywidgets", "anywidget", "typer"),
    *("rouge_score", "nltk"),
)

UPWARDS = (
    ("scheduling",),
    ("strategies", "replays"),
    ("models",),
    ("store",),
    ("settings",),
    ("spelling",),
    ("engine",),
    ("runs",),
    ("views",),
    ("demo",),
    ("catalogue",),
    ("calibration",),
    ("lab",),
    ("opening",),
    ("health", "transforms", "widgets"),
    ("bench",),
    ("course",),
    ("cli",),
    ("training", "__main__"),
)
"""Rooms and single files from the bottom up: each may import those below it and itself."""
RANK = {room: rank for rank, rooms in enumerate(UPWARDS) for room in rooms}


def _imports(tree: ast.AST, *, types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import at any depth; those for types alone only where asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if types or not for_types:
            yield from _imports(node, types=types)


def imports(source: str, module: str, *, types: bool = True) -> set[str]:
    """Full names of everything a module's source imports."""
    found = set()
    for node in _imports(ast.parse(source), types=types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        home = module.split(".")[: -node.level] if node.level else []
        base = ".".join([*home, *([node.module] if node.module else [])])
        found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


@cache
def sources() -> dict[str, Path]:
    """Dotted name -> file of every module."""
    out = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(TOP).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return out


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it needs to run."""
    known, out = sources(), {}
    for name, file in known.items():
        inside = name + ".__init__" if file.name == "__init__.py" else name
        found = imports(file.read_text("utf-8"), inside, types=False) & known.keys()
        out[name] = {other for other in found if other not in (name, "moelab")}
    return out


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import os, moelab.runs.run\nfrom . import cache\nfrom ..engine import loader\n"
        "def f():\n    from moelab.store import pack\n"
        "if TYPE_CHECKING:\n    import pandas\n"
    )
    found = imports(source, "moelab.scheduling.trace")
    assert found >= {
        *("os", "moelab.runs.run", "moelab.scheduling.cache", "moelab.engine.loader"),
        *("moelab.store.pack", "pandas"),
    }
    assert "pandas" not in imports(source, "moelab.scheduling.trace", types=False)


def test_imports_only_go_down():
    assert {room(name) for name in sources()} - {""} == RANK.keys()
    up = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in sorted(others)
        if room(name) and room(other) != room(name) and RANK[room(other)] >= RANK[room(name)]
    ]
    assert up == []


def test_there_is_no_circle_of_files_or_of_rooms():
    rooms: dict[str, set[str]] = {}
    for name, others in graph().items():
        rooms.setdefault(room(name), set()).update({room(o) for o in others} - {room(name), ""})
    for nodes in (graph(), rooms):
        try:
            TopologicalSorter(nodes).prepare()
        except CycleError as error:
            pytest.fail(" > ".join(error.args[1]))


def test_nothing_imports_what_made_the_bundled_models():
    users = {n for n, others in graph().items() if any(room(o) == "training" for o in others)}
    assert {room(name) for name in users} <= {"training"}


def test_scheduling_needs_numpy_and_the_standard_library_only():
    """It decides: no other part of moelab, no tensors, no threads, no clock."""
    clocks = {"threading", "time", "asyncio", "concurrent", "multiprocessing", "datetime"}
    for name, file in sources().items():
        if room(name) == "scheduling":
            for other in imports(file.read_text("utf-8"), name):
                first = other.split(".")[0]
                if first == "moelab":
                    assert other.split(".")[1:2] in ([], ["scheduling"]), f"{name}: {other}"
                else:
                    allowed = (sys.stdlib_module_names - clocks) | {"numpy"}
                    assert first in allowed, f"{name}: {other}"


def test_widgets_never_look_inside_the_engine():
    inside = {"engine", "store"}
    for name, others in graph().items():
        if room(name) == "widgets":
            assert {room(o) for o in others}.isdisjoint(inside), name
            assert "moelab.scheduling.scheduler" not in others, name


def test_no_file_and_no_function_is_long_and_few_files_are_at_the_top():
    long = []
    for name, file in sources().items():
        text = file.read_text("utf-8")
        if text.count("\n") > 400:
            long.append(name)
        functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef))
        long += [f"{name}.{f.name}" for f in functions if f.end_lineno - f.lineno >= 80]
    assert long == []
    assert len([p for p in PACKAGE.iterdir() if p.is_file()]) <= 10


def test_every_import_of_the_package_is_asked_for_in_pyproject():
    """A wheel installed without the test extra must find all it imports."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    extras = [e for n, e in project["optional-dependencies"].items() if n not in ("dev", "test")]
    asked = {
        r.split(">")[0].split("[")[0].strip().lower().replace("-", "_")
        for r in [*project["dependencies"], *chain(*extras)]
    }
    unknown = {
        f"{module} imports {name}"
        for module, file in sources().items()
        if room(module) != "training"
        for name in imports(file.read_text("utf-8"), module)
        if (first := name.split(".")[0].lower()) not in sys.stdlib_module_names
        and first not in asked | {"moelab"}
    }
    assert unknown == set()


def test_at_most_33_public_names_and_each_of_them_exists():
    assert len(moelab.__all__) <= 33
    missing = [name for name in moelab.__all__ if not hasattr(moelab, name)]
    assert missing == []


def test_importing_moelab_imports_nothing_heavy():
    code = (
        f"import sys, moelab; dir(moelab); print([m for m in {HEAVY} + ('numpy',) "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_an_unknown_public_name_says_what_there_is():
    with pytest.raises(AttributeError, match="replay"):
        moelab.no_such_thing  # noqa: B018
