"""A run token by token, folded from its event log; and figures of any stretch of tokens.

The log is the only account of a run. What it cannot say (a token's text, its time, its KL, the
memory then) is noted once, when the token is complete; counts, bytes and stalls are sums of its
events. Figures measured on this machine's disk and figures of an emulated device are never averaged
together: who asks for figures of times gives the tokens since the device last changed.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moelab.engine.log import EventLog
from moelab.scheduling import events as e
from moelab.scheduling.stream import Shape

_WAITS = (e.ON_DEMAND, e.LATE, e.EVICTED_LATE)
STALLS = tuple(e.CAUSES[code] for code in _WAITS)
"""What a token may wait for."""

COUNTED = {"hits": e.HIT, "loads": e.LOAD, "prefetches": e.PREFETCH, "downgrades": e.DOWNGRADE}
COUNTED |= {"skips": e.SKIP, "substitutes": e.SUBSTITUTE}
COUNTS = ("bytes", "setup_bytes", *COUNTED, "late")
REQUESTS = ("hits", "late", "loads", "skips", "substitutes")
"""What may become of an expert that a layer asks for; each request is counted as one of these."""
_SUMMED = ("late", "downgrades", "skips", "substitutes")
NOTED = ("text", "kl", "resident_bytes", "budget_bytes", "device")
COLUMNS = (
    *("total_ms", "compute_ms", "deciding_ms", *STALLS, "kl", *COUNTS),
    *("resident_bytes", "budget_bytes", "measuring_ms", "setup_ms"),
)


WALL = ("total_ms", "measuring_ms", "setup_ms")
"""What a watch shows: the engine's own time, measuring, and obeying settings before the token."""


@dataclass(frozen=True)
class TokenReport:
    """What one token cost. Token 0 is the first generated one and carries the whole prefill.

    Where a pass verified a draft, the first token that it kept carries the pass, the others little.

    ``total_ms`` is the engine's own time: compute (and drawing the token), deciding (the strategy's
    own time) and stalls. ``stall_ms`` is by cause: ``on demand``, ``prefetch late`` (a guess was
    right but still on its way), ``evict``. ``measuring_ms`` went into KL and the likeliest tokens,
    ``setup_ms`` into obeying settings and loading what the strategy wants beforehand.

    ``hits`` were in memory when they were asked for, ``free_hits`` of them are experts without
    weights, of 0 bytes; ``late`` were guessed right but still on their way. ``bytes`` were read
    from the device (prefetches too), ``load_bytes`` of them on demand, ``setup_bytes`` between the
    token before and this one; ``hit_bytes`` were served from memory. ``resident_bytes`` is what the
    resident experts took at its end, loads on their way included.
    """

    token: int
    text: str
    total_ms: float
    compute_ms: float
    deciding_ms: float
    stall_ms: dict[str, float]
    bytes: int
    hit_bytes: int
    hits: int
    loads: int
    prefetches: int
    downgrades: int
    skips: int
    substitutes: int
    kl: float | None
    resident_bytes: int
    budget_bytes: int
    device: str
    load_bytes: int = 0
    late: int = 0
    setup_bytes: int = 0
    free_hits: int = 0
    measuring_ms: float = 0.0
    setup_ms: float = 0.0

    @property
    def wall_ms(self) -> float:
        """What a watch shows from the token before it to this one: all of its parts."""
        return sum(getattr(self, name) for name in WALL)

    @functools.cached_property
    def row(self) -> tuple[float, ...]:
        """As numbers, in the order of `COLUMNS`; a KL not measured is NaN."""
        known = {"kl": math.nan} | {n: v for n, v in vars(self).items() if v is not None}
        known |= {cause: self.stall_ms.get(cause, 0.0) for cause in STALLS}
        return tuple(float(known[name]) for name in COLUMNS)


class Noted(NamedTuple):
    """What is noted of a token beside its events; ``rows``: of the log, when it was complete.

    ``seconds``: from the token before it; of these ``deciding``, ``measuring`` and ``setup``.
    """

    text: str
    seconds: float
    deciding: float
    kl: float | None
    resident_bytes: int
    budget_bytes: int
    device: str
    rows: int
    measuring: float = 0.0
    setup: float = 0.0


class Tokens:
    """The reports of a run that grows.

    Parameters
    ----------
    log
        The run's.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._noted: list[Noted] = []
        self._loaded: np.ndarray | None = None
        self._seen = 0  # rows of the log that `loaded` has read
        self._reading = threading.Lock()
        self._known: tuple[list[TokenReport], int] = [], 0  # and how many do not change any more

    def __len__(self) -> int:
        return len(self._noted)

    def records(self, first: int, last: int) -> np.ndarray:
        """The events of the tokens from ``first`` to before ``last``."""
        last = min(last, len(self))
        begin, end = (self._noted[n - 1].rows if n else 0 for n in (min(first, last), last))
        return self._log.records(begin, end)

    def add(self, noted: Noted) -> None:
        """A token is complete."""
        self._noted.append(noted)

    def extend(self, text: str) -> None:
        """The last token's text goes on; nothing is noted after this."""
        last, (known, final) = self._noted[-1], self._known
        self._noted[-1] = last._replace(text=last.text + text)
        self._known = known, min(final, len(self) - 1)

    def reports(self) -> list[TokenReport]:
        """One a token; from any thread.

        A prefetch that is withdrawn is never read: until all loads of a token have begun, its bytes
        may still become fewer. Those tokens are folded again at every call.
        """
        settled, count = self._log.settled, len(self._noted)
        known, final = self._known
        new = known[:final]
        for token in range(final, count):
            new.append(fold(token, self._noted[token], self.records(token, token + 1)))
            if token == final and self._noted[token].rows <= settled:
                final += 1
        self._known = new, final
        return list(new)

    def loaded(self, shape: Shape) -> np.ndarray:
        """Last token at which each expert was loaded or prefetched, -1: not in this run ``[n]``."""
        with self._reading:
            if self._loaded is None:
                self._loaded = np.full(shape.n, -1, np.int32)
            rows = self._log.records(self._seen)
            self._seen += len(rows)
            rows = rows[(rows["kind"] == e.LOAD) | (rows["kind"] == e.PREFETCH)]
            keys = np.array(shape.offset)[rows["layer"]] + rows["expert"]
            self._loaded[keys] = rows["token"]  # of several, the last stays
            return self._loaded


def fold(token: int, noted: Noted, rows: np.ndarray) -> TokenReport:
    """A token's report: what was noted of it, and the sums of its events."""
    sums = tally(rows)
    total, deciding = 1e3 * (noted.seconds - noted.measuring - noted.setup), 1e3 * noted.deciding
    return TokenReport(
        token=token,
        total_ms=total,
        compute_ms=total - deciding - sum(sums["stall_ms"].values()),
        deciding_ms=deciding,
        measuring_ms=1e3 * noted.measuring,
        setup_ms=1e3 * noted.setup,
        **sums,
        **{name: getattr(noted, name) for name in NOTED},
    )


def tally(rows: np.ndarray) -> dict[str, Any]:
    """Counts, bytes and stalls of the events of one token, by the names of `TokenReport`.

    Parameters
    ----------
    rows
        Records of `moelab.scheduling.events.DTYPE`; of those between tokens only the bytes count.
    """
    between, reads = rows["at"] < 0, np.isin(rows["kind"], (e.LOAD, e.PREFETCH))
    setup = int(rows["bytes"][between & reads].sum())
    rows = rows[~between]
    kind, nbytes = rows["kind"], rows["bytes"]
    counts = np.bincount(kind, minlength=len(e.KINDS)).tolist()
    read = [int(nbytes[kind == code].sum()) for code in (e.LOAD, e.PREFETCH)]
    late = int(((kind == e.HIT) & (rows["cause"] == e.LATE)).sum())
    counts[e.HIT] -= late
    waits = {e.CAUSES[c]: (kind == e.STALL) & (rows["cause"] == c) for c in _WAITS}
    return {
        "stall_ms": {n: float(rows["dur_ms"][w].sum()) for n, w in waits.items() if w.any()},
        "bytes": sum(read),
        "hit_bytes": int(nbytes[(kind == e.HIT) | (kind == e.SUBSTITUTE)].sum()),
        "load_bytes": read[0],
        "late": late,
        "free_hits": int(((kind == e.HIT) & (rows["bits"] == 0)).sum()),
        "setup_bytes": setup,
        **{name: counts[code] for name, code in COUNTED.items()},
    }


def table(reports: Sequence[TokenReport]) -> np.ndarray:
    """The rows of some reports, [T, C]."""
    return np.array([report.row for report in reports]).reshape(-1, len(COLUMNS))


def since_device(reports: Sequence[Any]) -> int:
    """Index of the first token since the device last changed."""
    last = len(reports)
    while last > 0 and reports[last - 1].device == reports[-1].device:
        last -= 1
    return last


def figures(values: np.ndarray, *, first: int = 0) -> dict[str, float | int | None]:
    """Running figures of some tokens.

    Parameters
    ----------
    values
        [T, C], columns as in `COLUMNS`.
    first
        Index of the first of them. Token 0 carries the prefill: only its KL counts.

    Returns
    -------
    dict
        ``tokens``, ``tokens_per_s`` (as a watch shows it), ``engine_tokens_per_s`` (without
        measuring and set-up), ``hit_ratio``, ``bytes_per_token``, ``stall_share``, ``kl_mean``;
        None where there is nothing to divide.
    """
    kls = values[:, COLUMNS.index("kl")]
    kls = kls[np.isfinite(kls)]
    decoded = np.delete(values, COLUMNS.index("kl"), axis=1)[int(first == 0) :]
    names = [name for name in COLUMNS if name != "kl"]
    sums = dict(zip(names, decoded.sum(axis=0, dtype=np.float64).tolist(), strict=True))

    def ratio(over: float, under: float) -> float | None:
        return over / under if under else None

    asked = sum(sums[name] for name in REQUESTS)
    return {
        "tokens": len(values),
        "tokens_per_s": ratio(1e3 * len(decoded), sum(sums[name] for name in WALL)),
        "engine_tokens_per_s": ratio(1e3 * len(decoded), sums["total_ms"]),
        "hit_ratio": ratio(sums["hits"], asked),
        "bytes_per_token": ratio(sums["bytes"], len(decoded)),
        "stall_share": ratio(sum(sums[cause] for cause in STALLS), sums["total_ms"]),
        "kl_mean": float(kls.mean(dtype=np.float64)) if len(kls) else None,
    }


def summary(
    reports: Sequence[TokenReport], *, setup_ms: float, peak_bytes: int, timing: str
) -> dict[str, Any]:
    """A run in figures, see `moelab.Run.summary`; None where there is nothing to divide."""
    values, since, decoded = table(reports), since_device(reports), reports[1:]
    whole, timed = figures(values), figures(values[since:], first=since)
    times = [r.total_ms for r in reports[max(1, since) :]]
    hit, load = (sum(getattr(r, n) for r in decoded) for n in ("hit_bytes", "load_bytes"))
    free = sum(r.free_hits for r in decoded)
    return {
        "tokens": len(reports),
        "tokens_per_s": timed["tokens_per_s"],
        "engine_tokens_per_s": timed["engine_tokens_per_s"],
        "setup_ms": setup_ms,
        "setup_bytes": sum(r.setup_bytes for r in reports),
        "ttft_ms": reports[0].total_ms if reports else None,
        "tpot_ms_median": float(np.median(times)) if times else None,
        "tpot_ms_p99": float(np.quantile(times, 0.99)) if times else None,
        "hit_ratio": whole["hit_ratio"],
        **({"free_hits": free} if free else {}),
        "byte_hit_ratio": hit / (hit + load) if hit + load else None,
        "bytes_per_token": whole["bytes_per_token"],
        "stall_share": timed["stall_share"],
        **{n: sum(getattr(r, n) for r in decoded) for n in _SUMMED},
        "kl_mean": whole["kl_mean"],
        "peak_resident_bytes": peak_bytes,
        "budget_bytes": reports[-1].budget_bytes if reports else 0,
        "device": reports[-1].device if reports else "",
        "timing": timing,
    }


def titled(title: str, *, outpaced: bool) -> str:
    """A device's title, with a word where this machine's disk is too slow to stand for it.

    Examples
    --------
    >>> titled("NVMe SSD, 3 GB/s", outpaced=True)
    'NVMe SSD, 3 GB/s, faster than this disk'
    """
    return f"{title}, faster than this disk" if outpaced else title
