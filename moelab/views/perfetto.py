"""A run as a Chrome trace: every token, read, wait and decision on a time axis in Perfetto.

The format is Google's "Trace Event Format"; https://ui.perfetto.dev and chrome://tracing open it
without sending it anywhere. Reads overlap, so they take as many tracks as were on their way at
once: a load goes to the first that is free.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.runs.compare import recorded
from moelab.scheduling.writing import write_atomically

if TYPE_CHECKING:
    from moelab.runs.recording import Recording
    from moelab.runs.run import Run

TOKENS, WAITS, DECISIONS, READS = 1, 2, 3, 4
"""Numbers of the tracks; reads have this one and those after it."""
TOLD = ("token", "bits_asked", "bits", "bytes", "cause")


def perfetto(run: Run | Recording, path: str | Path) -> Path:
    """Write a run's events as a Chrome trace in JSON; times are microseconds since its beginning.

    Parameters
    ----------
    run
        A run that is over, or a recording.
    path
        Of the file; ``.json`` is added where it has no suffix.

    Examples
    --------
    >>> moelab.perfetto(run, "run.perfetto.json")  # doctest: +SKIP
    """
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".json")
    text = json.dumps({"traceEvents": trace_events(run), "displayTimeUnit": "ms"})
    write_atomically(path, text.encode())
    return path


def trace_events(run: Run | Recording) -> list[dict[str, Any]]:
    """The trace's events: slices (``ph`` X), moments (i) and names of tracks (M)."""
    run = recorded(run)
    events = run.events
    starts = events.groupby("token").start_ms.min().sort_index()
    ends = [*starts.iloc[1:], (events.start_ms + events.dur_ms).max()] if len(starts) else []
    found = [
        _slice(TOKENS, f"token {token}", begun, end - begun, {"text": run.per_token.text[token]})
        for (token, begun), end in zip(starts.items(), ends, strict=True)
    ]
    free: list[float] = []  # of each track of reads: when its last one is over
    for row in events.sort_values("start_ms", kind="stable").to_dict("records"):
        kind, start, ms = str(row["kind"]), row["start_ms"], row["dur_ms"]
        name = f"{kind} {row['layer']}:{row['expert']}"
        told = {"at layer": row["at"], **{n: row[n] for n in TOLD}}
        if kind == "stall":
            found.append(_slice(WAITS, name, start, ms, told))
        elif kind in ("load", "prefetch"):
            track = next((i for i, end in enumerate(free) if end <= start), len(free))
            free[track : track + 1] = [start + ms]
            found.append(_slice(READS + track, name, start, ms, told))
        else:
            moment = {"ph": "i", "s": "t", "pid": 1, "tid": DECISIONS, "ts": 1e3 * start}
            found.append({**moment, "name": name, "cat": kind, "args": told})
    titles = {TOKENS: "tokens", WAITS: "waits", DECISIONS: "decisions"}
    titles |= {READS + i: f"reads {i + 1}" for i in range(len(free))}
    named = {"ph": "M", "pid": 1, "name": "thread_name"}
    return [{**named, "tid": tid, "args": {"name": name}} for tid, name in titles.items()] + found


def _slice(
    track: int, name: str, start_ms: float, ms: float, told: dict[str, Any]
) -> dict[str, Any]:
    at = {"ph": "X", "pid": 1, "tid": track, "ts": 1e3 * start_ms, "dur": 1e3 * ms}
    return {**at, "name": name, "cat": name.partition(" ")[0], "args": told}
