"""What lets the same dashboard run in JupyterLab, Notebook 7, VS Code, Colab and Voila.

None of it can be seen from a kernel, so these hold the patterns: one script inside the widget, no
address of another machine, no Output widget, work in threads, and a picture without any script.
"""

from __future__ import annotations

import re
import sys
import threading
import types
from pathlib import Path

import anywidget
import pytest

import moelab
from moelab.widgets import Dashboard

PACKAGE = Path(moelab.__file__).parent
WIDGETS = PACKAGE / "widgets"
NAMESPACE = "http://www.w3.org/"  # names of XML, never fetched
VIEW = "application/vnd.jupyter.widget-view+json"


def anywidgets() -> list[type]:
    """Every widget of the package, also those that other modules define."""
    import moelab.widgets.dashboard  # noqa: F401

    found, todo = [], [anywidget.AnyWidget]
    while todo:
        todo += todo.pop().__subclasses__()
        found = [*found, *(c for c in todo if c.__module__.startswith("moelab."))]
    return list(dict.fromkeys(found))


def test_the_widgets_are_found():
    assert Dashboard in anywidgets()


@pytest.mark.parametrize("widget", anywidgets(), ids=lambda c: c.__name__)
def test_a_widget_brings_its_script_and_style_as_text(widget):
    """A path or an address would have to be fetched: VS Code and Colab do that from elsewhere."""
    assert isinstance(widget._esm, str)
    assert not re.match(r"\s*(https?:|/|\.)\S*\s*$", widget._esm)
    assert re.search(r"^export default\b", widget._esm, re.MULTILINE)
    assert not re.search(r"^\s*import\b|\bimport\s*\(|@import\b", widget._esm, re.MULTILINE)
    assert "@import" not in widget._css


@pytest.mark.parametrize(
    "file",
    sorted(f for f in WIDGETS.rglob("*") if f.suffix in {".js", ".css", ".py"}),
    ids=lambda f: str(f.relative_to(WIDGETS)),
)
def test_no_address_of_another_machine(file):
    text = file.read_text("utf-8").replace(NAMESPACE, "")
    assert re.findall(r"(?:https?:|wss?:)//\S+|url\(['\"]?//\S+", text) == []
    if file.suffix == ".js":
        asks = r"\b(?:fetch|importScripts|XMLHttpRequest|WebSocket|EventSource)\b\s*\("
        assert re.findall(asks, text) == []


def test_no_output_widget_and_no_figure_widget():
    """Output widgets lose what a thread prints; figure widgets are too slow and need extensions."""
    used = {
        f"{file.relative_to(PACKAGE)}: {match[0]}"
        for file in PACKAGE.rglob("*.py")
        for match in re.finditer(
            r"\b(?:ipywidgets\.|widgets\.)?Output\(|\bFigureWidget\b|\binteract(?:ive)?\(",
            file.read_text("utf-8"),
        )
    }
    assert used == set()


def test_a_run_works_in_a_thread_and_the_cell_is_free_at_once(demo_lab):
    demo_lab.update(device="sd_card", strategy="on_demand")
    before = set(threading.enumerate())
    run = demo_lab.start("Once upon a time", max_new_tokens=500, ignore_eos=True)
    assert run.running
    new = set(threading.enumerate()) - before
    assert new
    assert all(t.daemon for t in new), "a kernel that is shut down must not wait for them"
    run.stop()


def test_a_saved_notebook_shows_a_picture_without_any_script(demo_lab):
    demo_lab.generate("Once", max_new_tokens=3)
    bundle = Dashboard(demo_lab)._repr_mimebundle_()
    bundle = bundle[0] if isinstance(bundle, tuple) else bundle
    assert VIEW in bundle
    assert re.match(r"<img alt=\"[^\"]+\"", bundle["text/html"])
    assert "<script" not in bundle["text/html"]


def test_in_colab_the_custom_widget_manager_is_switched_on(demo_lab, monkeypatch):
    asked = []
    output = types.ModuleType("google.colab.output")
    output.enable_custom_widget_manager = lambda: asked.append(True)
    output._widgets = types.SimpleNamespace(_installed_url="colab-widgets")
    for name, module in (
        ("google.colab", types.ModuleType("google.colab")),
        (output.__name__, output),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    anywidget._util.enable_custom_widget_manager_once.cache_clear()
    bundle = Dashboard(demo_lab)._repr_mimebundle_()
    anywidget._util.enable_custom_widget_manager_once.cache_clear()
    assert asked
    assert bundle[1][VIEW]["colab"]["custom_widget_manager"]["url"] == "colab-widgets"
