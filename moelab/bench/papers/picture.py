"""The figure for all: quality against speed, a panel for each device, drawn by matplotlib.

Contenders that leave the output as it is have no quality to show, so they lie in a panel below, one
line each, by speed. The SVG keeps text as text and follows the reader's light or dark page.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE, INK, GRID, CHANGES, SAME = "#ffffff", "#1f2328", "#d8dee4", "#d55e00", "#0072b2"
DARK = dict(
    zip(
        (PAGE, INK, GRID, CHANGES, SAME),
        ("#0d1117", "#e6edf3", "#30363d", "#e69f00", "#56b4e9"),
        strict=True,
    )
)
PLACES = tuple(
    (x, y, side)
    for y in (0, 13, -13, 25, -25, 37, -37, 49, -49)
    for x, side in ((9, "left"), (-9, "right"), (0, "center"))
)
"""Where a name may lie beside its mark, in points; the first place that hides nothing is taken."""


def scatter(
    points: Sequence[dict[str, Any]], *, title: str, unchanged: float, devices: dict[str, str]
) -> str:
    """The figure as SVG text; parameters as for `draw`."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moelab"}):
        drawn = draw(points, title=title, unchanged=unchanged, devices=devices)
        drawn.savefig(out, format="svg", metadata={"Date": None})
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

    columns = [[p for p in points if p["device"] == device] for device in devices]
    lanes = max((sum(p["KL"] < unchanged for p in here) for here in columns), default=0)
    heights = (3.6, 0.3 + 0.19 * lanes)
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with mpl.rc_context({"font.size": 9, "grid.color": GRID, **dict.fromkeys(inks, INK)}):
        size = (5.4 * len(devices), sum(heights) + 1.2)
        figure = Figure(size, layout="constrained", facecolor=PAGE)
        axes = figure.subplots(
            2, len(devices), sharex="col", sharey="row", squeeze=False, height_ratios=heights
        )
        figure.suptitle(title, weight="bold")
        for here, name, above, below in zip(columns, devices.values(), *axes, strict=True):
            changing = [(p, p["KL"]) for p in here if p["KL"] >= unchanged]
            same = sorted((p for p in here if p["KL"] < unchanged), key=lambda p: -p["tokens/s"])
            above.set(title=name, yscale="log", ylabel="KL, nats a token")
            below.set(xlabel="tokens per second", yticks=(), ylim=(lanes, -1))
            below.set_ylabel("output\nas it is", rotation="horizontal", ha="right", va="center")
            above.set_xlim(0, 1.25 * max((p["tokens/s"] for p in here), default=1.0))
            _marks(above, changing, "D", CHANGES)
            _marks(below, [(p, lane) for lane, p in enumerate(same)], "o", SAME)
        figure.draw_without_rendering()  # lays the panels out: only now is it known what meets
        for panel in axes.flat:
            _unhide(panel)
    return figure


def _marks(
    axes: Axes, points: Sequence[tuple[dict[str, Any], float]], mark: str, colour: str
) -> None:
    """A mark for each point at its speed and height, with its name beside it."""
    axes.set_facecolor(PAGE)
    axes.grid(visible=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.scatter(
        [p["tokens/s"] for p, _ in points], [y for _, y in points], c=colour, marker=mark, zorder=3
    )
    for p, y in points:
        axes.annotate(
            p["strategy"],
            (p["tokens/s"], y),
            PLACES[0][:2],
            textcoords="offset points",
            va="center",
        )


def _unhide(axes: Axes) -> None:
    """Move each name to the first place where it hides neither a mark nor another name."""
    from matplotlib.transforms import Bbox

    names = axes.texts
    spots = [axes.transData.transform(name.xy) for name in names]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    for name in names:
        for x, y, side in PLACES:
            name.set(position=(x, y), ha=side)
            box = name.get_window_extent()
            if box.x0 > axes.bbox.x0 and box.x1 < axes.bbox.x1 and not box.count_overlaps(taken):
                break
        taken.append(name.get_window_extent())
