"""The event log: one record for everything that happens to an expert.

The engine appends plain tuples while it runs (a fraction of a microsecond each) and the log turns
them into numpy records, a pandas DataFrame or a Chrome trace for Perfetto when somebody looks.
A load's times come from its ticket, which the loader fills in later.
"""

from __future__ import annotations

import bisect
import json
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("hit", "load", "prefetch", "downgrade", "skip", "substitute", "evict", "stall")
CODES = {kind: i for i, kind in enumerate(KINDS)}

DTYPE = np.dtype(
    [
        ("token", "i4"),
        ("at", "i2"),
        ("layer", "i2"),
        ("expert", "i2"),
        ("kind", "u1"),
        ("bits_asked", "u1"),
        ("bits", "u1"),
        ("bytes", "i8"),
        ("start_ms", "f8"),
        ("dur_ms", "f8"),
        ("cause", "U16"),
    ]
)
"""One event. ``token`` is the generated token it was spent on (0: the prefill), ``at`` the layer
whose step decided it, -1 between tokens (a set-up, a change of settings); ``bits`` is what was
served, 0 for a skip; times are milliseconds since the run began.

Rows are in the order decided: resident at a token and layer is what was so at the start, changed by
all rows up to there.
"""


class Timed(Protocol):
    """What the log reads from a load's ticket, seconds of the engine's clock."""

    started: float
    finished: float
    cancelled: bool


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
        self._tickets: list[tuple[int, Timed]] = []
        self._known = 0  # tickets whose times are known

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        token: int,
        at: int,
        layer: int,
        expert: int,
        kind: str,
        bits_asked: int,
        bits: int,
        nbytes: int,
        start: float,
        seconds: float,
        cause: str,
    ) -> None:
        """Append one event; ``start`` in seconds of the engine's clock."""
        self._rows.append(
            (
                token,
                at,
                layer,
                expert,
                CODES[kind],
                bits_asked,
                bits,
                nbytes,
                (start - self.origin) * 1e3,
                seconds * 1e3,
                cause,
            )
        )

    def time_by(self, ticket: Timed) -> None:
        """The event added last takes its times from ``ticket`` when it is done."""
        self._tickets.append((len(self._rows) - 1, ticket))

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

    def records(self, start: int = 0) -> np.ndarray:
        """The events from row ``start`` on as a structured array of `DTYPE`.

        A load's times are those known by now; a cancelled load has 0 bytes.
        """
        rows = self._rows[start:]
        out = np.array(rows, dtype=DTYPE)
        begin = bisect.bisect_left(self._tickets, start, key=itemgetter(0))
        for at, t in self._tickets[begin:]:
            i = at - start
            if i >= len(out):
                break
            if t.cancelled:
                out["bytes"][i], out["cause"][i] = 0, "cancelled"
            elif t.finished:
                out["start_ms"][i] = (t.started - self.origin) * 1e3
                out["dur_ms"][i] = (t.finished - t.started) * 1e3
        return out

    def frame(self) -> pd.DataFrame:
        """All events so far as a DataFrame; ``kind`` and ``cause`` are words."""
        import pandas as pd

        frame = pd.DataFrame.from_records(self.records(), columns=DTYPE.names)
        frame["kind"] = pd.Categorical.from_codes(frame["kind"].astype("int8"), categories=KINDS)
        return frame

    def to_perfetto(self, path: str | Path) -> Path:
        """Write loads, prefetches and stalls as Chrome trace JSON (open in ui.perfetto.dev)."""
        path, out = Path(path), []
        for row in self.records():
            kind = KINDS[row["kind"]]
            name = f"L{row['layer']} E{row['expert']} {row['bits']} bit"
            lane = {"load": 1, "prefetch": 2, "stall": 0}.get(kind)
            if lane is None:
                continue
            span = {
                "ph": "X",
                "ts": float(row["start_ms"]) * 1e3,
                "dur": float(row["dur_ms"]) * 1e3,
            }
            out.append(
                {"name": kind if lane == 0 else name, "cat": kind, "pid": 0, "tid": lane}
                | span
                | {"args": {"token": int(row["token"]), "cause": str(row["cause"])}}
            )
        path.write_text(json.dumps({"traceEvents": out, "displayTimeUnit": "ms"}))
        return path
