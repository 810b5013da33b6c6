"""A run read into the fields of a recording, also while the run goes on.

Columns of numbers are arrays here; `moelab.runs.recording` and the dashboard pack them, each in
its own way. Only complete tokens are read: their events, gates and figures, all or none.

T tokens, C columns of a token, L layers, K active experts, N events.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import moelab
from moelab.runs.account import Account
from moelab.runs.passes import COUNTED, for_rejected
from moelab.runs.schema import EVENTS, FORMAT
from moelab.runs.speculation import complete, kept
from moelab.runs.tokens import COLUMNS, STALLS, table, titled
from moelab.scheduling.events import AHEAD, CAUSES
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.trace import Trace
from moelab.spelling import (
    changed,
    in_words,
    merge_changes,
    opened,
    plain,
    sentence,
    short,
    shown,
    shown_strategy,
)
from moelab.store.devices import DEVICES

if TYPE_CHECKING:
    from moelab.runs.run import Run
    from moelab.settings import Settings


class RunReader:
    """Reads one run; what was read once is not read again.

    Parameters
    ----------
    run
        Of `Lab.start` or `Lab.generate`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._lock = threading.RLock()
        self._gates: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []  # [L, K] each
        self._served: list[list] = []
        self._full: list[list | None] = []
        self._settings: list[dict[str, Any]] = []
        self._texts: dict[int, str] = {}
        self._passes: list[dict[str, Any]] = []

    def tokens(self) -> tuple[list[Any], np.ndarray]:
        """Token reports by now, and their figures [T, C]."""
        reports = self.run.token_reports
        return reports, table(reports).astype("<f4")

    def draft(self) -> dict[str, Any] | None:
        """The draft's tier and its lengths from tokens on, by now; None: there is none."""
        bits, lengths = self.run.request.draft_bits, self.run.draft_lengths
        return None if bits is None else {"bits": bits, "lengths": [list(one) for one in lengths]}

    def passes(self, tokens: int) -> list[dict[str, Any]]:
        """The verified passes among so many tokens, see `passes.COUNTED`."""
        with self._lock:
            for one in complete(self.run._verified, tokens)[len(self._passes) :]:
                rows = self.run._tokens.records(one.token, one.token + 1)
                own = (one.token, one.drafted, one.accepted, one.kept)
                own += for_rejected(rows, kept(self.run, one))
                rejected = [self._text(token) for token in one.rejected]
                self._passes.append(dict(zip(COUNTED, own, strict=True)) | {"rejected": rejected})
        return [one for one in self._passes if one["token"] + one["kept"] <= tokens]

    def account(self, values: np.ndarray, first: int, last: int | None = None) -> Account:
        """The account of tokens ``first`` to before ``last``, of figures that `tokens` gave."""
        last = len(values) if last is None else last
        return Account.of(values[first:last], self.run._tokens.records(first, last))

    def read(self, start: int = 0) -> dict[str, Any]:
        """The document by now, with the events from row ``start`` on; without ``evictions``."""
        run = self.run
        reports, values = self.tokens()
        with self._lock:
            tokens = len(reports)
            ended = tokens or 1
            history = [entry for entry in run.history if entry[0] < ended]
            changes = [change for change in run.changes if change[0] < ended]
            return {
                "format": FORMAT,
                "moelab": moelab.__version__,
                "model": self._model(),
                "prompt": run.prompt,
                "messages": [dict(message) for message in run.request.messages],
                "max_new_tokens": run.request.max_new_tokens,
                "ignore_eos": run.request.ignore_eos,
                "sampling": dataclasses.asdict(run.request.sampling),
                "draft": self.draft(),
                "passes": self.passes(tokens),
                "pieces": [r.text for r in reports],
                "ids": run.tokens[:tokens],
                "ended": run.ended,
                "repeats": list(run.repeats),
                "error": "" if run.error is None else in_words(run.error),
                "columns": list(COLUMNS),
                "values": np.ascontiguousarray(values.T),  # [C, T]
                "changes": [list(change) for change in changes],
                "marks": merge_changes(changes),
                "origins": origins(
                    [r.device for r in reports] or [s.device for _, s in history[-1:]] or ["disk"],
                    run.outpaced,
                ),
                "settings": self._settings_of(history),
                "start": _start(run.trace),
                "events": self._events(start, tokens),
                "gates": self._gates_of(tokens),
                "top": self._top(tokens),
                "summary": {name: plain(value) for name, value in run.summary().items()},
            }

    def _model(self) -> dict[str, Any]:
        run, shape = self.run, self.run.trace.shape
        return {
            "name": run.model,
            "architecture": in_short(run.architecture),
            "layers": shape.layers,
            "encoder_layers": shape.encoder_layers,
            "experts": max(shape.experts) + shape.free,
            **({"free_experts": shape.free} if shape.free else {}),
            "top_k": shape.top_k,
            "tiers": sorted(shape.nbytes, reverse=True),
            "expert_bytes": {str(bits): int(n) for bits, n in shape.nbytes.items()},
            "all_experts_bytes": int(shape.all_bytes(max(shape.nbytes))),
            "dense_bits": run.dense[0],
            "dense_bytes": run.dense[1],
            "causes": list(STALLS),
        } | ({"own_bytes": {str(b): c for b, c in shape.own_cells().items()}} if shape.own else {})

    def _settings_of(self, history: Sequence[tuple[int, Settings]]) -> list[dict[str, Any]]:
        """The settings in force from each token on, in words and as code."""
        shape = self.run.trace.shape
        for i in range(len(self._settings), len(history)):
            token, settings = history[i]
            self._settings.append(
                {
                    "token": token,
                    "shown": shown_strategy(settings.strategy) | shown(settings),
                    "code": opened(self.run.model, settings, self.run.dense[0]),
                    "update": changed(history[i - 1][1], settings) if i else "",
                    "short": short(settings, shape),
                    "about": sentence(settings, shape),
                }
            )
        return list(self._settings)

    def _events(self, start: int, tokens: int) -> dict[str, Any]:
        """Rows of complete tokens from ``start`` on: arrays [N]."""
        rows = self.run.log.records(start)
        rows = rows[: np.searchsorted(rows["token"], tokens)]
        columns = {n: rows[n].astype(t) for n, t in EVENTS.items()}
        known = CAUSES[: AHEAD + self.run.trace.shape.layers]
        return {"count": start + len(rows), "causes": list(known), **columns}

    def _gates_of(self, tokens: int) -> dict[str, Any]:
        """What the router chose at each token's position, the prompt's last: arrays [T, L, K]."""
        trace = self.run.trace
        shape, layers, top_k = trace.shape, trace.shape.layers, trace.shape.top_k
        for t in range(len(self._gates), tokens):
            at, row = self.run._places[t]
            row = row if at else -1  # the prompt's last
            steps = trace.steps[shape.steps_of(at) : shape.steps_of(at + 1)]
            self._gates.append(_row(steps, (layers, top_k), row))
        size = (-1, layers, top_k)
        expert, weight, wanted = zip(*self._gates, strict=True) if self._gates else ((), (), ())
        steered = any(w is not None for w in wanted)
        own = [e if w is None else w for e, w in zip(expert, wanted, strict=True)]
        return {
            "K": top_k,
            "expert": np.array(expert, "<i2").reshape(size),
            "weight": np.array(weight, "<f4").reshape(size),
            "wanted": np.array(own, "<i2").reshape(size) if steered else None,
        }

    def _top(self, tokens: int) -> dict[str, list]:
        """The likeliest next tokens as text, beside their probability."""
        for best in self.run.likeliest[len(self._served) : tokens]:
            self._served.append(self._pairs(best.served))
            self._full.append(None if best.full is None else self._pairs(best.full))
        return {"served": list(self._served), "full": list(self._full)}

    def _pairs(self, best: Sequence[tuple[int, float]]) -> list[list]:
        return [[self._text(token), float(f"{p:.4g}")] for token, p in best]

    def _text(self, token: int) -> str:
        """One token as text, with the space it begins with: decoded behind another one."""
        if token not in self._texts:
            tokenizer: Any = self.run._tokenizer
            before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
            plain = {"clean_up_tokenization_spaces": False}
            alone, both = (tokenizer.decode(i, **plain) for i in (before, [*before, token]))
            self._texts[token] = both[len(alone) :]
        return self._texts[token]


def in_short(architecture: str) -> str:
    """A class of transformers without what all of them end with."""
    return architecture.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")


def _start(trace: Trace) -> dict[str, list[int]]:
    """What was resident when the run began."""
    resident = list(trace.resident)
    places = [trace.shape.place(key) for key, _ in resident]
    return {
        "layer": [layer for layer, _ in places],
        "expert": [expert for _, expert in places],
        "bits": [bits for _, bits in resident],
    }


def _row(
    steps: Sequence[LayerInput], size: tuple[int, int], row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Experts, gate weights and the router's own choice at one position: [L, K] each."""
    expert, weight = np.full(size, -1, "<i2"), np.zeros(size, "<f4")
    wanted, steered = np.full_like(expert, -1), False
    for step in steps:
        i = step.layer
        free, gates = (f[row] if f else () for f in (step.free, step.free_weights))
        chosen = step.experts[row] + free
        expert[i, : len(chosen)] = chosen
        weight[i, : len(chosen)] = step.weights[row] + gates
        steered |= step.wanted is not None
        own = step.router_experts[row] + free
        wanted[i, : len(own)] = own
    return expert, weight, wanted if steered else None


def origins(names: Sequence[str], outpaced: Collection[str] = ()) -> list[dict[str, Any]]:
    """From which token on the times come from which device, given each token's device."""
    found: list[dict[str, Any]] = []
    for token, name in enumerate(names):
        if not found or name != found[-1]["device"]:
            title = titled(DEVICES[name].title, outpaced=name in outpaced)
            emulated = bool(DEVICES[name].emulated)
            found.append({"token": token, "device": name, "title": title, "emulated": emulated})
    return found
