"""A recording as files for others: one HTML page, a picture, tables.

The page holds the recording and the dashboard's own views; it opens from disk, without kernel or
network, and `moelab.Recording.load` reads it. The tables hold every event and every token.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.runs.schema import replaced
from moelab.views import page
from moelab.views.png import png as drawn
from moelab.views.report import Report

if TYPE_CHECKING:
    from moelab.runs.recording import Recording

LIBRARIES = {"png": ("resvg_py", "resvg-py"), "parquet": ("pyarrow", "pyarrow")}
"""What a kind of file needs: the module, and the name it is installed by."""


def report(
    recording: Recording,
    path: Path,
    *,
    png: bool | None = None,
    csv: bool = True,
    parquet: bool | None = None,
) -> list[Path]:
    """See `moelab.Recording.report`."""
    png, parquet = _wanted("png", png), _wanted("parquet", parquet)
    path = path if path.suffix in (".html", ".htm") else path.with_name(path.name + ".html")
    replaced(path, as_page(recording).encode())
    written = [path]
    if png:
        written.append(path.with_suffix(".png"))
        written[-1].write_bytes(drawn(Report.of(recording).svg()))
    tables = {"events": recording.events, "tokens": recording.per_token}
    for name, table in tables.items() if csv else ():
        written.append(path.with_suffix(f".{name}.csv"))
        table.to_csv(written[-1], index=False)
    for name, table in tables.items() if parquet else ():
        written.append(path.with_suffix(f".{name}.parquet"))
        table.to_parquet(written[-1], index=False)
    return written


def as_page(recording: Recording) -> str:
    """The HTML page alone."""
    tokens, name = len(recording.document["pieces"]), recording.document["model"]["name"]
    title = f"moelab: {tokens} tokens of {Path(name).name}"
    return page.html(recording.packed(), title=title, picture=Report.of(recording).html())


def _wanted(kind: str, asked: bool | None) -> bool:
    """Whether to write such a file; refused where it was asked for and its library is missing."""
    module, name = LIBRARIES[kind]
    there = importlib.util.find_spec(module) is not None
    if asked and not there:
        raise ImportError(f"{kind}=True needs {name}: pip install {name}; or {kind}=False")
    return there if asked is None else asked
