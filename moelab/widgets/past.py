"""What the dashboard is told of the past: the newest run's recording, and why an expert went.

Both are worked out by a thread of their own, so that the thread on which the browser's messages
come is free for the next slider. Of a run that goes on only the events come piece by piece.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moelab.replays.why import reasons, until
from moelab.runs.schema import EVENTS, GATES
from moelab.runs.snapshot import Recorder
from moelab.scheduling.events import CODES
from moelab.widgets.frame import in_words

Send = Callable[[dict[str, Any], list[bytes]], None]
LARGEST_PAGE = 2_500_000
"""Bytes of an exported page that are sent to a browser: Jupyter drops more than 3 MB in 3 s."""

AT_ONCE = 64
"""Evictions of one expert that are explained when one of them is asked about, at most."""


class Past:
    """Answers a dashboard's questions about its newest run.

    Parameters
    ----------
    newest
        Gives the number of the run and the run, which is None where there is none yet.
    send
        Takes an answer and its buffers.
    """

    def __init__(self, newest: Callable[[], tuple[int, Any]], send: Send) -> None:
        self._newest, self._send = newest, send
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="moelab-past")
        self._number = -1
        self._recorder: Recorder | None = None
        self._settled = 0
        self._known: dict[int, dict[str, Any]] = {}
        self._closed = threading.Event()

    def recording(self, content: dict[str, Any]) -> None:
        """Answer ``{do: "recording", have: {run, events}}``; returns at once."""
        have = content.get("have") or {}
        self._ask(lambda: self._tell(have.get("run"), int(have.get("events") or 0)))

    def eviction(self, content: dict[str, Any]) -> None:
        """Answer ``{do: "eviction", run, row}``; returns at once."""
        number, row = int(content["run"]), int(content["row"])
        self._ask(lambda: self._send({"eviction": self._why(number, row)}, []))

    def page(self, _content: dict[str, Any]) -> None:
        """Answer ``{do: "page"}`` with the newest run as an HTML page; returns at once."""
        self._ask(self._export)

    def forget(self) -> None:
        """Let go of the run."""
        self._recorder, self._known = None, {}

    def close(self) -> None:
        """Answer no more."""
        self._closed.set()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._recorder = None

    def _ask(self, work: Callable[[], None]) -> None:
        if not self._closed.is_set():
            self._worker.submit(work)

    def _read(self) -> Recorder | None:
        number, run = self._newest()
        if run is None:
            return None
        if self._recorder is None or self._recorder.run is not run:
            self._recorder, self._settled, self._known = Recorder(run), 0, {}
        self._number = number
        return self._recorder

    def _tell(self, number: int | None, rows: int) -> None:
        try:
            recorder = self._read()
            if recorder is None:
                self._send({"recording": {"error": "nothing has run yet"}}, [])
                return
            running = recorder.run.running  # asked first: then nothing is missed
            start = min(rows, self._settled) if running and number == self._number else 0
            settled = recorder.run.log.settled
            document = recorder.read(start)
            self._settled = min(settled, document["events"]["count"])
            own = {"run": self._number, "from": start, "running": running}
            self._send(*with_buffers(document | own))
        except Exception as error:  # noqa: BLE001, a thread has nobody else to tell
            self._send({"recording": {"error": in_words(error)}}, [])

    def _why(self, number: int, row: int) -> dict[str, Any]:
        asked = {"run": number, "row": row}
        try:
            if row not in self._known_of(number):
                self._explain(row)
            return asked | self._known[row]
        except Exception as error:  # noqa: BLE001, whatever it is, the user must see it
            return asked | {"error": in_words(error)}

    def _export(self) -> None:
        from moelab.views.export import as_page

        try:
            _, run = self._newest()
            if run is None:
                raise ValueError("nothing has run yet")  # noqa: TRY301 told below
            page = as_page(run.recording()).encode()
            if len(page) > LARGEST_PAGE:
                raise ValueError(  # noqa: TRY301
                    f"this run's page has {len(page) / 1e6:.1f} MB, more than the "
                    f"{LARGEST_PAGE / 1e6:.1f} MB that Jupyter passes on: "
                    'lab.run.report("run.html") writes it beside the notebook'
                )
            self._send({"page": {"tokens": len(run.token_reports)}}, [page])
        except Exception as error:  # noqa: BLE001, whatever it is, the user must see it
            self._send({"page": {"error": in_words(error)}}, [])

    def _known_of(self, number: int) -> dict[int, dict[str, Any]]:
        if self._read() is None or number != self._number:
            raise ValueError("another run has begun since; that one is let go")
        return self._known

    def _explain(self, row: int) -> None:
        """Why the expert of this row went, then and at other times: one replay tells all."""
        recorder = self._recorder
        if recorder is None:
            raise ValueError("the dashboard is closed")
        run = recorder.run
        trace = until(run.trace, len(run.token_reports))
        events = run.log.records()
        evicted = np.flatnonzero(events["kind"] == CODES["evict"])
        if row not in evicted:
            raise ValueError(f"row {row} of the events is no eviction")
        gone = events[["layer", "expert"]][evicted]
        same = np.flatnonzero(gone == events[["layer", "expert"]][row])
        near = same[np.argsort(np.abs(evicted[same] - row), kind="stable")[:AT_ONCE]]
        for number, entry in reasons(trace, near.tolist()).items():
            at = int(evicted[number])
            self._known[at] = entry
        if row not in self._known:
            raise ValueError("this token is not complete yet; ask again")


def with_buffers(document: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """The document with its columns taken out, and where they belong in ``buffers``."""
    paths = [["values"], *(["events", name] for name in EVENTS)]
    paths += [["gates", name] for name in GATES if document["gates"][name] is not None]
    out: dict[str, Any] = {**document, "buffers": paths}
    for part in ("events", "gates"):
        out[part] = dict(document[part])
    buffers = []
    for *owner, name in paths:
        holder = out[owner[0]] if owner else out
        buffers.append(np.ascontiguousarray(holder.pop(name)).tobytes())
    return {"recording": out}, buffers
