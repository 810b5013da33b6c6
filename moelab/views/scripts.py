"""The scripts and style sheets of the views, in the order they are joined into one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

STATIC = Path(__file__).parent / "static"
VIEWS = (
    *("look", "recording", "past", "figures", "why", "tiles", "cells", "bars", "text"),
    *("timeline", "chips", "blame", "lane", "life", "source", "travel", "stage"),
)
"""What draws a frame, live or recorded: shared by the dashboard and an exported page."""

DASHBOARD = (
    *VIEWS,
    *("ask", "budget", "fault", "parameters", "decisions", "settings"),
    *("compare", "whatif", "model", "dashboard"),
)
PAGE = (*VIEWS, "page")
STYLES = ("controls", "decisions", "views", "past", "compare", "dashboard")
PAGE_STYLES = ("controls", "views", "past", "dashboard", "page")


def joined(names: Iterable[str], suffix: str) -> str:
    """The files of these names as one text."""
    return "\n".join((STATIC / f"{name}.{suffix}").read_text(encoding="utf-8") for name in names)
