"""A picture of a run that outlives the kernel: one SVG with the last frame and its figures.

It needs no script, no style sheet and no network, so a saved notebook still shows it. As HTML it
is an image with the picture inside its address: notebooks that are not trusted drop inline SVG. It
brings its own light ground and reads the same on a dark page.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from moelab.widgets.picture import (
    HATCH,
    KL,
    LINE,
    MARGIN,
    SOFT,
    WIDTH,
    cache_map,
    latency_bars,
    shaded_text,
    words,
)

EMULATED = "#a35200"


@dataclass(frozen=True, repr=False)
class Report:
    """The last frame as a static picture.

    Parameters
    ----------
    frame, controls, options
        As `moelab.widgets.frame` builds them.
    """

    frame: Mapping[str, Any]
    controls: Mapping[str, Any]
    options: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Report of {self.options['name']}: {self.figures()}>"

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, str]:
        return {"text/html": self.html(), "image/svg+xml": self.svg(), "text/plain": repr(self)}

    def html(self) -> str:
        """The picture as an image that says its content to a screen reader."""
        label = escape(f"moelab report. {self.settings()}. {self.figures()}.", quote=True)
        data = base64.b64encode(self.svg().encode()).decode()
        return f'<img alt="{label}" width="{WIDTH}" src="data:image/svg+xml;base64,{data}"/>'

    def svg(self) -> str:
        """The picture alone."""
        parts, y = list(self._head()), 74.0
        for draw in (self._map, self._bars, self._text):
            markup, tall = draw(y)
            parts.append(markup)
            y += tall + 18
        style = "font-family:system-ui,Helvetica,Arial,sans-serif;font-variant-numeric:tabular-nums"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" '
            f'width="100%" style="max-width:{WIDTH}px;{style}" font-size="12">{HATCH}'
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{y - 1:.0f}" rx="8" '
            f'fill="#fff" stroke="{LINE}"/>{"".join(parts)}</svg>'
        )

    def settings(self) -> str:
        """The settings at the end, in words."""
        c = self.controls
        share = c["budget_bytes"] / self.options["all_experts_bytes"]
        low = f", low bits {c['low_bits']}" if c["low_bits"] else ""
        ahead = f", prefetch {c['prefetch']} ahead" if c["prefetch"] else ""
        strategy = c["about"] if c["strategy"].endswith("*") else c["strategy"]
        return (
            f"budget {size(c['budget_bytes'])} = {share:.0%} = {c['budget_experts']} experts, "
            f"{c['bits']} bit{low}, {strategy}{ahead}"
        )

    def figures(self) -> str:
        """The running figures, in words; never over two devices."""
        w, origins = self.frame["whole"], self.frame["origins"]
        since = f" since token {origins[-1]['token']}" if len(origins) > 1 else ""
        return (
            f"{self.frame['first'] + self.frame['count']} tokens, "
            f"{number(w['tokens_per_s'])} tokens/s, hit ratio {number(w['hit_ratio'], '.0%')}, "
            f"{size(w['bytes_per_token'])} read per token, "
            f"stall share {number(w['stall_share'], '.0%')}, mean KL {number(w['kl_mean'])}{since}"
        )

    def _head(self) -> Iterator[str]:
        o, origin = self.options, self.frame["origins"][-1]
        shape = f"{o['layers']} layers x {o['experts']} experts, top {o['top_k']}"
        yield words(MARGIN, 27, f"{o['name']} · {o['architecture']} · {shape}", size=14, weight=650)
        kind, colour, dash = ("measured", KL, "none")
        if origin["emulated"]:
            kind, colour, dash = ("emulated", EMULATED, "4 2")
        label = f"{kind}: {origin['title']}"
        wide = 7.2 * len(label) + 18
        yield (
            f'<rect x="{WIDTH - MARGIN - wide:.1f}" y="13" width="{wide:.1f}" height="19" '
            f'rx="9.5" fill="none" stroke="{colour}" stroke-dasharray="{dash}"/>'
        )
        middle = WIDTH - MARGIN - wide / 2
        yield words(middle, 26.5, label, anchor="middle", fill=colour, weight=600)
        yield words(MARGIN, 48, self.figures())
        yield words(MARGIN, 65, self.settings(), fill=SOFT)

    def _map(self, top: float) -> tuple[str, float]:
        return cache_map(self.frame, self.options, top)

    def _bars(self, top: float) -> tuple[str, float]:
        return latency_bars(self.frame, top)

    def _text(self, top: float) -> tuple[str, float]:
        return shaded_text(self.frame, top)


def size(nbytes: float | None) -> str:
    """Bytes in words: ``5.31 MB``."""
    if nbytes is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def number(value: float | None, form: str = ".3g") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else format(value, form)
