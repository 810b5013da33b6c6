"""One figure for all: what each strategy's speed costs in quality, at the same memory.

A panel for each device, drawn by matplotlib. Contenders that leave the output as it is have no
quality to show, so they lie in a panel below, one line each, by speed. The SVG keeps text as text
and follows the reader's light or dark page.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import pandas as pd

import moelab
from moelab.bench.cases import Case
from moelab.bench.papers.results import Report, Results, Task, named
from moelab.bench.tables import Table, figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "everyone"
BUDGET = "25%"
DEVICES = ("sd_card", "nvme")
MORE = ("lru + 4 bit", "lru + 2 bit", "lru + look-ahead", "lru + mixed 16/4", "on_demand + 4 bit")
"""Plain answers beside the strategies, to measure the papers' ideas against."""
UNCHANGED = 1e-6
"""Below this KL the output is the full model's, up to rounding."""
PAGE, INK, GRID, CHANGES, SAME = "#ffffff", "#1f2328", "#d8dee4", "#d55e00", "#0072b2"
DARK = {PAGE: "#0d1117", INK: "#e6edf3", GRID: "#30363d", CHANGES: "#e69f00", SAME: "#56b4e9"}
SIDES = ((9, "left"), (-9, "right"), (0, "center"))
PLACES = tuple(itertools.product((0, 13, -13, 25, -25, 37, -37, 49, -49), SIDES))
"""Where a name may lie beside its mark, in points; the first place that hides nothing is taken."""


def contenders(results: Results) -> list[str]:
    """Every strategy, and the plain answers; everything in RAM only at bits that fit."""
    info = results.info
    share = float(BUDGET.rstrip("%")) / 100 * info["all_experts_bytes"]
    experts = info["all_experts_bytes"] / info["expert_bytes"][max(info["tiers"])]
    fitting = [bits for bits, n in info["expert_bytes"].items() if n * experts <= share]
    whole = [f"in_ram + {max(fitting)} bit"] if fitting else []
    names = [name for name in moelab.strategies.NAMES if name != "in_ram"]
    return [*names, *whole, *results.extent.choose((), MORE)]


def _devices(results: Results) -> list[str]:
    return results.extent.choose(DEVICES[1:], DEVICES)


def cases(results: Results) -> list[Case]:
    """Everyone at one budget on two devices."""
    return [Case(who, BUDGET, on) for who in contenders(results) for on in _devices(results)]


def tasks(_results: Results) -> list[Task]:
    """Nothing besides the runs."""
    return []


def picture(results: Results) -> str:
    """The figure as SVG: a point for each contender and device, by tokens/s and KL."""
    points = [
        {"strategy": case.strategy, "device": case.device, **figures(row, "tokens/s", "KL")}
        for case, row in results.rows(cases(results)).items()
        if "kl_mean" in row
    ]
    share, known = BUDGET.replace("%", " %"), moelab.devices()
    title = f"Quality against speed at {share} of the experts' memory"
    return scatter(points, title, {d: f"{known[d].title} (emulated)" for d in DEVICES})


def report(results: Results) -> Report:
    """One table for all, the fastest first."""
    devices, rows = _devices(results), []
    for who in contenders(results):
        each = [Case(who, BUDGET, device) for device in devices]
        names = ("hit ratio", "MB/token", "KL", "same top-1")
        if row := results.on_devices("tokens/s", each, *names):
            rows.append({"strategy": who, **row})
    frame = pd.DataFrame(rows)
    if rows:
        frame = frame.sort_values(f"{named(devices[0])}: tokens/s", ascending=False, kind="stable")
    unchanged = sum(row["KL"] < UNCHANGED for row in rows)
    text = (
        f"Every strategy with {BUDGET} of the memory that all experts take at 16 bit. {unchanged} "
        f"of {len(rows)} leave the output as it is (KL 0); the others buy speed with it, or "
        "memory that needs no loads."
    )
    tables = [Table("Everyone at the same budget", frame)]
    return Report("Everyone: quality against speed", text, tables, [])


# -- the figure -----------------------------------------------------------------------------------


def scatter(points: Sequence[dict[str, Any]], title: str, devices: dict[str, str]) -> str:
    """The figure as SVG text; parameters as for `draw`."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moelab"}):
        draw(points, title, devices).savefig(out, format="svg", metadata={"Date": None})
    dark = "".join(
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}\n'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    head, _, rest = out.getvalue().partition("<svg ")
    sizes, _, body = rest.partition(">")
    style = f"<style>@media (prefers-color-scheme: dark) {{\n{dark}}}</style>"
    return f'{head}<svg role="img" aria-label="{escape(title)}" {sizes}>\n{style}{body}'


def draw(points: Sequence[dict[str, Any]], title: str, devices: dict[str, str]) -> Figure:
    """The figure: a column for each device, the panels share the scale of KL.

    Parameters
    ----------
    points
        ``strategy``, ``device``, ``tokens/s`` and ``KL`` of each.
    title
        Above the panels.
    devices
        Device -> title of its panel, from left to right.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ordered = sorted(points, key=lambda p: -p["tokens/s"])
    of = {d: [p for p in ordered if p["device"] == d] for d in devices}
    changing = {d: [p for p in of[d] if p["KL"] >= UNCHANGED] for d in devices}
    same = {d: [p for p in of[d] if p["KL"] < UNCHANGED] for d in devices}
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
            fastest = max((p["tokens/s"] for p in of[device]), default=1)
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
