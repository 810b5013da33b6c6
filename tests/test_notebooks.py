"""Every notebook runs from top to bottom in a real kernel, and is committed clean."""

from __future__ import annotations

import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def test_there_are_notebooks():
    assert NOTEBOOKS, f"no notebook in {FOLDER}"


@each_notebook
def test_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@each_notebook
def test_one_question_in_few_and_short_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    assert path.stem[:2].isdigit()
    assert len(cells) <= 25
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    for cell in cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 12, cell.source


@pytest.mark.slow
@each_notebook
def test_runs_from_top_to_bottom(path, demo_store, monkeypatch, record_property):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    begun = time.monotonic()
    NotebookClient(notebook, timeout=180, kernel_name="python3", resources=resources).execute()
    record_property("seconds", round(time.monotonic() - begun, 1))
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    if path.stem == "01_live_lab":
        assert "application/vnd.jupyter.widget-view+json" in shown
        assert any("<img" in o.get("data", {}).get("text/html", "") for o in outputs)
    else:
        assert "application/vnd.plotly.v1+json" in shown, "a question is answered with a plot"
    assert not [o for o in outputs if o.get("name") == "stderr"], "a notebook that warns"
