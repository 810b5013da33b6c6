"""A recording for others: a picture that outlives the kernel, one HTML page, tables.

The picture shows the run's own settings and what was resident when it ended, whatever came later.
It needs no script, no style sheet and no network, so a saved notebook still shows it. As HTML it is
an image with the picture inside its address, because notebooks that are not trusted drop inline
SVG; where matplotlib is missing it is a table of the figures. The page holds the packed recording
in a script element that no browser runs, and the dashboard's own views; it opens from disk, without
kernel or network, and `moelab.Recording.load` reads it. Where scripts do not run the picture stays.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import moelab
from moelab.runs.account import ending
from moelab.runs.compare import given, recorded
from moelab.runs.passes import told
from moelab.runs.schema import RECORDING
from moelab.runs.tokens import figures
from moelab.scheduling.writing import write_atomically
from moelab.spelling import number, size
from moelab.views.picture import WIDTH, picture
from moelab.views.scripts import PAGE_STYLES, script, styles

if TYPE_CHECKING:
    from moelab.runs.recording import Recording
    from moelab.runs.run import Run

LONGEST = 1500
"""Tokens that are drawn at most, the newest ones."""

LIBRARIES = {"png": "matplotlib", "parquet": "pyarrow"}
"""What a kind of file needs."""

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""Of the page's contents: nothing can be fetched, whatever is inside."""

TOO_OLD = (
    "This browser cannot draw the recording: it needs Chrome 97, Firefox 113, Safari 16.4 or newer."
)


@dataclass(frozen=True, repr=False)
class Report:
    """A frame as a static picture.

    Parameters
    ----------
    frame
        As `moelab.widgets.frame` builds it.
    model
        Name, architecture, layers, experts, top_k and tiers of the model.
    settings
        What was set, in words.
    """

    frame: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: str

    @classmethod
    def of(cls, recording: Recording) -> Report:
        """The end of a recorded run."""
        d = recording.document
        count, since = len(d["pieces"]), d["origins"][-1]["token"]
        first = max(0, count - LONGEST)
        values = recording.figures
        frame = {
            "prompt": given(d),
            "first": first,
            "count": count - first,
            "texts": d["pieces"][first:],
            "values": values[:, first:].tobytes(),
            "changes": d["marks"],
            "origins": d["origins"],
            "map": {"bits": recording.cache_map()["bits"].tobytes()},
            "whole": figures(values.T[since:], first=since)
            | (told(d.get("passes", ()), since, count) if d.get("draft") else {}),
            "ended": ending(d.get("ended", ""), count, d["max_new_tokens"]),
        }
        changed = "at the end: " if len(d["settings"]) > 1 else ""
        return cls(frame, d["model"], changed + d["settings"][-1]["about"])

    def __repr__(self) -> str:
        return f"<Report of {self.model['name']}: {self.figures()}>"

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, str]:
        drawn = {"text/html": self.html(), "text/plain": repr(self)}
        with contextlib.suppress(ImportError):  # for hosts that show no HTML
            drawn["image/svg+xml"] = self.svg()
            drawn["image/png"] = base64.b64encode(self.png()).decode()
        return drawn

    def html(self) -> str:
        """The picture as an image that says its content to a screen reader; else a table."""
        try:
            data = base64.b64encode(self.svg().encode()).decode()
        except ImportError:
            said = zip(("model", "figures", "settings", "times"), self._head(), strict=False)
            rows = "".join(f"<tr><th>{name}</th><td>{escape(t)}</td></tr>" for name, t in said)
            return f"<table>{rows}</table>"
        label = escape(f"moelab report. {self.settings}. {self.figures()}.", quote=True)
        return f'<img alt="{label}" width="{WIDTH}" src="data:image/svg+xml;base64,{data}"/>'

    def svg(self) -> str:
        """The picture alone; ImportError where matplotlib is missing."""
        return picture(self.frame, self.model, self._head(), "svg").decode()

    def png(self) -> bytes:
        """The picture at twice its size in pixels; ImportError where matplotlib is missing."""
        return picture(self.frame, self.model, self._head(), "png")

    def figures(self) -> str:
        """The running figures, in words; never over two devices."""
        w, origins = self.frame["whole"], self.frame["origins"]
        since = f" since token {origins[-1]['token']}" if len(origins) > 1 else ""
        tokens = f"{self.frame['first'] + self.frame['count']} tokens"
        kept = w.get("acceptance")
        drafts = f", {kept:.0%} of the drafted tokens accepted" if kept is not None else ""
        return (
            f"{self.frame.get('ended') or tokens}, "
            f"{number(w['tokens_per_s'])} tokens/s, hit ratio {number(w['hit_ratio'], '.0%')}, "
            f"{size(w['bytes_per_token'])} read per token, "
            f"stall share {number(w['stall_share'], '.0%')}, mean KL {number(w['kl_mean'])}"
            f"{drafts}{since}"
        )

    def _head(self) -> tuple[str, ...]:
        """Title, figures and settings."""
        m = self.model
        experts = m["experts"] - m.get("free_experts", 0)
        shape = f"{m['layers']} layers x {experts} experts, top {m['top_k']}"
        return f"{m['name']} · {m['architecture']} · {shape}", self.figures(), self.settings


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
        write_atomically(written[-1], Report.of(recording).png())
    for name, table in {"events": recording.events, "tokens": recording.per_token}.items():
        if csv:
            written.append(path.with_suffix(f".{name}.csv"))
            write_atomically(written[-1], table.to_csv(index=False).encode())
        if parquet:
            written.append(path.with_suffix(f".{name}.parquet"))
            write_atomically(written[-1], table.to_parquet(index=False))
    return written


def as_page(recording: Recording) -> str:
    """The HTML page alone."""
    tokens, name = len(recording.document["pieces"]), recording.document["model"]["name"]
    title = f"moelab: {tokens} tokens of {Path(name).name}"
    return html(recording.packed(), title=title, picture=Report.of(recording).html())


def html(packed: bytes, *, title: str, picture: str = "") -> str:
    """The whole page.

    Parameters
    ----------
    packed
        The recording's document, as JSON in gzip.
    title
        Of the page.
    picture
        HTML that is shown until the scripts have run, and where they cannot.

    Examples
    --------
    >>> from moelab.runs.schema import embedded
    >>> embedded(html(b"packed", title="a run"), "run.html")
    b'packed'
    """
    body = f"""<main id="moelab-page">
{picture}
<p id="moelab-note" role="status">{TOO_OLD}</p>
</main>
{RECORDING}{base64.b64encode(packed).decode()}</script>
<script type="module">
{script("page")}
</script>"""
    return framed(body, title=title, policy=POLICY, css=styles(PAGE_STYLES))


def framed(body: str, *, title: str, policy: str, css: str) -> str:
    """A whole page around ``body`` that needs nothing else and may fetch nothing."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="generator" content="moelab {moelab.__version__}">
<title>{escape(title)}</title>
<style>
{css}
</style>
</head>
<body class="moe-page">
{body}
</body>
</html>
"""


def _wanted(kind: str, asked: bool | None) -> bool:
    """Whether to write such a file; refused where it was asked for and its library is missing."""
    name = LIBRARIES[kind]
    there = importlib.util.find_spec(name) is not None
    if asked and not there:
        raise ImportError(f"{kind}=True needs {name}: pip install {name}; or {kind}=False")
    return there if asked is None else asked
