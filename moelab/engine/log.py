"""The event log: the only account of a run, from which all others are folded.

The engine appends plain tuples while it runs (a fraction of a microsecond each) and the log turns
them into numpy records, a pandas DataFrame or a Chrome trace for Perfetto when somebody looks.
A load's times come from its ticket, which the loader fills in later.
"""

from __future__ import annotations

import bisect
import json
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moelab.scheduling.budget import bits_in_words
from moelab.scheduling.events import CANCELLED, CAUSES, DOWNGRADE, DTYPE, KINDS, SKIP, Row
from moelab.scheduling.writing import write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from moelab.engine.loader import Ticket


class EventLog:
    """Append-only log of one run.

    Parameters
    ----------
    origin
        Clock reading (seconds) that counts as 0 ms.
    """

    def __init__(self, origin: float = 0.0) -> None:
        self.origin = origin
        self._rows: list[tuple] = []
        self._tickets: list[tuple[int, Ticket]] = []
        self._known = 0  # tickets whose times are known

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, token: int, at: int, row: Row, nbytes: int, start: float, seconds: float = 0.0
    ) -> None:
        """Append a decision, or a wait that took so long; ``start`` by the engine's clock."""
        kind, layer, expert, asked, bits, cause, _ = row
        size = 0 if kind in (DOWNGRADE, SKIP) else nbytes
        when = (start - self.origin) * 1e3
        took = seconds * 1e3
        self._rows.append((token, at, layer, expert, kind, asked, bits, size, when, took, cause))

    def time_by(self, ticket: Ticket) -> None:
        """The event added last takes its times from ``ticket`` when it is done."""
        self._tickets.append((len(self._rows) - 1, ticket))

    def close(self) -> None:
        """The run is over: what becomes of loads still on their way changes its rows no more."""
        self._tickets = [(row, t) for row, t in self._tickets if t.cancelled or t.finished]

    @property
    def settled(self) -> int:
        """Rows that will not change any more: those before the first load still on its way."""
        tickets = self._tickets
        while self._known < len(tickets):
            row, ticket = tickets[self._known]
            if not (ticket.cancelled or ticket.finished):
                return row
            self._known += 1
        return len(self._rows)

    def records(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The events from row ``start`` up to ``stop`` as a structured array of `DTYPE`.

        A load's times are those known by now; a cancelled load has 0 bytes.
        """
        rows, tickets = self._rows[start:stop], self._tickets
        out = np.array(rows, dtype=DTYPE)
        begin = bisect.bisect_left(tickets, start, key=itemgetter(0))
        for at, t in tickets[begin:]:
            i = at - start
            if i >= len(out):
                break
            if t.cancelled:
                out["bytes"][i], out["cause"][i] = 0, CANCELLED
            elif t.finished:
                out["start_ms"][i] = (t.started - self.origin) * 1e3
                out["dur_ms"][i] = (t.finished - t.started) * 1e3
        return out

    def frame(self) -> pd.DataFrame:
        """All events so far as a DataFrame; ``kind`` and ``cause`` are words."""
        return as_frame(self.records())

    def to_perfetto(self, path: str | Path) -> Path:
        """Write loads, prefetches and stalls as Chrome trace JSON (open in ui.perfetto.dev)."""
        lanes = {"stall": 0, "load": 1, "prefetch": 2}
        spans = self.frame().query(f"kind in {list(lanes)}")
        out = [
            {
                "name": (
                    f"L{r['layer']} E{r['expert']} {bits_in_words(r['bits'])}"
                    if lanes[r["kind"]]
                    else "stall"
                ),
                "cat": r["kind"],
                "ph": "X",
                "pid": 0,
                "tid": lanes[r["kind"]],
                "ts": r["start_ms"] * 1e3,
                "dur": r["dur_ms"] * 1e3,
                "args": {"token": r["token"], "cause": r["cause"]},
            }
            for r in spans.to_dict("records")
        ]
        path = Path(path)
        told = {"traceEvents": out, "displayTimeUnit": "ms"}
        write_atomically(path, json.dumps(told).encode())
        return path


def as_frame(records: np.ndarray) -> pd.DataFrame:
    """Records of events as a DataFrame; ``kind`` and ``cause`` are words."""
    import pandas as pd

    frame = pd.DataFrame.from_records(records, columns=DTYPE.names)
    frame["kind"] = pd.Categorical.from_codes(frame["kind"].astype("int8"), categories=KINDS)
    frame["cause"] = np.array(CAUSES, object)[frame["cause"]]
    return frame
