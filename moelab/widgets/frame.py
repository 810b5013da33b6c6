"""What the dashboard shows, as one dict: a frame is a whole picture, never a difference.

A late view, a reloaded page and the static report all draw the same frame. Arrays travel as raw
little-endian bytes: the cache map as five [L, E] arrays, the tokens as one [C, T] float32 array
whose rows are `COLUMNS`. Nothing here knows widgets, threads or clocks.

Figures measured on this machine's disk and figures of an emulated device are never averaged
together: every figure covers the tokens since the device last changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moelab.runs.tokens import COLUMNS, STALLS, figures, row, titled
from moelab.widgets import decisions

RECENT_TOKENS = 16
"""The large figures cover this many tokens, so that they follow a slider."""

LONGEST = 1500
"""Tokens a frame carries at most; older ones leave the picture."""

STRIDE = 250
"""So many leave at a time: where the first one changes, the text has to be laid out anew."""

_NUMBERS = itertools.count(1)  # of runs, over all labs: a dashboard may change from one to another

LABEL = 48
"""Characters of a mark on the time axis; a strategy changes many settings at once."""

MAP_TYPES = {"bits": "<u1", "in_flight": "<u1", "loaded": "<i4", "used": "<i4", "uses": "<i4"}


def options(lab: Any, info: Mapping[str, Any], devices: Mapping[str, Any]) -> dict[str, Any]:
    """What the controls offer and what never changes for this model."""
    return {
        "name": info["name"],
        "architecture": info["architecture"].removesuffix("ForCausalLM"),
        "layers": info["layers"],
        "experts": info["experts_per_layer"],
        "top_k": info["top_k"],
        "tiers": list(info["tiers"]),
        "expert_bytes": {str(bits): int(n) for bits, n in info["expert_bytes"].items()},
        "all_experts_bytes": int(info["all_experts_bytes"]),
        "presets": decisions.presets(),
        "decisions": decisions.decisions(),
        "devices": [
            {"name": name, "title": device.title, "emulated": bool(device.emulated)}
            for name, device in devices.items()
        ],
        "prompts": lab.prompts(),
        "chat": bool(info.get("chat")),
        "causes": list(STALLS),
        "columns": list(COLUMNS),
    }


def controls(settings: Any, info: Mapping[str, Any]) -> dict[str, Any]:
    """What is set, and what that means in experts and bytes."""
    return {
        "budget_bytes": int(settings.budget_bytes),
        "bits": settings.bits,
        "low_bits": settings.low_bits,
        **decisions.chosen(settings.strategy),
        "device": settings.device,
        "prefetch": int(settings.prefetch),
        "measure_kl": bool(settings.measure_kl),
        "budget_experts": int(info["budget_experts"]),
        "minimum_budget_bytes": int(info["minimum_budget_bytes"]),
        "token_cycle_bytes": int(info["token_cycle_bytes"]),
    }


class Framer:
    """Builds frames of the lab's newest run, reading each token report once.

    Parameters
    ----------
    lab
        Read through `settings`, `cache_map` and `run` only.
    info
        The lab's `info`, for what never changes: the bytes of an expert at each tier.
    devices
        By name: a title, and whether it is emulated.
    """

    def __init__(self, lab: Any, info: Mapping[str, Any], devices: Mapping[str, Any]) -> None:
        self._lab, self._devices, self._each = lab, devices, info["expert_bytes"]
        self._run: Any = None
        self._number = 0
        self._reports: list[Any] = []
        self._rows = np.empty((64, len(COLUMNS)), np.float32)  # [T and room for more, C]

    def newest(self) -> tuple[int, Any]:
        """The lab's newest run and its number, which no other has; (0, None) where none is yet."""
        run = self._lab.run
        if run is not self._run:
            self._run = run
            self._number = 0 if run is None else next(_NUMBERS)
            self._reports = []
        return self._number, run

    def build(self) -> dict[str, Any]:
        """One frame of what is true now; JSON but for the arrays, which are bytes."""
        _, run = self.newest()
        running = run is not None and bool(run.running)  # asked first: then no token is missed
        self._read(list(run.token_reports) if run is not None else [])
        origins = self._origins()
        first = -(-max(0, len(self._reports) - LONGEST) // STRIDE) * STRIDE
        values = self._rows[first : len(self._reports)]  # [T, C]
        since = max(0, origins[-1]["token"] - first)
        recent = max(since, len(values) - RECENT_TOKENS)
        cells = self._lab.cache_map()
        return {
            "run": self._number,
            "running": running,
            "stopped": run is not None and bool(run.stopped),
            "error": "" if run is None or run.error is None else in_words(run.error),
            "prompt": "" if run is None else run.prompt + "\n" * bool(run.request.messages),
            "first": first,
            "count": len(values),
            "texts": [report.text for report in self._reports[first:]],
            "values": np.ascontiguousarray(values.T, "<f4").tobytes(),  # [C, T]
            "changes": merge_changes(run.changes if run is not None else []),
            "origins": origins,
            "map": {k: np.ascontiguousarray(cells[k], t).tobytes() for k, t in MAP_TYPES.items()},
            "resident": self._resident(cells["bits"]),
            "recent": figures(values[recent:], first=first + recent),
            "whole": figures(values[since:], first=first + since),
        }

    def _read(self, reports: list[Any]) -> None:
        """Take new reports, and those the run has put right since."""
        if len(reports) > len(self._rows):
            more = np.empty((len(reports), len(COLUMNS)), np.float32)
            self._rows = np.concatenate((self._rows, more))
        for i, report in enumerate(reports):
            if i == len(self._reports):
                self._reports.append(report)
            elif self._reports[i] is report:
                continue
            self._reports[i], self._rows[i] = report, row(report)

    def _resident(self, bits: np.ndarray) -> dict[str, int]:
        tiers, counts = np.unique(bits[bits > 0], return_counts=True)
        total = sum(self._each[int(b)] * int(n) for b, n in zip(tiers, counts, strict=True))
        budget = int(self._lab.settings.budget_bytes)
        return {"experts": int(counts.sum()), "bytes": total, "budget_bytes": budget}

    def _origins(self) -> list[dict[str, Any]]:
        """From which token on the times come from which device."""
        origins: list[dict[str, Any]] = []
        for token, report in enumerate(self._reports):
            if not origins or report.device != origins[-1]["device"]:
                origins.append({"token": token, **self._origin(report.device)})
        return origins or [{"token": 0, **self._origin(self._lab.settings.device)}]

    def _origin(self, name: str) -> dict[str, Any]:
        device, run = self._devices[name], self._run
        title = titled(device.title, outpaced=run is not None and name in run.outpaced)
        return {"device": name, "title": title, "emulated": bool(device.emulated)}


def merge_changes(
    changes: Sequence[tuple[int, Mapping[str, Any]]], *, gap: int = 8
) -> list[dict[str, Any]]:
    """Marks of the time axis: a slider drag is one mark with the value it ended on.

    Changes of the same settings at most ``gap`` tokens apart are one mark.

    Examples
    --------
    >>> merge_changes([(3, {"bits": "8"}), (5, {"bits": "4"})])
    [{'first': 3, 'last': 5, 'keys': ['bits'], 'label': 'bits 4'}]
    """
    marks: list[dict[str, Any]] = []
    for token, changed in list(changes):
        keys = sorted(changed)
        before = marks[-1] if marks else None
        if before and before["keys"] == keys and token - before["last"] <= gap:
            before |= {"last": token, "label": _label(changed)}
        else:
            marks.append({"first": token, "last": token, "keys": keys, "label": _label(changed)})
    return marks


def _label(changed: Mapping[str, Any]) -> str:
    words = (f"{k.removesuffix('_bytes').replace('_', ' ')} {v}" for k, v in changed.items())
    label = ", ".join(words)
    return label if len(label) <= LABEL else label[: LABEL - 1].rstrip(" ,") + "…"


def in_words(error: BaseException) -> str:
    """Say an exception as a sentence: moelab's own errors are, others get their type's name."""
    text = str(error).strip()
    if isinstance(error, (ValueError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
