"""A picture of a run that outlives the kernel: one SVG with its map, bars, text and figures.

It shows the run's own settings and what was resident when it ended, whatever came later.

It needs no script, no style sheet and no network, so a saved notebook still shows it. As HTML it
is an image with the picture inside its address: notebooks that are not trusted drop inline SVG. It
brings its own light ground and reads the same on a dark page.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from moelab.runs.tokens import figures
from moelab.views.picture import (
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
from moelab.views.png import png
from moelab.widgets.decisions import about, spelled
from moelab.widgets.frame import LONGEST

if TYPE_CHECKING:
    from moelab.runs.recording import Recording

EMULATED = "#a35200"


@dataclass(frozen=True, repr=False)
class Report:
    """A frame as a static picture.

    Parameters
    ----------
    frame
        As `moelab.widgets.frame` builds it.
    model
        Name, architecture, layers, experts, top_k and tiers of the model.
    settings
        What was set, in words.
    """

    frame: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: str

    @classmethod
    def of(cls, recording: Recording) -> Report:
        """The end of a recorded run."""
        d = recording.document
        count, since = len(d["pieces"]), d["origins"][-1]["token"]
        first = max(0, count - LONGEST)
        values = recording.figures
        frame = {
            "prompt": d["prompt"] + "\n" * bool(d["messages"]),
            "first": first,
            "count": count - first,
            "texts": d["pieces"][first:],
            "values": values[:, first:].tobytes(),
            "changes": d["marks"],
            "origins": d["origins"],
            "map": {"bits": recording.cache_map()["bits"].tobytes()},
            "whole": figures(values.T[since:], first=since),
        }
        changed = "at the end: " if len(d["settings"]) > 1 else ""
        return cls(frame, d["model"], changed + d["settings"][-1]["about"])

    def __repr__(self) -> str:
        return f"<Report of {self.model['name']}: {self.figures()}>"

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, str]:
        svg = self.svg()
        drawn = {"text/html": self.html(), "image/svg+xml": svg, "text/plain": repr(self)}
        with contextlib.suppress(ImportError):  # for hosts that show neither of the others
            drawn["image/png"] = base64.b64encode(png(svg)).decode()
        return drawn

    def html(self) -> str:
        """The picture as an image that says its content to a screen reader."""
        label = escape(f"moelab report. {self.settings}. {self.figures()}.", quote=True)
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
        o, origin = self.model, self.frame["origins"][-1]
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
        yield words(MARGIN, 65, self.settings, fill=SOFT)

    def _map(self, top: float) -> tuple[str, float]:
        return cache_map(self.frame, self.model, top)

    def _bars(self, top: float) -> tuple[str, float]:
        return latency_bars(self.frame, top)

    def _text(self, top: float) -> tuple[str, float]:
        return shaded_text(self.frame, top)


def sentence(settings: Any, expert_bytes: Mapping[int, int], all_experts_bytes: int) -> str:
    """Settings in one line: ``budget 5.31 MB = 25% = 24 experts, 16 bit, LRU``."""
    budget, name = settings.budget_bytes, settings.strategy.name
    experts = budget // expert_bytes[settings.bits]
    low = f", low bits {settings.low_bits}" if settings.low_bits else ""
    ahead = f", prefetch {settings.prefetch} ahead" if settings.prefetch else ""
    strategy = about(settings.strategy) if name.endswith("*") else spelled(name)
    return (
        f"budget {size(budget)} = {budget / all_experts_bytes:.0%} = {experts} experts, "
        f"{settings.bits} bit{low}, {strategy}{ahead}"
    )


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
