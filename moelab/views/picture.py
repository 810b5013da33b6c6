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
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moelab.runs.tokens import CAUSES, COLUMNS

WIDTH, DPI, MARGIN, AXIS = 960, 100, 20, 40  # in pixels, but for the pixels of an inch
TIERS = {16: "#482475", 8: "#355f8d", 4: "#21918c", 3: "#44bf70", 2: "#9bd93c"}
FILL = {16: 1.0, 8: 0.74, 4: 0.5, 3: 0.36, 2: 0.24}
PARTS = {
    "compute": ("#56a0d3", ""),
    "deciding": ("#8a8f98", "----"),
    **dict(zip(CAUSES, (("#d55e00", ""), ("#e69f00", "/////"), ("#a8518a", "xxxx")), strict=True)),
}
"""What a token's time goes into: colour and hatch."""

COST, KL, TEXT, SOFT, LINE, CELL = "#d55e00", "#00795a", "#1f2328", "#656d76", "#d0d7de", "#f0f2f5"
EMULATED = "#a35200"
CHAR, ROW = 7.25, 18.0  # one character of the text, in pixels
_MONO = "'DejaVu Sans Mono', Menlo, 'Liberation Mono', 'Courier New', monospace"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial", "sans-serif"],
    "svg.hashsalt": "moelab",  # the same frame gives the same bytes
    "font.size": 8.6,
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
        _Page(frame, model, head).figure.savefig(file, format=kind, dpi=2 * DPI, metadata=kinds)
    if kind == "png":
        return file.getvalue()
    svg = file.getvalue().decode()
    svg = re.sub(r"'DejaVu Sans Mono'(?:, monospace)?", _MONO, svg[svg.index("<svg") :])
    tenths = (r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]))
    return re.sub(*tenths, svg).encode()


class _Page:
    """The figure while it is drawn: lanes under each other, each as tall as it needs."""

    def __init__(
        self, frame: Mapping[str, Any], model: Mapping[str, Any], head: tuple[str, ...]
    ) -> None:
        from matplotlib.figure import Figure

        self.frame, self.model = frame, model
        columns = np.frombuffer(frame["values"], "<f4").reshape(len(COLUMNS), frame["count"])
        self.values: dict[str, np.ndarray] = dict(zip(COLUMNS, columns, strict=True))  # [T]
        pieces = [clean(piece) for piece in (frame["prompt"], *frame["texts"])]
        self.columns = int((WIDTH - 2 * MARGIN) / CHAR)
        self.rows = lay_out(pieces, columns=self.columns)  # of the text
        self.lines = [line for words in head[1:] for line in textwrap.wrap(words, 135)]
        self.known = np.flatnonzero(np.isfinite(self.values["kl"]))
        self.map_px = model["layers"] * min(22.0, max(5.0, 240 / model["layers"]))
        lanes = 234 + 52 * bool(len(self.known)) if frame["count"] else 52
        lanes += ROW * len(self.rows)
        self.height = 42 + 17 * len(self.lines) + 50 + self.map_px + lanes + 36 + MARGIN
        self.figure = Figure((WIDTH / DPI, self.height / DPI), dpi=DPI)
        self.y = 27.0
        self._head(head[0])
        self._map()
        if frame["count"]:
            self._bars()
        else:
            self._title("Latency per token")
            self._say(MARGIN + 150, "no token yet", color=SOFT)
        self._text()

    # -- pixels from the top left ---------------------------------------------------------------

    def _say(self, x: float, words: str, **style: Any) -> Any:
        place = x / WIDTH, 1 - self.y / self.height
        return self.figure.text(*place, words, **{"va": "baseline", **style})

    def _title(self, words: str, gap: float = 30) -> None:
        self.y += gap
        self._say(MARGIN, words, weight="bold")

    def _lane(self, tall: float, *, gap: float = 8, left: float = MARGIN + AXIS) -> Any:
        """Axes below what is there already."""
        self.y += gap + tall
        wide = WIDTH - left - MARGIN
        box = left / WIDTH, 1 - self.y / self.height, wide / WIDTH, tall / self.height
        axes = self.figure.add_axes(box)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        return axes

    def _legend(self, entries: Iterable[tuple[str, str, str, float]]) -> None:
        """On the title's line: words, colour, hatch and how full the box is."""
        from matplotlib.patches import Rectangle

        x = MARGIN + 150.0
        for words, colour, hatch, full in entries:
            for share, fill, lines in ((1.0, CELL, ""), (full, colour, hatch)):
                low, size = 1 - (self.y + 2) / self.height, (10 / WIDTH, 12 * share / self.height)
                look = {"facecolor": fill, "hatch": lines, "edgecolor": "w", "linewidth": 0}
                self.figure.add_artist(Rectangle((x / WIDTH, low), *size, **look))
            self._say(x + 15, words, color=SOFT, size=8)
            x += 40 + 6.4 * len(words)

    # -- the parts ------------------------------------------------------------------------------

    def _head(self, title: str) -> None:
        origin = self.frame["origins"][-1]
        emulated = origin["emulated"]
        self._say(MARGIN, title, size=10, weight="bold")
        colour = EMULATED if emulated else KL
        edge = {"boxstyle": "round,pad=0.35,rounding_size=0.9", "fc": "none", "ec": colour}
        words = f"{'emulated' if emulated else 'measured'}: {origin['title']}"
        style = {"ha": "right", "color": colour, "weight": "bold"}
        self._say(WIDTH - MARGIN - 8, words, bbox=edge | {"ls": "--" if emulated else "-"}, **style)
        self.y += 4
        for line in self.lines:
            self.y += 17
            self._say(MARGIN, line, color=TEXT if line == self.lines[0] else SOFT)

    def _map(self) -> None:
        """Layers down, experts across: colour and fill are the resident bits."""
        from matplotlib.colors import to_rgb

        shape = self.model["layers"], self.model["experts"]
        bits = np.frombuffer(self.frame["map"]["bits"], "<u1").reshape(shape)  # [L, E]
        self._title("Cache map")
        self._legend((f"{tier} bit", TIERS[tier], "", FILL[tier]) for tier in self.model["tiers"])
        tall, wide = 12, 8  # dots of a cell
        full = np.select([bits == tier for tier in FILL], list(FILL.values()), 0.0)
        colours = np.full((256, 3), to_rgb(CELL))
        colours[list(TIERS)] = [to_rgb(colour) for colour in TIERS.values()]
        filled = np.arange(tall, 0, -1)[:, None] <= np.rint(tall * full)[:, None, :]  # [L, dots, E]
        dots = np.where(filled[..., None], colours[bits][:, None], to_rgb(CELL))
        dots = np.repeat(dots[:, :, :, None], wide, axis=3)  # [L, dots, E, dots, 3]
        dots[:, -1], dots[:, :, :, -1] = 1.0, 1.0
        dots = dots.reshape(tall * shape[0], wide * shape[1], 3)
        axes = self._lane(self.map_px)
        axes.imshow(dots, extent=(0, shape[1], shape[0], 0), aspect="auto", interpolation="none")
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        layers = range(0, shape[0], -(-13 * shape[0] // int(self.map_px)))
        axes.set_yticks(np.array(layers) + 0.5, map(str, layers))

    def _bars(self) -> None:
        """One bar a token, stacked by cause; under it memory against budget, and KL."""
        values, count = self.values, self.frame["count"]
        parted = 1 + (count <= 300)  # a gap between tokens where there is room for one
        edges = np.append(np.add.outer(np.arange(count), (0, 0.86)[:parted]).ravel(), count)
        self._title("Latency per token")
        self._legend((part, *look, 1.0) for part, look in PARTS.items())
        axes = self._lane(120, gap=38)
        axes.grid(visible=True)
        axes.set(xlim=(0, max(count, 40)), xticks=[])
        axes.set_ylim(0, 1.15 * max(0.5, float(np.quantile(values["total_ms"], 0.96))))
        axes.locator_params(axis="y", nbins=3)
        axes.text(-0.006, 1.04, "ms", transform=axes.transAxes, ha="right", color=SOFT, size=7)
        below = np.zeros(count)
        for part, (colour, hatch) in PARTS.items():
            spent = values.get(f"{part}_ms", values.get(part))
            if spent is None or not spent.any():
                continue
            tops, bases = (np.repeat(v, parted) for v in (below + spent, below))
            tops[parted - 1 :: 2] *= np.nan if parted == 2 else 1
            self._steps(axes, tops, edges, bases, colour, hatch)
            below = below + spent
        self._marks(axes)
        self._memory(axes)
        if len(self.known):
            lane = self._lane(34, gap=18)
            lane.plot(self.known + 0.43, values["kl"][self.known].clip(1e-4, 1), "_", c=KL, ms=3)
            lane.set(xlim=axes.get_xlim(), xticks=[], yscale="log", ylim=(1e-4, 1))
            lane.set_yticks([1e-4, 1e-2, 1], ["10⁻⁴", "KL", "1"])
            lane.minorticks_off()

    @staticmethod
    def _steps(
        axes: Any, tops: Any, edges: Any, base: Any, colour: str, hatch: str = "", **line: Any
    ) -> None:
        """As ``axes.stairs``, which spends a second on looking for the limits of long ones."""
        from matplotlib.patches import StepPatch

        fill = {"fill": not line, "facecolor": colour, "edgecolor": "w", "linewidth": 0}
        axes.add_artist(StepPatch(tops, edges, baseline=base, hatch=hatch, **fill | line))

    def _memory(self, above: Any) -> None:
        held, budget = self.values["resident_bytes"] / 1e6, self.values["budget_bytes"] / 1e6
        lane, edges = self._lane(34, gap=12), np.arange(len(held) + 1)
        self._steps(lane, held, edges, 0, "#b8c0c8")
        self._steps(
            lane, budget, edges, None, "none", edgecolor=TEXT, linestyle="--", linewidth=0.8
        )
        most = max(float(budget.max()), float(held.max()), 1e-6)
        lane.set(xlim=above.get_xlim(), xticks=[], ylim=(0, 1.15 * most))
        lane.set_yticks([0, most], ["0", f"{most:.3g}"])
        words = "experts in memory, MB; dashed: budget"
        lane.text(1, 1.04, words, transform=lane.transAxes, ha="right", color=SOFT, size=7)

    def _marks(self, axes: Any) -> None:
        """Settings changed during the run, labelled as far as there is room."""
        ends, step = [-1e9, -1e9], (WIDTH - 2 * MARGIN - AXIS) / axes.get_xlim()[1]
        for change in self.frame["changes"]:
            x = change["last"] - self.frame["first"]
            if x < 0:
                continue
            wide = 6.4 * len(change["label"]) / step
            at = min(x, axes.get_xlim()[1] - wide)
            row = next((i for i, end in enumerate(ends) if end + 10 / step < at), None)
            axes.axvline(x, color=TEXT, linewidth=0.8, linestyle=(0, (3, 2)))
            if row is not None:
                ends[row] = at + wide
                place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset pixels"}
                up = (0, 22 - 12 * row)
                axes.annotate(change["label"], (at, 1.0), xytext=up, size=8, **place)

    def _text(self) -> None:
        """Prompt and text on a grid of characters, each token shaded by its cost."""
        from matplotlib.colors import to_rgb

        total = self.values["total_ms"]
        high = max(0.2, float(np.quantile(total, 0.97))) if len(total) else 1.0
        low = min(high / 4, float(np.quantile(total, 0.1))) if len(total) else 0.25
        shades = np.log(np.maximum(total, 1e-6) / low) / np.log(high / low)
        shades = np.append(0.0, 0.62 * shades.clip(0, 1))  # of the prompt, then of each token
        self._title("Text, shaded by cost", 36)
        axes = self._lane(ROW * len(self.rows), left=MARGIN)
        axes.set_axis_off()
        grid = np.zeros((len(self.rows), self.columns, 4))
        grid[..., :3] = to_rgb(COST)
        mono = {"family": "DejaVu Sans Mono", "size": 72 * CHAR / 0.602 / DPI, "va": "baseline"}
        for y, row in enumerate(self.rows):
            pieces = np.array([piece for _, piece in row], int)[: self.columns]
            grid[y, : len(pieces), 3] = shades[pieces]
            for colour, of_prompt in ((SOFT, True), (TEXT, False)):
                mine = (letter if (piece == 0) == of_prompt else " " for letter, piece in row)
                words = "".join(mine).rstrip().replace(" ", "\u00a0")  # SVG would drop spaces
                axes.text(0, y + 0.72, words, color=colour, **mono)
        extent = (0, self.columns, len(self.rows), 0)
        axes.imshow(grid, extent=extent, aspect="auto", interpolation="none")
        axes.set_xlim(0, (WIDTH - 2 * MARGIN) / CHAR)


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
