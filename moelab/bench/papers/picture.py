"""The figure for all: quality against speed, a panel for each device, drawn by matplotlib.

Contenders that leave the output as it is have no quality to show, so they lie in a panel below, one
line each, by speed. The SVG keeps text as text and follows the reader's light or dark page.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE, INK, GRID, CHANGES, SAME = "#ffffff", "#1f2328", "#d8dee4", "#d55e00", "#0072b2"
DARK = {PAGE: "#0d1117", INK: "#e6edf3", GRID: "#30363d", CHANGES: "#e69f00", SAME: "#56b4e9"}
SIDES = ((9, "left"), (-9, "right"), (0, "center"))
PLACES = tuple(itertools.product((0, 13, -13, 25, -25, 37, -37, 49, -49), SIDES))
"""Where a name may lie beside its mark, in points; the first place that hides nothing is taken."""


def scatter(points: Sequence[dict[str, Any]], *, title: str, **how: Any) -> str:
    """The figure as SVG text; parameters as for `draw`."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moelab"}):
        draw(points, title=title, **how).savefig(out, format="svg", metadata={"Date": None})
    dark = "".join(
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}\n'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    head, _, rest = out.getvalue().partition("<svg ")
    sizes, _, body = rest.partition(">")
    style = f"<style>@media (prefers-color-scheme: dark) {{\n{dark}}}</style>"
    return f'{head}<svg role="img" aria-label="{escape(title)}" {sizes}>\n{style}{body}'


def draw(
    points: Sequence[dict[str, Any]], *, title: str, unchanged: float, devices: dict[str, str]
) -> Figure:
    """The figure: a column for each device, the panels share the scale of KL.

    Parameters
    ----------
    points
        ``strategy``, ``device``, ``tokens/s`` and ``KL`` of each.
    title
        Above the panels.
    unchanged
        KL below which a point belongs into the lower panel.
    devices
        Device -> title of its panel, from left to right.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ordered = sorted(points, key=lambda p: -p["tokens/s"])
    changing = {
        d: [p for p in ordered if p["device"] == d and p["KL"] >= unchanged] for d in devices
    }
    same = {d: [p for p in ordered if p["device"] == d and p["KL"] < unchanged] for d in devices}
    lanes = max(map(len, same.values()))
    heights = (3.6, 0.3 + 0.19 * lanes)
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with mpl.rc_context({"font.size": 9, "grid.color": GRID, **dict.fromkeys(inks, INK)}):
        size = (5.4 * len(devices), sum(heights) + 1.2)
        figure = Figure(size, layout="constrained", facecolor=PAGE)
        figure.suptitle(title, weight="bold")
        panels = figure.subplots(
            2, len(devices), sharex="col", sharey="row", squeeze=False, height_ratios=heights
        )
        for (device, name), above, below in zip(devices.items(), *panels, strict=True):
            fastest = max((p["tokens/s"] for p in ordered if p["device"] == device), default=1)
            above.set(title=name, yscale="log", ylabel="KL, nats", xlim=(0, 1.25 * fastest))
            below.set(xlabel="tokens per second", yticks=(), ylim=(lanes, -1))
            below.set_ylabel("output\nas it is", rotation="horizontal", ha="right", va="center")
            _marks(above, changing[device], [p["KL"] for p in changing[device]], "D", CHANGES)
            _marks(below, same[device], range(len(same[device])), "o", SAME)
        figure.draw_without_rendering()  # lays the panels out: only now is it known what meets
        for axes in panels.flat:
            _place_names(axes)
    return figure


def _marks(
    axes: Axes, points: Sequence[dict[str, Any]], y: Sequence[float], mark: str, colour: str
) -> None:
    """A mark for each point, with its name beside it."""
    axes.set_facecolor(PAGE)
    axes.grid(visible=True)
    axes.spines[["top", "right"]].set_visible(False)
    x = [p["tokens/s"] for p in points]
    axes.scatter(x, y, c=colour, marker=mark, zorder=3)
    for p, at in zip(points, zip(x, y, strict=True), strict=True):
        axes.annotate(p["strategy"], at, (9, 0), textcoords="offset points", va="center")


def _place_names(axes: Axes) -> None:
    """Move each name to the first place where it hides neither a mark nor another name."""
    from matplotlib.transforms import Bbox

    names: list[Any] = list(axes.texts)
    spots = [axes.transData.transform(name.xy) for name in names]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    for name in names:
        for y, (x, side) in PLACES:
            name.set(position=(x, y), ha=side)
            box = name.get_window_extent()
            if box.x0 > axes.bbox.x0 and box.x1 < axes.bbox.x1 and not box.count_overlaps(taken):
                break
        taken.append(name.get_window_extent())
