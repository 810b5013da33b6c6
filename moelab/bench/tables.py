"""Tables: what stands in a column and how it is written, and what a record says of the machine.

A column is called ``figure`` or ``what of it: figure`` ("SD card: tokens/s"); `FIGURES` says how
the figure is got from a measured row (see `moelab.bench.cases.row`) and how it is written.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil

import moelab

Row = Mapping[str, Any]
FIGURES: dict[str, tuple[Callable[[Row], float], str]] = {
    "tokens/s": (lambda row: row["tokens_per_s"], "{:.1f}"),
    "s/token": (lambda row: 1 / row["tokens_per_s"], "{:.4f}"),
    "ms/token": (lambda row: 1e3 / row["tokens_per_s"], "{:.2f}"),
    "hit ratio": (lambda row: row["hit_ratio"], "{:.3f}"),
    "MB/token": (lambda row: row["bytes_per_token"] / 1e6, "{:.3f}"),
    "stall share": (lambda row: row["stall_share"], "{:.3f}"),
    "peak MB": (lambda row: row["peak_resident_bytes"] / 1e6, "{:.2f}"),
    "KL": (lambda row: row.get("kl_mean", math.nan), "{:.4f}"),
    "same top-1": (lambda row: row.get("same_top1", math.nan), "{:.1%}"),
    "perplexity": (lambda row: row.get("perplexity_ratio", math.nan) - 1, "{:+.1%}"),
    "Rouge-2": (lambda row: row.get("rouge2", math.nan), "{:.4f}"),
}


def figures(row: Row, *names: str) -> dict[str, float]:
    """These `FIGURES` of a row; NaN where its quality was not scored."""
    return {name: FIGURES[name][0](row) for name in names}


@dataclass(frozen=True)
class Table:
    """A table with its caption, a note to be read under it, and formats that are its own."""

    caption: str
    frame: pd.DataFrame
    formats: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def markdown(self) -> list[str]:
        """Its paragraphs."""
        table = as_markdown(worded(self.frame, self.formats))
        return [f"**{self.caption}**", table, *([self.note] if self.note else [])]


class Versus(NamedTuple):
    """A paper's figure beside ours."""

    what: str
    theirs: str
    their_device: str
    ours: str
    our_device: str = ""

    def beside(self) -> dict[str, str]:
        """As a row of a table."""
        pairs = ((self.theirs, self.their_device), (self.ours, self.our_device))
        theirs, ours = (f"{figure} ({on})" if on else figure for figure, on in pairs)
        return {"": self.what, "theirs, on their device": theirs, "ours, here": ours}


def as_markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown, padded so that it also reads as plain text."""
    rows = [list(frame.columns), *(list(map(str, row)) for row in frame.itertuples(index=False))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(frame.columns))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def worded(frame: pd.DataFrame, formats: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The table for people: numbers by their column's format, nothing where there is none."""
    known = {name: form for name, (_, form) in FIGURES.items()} | dict(formats or {})

    def words(name: str, value: Any) -> str:
        if pd.isna(value):
            return ""
        form = known.get(name, known.get(name.rpartition(": ")[2], "{}"))
        return value if isinstance(value, str) else form.format(value)

    return pd.DataFrame({n: [words(str(n), v) for v in column] for n, column in frame.items()})


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


def as_json(record: Any) -> str:
    """A record as the text of a JSON file."""
    return json.dumps(record, indent=2) + "\n"


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()
