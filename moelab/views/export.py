"""A recording as files for others: one HTML page, a picture, tables.

The page holds the recording and the dashboard's own views; it opens from disk, without kernel or
network, and `moelab.Recording.load` reads it. The tables hold every event and every token.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, overload

from moelab.store.paths import write_atomically
from moelab.views import page
from moelab.views.report import Report

if TYPE_CHECKING:
    from moelab.runs.recording import Recording
    from moelab.runs.run import Run

LIBRARIES = {"png": "matplotlib", "parquet": "pyarrow"}
"""What a kind of file needs."""


@overload
def report(run: Run | Recording, path: None = None) -> Report: ...
@overload
def report(
    run: Run | Recording,
    path: str | Path,
    *,
    png: bool | None = None,
    csv: bool = True,
    parquet: bool | None = None,
) -> list[Path]: ...
def report(
    run: Run | Recording,
    path: str | Path | None = None,
    *,
    png: bool | None = None,
    csv: bool = True,
    parquet: bool | None = None,
) -> Report | list[Path]:
    """A run as a picture, or with ``path`` as the files of `moelab.Recording.report`.

    Examples
    --------
    >>> moelab.report(run)  # doctest: +SKIP
    >>> moelab.report(run, "run.html")  # doctest: +SKIP
    """
    from moelab.runs.compare import recorded

    recording = recorded(run)
    if path is None:
        return Report.of(recording)
    png, parquet = _wanted("png", png), _wanted("parquet", parquet)
    path = Path(path)
    path = path if path.suffix in (".html", ".htm") else path.with_name(path.name + ".html")
    write_atomically(path, as_page(recording).encode())
    written = [path]
    if png:
        written.append(path.with_suffix(".png"))
        written[-1].write_bytes(Report.of(recording).png())
    for name, table in {"events": recording.events, "tokens": recording.per_token}.items():
        if csv:
            written.append(path.with_suffix(f".{name}.csv"))
            table.to_csv(written[-1], index=False)
        if parquet:
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
    name = LIBRARIES[kind]
    there = importlib.util.find_spec(name) is not None
    if asked and not there:
        raise ImportError(f"{kind}=True needs {name}: pip install {name}; or {kind}=False")
    return there if asked is None else asked
