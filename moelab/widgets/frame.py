"""What the dashboard shows: what there is to choose, what is chosen, and frames of what happens.

The choices of the five drop-downs are the distinct parts (by class) of all named strategies; each
stands for ``lab.update(<decision>=<name of a strategy that has it>)``. A part that no named
strategy has, such as a learner's own class, is shown by its class name.

A frame is a whole picture, never a difference: a late view, a reloaded page and the static report
all draw the same one. Arrays travel as raw little-endian bytes: the cache map as five [L, E]
arrays, the tokens as one [C, T] float32 array whose rows are `COLUMNS`. Figures measured on this
machine's disk and figures of an emulated device are never averaged together: every figure covers
the tokens since the device last changed. Nothing here knows widgets, threads or clocks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from moelab import strategies
from moelab.runs.account import Account, ending
from moelab.runs.passes import told
from moelab.runs.shadows import SHADOWS, Shadows
from moelab.runs.snapshot import RunReader, in_short, origins
from moelab.runs.tokens import COLUMNS, STALLS, figures
from moelab.scheduling.parts import Precision, Prefetch
from moelab.scheduling.strategy import Parameter, Strategy, is_on, part_parameters, part_title
from moelab.spelling import (
    about,
    called,
    differences,
    first_line,
    in_words,
    merge_changes,
    named,
    short,
    shown,
    shown_strategy,
    spelled,
    valued,
)
from moelab.views.report import LONGEST
from moelab.widgets.reference import Reference

RECENT_TOKENS = 16
"""The large figures cover this many tokens, so that they follow a slider."""

SHADOW, MOST_SHADOW = 0.03, 0.3
"""Of a run's computing, at most, that goes into what others would have had, and of all its time:
while a load is waited for there is more to spare."""

IDLE = "Press Run: what a token's time goes into, and why, is said here."

STRIDE = 250
"""So many leave at a time: where the first one changes, the text has to be laid out anew."""

_NUMBERS = itertools.count(1)  # of runs, over all labs: a dashboard may change from one to another

MAP_TYPES = {"bits": "<u1", "in_flight": "<u1", "loaded": "<i4", "used": "<i4", "uses": "<i4"}

QUESTIONS = {
    "allocate": "Before the run: which bits each expert gets, which share of memory each layer",
    "route": "Each token, each layer: which experts may serve it",
    "precision": "Each miss: at how many bits the expert is loaded",
    "evict": "Budget full: who leaves",
    "prefetch": "Ahead of need: who is fetched before a token asks for it",
}
SWITCHES = {"low_bits": "low_bits", "depth": "prefetch"}
"""Parameters with a control of their own, by its name."""
OFF = {"precision": Precision(), "prefetch": Prefetch()}
"""What the parts that can be switched off are then."""


def options(lab: Any, info: Mapping[str, Any], devices: Mapping[str, Any]) -> dict[str, Any]:
    """What the controls offer and what never changes for this model."""
    return {
        "name": info["name"],
        "architecture": in_short(info["architecture"]),
        "layers": info["layers"],
        "encoder_layers": info["encoder_layers"],
        "experts": info["experts_per_layer"] + info.get("free_experts", 0),
        "free_experts": info.get("free_experts", 0),
        "all_experts": lab._shape.n,
        "top_k": info["top_k"],
        "tiers": list(info["tiers"]),
        "expert_bytes": {str(bits): int(n) for bits, n in info["expert_bytes"].items()},
        "all_bytes": {str(bits): int(lab._shape.all_bytes(bits)) for bits in info["tiers"]},
        "own_sizes": list(lab._shape.own),
        "all_experts_bytes": int(info["all_experts_bytes"]),
        "dense_bits": info["dense_bits"],
        "dense_bytes": int(info["dense_bytes"]),
        "presets": presets(),
        "decisions": decisions(),
        "devices": [
            {"name": name, "title": device.title, "emulated": bool(device.emulated)}
            for name, device in devices.items()
        ],
        "prompts": lab.prompts(),
        "drafts": list(info.get("draft_bits", ())),
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
        **chosen(settings.strategy),
        "device": settings.device,
        "prefetch": int(settings.prefetch),
        "measure_kl": int(settings.measure_kl),
        "budget_experts": int(info["budget_experts"]),
        "minimum_budget_bytes": int(info["minimum_budget_bytes"]),
        "token_cycle_bytes": int(info["token_cycle_bytes"]),
    }


def presets() -> list[dict[str, Any]]:
    """The strategies to choose from, by group: name, how it is written, one line about it."""
    return [
        {
            "group": group,
            "entries": [{"name": n, "title": t, "text": about(named()[n])} for n, t in of.items()],
        }
        for group, of in strategies.GROUPS.items()
    ]


@functools.cache
def _distinct() -> dict[str, dict[type, str]]:
    """Of each decision the distinct parts, and the strategy to name for each.

    Of several strategies with one part, that one is named which has it switched on, so that
    choosing the part does something.
    """
    found: dict[str, dict[type, str]] = {role: {} for role in QUESTIONS}
    for role, kinds in found.items():
        for name, strategy in named().items():
            kind = type(strategy.parts[role])
            if kind not in kinds or (
                is_on(strategy.parts[role]) and not is_on(named()[kinds[kind]].parts[role])
            ):
                kinds[kind] = name
    return found


def decisions() -> list[dict[str, Any]]:
    """The five decisions: the question each answers, and the parts to choose from."""
    return [
        {
            "role": role,
            "question": QUESTIONS[role],
            "choices": [
                {
                    "value": name,
                    "title": part_title(named()[name].parts[role]),
                    "text": first_line(kind),
                }
                for kind, name in kinds.items()
            ],
        }
        for role, kinds in _distinct().items()
    ]


def chosen(strategy: Strategy) -> dict[str, Any]:
    """What holds now: the five parts, their parameters, and the switches that none of them has."""
    known = strategy.parameters
    off = {*SWITCHES}
    if "low_bits" in known and known["low_bits"][2] is None:
        off |= {"t1", "t2"}  # they have no effect
    parameters = [
        _shown(_having(strategy, p), p, v) for name, (_, p, v) in known.items() if name not in off
    ]
    doing = {r: p if is_on(p) else OFF.get(r, p) for r, p in strategy.parts.items()}
    return {
        "strategy": strategy.name,
        "label": spelled(strategy.name),
        "about": about(strategy),
        "parts": {
            role: {"value": _distinct()[role].get(type(part), ""), "title": part_title(part)}
            for role, part in doing.items()
        },
        "parameters": sorted(parameters, key=lambda p: [*QUESTIONS].index(p["roles"][0])),
        "unread": [name for has, name in SWITCHES.items() if has not in known],
    }


def _having(strategy: Strategy, parameter: Parameter) -> list[str]:
    """The decisions whose part has this parameter: one object may take several."""
    parts = strategy.parts.items()
    return [role for role, part in parts if parameter in part_parameters(part)]


def _shown(roles: list[str], parameter: Parameter, value: Any) -> dict[str, Any]:
    return {
        "roles": roles,
        "name": parameter.name,
        "text": parameter.text,
        "low": parameter.low,
        "high": parameter.high,
        "step": parameter.step,
        "choices": list(parameter.choices),
        "value": value if parameter.choices else float(value),
    }


class Framer:
    """Builds frames of the lab's newest run, reading each token report once.

    Parameters
    ----------
    lab
        Read through `settings`, `cache_map` and `run` only.
    info
        The lab's `info`, for what never changes: the bytes of an expert at each tier.
    """

    def __init__(self, lab: Any, info: Mapping[str, Any]) -> None:
        self._lab, self._each = lab, info["expert_bytes"] | info.get("own_bytes", {})
        self._number = 0
        self._reader: RunReader | None = None
        self._reference: Reference | None = None
        self.shadows: Shadows | None = None

    def newest(self) -> tuple[int, RunReader | None]:
        """The lab's newest run and its number, which no other has; (0, None) where none is yet."""
        run = self._lab.run
        if run is None:
            self._number, self._reader, self.shadows = 0, None, None
            self._reference = None
        elif self._reader is None or run is not self._reader.run:
            self._number, self._reader = next(_NUMBERS), RunReader(run)
            self.shadows = Shadows(run, self._lab._strategies)
            self._reference = Reference(self._lab.name, run)
        return self._number, self._reader

    def follow(self, frame: Mapping[str, Any], period: float) -> None:
        """Let the shadows follow the run: for a share of the seconds to the next frame."""
        shadows, recent = self.shadows, frame.get("recent") or {}
        if shadows is None:
            for name in SHADOWS:  # profiles are read before a run, not beside it
                with contextlib.suppress(ValueError):
                    self._lab._strategies(name, None, "")
        elif frame.get("running"):
            computing = 1 - (recent.get("stall_share") or 0.0)
            shadows.advance(period * min(MOST_SHADOW, SHADOW / max(computing, SHADOW)))
        else:
            shadows.advance(period)

    def build(self) -> dict[str, Any]:
        """One frame of what is true now; JSON but for the arrays, which are bytes."""
        _, reader = self.newest()
        run: Any = None if reader is None else reader.run
        running = run is not None and bool(run.running)  # asked first: then no token is missed
        reports, rows = ([], np.empty((0, len(COLUMNS)))) if reader is None else reader.tokens()
        devices = [report.device for report in reports] or [self._lab.settings.device]
        began = origins(devices, () if run is None else run.outpaced)
        first = -(-max(0, len(reports) - LONGEST) // STRIDE) * STRIDE
        values = rows[first:]  # [T, C]
        since = max(0, began[-1]["token"] - first)
        recent = max(since, len(values) - RECENT_TOKENS)
        cells = self._lab.cache_map()
        draft = None if reader is None else reader.draft()
        passes = reader.passes(len(reports)) if reader and draft else None
        return {
            "run": self._number,
            "running": running,
            "error": "" if run is None or run.error is None else in_words(run.error),
            "prompt": "" if run is None else run.prompt + "\n" * _answers(run),
            "reference": self._reference.told(running=running) if self._reference else "",
            "first": first,
            "count": len(values),
            "texts": [report.text for report in reports[first:]],
            "values": np.ascontiguousarray(values.T, "<f4").tobytes(),  # [C, T]
            "changes": merge_changes([] if run is None else run.changes),
            "origins": began,
            "map": {k: np.ascontiguousarray(cells[k], t).tobytes() for k, t in MAP_TYPES.items()},
            "resident": self._resident(cells["bits"]),
            "recent": _figures(values, recent, first, passes),
            "whole": _figures(values, since, first, passes),
            "draft": draft,
            "passes": [one for one in passes or () if one["token"] + one["kept"] > first],
            "span": [first + recent, len(reports)],
            "shadows": self.shadows.told(rows) if self.shadows else [],
            **spoken(reader, self._lab.settings, rows, first + recent, running=running),
        }

    def _resident(self, bits: np.ndarray) -> dict[str, int]:
        cells, total = bits.ravel(), 0
        for tier in np.unique(cells[cells > 0]).tolist():
            total += int(np.broadcast_to(self._each[tier], cells.shape)[cells == tier].sum())
        budget = int(self._lab.settings.budget_bytes)
        return {"experts": int(np.count_nonzero(cells)), "bytes": total, "budget_bytes": budget}


def _figures(
    values: np.ndarray, begin: int, first: int, passes: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """Figures of the tokens from row ``begin`` on, also of passes where there is a draft."""
    own = figures(values[begin:], first=first + begin)
    drafts = {} if passes is None else told(passes, first + begin, first + len(values))
    return own | drafts


def spoken(
    reader: RunReader | None, settings: Any, rows: np.ndarray, first: int, *, running: bool
) -> dict[str, Any]:
    """What is said of a run: why its tokens from ``first`` on cost what they did, and how it ended.

    ``rows`` are the figures of its tokens [T, C] that the frame shows: what is said is of these.

    Returns
    -------
    dict
        ``guesses``: bytes a token that were read ahead, by what became of them. ``sentence``;
        ``change``, where settings were changed on the way; ``of``: the settings of the run, where
        they are not those in force any more; ``ended``: why and when.
    """
    if reader is None:
        return {"guesses": {}, "sentence": IDLE, "change": "", "of": "", "ended": ""}
    run: Any = reader.run
    first = max(1, first)
    account = reader.account(rows, first)
    held, asked = run.history[-1][1], run.request.max_new_tokens
    stale = not running and differences(held, settings)
    return {
        "guesses": dict(account.guesses),
        "sentence": account.sentence(run.limits()),
        "change": _change(reader, rows, first, account),
        "of": short(held, run.trace.shape) if stale else "",
        "ended": "" if running else ending(run.ended, len(rows), asked),
    }


def _answers(run: Any) -> bool:
    """Whether the text is one of its own, and no continuation of the prompt."""
    return bool(run.request.messages or run.trace.shape.encoder_layers)


def _change(reader: RunReader, rows: np.ndarray, since: int, account: Account) -> str:
    """What the last change of settings did to a token, once there are tokens on both sides.

    ``account`` is that of the tokens from ``since`` on; those under other settings are left out.
    """
    run: Any = reader.run
    marks = merge_changes(run.changes)
    if not marks or marks[-1]["first"] < 2 or marks[-1]["last"] >= len(rows):
        return ""  # decoded tokens are on one side of it only
    first, last = marks[-1]["first"], marks[-1]["last"]
    was, now = [s for token, s in run.history if token < first][-1], run.history[-1][1]
    if was.device != now.device:
        return ""  # a measured and an emulated time have no difference
    old = shown(was) | shown_strategy(was.strategy)
    what = ", ".join(
        f"{called(name)} {valued(name, old.get(name, 'none'))} \N{RIGHTWARDS ARROW} "
        f"{valued(name, value)}"
        for name, value in differences(was, now).items()
    )
    what = what or marks[-1]["label"]  # of the draft, which is no setting
    before = reader.account(rows, max(1, first - RECENT_TOKENS), first)
    return before.change_to(account if since >= last else reader.account(rows, last), what)
