"""Tables as Markdown and as plain values, and what every record says of the machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

import moelab


def as_markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown, padded so that it also reads as plain text."""
    rows = [list(frame.columns), *(list(map(str, row)) for row in frame.itertuples(index=False))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(frame.columns))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def worded(frame: pd.DataFrame, formats: Mapping[str, str]) -> pd.DataFrame:
    """The table for people: numbers by their column's format, nothing where there is none."""
    words = {
        name: [
            "" if pd.isna(value) else formats.get(str(name), "{}").format(value) for value in column
        ]
        for name, column in frame.items()
    }
    return pd.DataFrame(words)


def as_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain values for JSON."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def as_record(frame: pd.DataFrame) -> dict[str, Any]:
    """Everything as plain values for JSON: model, prompt, versions, machine, and the rows."""
    return {
        **{str(k): v for k, v in frame.attrs.items()},
        **circumstances(),
        "rows": as_rows(frame),
    }


def circumstances() -> dict[str, Any]:
    """When and with what: the time, versions, and the machine."""
    names = ("torch", "transformers", "numba", "numpy")
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"moelab": moelab.__version__}
        | {name: metadata.version(name) for name in names},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": psutil.cpu_count(logical=True),
            "memory_bytes": psutil.virtual_memory().total,
            "python": platform.python_version(),
        },
    }


def write_whole(path: Path, text: str) -> Path:
    """Write a file that is always whole: beside its place first, then renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, "utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()
