"""Challenges: a memory limit, a loss limit and one figure to win by, scored by the real engine.

An entry is settings, never figures: they go as JSON to a fresh process, which opens the bundled
model on a fixed device, runs fixed prompts, and measures memory, loss and speed itself. So nothing
that was patched or edited in a notebook counts, and `verify` measures a whole board again.

>>> moelab.challenge("six megabytes")  # doctest: +ELLIPSIS
six megabytes: ...
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "TASKS": "tasks",
    "Task": "tasks",
    "Entry": "entries",
    "Leaderboard": "board",
    "leaderboard": "board",
    "verify": "board",
    "Challenge": "entering",
    "challenge": "entering",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: the command line's help needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"moelab.course.challenge has no {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
