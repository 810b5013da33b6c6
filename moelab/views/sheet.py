"""What was found out, on one sheet: a sentence first, then a picture, then tables.

The same sheet is text in a terminal, HTML in a notebook (without style sheet or script, so that a
notebook that is not trusted shows it too) and a page of its own that opens from disk. Its colours
are a middle grey and bars that let the ground through: it reads on a light and on a dark page.
"""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from moelab.scheduling.writing import write_atomically
from moelab.spelling import number
from moelab.views.charts import COLOURS, DASHES, GRID, INK, SYMBOLS
from moelab.views.picture import DPI, saved
from moelab.views.report import framed
from moelab.views.scripts import styles

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
CSS = ".moe-sheet{max-width:1000px;margin:0 auto}.moe-sheet img{max-width:100%}"
CELL = "text-align:left;vertical-align:top;padding:3px 12px 3px 0;border-bottom:1px solid " + GRID
BAR = "background:linear-gradient(90deg,rgba(0,114,178,0.3) {0:.0%},transparent {0:.0%})"
WIDE = 100
_MARKERS = dict(zip(SYMBOLS[:7], "osDPX^v", strict=True))
_LINES: dict[str, str] = dict(zip(DASHES[:4], ("-", "--", ":", "-."), strict=True))


@dataclass(frozen=True)
class Table:
    """Rows under a caption; figures of the column ``bar``, from 0 to 1, are drawn as bars too."""

    caption: str
    rows: pd.DataFrame
    bar: str = ""

    def words(self) -> pd.DataFrame:
        """The rows as they are read."""
        shown = {
            name: [_word(value, share=name == self.bar) for value in self.rows[name]]
            for name in self.rows
        }
        return pd.DataFrame(shown, dtype=object)

    def text(self) -> str:
        """A table, or where its rows are long a paragraph for each."""
        words = self.words()
        if max(map(len, words.to_string(index=False).splitlines())) <= WIDE:
            return words.to_string(index=False)
        rows = ("; ".join(f"{n}: {w}" for n, w in row.items()) for row in words.to_dict("records"))
        return "\n".join(textwrap.fill(row, WIDE, subsequent_indent="    ") for row in rows)

    def html(self) -> str:
        """A table element."""
        words = self.words()
        head = "".join(f'<th scope="col" style="{CELL}">{escape(str(n))}</th>' for n in words)
        rows = ""
        for at, row in enumerate(words.itertuples(index=False)):
            rows += "<tr>"
            for name, word in zip(words, row, strict=True):
                share = self.rows[name].iloc[at] if name == self.bar else None
                bar = BAR.format(share) if share is not None and not pd.isna(share) else ""
                wide = "min-width:20em;" * (len(word) > 60)
                rows += f'<td style="{CELL};{wide}{bar}">{_linked(word)}</td>'
            rows += "</tr>"
        said = f'<caption style="text-align:left;padding:14px 0 4px"><b>{escape(self.caption)}</b>'
        return (
            f'<table style="border-collapse:collapse">{said}</caption><thead><tr>{head}</tr>'
            f"</thead><tbody>{rows}</tbody></table>"
        )


@dataclass(frozen=True)
class Picture:
    """Lines over one axis, and what they say to whoever cannot see them."""

    said: str
    draw: Callable[[], Any] = field(repr=False)

    def address(self) -> str:
        """Of an image, which holds the picture itself; empty where matplotlib is missing."""
        try:
            svg = saved(self.draw, "svg", transparent=True)
        except ImportError:
            return ""
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

    def html(self) -> str:
        """An image, where there is one."""
        address = self.address()
        return f'<p><img alt="{escape(self.said)}" src="{address}"></p>' if address else ""


@dataclass(frozen=True)
class Sheet:
    """A title, the sentence, and what it stands on: pictures, tables and notes in this order."""

    title: str
    sentence: str
    parts: Sequence[Picture | Table | str]

    def text(self) -> str:
        """For a terminal."""
        found = [textwrap.fill(self.sentence, WIDE)]
        for part in self.parts:
            if isinstance(part, Table):
                found.append(f"{part.caption}\n{part.text()}")
            elif isinstance(part, str):
                found.append(textwrap.fill(part, WIDE))
        return "\n\n".join(found)

    def html(self) -> str:
        """For a notebook."""
        inside = "".join(
            f'<p style="color:{INK}">{escape(part)}</p>' if isinstance(part, str) else part.html()
            for part in self.parts
        )
        return (
            f'<div class="moe-sheet"><h2>{escape(self.title)}</h2>'
            f'<p style="font-size:115%">{escape(self.sentence)}</p>{inside}</div>'
        )

    def save(self, path: str | Path) -> Path:
        """Write it as one HTML file that needs no network, kernel or script; returns its path."""
        path = Path(path)
        path = path if path.suffix in (".html", ".htm") else path.with_name(path.name + ".html")
        page = f"<main>{self.html()}</main>"
        css = f"{styles(('page',))}\n{CSS}"
        text = framed(page, title=f"moelab: {self.title}", policy=POLICY, css=css)
        write_atomically(path, text.encode())
        return path


class Shown:
    """What is shown as its `sheet`."""

    def sheet(self) -> Sheet:
        """What was found, to be shown."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write the sheet as one HTML file that needs no network, kernel or script."""
        return self.sheet().save(path)

    def __repr__(self) -> str:
        return self.sheet().text()

    def _repr_html_(self) -> str:
        return self.sheet().html()


def lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    color: str,
    *,
    marks: Sequence[tuple[float, str]] = (),
    log_x: bool = False,
    log_y: bool = False,
) -> Any:
    """A figure of matplotlib: what `moelab.charts.curve` draws, for a page without scripts."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure((9.6, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for at, (name, rows) in enumerate(frame.sort_values(x).groupby(color, sort=False)):
        few = len(rows) <= 40
        style: dict[str, Any] = {
            "c": COLOURS[at % len(COLOURS)],
            "ls": _LINES[str(DASHES[at % 4])] if len(rows) > 1 else "",
        }
        marker = _MARKERS[SYMBOLS[at % 7]] if few else ""
        axes.plot(rows[x], rows[y], marker=marker, ms=5, lw=2, label=str(name), **style)
    for at, (place, words) in enumerate(marks):
        axes.axvline(place, color=INK, ls="--", lw=1)
        beside = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate(words, (place, 1), (4, -10 - 12 * (at % 3)), color=INK, **beside)
    scales = {"xscale": "log" if log_x else "linear", "yscale": "log" if log_y else "linear"}
    axes.set(xlabel=x, ylabel=y, **scales)
    for axis in [axes.xaxis] * log_x + [axes.yaxis] * log_y:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, axis="both", color=INK, alpha=0.25)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(INK)
    axes.tick_params(colors=INK, which="both")
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.legend(labelcolor=INK, frameon=False, loc="best")
    return figure


def _word(value: Any, *, share: bool) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    if share:
        return f"{value:.1%}"
    return number(value) if isinstance(value, float) else str(value)


def _linked(word: str) -> str:
    """An address can be followed."""
    if not word.startswith("https://"):
        return escape(word)
    place = escape(word, quote=True)
    return f'<a href="{place}" style="color:inherit;overflow-wrap:anywhere">{place.removeprefix("https://")}</a>'
