"""Which notebook cell shows which dashboard: when a cell is run again, its old one is closed.

Jupyter keeps every widget for good, in the kernel and in the page, and with it all it holds.
Where the notebook says which cell is being run (JupyterLab, Notebook 7 and VS Code do), what that
cell showed before can be closed; where it does not, nothing is.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakSet

_cells: dict[str, tuple[str, WeakSet[Any]]] = {}
"""By cell: the execution that showed them, and what it showed."""


def take_place(shown: Any) -> list[Any]:
    """Note that ``shown`` is in the cell being run; return what its former run showed.

    What is to be seen in another cell as well is not returned.
    """
    cell, execution = _here()
    if not cell:
        return []
    before, here = _cells.get(cell, ("", WeakSet()))
    former = []
    if execution != before:
        _cells[cell] = execution, WeakSet()
        former = [old for old in here if old is not shown and not _is_shown(old)]
    _cells[cell][1].add(shown)
    return former


def _is_shown(one: Any) -> bool:
    return any(one in here for _, here in _cells.values())


def _here() -> tuple[str, str]:
    """Ids of the cell and of its execution; empty where there is none or nobody tells."""
    kernel = sys.modules.get("ipykernel.zmqshell")
    shell = kernel and kernel.ZMQInteractiveShell._instance
    if not shell:
        return "", ""
    asked = shell.get_parent() or {}
    cell = asked.get("metadata", {}).get("cellId")
    return cell or "", asked.get("header", {}).get("msg_id", "")
