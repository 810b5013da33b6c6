"""Static charts for notebooks, made with plotly: heat map, curve, bars, scatter, and a comparison.

Each function takes plain values or a DataFrame and returns a `plotly.graph_objects.Figure`; nothing
is drawn live. Colours are Okabe-Ito's (cividis for heat maps) and never the only cue: lines differ
by dash and marker, bars by hatch, points by shape. A figure has no background of its own and its
words are a middle grey, so that it reads on a light and on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808890")
"""Okabe-Ito without yellow, which no light page shows, and black, which no dark one does."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = (
    *("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star"),
    *("pentagon", "hexagon", "hourglass", "bowtie", "triangle-left", "triangle-right", "hexagram"),
)
HATCHES = ("", "/", ".", "x", "\\", "-", "|", "+")
HEIGHT, TALLEST = 400, 620
INK, GRID, PAPER = "#757d86", "rgba(128,136,144,0.3)", "rgba(0,0,0,0)"
STROKE = "#ffffff"
FEW = 12
"""As many different whole numbers still get a tick each."""
Mark: TypeAlias = "float | tuple[float, str]"


def heat_map(
    values: Any, *, title: str, unit: str, x: str = "expert", y: str = "layer"
) -> go.Figure:
    """A table of numbers as colours, row 0 on top.

    Parameters
    ----------
    values
        ``[rows][columns]``, by default layer x expert; NaN stays empty.
    title, unit
        Of the figure, and of its colour scale.
    x, y
        What a column and a row are.

    Examples
    --------
    >>> heat_map([[0.1, 0.2], [0.0, 0.4]], title="importance", unit="nats").layout.title.text
    'importance'
    """
    graph = _plotly()
    table = np.asarray(values, dtype=float)  # [rows, columns]
    if table.ndim != 2 or not table.size:
        raise ValueError(f"values has shape {table.shape}: need a table [rows][columns]")
    rows, columns = table.shape
    told = f"{y} %{{y}}, {x} %{{x}}: %{{z:.4g}} {unit}<extra></extra>"
    figure = graph.Figure(
        graph.Heatmap(
            z=table,
            x=list(range(columns)),
            y=list(range(rows)),
            colorscale="Cividis",
            colorbar={"title": {"text": unit}, **_ticks(table)},
            hovertemplate=told,
            xgap=1,
            ygap=1,
        )
    )
    _dress(figure, title, x, y, height=min(TALLEST, max(260, 140 + 30 * rows)))
    figure.update_xaxes(showgrid=False, dtick=max(1, columns // 16))
    figure.update_yaxes(showgrid=False, autorange="reversed", dtick=max(1, rows // 16))
    return figure


def curve(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    color: str | None = None,
    title: str,
    mark: Mark | list[Mark] | None = None,
    log_x: bool = False,
) -> go.Figure:
    """Lines through points, one for each value of ``color``.

    Parameters
    ----------
    frame
        One row a point.
    x, y, color
        Names of columns.
    mark
        Where to draw an upright line: x, or (x, words beside it), or a list of these.
    log_x
        Logarithmic x axis.

    Examples
    --------
    >>> frame = pd.DataFrame({"K": [0, 1, 2], "loss": [0.0, 0.01, 0.03]})
    >>> len(curve(frame, "K", "loss", title="K to loss", mark=(1, "chosen")).data)
    1
    """
    graph = _plotly()
    figure = graph.Figure()
    for i, (name, rows) in enumerate(_groups(frame, (x, y), color)):
        ordered = rows.sort_values(x)
        figure.add_scatter(
            x=ordered[x],
            y=ordered[y],
            name=name,
            mode="lines+markers" if len(ordered) <= 40 else "lines",
            line={"color": _pick(COLOURS, i), "dash": _pick(DASHES, i), "width": 2.5},
            marker={"symbol": _pick(SYMBOLS, i), "size": 8},
            showlegend=color is not None,
        )
    for one in mark if isinstance(mark, list) else [] if mark is None else [mark]:
        at, words = one if isinstance(one, tuple) else (one, f"{one:.4g}")
        figure.add_vline(x=at, line={"color": INK, "dash": "dash", "width": 1.5})
        place = math.log10(at) if log_x else at  # a note, unlike a line, wants the power of ten
        beside = {"y": 1, "yref": "paper", "xanchor": "left", "showarrow": False}
        figure.add_annotation(x=place, text=words, **beside)
    _dress(figure, title, x, y, legend=color)
    figure.update_xaxes(**({"type": "log"} if log_x else _ticks(frame[x])))
    return figure


def bars(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    color: str | None = None,
    title: str,
    text: str | None = None,
) -> go.Figure:
    """Bars side by side, one colour and hatch for each value of ``color``.

    Parameters
    ----------
    frame
        One row a bar.
    x, y, color
        Names of columns.
    text
        Column to write on the bars; default ``y`` to three digits.

    Examples
    --------
    >>> frame = pd.DataFrame({"rung": ["on demand", "+ 4 bit"], "s/token": [0.079, 0.039]})
    >>> bars(frame, "rung", "s/token", title="EdgeMoE's ladder").data[0].text
    ('0.079', '0.039')
    """
    graph = _plotly()
    figure = graph.Figure()
    for i, (name, rows) in enumerate(_groups(frame, (x, y, *([text] if text else [])), color)):
        words = rows[text].astype(str) if text else rows[y].map("{:.3g}".format)
        figure.add_bar(
            x=rows[x],
            y=rows[y],
            name=name,
            text=list(words),
            textposition="outside",
            cliponaxis=False,
            marker={"color": _pick(COLOURS, i), "pattern": _hatched(i)},
            showlegend=color is not None,
        )
    _dress(figure, title, x, y, legend=color)
    figure.update_layout(barmode="group")
    figure.update_xaxes(type="category", showgrid=False)
    return figure


def scatter(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    color: str,
    symbol: str | None = None,
    label: str | None = None,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
) -> go.Figure:
    """Points, coloured by one column and shaped by another.

    Parameters
    ----------
    frame
        One row a point. On a logarithmic axis, points at 0 or below are left out.
    x, y, color
        Names of columns.
    symbol
        Column that chooses the shape; default ``color``.
    label
        Column with the words beside a point.
    log_x, log_y
        Logarithmic axes.

    Examples
    --------
    >>> frame = pd.DataFrame({"speed": [9, 20], "KL": [0.0, 0.01], "who": ["lru", "hobbit"]})
    >>> len(scatter(frame, "speed", "KL", color="who", title="who is where").data)
    2
    """
    graph = _plotly()
    shapes = {} if symbol is None else {s: _pick(SYMBOLS, i) for i, s in _listed(frame, symbol)}
    figure = graph.Figure()
    wanted = [x, y, *(column for column in (symbol, label) if column)]
    for i, (name, rows) in enumerate(_groups(frame, wanted, color)):
        markers = [_pick(SYMBOLS, i)] if symbol is None else [shapes[str(s)] for s in rows[symbol]]
        figure.add_scatter(
            x=rows[x],
            y=rows[y],
            name=name,
            mode="markers+text" if label else "markers",
            text=None if label is None else list(rows[label].astype(str)),
            textposition="top center",
            marker={"color": _pick(COLOURS, i), "symbol": markers, "size": 11},
            showlegend=label != color,
        )
    _dress(figure, title, x, y, height=480, legend=color)
    figure.update_xaxes(type="log" if log_x else "linear")
    figure.update_yaxes(type="log" if log_y else "linear")
    return figure


def compare(rows: Sequence[tuple[str, Any, Any]], *, title: str) -> pd.DataFrame:
    """A paper's figures beside ours: (what, theirs on their device, ours here), a row each.

    Examples
    --------
    >>> compare([("on demand, s/token", 0.789, 0.0612)], title="EdgeMoE").columns.tolist()
    ['theirs, on their device', 'ours, here']
    """
    frame = pd.DataFrame(
        [(_word(theirs), _word(ours)) for _, theirs, ours in rows],
        index=[what for what, _, _ in rows],
        columns=["theirs, on their device", "ours, here"],
    )
    frame.columns.name = title
    return frame


# -- inside -------------------------------------------------------------------------------------


def _plotly() -> Any:
    try:
        import plotly.graph_objects as graph
    except ImportError as error:
        raise ImportError(
            "charts need plotly, which is not installed here; run: pip install 'moelab[lab]'"
        ) from error
    return graph


def _dress(
    figure: go.Figure,
    title: str,
    x: str,
    y: str,
    *,
    height: int = HEIGHT,
    legend: str | None = None,
) -> None:
    figure.update_layout(
        template="none",
        title={"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        height=height,
        margin={"l": 70, "r": 20, "t": 56, "b": 68},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        font={"color": INK, "size": 13, "family": "system-ui, sans-serif"},
        legend={"bgcolor": PAPER, "title": {"text": legend}},
        hoverlabel={"font": {"size": 13}},
    )
    axis: dict[str, Any] = {
        "gridcolor": GRID,
        "linecolor": INK,
        "ticks": "outside",
        "tickcolor": INK,
    }
    figure.update_xaxes(title={"text": x}, automargin=True, zeroline=False, **axis)
    figure.update_yaxes(title={"text": y}, automargin=True, zeroline=False, **axis)


def _ticks(values: Any) -> dict[str, Any]:
    """A tick for each of a few whole numbers, unless they would touch; else plotly's own."""
    found = np.unique(np.asarray(values))
    if found.dtype.kind not in "iuf":
        return {}
    found = found[np.isfinite(found)]
    if not 1 < len(found) <= FEW or (found % 1).any() or np.diff(found).min() < np.ptp(found) / 25:
        return {}
    return {"tickmode": "array", "tickvals": found.tolist()}


def _groups(
    frame: pd.DataFrame, columns: Sequence[str], color: str | None
) -> Iterator[tuple[str, pd.DataFrame]]:
    wanted = [*columns, *([color] if color else [])]
    if missing := [column for column in wanted if column not in frame]:
        raise ValueError(f"no column {missing[0]!r}; there are {', '.join(map(str, frame))}")
    if color is None:
        yield "", frame
        return
    for name, rows in frame.groupby(color, sort=False, observed=True):
        yield str(name), rows


def _listed(frame: pd.DataFrame, column: str) -> Iterator[tuple[int, str]]:
    if column not in frame:
        raise ValueError(f"no column {column!r}; there are {', '.join(map(str, frame))}")
    return enumerate(map(str, frame[column].unique()))


def _hatched(index: int) -> dict[str, Any]:
    """A bar's hatch: white strokes on the bar's own colour."""
    shape = _pick(HATCHES, index)
    return {"shape": shape, "fgcolor": STROKE, "bgcolor": _pick(COLOURS, index), "size": 6}


def _pick(values: Sequence[str], index: int) -> str:
    return values[index % len(values)]


def _word(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, (float, np.floating)) else str(value)
