"""The live view of a lab, and the picture of it that outlives the kernel."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelab.views.report import Report
    from moelab.widgets.dashboard import Dashboard

__all__ = ["Dashboard", "Report"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: a picture needs none of the live view's libraries."""
    if name not in __all__:
        raise AttributeError(f"moelab.widgets has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"moelab.widgets.{name.lower()}"), name)
