"""Static charts for notebooks, made with plotly: heat map, curve, bars, scatter, and a comparison.

Each function takes plain values or a DataFrame and returns a `plotly.graph_objects.Figure`; nothing
is drawn live. Colours are Okabe-Ito's (cividis for heat maps) and never the only cue: lines differ
by dash and marker, bars by hatch, points by shape. A figure has no background of its own and its
words are a middle grey, so that it reads on a light and on a dark page.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from moelab.runs.compare import MEMORY, SPEED

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moelab.runs.compare import Comparison

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
    table = np.asarray(values, dtype=float)  # [rows, columns]
    if table.ndim != 2 or not table.size:
        raise ValueError(f"values has shape {table.shape}: need a table [rows][columns]")
    rows, columns = table.shape
    figure = _express().imshow(
        table,
        labels={"x": x, "y": y, "color": unit},
        title=title,
        aspect="auto",
        color_continuous_scale="Cividis",
        height=min(TALLEST, max(260, 140 + 30 * rows)),
        template=_template(),
    )
    told = f"{y} %{{y}}, {x} %{{x}}: %{{z:.4g}} {unit}<extra></extra>"
    figure.update_traces(hovertemplate=told, xgap=1, ygap=1)
    figure.update_layout(coloraxis_colorbar=_ticks(table))
    figure.update_xaxes(showgrid=False, dtick=max(1, columns // 16))
    return figure.update_yaxes(showgrid=False, dtick=max(1, rows // 16))


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
    dashes = {"line_dash": color, "line_dash_sequence": DASHES}
    looks = {"symbol": color, "symbol_sequence": SYMBOLS, **dashes}
    figure = _drawn("line", frame, x, y, color, title=title, log_x=log_x, markers=True, **looks)
    figure.update_traces(line_width=2.5, marker_size=8)
    figure.for_each_trace(lambda t: t.update(mode="lines") if len(t.x) > 40 else None)
    marks = mark if isinstance(mark, list) else [] if mark is None else [mark]
    for row, one in enumerate(marks):  # above the plot, a row each: lines may stand close together
        at, words = one if isinstance(one, tuple) else (one, f"{one:.4g}")
        figure.add_vline(x=at, line={"color": INK, "dash": "dash", "width": 1.5})
        place = math.log10(at) if log_x else at  # a note, unlike a line, wants the power of ten
        beside = {"y": 1, "yref": "paper", "yanchor": "bottom", "yshift": 13 * row}
        beside |= {"xanchor": "left", "showarrow": False}
        figure.add_annotation(x=place, text=words, **beside)
    return figure if log_x else figure.update_xaxes(**_ticks(frame[x]))


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
    >>> list(bars(frame, "rung", "s/token", title="EdgeMoE's ladder").data[0].text)
    ['0.079', '0.039']
    """
    words = {"text": text or frame[y].map("{:.3g}".format)} if y in frame else {}
    hatches = {"pattern_shape": color, "pattern_shape_sequence": HATCHES}
    figure = _drawn("bar", frame, x, y, color, title=title, **words, **hatches)
    style = {"textposition": "outside", "cliponaxis": False}
    figure.update_traces(
        marker_pattern={"fillmode": "replace", "fgcolor": "#fff", "size": 6}, **style
    )
    figure.for_each_trace(lambda t: t.update(marker_pattern_bgcolor=t.marker.color))
    figure.update_layout(barmode="group")  # plotly express says "relative" over any template
    return figure.update_xaxes(type="category", showgrid=False)


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
    looks = {"symbol": symbol or color, "symbol_sequence": SYMBOLS, "text": label}
    logs = {"log_x": log_x, "log_y": log_y}
    figure = _drawn("scatter", frame, x, y, color, title=title, height=480, **looks, **logs)
    return figure.update_traces(
        marker_size=11, textposition="top center", cliponaxis=False, showlegend=label != color
    )


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


def memory_and_speed(comparison: Comparison) -> go.Figure:
    """See `moelab.runs.compare.Comparison.figure`."""
    frame = comparison.points()
    title = "Memory, speed and quality"
    figure = scatter(frame, MEMORY, SPEED, color="timing", label="run", title=title)
    groups = [rows for _, rows in frame.groupby("timing", sort=False)]
    known = np.log10(frame["KL"].dropna().clip(1e-5))
    low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
    high = max(high, low + 1.0)
    steps = np.log10((1, 2, 5) if high - low < 2.5 else (1,))  # a decade has three ticks, many one
    ticks = np.add.outer(np.arange(np.floor(low), high + 1), steps).ravel()
    ticks = ticks[(ticks > low - 0.01) & (ticks < high + 0.01)]
    words = [f"{10.0**t:.0e}" for t in ticks]
    bar = {"title": {"text": "mean KL"}, "tickvals": ticks.tolist(), "ticktext": words}
    scale = {"colorscale": "Cividis", "cmin": low, "cmax": high, "showscale": True, "colorbar": bar}
    traces: list[Any] = list(figure.data)
    for i, (trace, rows) in enumerate(zip(traces, groups, strict=True)):
        there = rows["KL"].notna()
        depth: Any = np.log10(rows["KL"].fillna(10.0**low).clip(1e-5))
        shape = trace.marker.symbol
        trace.marker.symbol = [shape if k else f"{shape}-open" for k in there]
        trace.marker.size = (11 + 15 * (depth - low) / (high - low)).where(there, 11).tolist()
        trace.marker.update(color=depth.tolist(), **scale)
        trace.customdata = [
            f"{kl:.3g}" if k else "not measured" for kl, k in zip(rows["KL"], there, strict=True)
        ]
        trace.hovertemplate = (
            f"%{{text}}<br>{MEMORY} %{{x:.3g}}<br>{SPEED} %{{y:.3g}}<br>KL %{{customdata}}"
            "<extra>%{fullData.name}</extra>"
        )
        best = rows.loc[rows["run"].isin(comparison.front())].sort_values(by=MEMORY)
        line = {"dash": "dot", "color": "#808890", "width": 1.5}
        front = {"name": "not beaten", "hoverinfo": "skip", "showlegend": i == 0}
        figure.add_scatter(x=best[MEMORY], y=best[SPEED], mode="lines", line=line, **front)
    below = {"orientation": "h", "y": -0.2, "title": {"text": ""}, "itemsizing": "constant"}
    return figure.update_layout(legend=below)


# -- inside -------------------------------------------------------------------------------------


@functools.cache
def _template() -> Any:
    """What all figures share."""
    from plotly.graph_objects import layout as made

    axis = {"gridcolor": GRID, "linecolor": INK, "tickcolor": INK, "ticks": "outside"}
    axis |= {"automargin": True, "zeroline": False}
    shared = {
        "title": {"x": 0.01, "xanchor": "left", "font": {"size": 16}},
        "margin": {"l": 70, "r": 20, "t": 56, "b": 68},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "font": {"color": INK, "size": 13, "family": "system-ui, sans-serif"},
        "legend": {"bgcolor": PAPER},
        "hoverlabel": {"font": {"size": 13}},
        "xaxis": axis,
        "yaxis": axis,
    }
    return made.Template(layout=shared)


def _express() -> Any:
    try:
        import plotly.express as px
    except ImportError as error:
        raise ImportError(
            "charts need plotly, which is not installed here; run: pip install 'moelab[lab]'"
        ) from error
    return px


def _drawn(
    kind: str, frame: pd.DataFrame, x: str, y: str, color: str | None, **options: Any
) -> go.Figure:
    """A figure of plotly express in the looks of all; groups in the order of the frame."""
    px, columns = _express(), [x, y, color, *map(options.get, ("text", "symbol"))]
    for column in columns:
        if isinstance(column, str) and column not in frame:
            raise ValueError(f"no column {column!r}; there are {', '.join(map(str, frame))}")
    orders = {}
    if color is not None:
        frame = frame.assign(**{color: frame[color].astype(str)})  # numbers would be a scale
        orders = {color: list(dict.fromkeys(frame[color]))}
    if kind == "line":
        frame = frame.sort_values(x, kind="stable")
    options = {"height": HEIGHT, "color_discrete_sequence": COLOURS, **options}
    draw = getattr(px, kind)
    return draw(
        frame, x=x, y=y, color=color, category_orders=orders, template=_template(), **options
    )


def _ticks(values: Any) -> dict[str, Any]:
    """A tick for each of a few whole numbers, unless they would touch; else plotly's own."""
    found = np.unique(np.asarray(values))
    if found.dtype.kind not in "iuf":
        return {}
    found = found[np.isfinite(found)]
    if not 1 < len(found) <= FEW or (found % 1).any() or np.diff(found).min() < np.ptp(found) / 25:
        return {}
    return {"tickmode": "array", "tickvals": found.tolist()}


def _word(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, (float, np.floating)) else str(value)
