"""The figure for all as an SVG drawn by hand: quality against speed, a panel for each device.

Contenders that leave the output as it is have no quality to show, so they lie below the plot, one
line each, by speed. The file is small text, needs no program to draw it, and follows the reader's
light or dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

PANEL, GAP, LEFT, TOP = 430, 60, 62, 64
PLOT, LANE, LETTER = 250, 17, 7.4
STYLE = """
svg { font: 12px system-ui, sans-serif }
.page { fill: #ffffff } text { fill: #1f2328 } .soft { fill: #59636e }
.grid { stroke: #d8dee4 } .axis { stroke: #1f2328; fill: none }
.changes { fill: #d55e00 } .same { fill: #0072b2 }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117 } text { fill: #e6edf3 } .soft { fill: #9198a1 }
.grid { stroke: #30363d } .axis { stroke: #e6edf3 }
.changes { fill: #e69f00 } .same { fill: #56b4e9 }
}
"""
Box = tuple[float, float, float, float]


def scatter(
    points: Sequence[dict[str, Any]], *, title: str, unchanged: float, devices: dict[str, str]
) -> str:
    """The figure as SVG text.

    Parameters
    ----------
    points
        ``strategy``, ``device``, ``tokens/s`` and ``KL`` of each.
    title
        Above the panels.
    unchanged
        KL below which a point belongs under the plot.
    devices
        Device -> title of its panel, from left to right.
    """
    panels = [[p for p in points if p["device"] == device] for device in devices]
    lanes = max((sum(p["KL"] < unchanged for p in panel) for panel in panels), default=0)
    height = TOP + PLOT + 62 + LANE * (lanes + 1) + 24
    width = LEFT + len(panels) * PANEL + (len(panels) - 1) * GAP + 30
    kls = [p["KL"] for p in points if p["KL"] >= unchanged]
    decades = (_decade(min(kls, default=1e-3)), _decade(max(kls, default=1.0)) + 1)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect class="page" width="{width}" height="{height}" rx="6"/>'
    )
    parts = [
        head,
        _words(LEFT, 26, title, size=15, weight=600),
    ]
    for i, (panel, name) in enumerate(zip(panels, devices.values(), strict=True)):
        parts += _panel(panel, name, LEFT + i * (PANEL + GAP), decades, unchanged)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    points: list[dict[str, Any]], name: str, left: float, decades: tuple[int, int], unchanged: float
) -> list[str]:
    speeds = [p["tokens/s"] for p in points] or [1.0]
    step = _step(max(speeds) * 1.05)
    most = step * math.ceil(max(speeds) * 1.05 / step)
    low, high = decades

    def x(speed: float) -> float:
        return left + PANEL * speed / most

    def y(kl: float) -> float:
        return TOP + PLOT * (high - math.log10(kl)) / (high - low)

    changing = sorted((p for p in points if p["KL"] >= unchanged), key=lambda p: -p["tokens/s"])
    same = sorted((p for p in points if p["KL"] < unchanged), key=lambda p: -p["tokens/s"])
    floor = TOP + PLOT + 30 + LANE * (len(same) + 1)
    parts = [_words(left, TOP - 12, name, weight=600)]
    for power in range(low, high + 1):
        at = TOP + PLOT * (high - power) / (high - low)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}h{PANEL}"/>')
        parts.append(_words(left - 6, at + 4, f"{10.0**power:g}", anchor="end"))
    for i in range(round(most / step) + 1):
        at = x(i * step)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{floor:.1f}"/>')
        parts.append(_words(at, floor + 16, f"{i * step:g}", anchor="middle"))
    parts.append(f'<path class="axis" d="M{left} {TOP}V{floor:.1f}h{PANEL}"/>')
    parts.append(_words(left + PANEL / 2, floor + 34, "tokens per second", anchor="middle"))
    parts.append(
        _words(
            left + 4, TOP + 14, "KL, nats a token (log): best is low and to the right", soft=True
        )
    )
    parts.append(_words(left + 4, TOP + PLOT + 30, "output as it is (KL 0)", soft=True))
    marks = [(x(p["tokens/s"]), y(p["KL"]), p["strategy"]) for p in changing]
    parts += _labelled(marks, left, left + PANEL)
    for lane, p in enumerate(same):
        at = TOP + PLOT + 30 + LANE * (lane + 1)
        parts += _dot(x(p["tokens/s"]), at - 4, p, left + PANEL)
    return parts


def _labelled(marks: list[tuple[float, float, str]], left: float, right: float) -> list[str]:
    """Diamonds, each with its name where it hides nothing: beside, above or below."""
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y, _ in marks]
    parts = []
    for x, y, name in marks:
        wide = LETTER * len(name)
        free = [
            (place, box)
            for dy in (4, -10, 18, -22, 30, -34, 42)
            for place, begin in (
                ("start", x + 10),
                ("end", x - 10 - wide),
                ("middle", x - wide / 2),
            )
            if (box := (begin, y + dy - 11, begin + wide, y + dy + 3))[0] >= left + 4
            and box[2] <= right + 24
            and not any(_meet(box, other) for other in taken)
        ]
        place, box = free[0] if free else ("start", (x + 10, y - 7, x + 10 + wide, y + 7))
        taken.append(box)
        at = {"start": box[0], "middle": x, "end": box[2]}[place]
        points = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y:.1f} {x:.1f},{y + 6:.1f} {x - 6:.1f},{y:.1f}"
        parts.append(f'<polygon class="changes" points="{points}"/>')
        parts.append(_words(at, box[3] - 3, name, anchor=place))
    return parts


def _dot(x: float, y: float, point: dict[str, Any], right: float) -> list[str]:
    name = point["strategy"]
    outside = x + 10 + LETTER * len(name) > right + 24
    words = _words(x - 10 if outside else x + 10, y + 4, name, anchor="end" if outside else "start")
    return [f'<circle class="same" cx="{x:.1f}" cy="{y:.1f}" r="5"/>', words]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _words(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 12,
    weight: int = 400,
    soft: bool = False,
) -> str:
    kind = ' class="soft"' if soft else ""
    heavy = f' font-weight="{weight}"' if weight != 400 else ""
    large = f' font-size="{size}"' if size != 12 else ""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}"{place}{large}{heavy}>{escape(text)}</text>'


def _decade(value: float) -> int:
    return math.floor(math.log10(value))


def _step(most: float) -> float:
    """A round step that divides 0 to ``most`` into four to eight."""
    power = 10.0 ** _decade(most / 4)
    return next(n * power for n in (1, 2, 2.5, 5, 10) if most / (n * power) <= 8)
