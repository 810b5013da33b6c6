"""A picture of a run that outlives the kernel: its map, bars, text and figures.

It shows the run's own settings and what was resident when it ended, whatever came later. It needs
no script, no style sheet and no network, so a saved notebook still shows it. As HTML it is an image
with the picture inside its address, because notebooks that are not trusted drop inline SVG; where
matplotlib is missing it is a table of the figures.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from moelab.runs.tokens import figures
from moelab.runs.words import number, size
from moelab.views.picture import WIDTH, picture

if TYPE_CHECKING:
    from moelab.runs.recording import Recording

LONGEST = 1500
"""Tokens that are drawn at most, the newest ones."""


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
        drawn = {"text/html": self.html(), "text/plain": repr(self)}
        with contextlib.suppress(ImportError):  # for hosts that show no HTML
            drawn["image/svg+xml"] = self.svg()
            drawn["image/png"] = base64.b64encode(self.png()).decode()
        return drawn

    def html(self) -> str:
        """The picture as an image that says its content to a screen reader; else a table."""
        try:
            data = base64.b64encode(self.svg().encode()).decode()
        except ImportError:
            said = zip(("model", "figures", "settings", "times"), self._head(), strict=False)
            rows = "".join(f"<tr><th>{name}</th><td>{escape(t)}</td></tr>" for name, t in said)
            return f"<table>{rows}</table>"
        label = escape(f"moelab report. {self.settings}. {self.figures()}.", quote=True)
        return f'<img alt="{label}" width="{WIDTH}" src="data:image/svg+xml;base64,{data}"/>'

    def svg(self) -> str:
        """The picture alone; ImportError where matplotlib is missing."""
        return picture(self.frame, self.model, self._head(), "svg").decode()

    def png(self) -> bytes:
        """The picture at twice its size in pixels; ImportError where matplotlib is missing."""
        return picture(self.frame, self.model, self._head(), "png")

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

    def _head(self) -> tuple[str, ...]:
        """Title, figures and settings."""
        m = self.model
        shape = f"{m['layers']} layers x {m['experts']} experts, top {m['top_k']}"
        return f"{m['name']} · {m['architecture']} · {shape}", self.figures(), self.settings
