"""What the dashboard asks: the recording of its newest run, why an expert went or stays, the page.

All is worked out by a thread of its own, so that the thread on which the browser's messages come
is free for the next slider. Of a run that goes on only the events come piece by piece.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moelab.replays.why import reasons, until
from moelab.runs.schema import EVENTS, GATES
from moelab.runs.snapshot import RunReader
from moelab.scheduling.events import CODES
from moelab.scheduling.strategy import part_title
from moelab.spelling import in_words, plain
from moelab.views.report import as_page

Answer = tuple[dict[str, Any], list[bytes]]
LARGEST_PAGE = 2_500_000
"""Bytes of an exported page that are sent to a browser: Jupyter drops more than 3 MB in 3 s."""

AT_ONCE = 64
"""Evictions of one expert that are explained when one of them is asked about, at most."""


class RunQueries:
    """Answers a dashboard's questions about its newest run.

    Parameters
    ----------
    newest
        Gives the number of the run and its reader, which is None where there is no run yet.
    send
        Takes an answer and its buffers.
    """

    def __init__(
        self,
        newest: Callable[[], tuple[int, RunReader | None]],
        send: Callable[[dict[str, Any], list[bytes]], None],
    ) -> None:
        self._newest, self._send = newest, send
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="moelab-queries")
        self._closed = threading.Event()
        self._number, self._settled = -1, 0
        self._known: dict[int, dict[str, Any]] = {}

    def hear(self, content: Mapping[str, Any]) -> None:
        """Answer one of these messages; returns at once.

        ``{do: "recording", have: {run, events}}``, ``{do: "eviction", run, row}``, and
        ``{do: "page"}``: the newest run as an HTML page.
        """
        if not self._closed.is_set():
            self._worker.submit(self._answer, content)

    def forget(self) -> None:
        """Let go of what is known of the run."""
        self._number, self._known = -1, {}

    def close(self) -> None:
        """Answer no more."""
        self._closed.set()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self.forget()

    def _answer(self, content: Mapping[str, Any]) -> None:
        what = content["do"]
        answer = {"recording": self._recording, "eviction": self._eviction, "page": self._page}
        try:
            told, buffers = answer[what](content)
        except Exception as error:  # noqa: BLE001 whatever it is, the user must see it
            told, buffers = {"error": in_words(error)}, []
        asked = {key: content[key] for key in ("run", "row") if key in content}
        self._send({what: asked | told}, buffers)

    def _reader(self) -> RunReader:
        number, reader = self._newest()
        if reader is None:
            raise ValueError("nothing has run yet")
        if number != self._number:
            self._number, self._settled, self._known = number, 0, {}
        return reader

    def _recording(self, content: Mapping[str, Any]) -> Answer:
        reader, have = self._reader(), content.get("have") or {}
        running = reader.run.running  # asked first: then nothing is missed
        known = running and have.get("run") == self._number
        start = min(int(have.get("events") or 0), self._settled) if known else 0
        settled = reader.run.log.settled
        document = reader.read(start)
        self._settled = min(settled, document["events"]["count"])
        told = {"run": self._number, "from": start, "running": bool(running)}
        return with_buffers(document | told | {"sentence": reader.run.sentence()})

    def _page(self, _content: Mapping[str, Any]) -> Answer:
        run = self._reader().run
        page = as_page(run.recording()).encode()
        if len(page) > LARGEST_PAGE:
            raise ValueError(
                f"this run's page has {len(page) / 1e6:.1f} MB, more than the "
                f"{LARGEST_PAGE / 1e6:.1f} MB that Jupyter passes on: "
                'lab.run.report("run.html") writes it beside the notebook'
            )
        return {"tokens": len(run.token_reports)}, [page]

    def _eviction(self, content: Mapping[str, Any]) -> Answer:
        reader, row = self._reader(), int(content["row"])
        if int(content["run"]) != self._number:
            raise ValueError("another run has begun since; that one is let go")
        if row not in self._known:
            self._known |= explained(reader.run, row)
        if row not in self._known:
            raise ValueError("this token is not complete yet; ask again")
        return self._known[row], []


def explained(run: Any, row: int) -> dict[int, dict[str, Any]]:
    """Why the expert of this row went, then and at other times, by row: one replay tells all."""
    trace = until(run.trace, run.passes(len(run.token_reports)))
    events = run.log.records()
    evicted = np.flatnonzero(events["kind"] == CODES["evict"])
    if row not in evicted:
        raise ValueError(f"row {row} of the events is no eviction")
    gone = events[["layer", "expert"]][evicted]
    same = np.flatnonzero(gone == events[["layer", "expert"]][row])
    near = same[np.argsort(np.abs(evicted[same] - row), kind="stable")[:AT_ONCE]]
    return {int(evicted[n]): entry for n, entry in reasons(trace, near.tolist()).items()}


def with_buffers(document: dict[str, Any]) -> Answer:
    """The recording with its columns taken out, and where they belong in ``buffers``."""
    paths = [["values"], *(["events", name] for name in EVENTS)]
    paths += [["gates", name] for name in GATES if document["gates"][name] is not None]
    out: dict[str, Any] = {**document, "buffers": paths}
    for part in ("events", "gates"):
        out[part] = dict(document[part])
    buffers = []
    for *owner, name in paths:
        holder = out[owner[0]] if owner else out
        buffers.append(np.ascontiguousarray(holder.pop(name)).tobytes())
    return out, buffers


def explained_now(lab: Any, layer: int, expert: int) -> dict[str, Any]:
    """Why a resident expert would stay or go: the evict decision's terms, beside its neighbours'.

    Returns
    -------
    dict
        ``terms`` is empty for an expert that is not resident; ``error`` says what a policy of
        somebody's own raised.
    """
    evict = lab.settings.strategy.parts["evict"]
    policy, texts = part_title(evict), getattr(evict, "explained", {})
    answer = {"layer": layer, "expert": expert, "policy": policy, "terms": [], "error": ""}
    try:
        terms = lab.why(layer)
    except Exception as error:  # noqa: BLE001 whatever it is, the user must see it
        return answer | {"error": in_words(error)}
    for name, value in terms.get(expert, {}).items():
        every = [other[name] for other in terms.values() if name in other]
        finite = [float(x) for x in every if math.isfinite(x)]  # JSON has no others
        told = {"name": name, "text": texts.get(name, ""), "value": plain(float(value))}
        told |= {"low": min(finite, default=None), "high": max(finite, default=None)}
        answer["terms"].append(told)
    return answer
