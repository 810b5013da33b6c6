"""The rules of the house: who may import whom, and how little `import moelab` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import moelab

TOP = Path(__file__).parent.parent
PACKAGE = TOP / "moelab"
HEAVY = ("torch", "transformers", "numba", "pandas", "IPython", "ipywidgets", "anywidget", "typer")


def imports(source: str, module: str) -> set[str]:
    """Full names of everything a module's source imports, at any depth, for types or to run."""
    package = module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*home, node.module] if node.module else home)
            base = base if node.level else node.module
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def modules(part: str) -> list[tuple[str, set[str]]]:
    """(path, imports) of each module of a part: a package, or one file."""
    folder = PACKAGE / part
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    out = []
    for file in files:
        dotted = ".".join(file.relative_to(TOP).with_suffix("").parts)
        out.append((str(file.relative_to(TOP)), imports(file.read_text("utf-8"), dotted)))
    return out


def offences(part: str, allowed) -> list[str]:
    return [
        f"{path} imports {name}"
        for path, names in modules(part)
        for name in sorted(names)
        if not allowed(name)
    ]


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import os, moelab.runs.events\nfrom . import cache\nfrom ..engine import loader\n"
        "def f():\n    from moelab.store import pack\n"
    )
    assert imports(source, "moelab.scheduling.trace") >= {
        "os",
        "moelab.runs.events",
        "moelab.scheduling.cache",
        "moelab.engine.loader",
        "moelab.store.pack",
    }


def test_scheduling_is_pure():
    """It decides: no other part of moelab, no tensors, no threads, no clock."""
    banned = ("torch", "threading", "time", "asyncio", "concurrent", "multiprocessing", "datetime")

    def allowed(name: str) -> bool:
        own = not inside(name, "moelab") or inside(name, "moelab.scheduling")
        return own and not inside(name, *banned)

    assert modules("scheduling")
    assert offences("scheduling", allowed) == []


def test_strategies_import_only_scheduling():
    def allowed(name: str) -> bool:
        ours = inside(name, "moelab.scheduling", "moelab.strategies")
        return (ours or not inside(name, "moelab")) and not inside(name, "torch", "threading")

    assert modules("strategies")
    assert offences("strategies", allowed) == []


@pytest.mark.parametrize("part", ["store", "engine"])
def test_store_and_engine_never_import_widgets(part):
    def allowed(name: str) -> bool:
        return not inside(name, "moelab.widgets", "moelab.lab", "ipywidgets", "anywidget")

    assert modules(part)
    assert offences(part, allowed) == []


def test_widgets_never_look_inside_the_engine():
    def allowed(name: str) -> bool:
        return not inside(name, "moelab.engine", "moelab.store", "moelab.scheduling.scheduler")

    assert modules("widgets")
    assert offences("widgets", allowed) == []


@pytest.mark.parametrize("part", ["cli", "bench"])
def test_command_line_and_bench_use_only_public_names(part):
    names = {f"moelab.{name}" for name in moelab.__all__}
    own = tuple(
        f"moelab.{name}"
        for name in (
            *("bench", "calibration", "challenges", "charts"),
            *("cli", "paths", "serving", "strategies"),
        )
    )

    def allowed(name: str) -> bool:
        return name == "moelab" or not inside(name, "moelab") or inside(name, *own, *names)

    assert offences(part, allowed) == []


def test_every_import_of_the_package_is_asked_for_in_pyproject():
    """A wheel installed without the test extra must find all it imports."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    extras = [e for n, e in project["optional-dependencies"].items() if n not in ("dev", "test")]
    asked = {
        r.split(">")[0].split("[")[0].strip().lower().replace("-", "_")
        for r in [*project["dependencies"], *chain(*extras)]
    }
    unknown = {
        f"{path} imports {name}"
        for part in sorted(p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir())
        if part not in ("__pycache__", "notebooks", "demo")
        for path, names in modules(part)
        for name in names
        if (first := name.split(".")[0].lower()) not in sys.stdlib_module_names
        and first not in asked | {"moelab"}
    }
    assert unknown == set()


def test_at_most_twenty_five_public_names_and_each_of_them_exists():
    assert len(moelab.__all__) <= 25
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
