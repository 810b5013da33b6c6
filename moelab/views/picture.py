"""A frame drawn by matplotlib: cache map, latency bars, memory, KL and text, as SVG or PNG.

Colours are Okabe-Ito's and viridis', those of the live view on a light page (static/), and never
the only cue: tiers differ by how full a cell is, causes of waiting by hatch. The picture has its
own light ground and asks for no font that matplotlib does not bring; in the SVG, text stays text.
"""

from __future__ import annotations

import io
import re
import textwrap
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from moelab.runs.tokens import COLUMNS
from moelab.scheduling.budget import bits_in_words
from moelab.spelling import brief

WIDTH, LEFT, RIGHT, DPI = 960, 60, 20, 100  # pixels of the picture, its margins, and an inch
TIERS = {16: "#482475", 12: "#414487", 8: "#355f8d"}
TIERS |= {5: "#2a788e", 4: "#21918c", 3: "#44bf70", 2: "#9bd93c", 1: "#d2e21b"}
FILL = {16: 1.0, 12: 0.87, 8: 0.74, 5: 0.62, 4: 0.5, 3: 0.36, 2: 0.24, 1: 0.14}
COST, KL, TEXT, SOFT, LINE, CELL = "#d55e00", "#00795a", "#1f2328", "#656d76", "#d0d7de", "#f0f2f5"
PARTS = {
    "compute": ("#56a0d3", "", TEXT),
    "deciding": ("#f0e442", "\\\\\\\\\\", TEXT),
    "on demand": ("#d55e00", "", "w"),
    "prefetch late": ("#e69f00", "/////", "w"),
    "evict": ("#a8518a", "xxxx", "w"),
}
"""What a token's time goes into: colour, hatch and the colour of its lines."""

EMULATED = "#a35200"
CHAR, ROW = 7.25, 18.0  # one character of the text, in pixels
_MONO = "'DejaVu Sans Mono', Menlo, 'Liberation Mono', 'Courier New', monospace"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial", "sans-serif"],
    "svg.hashsalt": "moelab",  # the same frame gives the same bytes
    "font.size": 8.6,
    "legend.fontsize": 8,
    "legend.handleheight": 1,
    "text.color": TEXT,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "hatch.linewidth": 0.5,
}
_LOCK = threading.Lock()  # matplotlib's settings belong to the process


def picture(
    frame: Mapping[str, Any], model: Mapping[str, Any], head: tuple[str, ...], kind: str
) -> bytes:
    """The whole picture.

    Parameters
    ----------
    frame, model
        As `moelab.views.report.Report` has them.
    head
        Title, figures and settings, in words.
    kind
        ``"svg"`` or ``"png"``, which has twice the size in pixels.

    Raises
    ------
    ImportError
        matplotlib is not installed; the message has the command that installs it.
    """
    return saved(lambda: _drawn(frame, model, head), kind)


def saved(draw: Callable[[], Any], kind: str, *, transparent: bool = False) -> bytes:
    """A figure of matplotlib in the looks of all pictures, as ``"svg"`` or ``"png"``."""
    try:
        import matplotlib as mpl
    except ImportError as e:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from e
    file = io.BytesIO()
    with _LOCK, mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks: the SVG has them
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        kinds = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else None
        clear = {"transparent": transparent, "metadata": kinds}
        draw().savefig(file, format=kind, dpi=2 * DPI, **clear)
    if kind == "png":
        return file.getvalue()
    svg = file.getvalue().decode()
    svg = re.sub(r"'DejaVu Sans Mono'(?:, monospace)?", _MONO, svg[svg.index("<svg") :])
    tenths = (r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]))
    return re.sub(*tenths, svg).encode()


def _drawn(frame: Mapping[str, Any], model: Mapping[str, Any], head: tuple[str, ...]) -> Any:
    """The figure: lanes under each other, each with a gap above for its title."""
    from matplotlib.figure import Figure

    columns = np.frombuffer(frame["values"], "<f4").reshape(len(COLUMNS), frame["count"])
    values: dict[str, np.ndarray] = dict(zip(COLUMNS, columns, strict=True))  # [T] each
    pieces = [clean(piece) for piece in (frame["prompt"], *frame["texts"])]
    rows = lay_out(pieces, columns=int((WIDTH - LEFT - RIGHT) / CHAR))
    lines = [line for words in head[1:] for line in textwrap.wrap(words, 135)]
    map_px = model["layers"] * min(22.0, max(5.0, 240 / model["layers"]))
    lanes = {"map": (70 + 17 * len(lines), map_px), "bars": (66, 120)}  # gap above, height
    if frame["count"]:
        lanes["memory"] = 14, 34
        if np.isfinite(values["kl"]).any():
            lanes["kl"] = 18, 34
    lanes["text"] = 42, ROW * len(rows)
    ratios = [pixels for lane in lanes.values() for pixels in lane] + [RIGHT]
    figure = Figure((WIDTH / DPI, sum(ratios) / DPI), dpi=DPI)
    spec = figure.add_gridspec(len(ratios), height_ratios=ratios, top=1, bottom=0, hspace=0)
    spec.update(left=LEFT / WIDTH, right=1 - RIGHT / WIDTH)
    axes = {name: figure.add_subplot(spec[2 * i + 1]) for i, name in enumerate(lanes)}
    for lane in axes.values():
        lane.set(xticks=[], yticks=[], xlim=(0, max(frame["count"], 40)))
        lane.spines[["top", "right", "left"]].set_visible(False)
        lane.tick_params(length=0)
    _head(figure, frame["origins"][-1], head[0], lines)
    _map(axes["map"], frame, model)
    _bars(axes["bars"], values)
    _marks(axes["bars"], frame)
    if "memory" in axes:
        _memory(axes["memory"], values)
    if "kl" in axes:
        at = np.arange(frame["count"]) + 0.43
        axes["kl"].plot(at, values["kl"].clip(1e-4, 1), "_", c=KL, ms=3)
        axes["kl"].set(yscale="log", ylim=(1e-4, 1))
        axes["kl"].set_yticks([1e-4, 1e-2, 1], ["≤10⁻⁴", "KL", "1"])
        axes["kl"].minorticks_off()
    _text(axes["text"], values["total_ms"], rows)
    return figure


def _head(figure: Any, origin: Mapping[str, Any], title: str, lines: list[str]) -> None:
    def say(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / WIDTH, 1 - y / DPI / figure.get_figheight(), words, **style)

    say(RIGHT, 27, title, size=10, weight="bold")
    for i, line in enumerate(lines):
        say(RIGHT, 48 + 17 * i, line, color=SOFT if i else TEXT)
    name, colour, dash = ("measured", KL, "-")
    if origin["emulated"]:
        name, colour, dash = ("emulated", EMULATED, "--")
    edge = {"boxstyle": "round,pad=0.35,rounding_size=0.9", "fc": "none", "ec": colour, "ls": dash}
    style = {"ha": "right", "color": colour, "weight": "bold", "bbox": edge}
    say(WIDTH - RIGHT - 8, 27, f"{name}: {origin['title']}", **style)


def _title(
    axes: Any, words: str, legend: Iterable[tuple[str, str, str, str]] = (), up: int = 6
) -> None:
    """Above the lane: its title, and beside it the legend (words, colour, hatch, its colour)."""
    from matplotlib.patches import Patch

    axes.set_title(words, loc="left", size=8.6, weight="bold", pad=up * 72 / DPI)
    handles = [Patch(fc=c, hatch=h, ec=e, lw=0, label=label) for label, c, h, e in legend]
    tight = {"frameon": False, "borderpad": 0, "borderaxespad": 0, "handlelength": 1, "ncols": 9}
    at = 0.16, 1 + (up - 3) / axes.bbox.height
    axes.legend(handles=handles, bbox_to_anchor=at, loc="lower left", labelcolor=SOFT, **tight)


def _map(axes: Any, frame: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Layers down, experts across: colour and fill are the resident bits."""
    from matplotlib.colors import to_rgb

    layers, experts = model["layers"], model["experts"]
    bits = np.frombuffer(frame["map"]["bits"], "<u1").reshape(layers, experts)  # [L, E]
    blocks = {tier: "▁▂▃▄▅▆▇█"[round(8 * share) - 1] for tier, share in FILL.items()}
    legend = ((f"{bits_in_words(t)} {blocks[t]}", TIERS[t], "", "w") for t in model["tiers"])
    _title(axes, "Cache map", legend)
    tall, wide = 12, 8  # dots of a cell
    full = np.select([bits == tier for tier in FILL], list(FILL.values()), 0.0)
    colours = np.full((256, 3), to_rgb(CELL))
    colours[list(TIERS)] = [to_rgb(colour) for colour in TIERS.values()]
    filled = np.arange(tall, 0, -1)[:, None] <= np.rint(tall * full)[:, None, :]  # [L, dots, E]
    dots = np.where(filled[..., None], colours[bits][:, None], to_rgb(CELL))
    dots = np.repeat(dots[:, :, :, None], wide, axis=3)  # [L, dots, E, dots, 3]
    dots[:, -1], dots[:, :, :, -1] = 1.0, 1.0
    dots = dots.reshape(tall * layers, wide * experts, 3)
    axes.imshow(dots, extent=(0, experts, layers, 0), aspect="auto", interpolation="none")
    axes.set_xlim(0, experts)
    axes.spines["bottom"].set_visible(False)
    if encoder := model.get("encoder_layers"):  # the decoder's are below the line
        axes.axhline(encoder, color=SOFT, linewidth=1)
    shown = range(0, layers, -(-13 * layers // int(axes.bbox.height)))
    axes.set_yticks(np.array(shown) + 0.5, map(str, shown))


def _steps(axes: Any, tops: Any, edges: Any, base: Any, **look: Any) -> None:
    """As ``axes.stairs``, which takes a second to find the limits of long ones."""
    from matplotlib.patches import StepPatch

    axes.add_artist(StepPatch(tops, edges, baseline=base, **look))


def _bars(axes: Any, values: Mapping[str, np.ndarray]) -> None:
    """One bar a token, stacked by cause."""
    from matplotlib.ticker import MaxNLocator

    total, count = values["total_ms"], len(values["total_ms"])
    _title(axes, "Latency per token", ((part, *look) for part, look in PARTS.items()), up=44)
    if not count:
        axes.text(0, 0.5, "no token yet", color=SOFT)
        return
    gaps = count <= 300  # between tokens, where there is room
    edges = np.append(np.add.outer(np.arange(count), (0, 0.86)[: 1 + gaps]).ravel(), count)
    axes.grid(visible=True)
    top = 1.15 * max(0.5, float(np.quantile(total, 0.96)))
    axes.set_ylim(0, top)
    shrunk = np.minimum(1, top / np.maximum(total, 1e-6))  # a bar that is cut shows all its parts
    cut = np.flatnonzero(shrunk < 1)
    axes.plot(cut + 0.43, np.full(len(cut), 1.02 * top), "^", c=TEXT, ms=3, clip_on=False)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.text(-0.006, 1.04, "ms", transform=axes.transAxes, ha="right", color=SOFT, size=7)
    below = np.zeros(count)
    for part, (colour, hatch, lines) in PARTS.items():
        spent = values.get(f"{part}_ms", values.get(part))
        if spent is None or not spent.any():
            continue
        spent = spent * shrunk
        tops, bases = (np.repeat(v, 1 + gaps) for v in (below + spent, below))
        if gaps:
            tops[1::2] = np.nan
        _steps(axes, tops, edges, bases, fc=colour, hatch=hatch, ec=lines, lw=0)
        below = below + spent


def _memory(axes: Any, values: Mapping[str, np.ndarray]) -> None:
    held, budget = values["resident_bytes"] / 1e6, values["budget_bytes"] / 1e6
    edges, most = np.arange(len(held) + 1), max(float(budget.max()), float(held.max()), 1e-6)
    _steps(axes, held, edges, 0, fc="#b8c0c8", lw=0)
    _steps(axes, budget, edges, None, fill=False, ec=TEXT, ls="--", lw=0.8)
    axes.set_ylim(0, 1.15 * most)
    axes.set_yticks([0, most], ["0", brief(most)])
    words = "experts in memory, MB; dashed: budget"
    axes.text(1, 1.04, words, transform=axes.transAxes, ha="right", color=SOFT, size=7)


def _marks(axes: Any, frame: Mapping[str, Any]) -> None:
    """Settings changed during the run, labelled as far as there is room."""
    ends, most = [-1e9, -1e9], axes.get_xlim()[1]
    step = axes.bbox.width / most
    for change in frame["changes"]:
        x = change["last"] - frame["first"]
        if x < 0:
            continue
        wide = 6.4 * len(change["label"]) / step
        at = min(x, most - wide)
        row = next((i for i, end in enumerate(ends) if end + 10 / step < at), None)
        axes.axvline(x, color=TEXT, linewidth=0.8, linestyle=(0, (3, 2)))
        if row is not None:
            ends[row] = at + wide
            place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(change["label"], (at, 1), (0, 13 - 9 * row), size=8, **place)


def _text(axes: Any, total_ms: np.ndarray, rows: list[list[tuple[str, int]]]) -> None:
    """Prompt and text on a grid of characters, each token shaded by its cost."""
    from matplotlib.colors import to_rgb

    high = max(0.2, float(np.quantile(total_ms, 0.97))) if len(total_ms) else 1.0
    low = min(high / 4, float(np.quantile(total_ms, 0.1))) if len(total_ms) else 0.25
    shades = np.log(np.maximum(total_ms, 1e-6) / low) / np.log(high / low)
    shades = np.append(0.0, 0.62 * shades.clip(0, 1))  # of the prompt, then of each token
    _title(axes, "Text, shaded by cost")
    axes.set_axis_off()
    columns = axes.bbox.width / CHAR
    grid = np.zeros((len(rows), int(columns), 4))
    grid[..., :3] = to_rgb(COST)
    mono = {"family": "DejaVu Sans Mono", "size": 72 * CHAR / 0.602 / DPI}
    for y, row in enumerate(rows):
        pieces = np.array([piece for _, piece in row], int)[: int(columns)]
        grid[y, : len(pieces), 3] = shades[pieces]
        for colour, of_prompt in ((SOFT, True), (TEXT, False)):
            mine = (letter if (piece == 0) == of_prompt else " " for letter, piece in row)
            words = "".join(mine).rstrip().replace(" ", "\u00a0")  # SVG would drop spaces
            axes.text(0, y + 0.72, words, color=colour, **mono)
    extent = (0, int(columns), len(rows), 0)
    axes.imshow(grid, extent=extent, aspect="auto", interpolation="none")
    axes.set_xlim(0, columns)


def clean(text: str) -> str:
    """Text without the characters that XML does not have; line ends and tabs stay."""
    text = text.replace("\r\n", "\n")
    return "".join(c if c.isprintable() or c in " \n\t" else "\ufffd" for c in text)


def lay_out(pieces: Iterable[str], *, columns: int) -> list[list[tuple[str, int]]]:
    r"""Rows of (character, index of its piece), broken at ``columns`` and at line ends.

    A wide character (Chinese, say) takes two places: the second one is empty.

    Examples
    --------
    >>> lay_out(["ab", "c\ne"], columns=3)
    [[('a', 0), ('b', 0), ('c', 1)], [('e', 1)]]
    """
    rows: list[list[tuple[str, int]]] = [[]]
    for index, piece in enumerate(pieces):
        for letter in piece.expandtabs(4):
            if letter == "\n" or len(rows[-1]) >= columns:
                rows.append([])
            if letter != "\n":
                rows[-1].append((letter, index))
                rows[-1] += [("", index)] * (unicodedata.east_asian_width(letter) in "WF")
    return rows
