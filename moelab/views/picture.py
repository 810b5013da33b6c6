"""The views of the dashboard as SVG, drawn by hand: cache map, latency bars, shaded text.

Each function takes a frame and the y it begins at, and returns markup and the height it took.
Colours, fill and hatches are those of the live view on a light page (static/look.js).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

import numpy as np

from moelab.runs.tokens import COLUMNS, STALLS
from moelab.widgets.frame import MAP_TYPES

WIDTH, MARGIN, AXIS = 960, 20, 34
TIERS = {16: "#482475", 8: "#355f8d", 4: "#21918c", 3: "#44bf70", 2: "#9bd93c"}
FILL = {16: 1.0, 8: 0.74, 4: 0.5, 3: 0.36, 2: 0.24}
PARTS = dict(
    zip(("compute", *STALLS), ("#56a0d3", "#d55e00", "url(#moe-late)", "#a8518a"), strict=True)
)
COST, KL, TEXT, SOFT, LINE, CELL = "#d55e00", "#00795a", "#1f2328", "#656d76", "#d0d7de", "#f0f2f5"
HATCH = (
    '<defs><pattern id="moe-late" width="4" height="4" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="4" height="4" fill="#fff"/>'
    '<rect width="2.4" height="4" fill="#e69f00"/></pattern></defs>'
)
KL_LOW, KL_HIGH = 1e-4, 1.0


def words(
    x: float, y: float, text: object, *, fill: str = TEXT, size: int = 12, anchor: str = "start",
    weight: int = 400,
) -> str:  # fmt: skip
    """One line of text; ``y`` is its base line."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{clean(str(text))}</text>'
    )


def box(x: float, y: float, wide: float, tall: float, fill: str, opacity: float = 1) -> str:
    """One filled rectangle."""
    see = f'" fill-opacity="{opacity:.2f}' if opacity < 1 else ""
    size = f'width="{wide:.1f}" height="{tall:.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{fill}{see}"/>'


def clean(text: str) -> str:
    """Text as markup: escaped, and without the characters that XML does not have."""
    return escape("".join(c if c.isprintable() or c == " " else "\ufffd" for c in text))


def values_of(frame: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The token columns by name, each [T]."""
    rows = np.frombuffer(frame["values"], "<f4").reshape(len(COLUMNS), frame["count"])  # [C, T]
    return dict(zip(COLUMNS, rows, strict=True))


def cache_map(
    frame: Mapping[str, Any], options: Mapping[str, Any], top: float
) -> tuple[str, float]:
    """Layers down, experts across: colour and fill are the resident bits."""
    shape = layers, experts = options["layers"], options["experts"]
    bits = np.frombuffer(frame["map"]["bits"], MAP_TYPES["bits"]).reshape(shape)  # [L, E]
    left, y0 = MARGIN + AXIS, top + 26
    wide, tall = (WIDTH - left - MARGIN) / experts, min(22.0, max(5.0, 240 / layers))
    gap = 2.0 if tall > 9 else 0.6
    out = [words(MARGIN, top + 16, "Cache map", weight=650), *_tier_legend(options, top + 16)]
    for layer, e in np.ndindex(shape):
        x, y, tier = left + e * wide, y0 + layer * tall, int(bits[layer, e])
        cell = box(x, y, wide - gap, tall - gap, CELL)
        if tier:
            full = (tall - gap) * FILL[tier]
            cell += box(x, y + tall - gap - full, wide - gap, full, TIERS[tier])
        out.append(cell)
    for layer in range(0, layers, math.ceil(13 / tall)):
        y = y0 + (layer + 0.5) * tall + 3
        out.append(words(left - 6, y, layer, anchor="end", fill=SOFT, size=10))
    return "".join(out), 26 + layers * tall


def _tier_legend(options: Mapping[str, Any], y: float) -> Iterator[str]:
    for i, tier in enumerate(options["tiers"]):
        x, full = MARGIN + 150 + 62 * i, 12 * FILL[tier]
        yield box(x, y - 10, 10, 12, CELL) + box(x, y + 2 - full, 10, full, TIERS[tier])
        yield words(x + 15, y, f"{tier} bit", fill=SOFT, size=11)


def latency_bars(frame: Mapping[str, Any], top: float) -> tuple[str, float]:
    """One bar a token, compute and stalls by cause, with the settings changed on the way."""
    out = [words(MARGIN, top + 16, "Latency per token", weight=650)]
    x = MARGIN + 150.0
    for part, colour in PARTS.items():
        out.append(box(x, top + 6, 10, 12, colour))
        out.append(words(x + 15, top + 16, part, fill=SOFT, size=11))
        x += 36 + 6 * len(part)
    if not frame["count"]:
        return "".join([*out, words(MARGIN + 150, top + 44, "no token yet", fill=SOFT)]), 44
    values, left, y0, tall = values_of(frame), MARGIN + AXIS, top + 50, 120.0
    step = (WIDTH - left - MARGIN) / max(frame["count"], 40)
    scale = round_up(1.15 * max(0.5, float(np.quantile(values["total_ms"], 0.96))))
    out.append(words(left - 6, y0 - 10, "ms", anchor="end", fill=SOFT, size=10))
    out += _rules(y0, tall, [(share, f"{scale * share:.3g}") for share in (0, 0.5, 1)])
    below = np.zeros(frame["count"])
    for part, colour in PARTS.items():
        above = below + values["compute_ms" if part == "compute" else part]
        low, high = (y0 + tall * (1 - np.minimum(1, v / scale)) for v in (below, above))
        thick = step * 0.86
        boxes = "".join(
            f"M{left + i * step:.1f} {low[i]:.1f}h{thick:.2f}V{high[i]:.1f}h{-thick:.2f}z"
            for i in np.flatnonzero(low - high > 0.05)
        )
        out.append(f'<path d="{boxes}" fill="{colour}"/>')
        below = above
    out += _marks(frame, y0, tall, step)
    lane = list(_kl_lane(values["kl"], y0 + tall + 14, step))
    return "".join([*out, *lane]), 50 + tall + (60 if lane else 10)


def round_up(x: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8, 10 … at or above x."""
    ten = 10.0 ** math.floor(math.log10(x))
    return ten * next(m for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if m * ten >= x * 0.9999)


def _rules(y0: float, tall: float, labels: Iterable[tuple[float, str]]) -> Iterator[str]:
    left = MARGIN + AXIS
    for share, label in labels:
        y = y0 + tall * (1 - share)
        yield box(left, y, WIDTH - left - MARGIN, 0.8, LINE)
        yield words(left - 6, y + 4, label, anchor="end", fill=SOFT, size=10)


def _marks(frame: Mapping[str, Any], y0: float, tall: float, step: float) -> Iterator[str]:
    """Settings changed during the run, labelled as far as there is room."""
    ends = [-1e9, -1e9]
    for change in frame["changes"]:
        x = MARGIN + AXIS + (change["last"] - frame["first"]) * step
        if x < MARGIN + AXIS:
            continue
        wide = 6.0 * len(change["label"])
        at = min(x, WIDTH - MARGIN - wide)
        row = next((i for i, end in enumerate(ends) if end + 10 < at), None)
        up = y0 if row is None else y0 - 16 + 12 * row
        line = f"M{x:.1f} {up:.1f}V{y0 + tall:.1f}"
        yield f'<path d="{line}" stroke="{TEXT}" stroke-dasharray="3 2"/>'
        if row is not None:
            ends[row] = at + wide
            yield words(at, up - 3, change["label"], size=11)


def _kl_lane(kl: np.ndarray, y0: float, step: float) -> Iterator[str]:
    """KL of each token on a log scale, where it was measured."""
    shown = np.flatnonzero(np.isfinite(kl))
    if not len(shown):
        return
    yield from _rules(y0, 34, ((0, "10⁻⁴"), (0.5, "KL"), (1, "1")))
    share = np.log(np.maximum(kl, 1e-12) / KL_LOW) / math.log(KL_HIGH / KL_LOW)
    y, left = y0 + 34 * (1 - np.clip(share, 0, 1)), MARGIN + AXIS
    spots = "".join(f"M{left + (i + 0.43) * step - 1.5:.1f} {y[i]:.1f}h3" for i in shown)
    yield f'<path d="{spots}" stroke="{KL}" stroke-width="3"/>'


def shaded_text(frame: Mapping[str, Any], top: float) -> tuple[str, float]:
    """Prompt and text on a grid of characters, each token shaded by its cost."""
    char, line = 7.25, 18.0
    total = values_of(frame)["total_ms"]
    high = max(0.2, float(np.quantile(total, 0.97))) if len(total) else 1.0
    low = min(high / 4, float(np.quantile(total, 0.1))) if len(total) else 0.25
    shades = np.log(np.maximum(total, 1e-6) / low) / math.log(high / low)
    out, text, y = [words(MARGIN, top + 16, "Text, shaded by cost", weight=650)], [], top
    pieces = [frame["prompt"], *frame["texts"]]
    for token, piece, column, row in lay_out(pieces, columns=int((WIDTH - 2 * MARGIN) / char)):
        x, y, wide = MARGIN + column * char, top + 42 + row * line, len(piece) * char
        shade = 0.62 * min(1.0, float(shades[token - 1])) if token else 0.0
        if shade > 0.02:
            out.append(box(x, y - 13, wide, line - 1, COST, shade))
        fill = f' fill="{SOFT}"' if not token else ""
        place = f'x="{x:.1f}" y="{y:.1f}" textLength="{wide:.1f}"'
        kept = clean(piece).replace(" ", "\u00a0")  # SVG would drop the spaces at both ends
        text.append(f"<text {place}{fill}>{kept}</text>")
    style = "font-family:ui-monospace,Menlo,Consolas,monospace"
    return f'{"".join(out)}<g style="{style}">{"".join(text)}</g>', y - top + 8


def lay_out(pieces: Iterable[str], *, columns: int) -> Iterator[tuple[int, str, int, int]]:
    r"""Break pieces of text at ``columns`` characters and at line ends.

    Yields
    ------
    tuple
        Index of the piece, text without line ends, column and row it begins at.

    Examples
    --------
    >>> list(lay_out(["ab", "cd\ne"], columns=3))
    [(0, 'ab', 0, 0), (1, 'c', 2, 0), (1, 'd', 0, 1), (1, 'e', 0, 2)]
    """
    column = row = 0
    for index, piece in enumerate(pieces):
        for i, part in enumerate(piece.expandtabs(4).split("\n")):
            if i:
                column, row = 0, row + 1
            rest = part
            while rest:
                if column >= columns:
                    column, row = 0, row + 1
                now, rest = rest[: columns - column], rest[columns - column :]
                yield index, now, column, row
                column += len(now)
