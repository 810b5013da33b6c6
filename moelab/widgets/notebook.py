"""What a dashboard knows of the notebook around it: its cell, its kernel's shells, its name.

Jupyter keeps every widget for good, in the kernel and in the page, and with it all it holds. Where
the notebook says which cell is being run (JupyterLab, Notebook 7 and VS Code do), what that cell
showed before can be closed; where it does not, nothing is.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

SWITCH_S = 0.001
"""Python's switch interval beside a dashboard; its default of 5 ms is felt on a slider."""

_cells: dict[str, tuple[str, weakref.WeakSet[Any]]] = {}
"""By cell: the execution that showed them, and what it showed."""


def take_place(shown: Any) -> list[Any]:
    """Note that it is in the cell being run; returns what the cell's former run alone showed."""
    cell, execution = _here()
    if not cell:
        return []
    before, former = _cells.get(cell, ("", weakref.WeakSet()))
    if execution != before:
        _cells[cell] = execution, weakref.WeakSet()
    _cells[cell][1].add(shown)
    still = {one for _, here in _cells.values() for one in here}
    return [old for old in former if old not in still]


def name_of(value: Any) -> str | None:
    """The name by which the notebook has something."""
    mine = (name for name, held in vars(sys.modules["__main__"]).items() if held is value)
    return next((name for name in mine if not name.startswith("_")), None)


def hear_in_subshell(comm: Any) -> None:
    """What the page says is heard while a cell is busy, where page and kernel know subshells.

    ipykernel 7 hands it to the shell that last spoke on the comm. Here that is mostly the thread
    that publishes, which belongs to the main shell; what the page asks for is to hold.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda _said, asked: asked
        # A message passes four threads there, and each may wait this long for a run's own.
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))


def _here() -> tuple[str, str]:
    """Ids of the cell and of its execution; empty where there is none or nobody tells."""
    kernel = sys.modules.get("ipykernel.zmqshell")
    shell = kernel and kernel.ZMQInteractiveShell._instance
    if not shell:
        return "", ""
    asked = shell.get_parent() or {}
    cell = asked.get("metadata", {}).get("cellId")
    return cell or "", asked.get("header", {}).get("msg_id", "")
