"""Where the time and the bytes of some tokens went, and the sentence that says so.

An `Account` is means per token over a stretch of tokens of one device: the parts of a token's time,
what became of its requests, what was read, and what became of the bytes that were read ahead. It
knows figures and events only; the sentences are the same live, in a report and in a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moelab.runs.tokens import COLUMNS, REQUESTS, STALLS
from moelab.scheduling import events as e
from moelab.scheduling.strategy import part_title
from moelab.spelling import brief, size
from moelab.strategies import lru

LRU = part_title(lru().evict)
FATES = ("right", "late", "wasted", "waiting")
"""What may become of the bytes of a prefetch."""
LEAST_MS = 0.5
"""A change of a part of a token's time below this is not worth a word."""
SEEN_MS = 0.005
"""A part below this is 0.00 ms where it is written."""
_WORDS = {
    "on demand": "for loads on demand",
    "prefetch late": "for late prefetches",
    "evict": "to evict what is still on its way",
}


class Limits(NamedTuple):
    """What a strategy had to do with: its budget, what one token needs, and who evicts."""

    budget_bytes: int
    cycle_bytes: int
    evict: str


@dataclass(frozen=True)
class Account:
    """Means per token.

    Attributes
    ----------
    tokens
        How many they are means of; of none all are 0.
    ms
        Compute, deciding and waiting by cause; they add up to a token's time.
    requests
        By what became of them: hits, late, loads, skips, substitutes.
    bytes
        Read, prefetches too.
    guesses
        Bytes read ahead: ``right`` in time, ``late``, ``wasted`` (left before they were used) and
        ``waiting`` to be used when the last of these tokens was complete.
    bandwidth
        Bytes a second while something was read; None where nothing was.
    free
        Of the hits, those of experts without weights: 0 bytes.
    """

    tokens: int
    ms: Mapping[str, float]
    requests: Mapping[str, float]
    bytes: float
    guesses: Mapping[str, float]
    bandwidth: float | None
    free: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray, rows: np.ndarray) -> Account:
        """The account of some tokens.

        Parameters
        ----------
        values
            Their figures [T, C], columns as in `COLUMNS`.
        rows
            Their events, records of `moelab.scheduling.events.DTYPE`.
        """
        count = max(1, len(values))
        sums = values.sum(axis=0, dtype=np.float64) / count
        mean = dict(zip(COLUMNS, sums.tolist(), strict=True))
        parts = {"compute": mean["compute_ms"], "deciding": mean["deciding_ms"]}
        return cls(
            len(values),
            parts | {cause: mean[cause] for cause in STALLS},
            {name: mean[name] for name in REQUESTS},
            mean["bytes"],
            {name: nbytes / count for name, nbytes in guesses(rows).items()},
            bandwidth(rows),
            int(((rows["kind"] == e.HIT) & (rows["bits"] == 0)).sum()) / count,
        )

    @property
    def total_ms(self) -> float:
        """A token's time."""
        return sum(self.ms.values())

    @property
    def wait_ms(self) -> float:
        """The part of it that is waiting."""
        return sum(self.ms[cause] for cause in STALLS)

    def sentence(self, limits: Limits) -> str:
        """Why the speed is what it is.

        Examples
        --------
        ``disk-bound: 34 of 40 ms wait for loads on demand; 12 MB a token at 340 MB/s; below one
        token's cycle (14.2 MB), LRU cannot hit``
        """
        if not self.tokens:
            return "no token has been decoded yet"
        parts = {
            "disk-bound": (self.wait_ms, self._waiting()),
            "compute-bound": (self.ms["compute"], "are compute"),
            "bound by deciding": (self.ms["deciding"], "are the strategy's own time"),
        }
        name = max(parts, key=lambda bound: parts[bound][0])
        part, words = parts[name]
        said = [f"{name}: {brief(part)} of {brief(self.total_ms)} ms {words}"]
        if name != "disk-bound" and self.wait_ms >= LEAST_MS:
            said[0] += f", {brief(self.wait_ms)} {self._waiting()}"
        if self.bytes:
            speed = f" at {size(self.bandwidth)}/s" if self.bandwidth else ""
            said.append(f"{size(self.bytes)} a token{speed}")
        return "; ".join([*said, self._reason(limits)])

    def _waiting(self) -> str:
        """What is waited for, each cause with its own time where there are several."""
        causes = sorted(STALLS, key=self.ms.__getitem__, reverse=True)
        several = [cause for cause in causes if self.ms[cause] >= SEEN_MS]
        if len(several) < 2:
            return f"wait {_WORDS[causes[0]]}"
        return "wait: " + ", ".join(f"{brief(self.ms[c])} {_WORDS[c]}" for c in several)

    def _reason(self, limits: Limits) -> str:
        asked, cycle = sum(self.requests.values()), size(limits.cycle_bytes)
        hits = self.requests["hits"] / asked if asked else 0.0
        if limits.budget_bytes < limits.cycle_bytes:
            never = ", LRU cannot hit" if limits.evict == LRU and not hits else ""
            return f"the budget is below one token's cycle ({cycle}){never}"
        late = self.requests["late"] / asked if asked else 0.0
        free = f" ({self.free / asked:.0%} of 0 bytes)" if self.free else ""
        return f"{hits:.0%} of the requests hit{free}" + f", {late:.0%} come late" * (late >= 0.005)

    def change_to(self, after: Account, what: str) -> str:
        """What a change did: ``prefetch ahead off -> +1: wait -3 ms, wasted reads +1.2 MB``."""
        if not (self.tokens and after.tokens):
            return f"{what}: no token on both sides of it yet"
        parts = {"compute": "compute", "deciding": "deciding"}
        moved = {word: after.ms[part] - self.ms[part] for part, word in parts.items()}
        moved |= {"wait": after.wait_ms - self.wait_ms}
        told = [
            f"{w} {_signed(ms, f'{brief(abs(ms), 2)} ms')}"
            for w, ms in moved.items()
            if abs(ms) >= LEAST_MS
        ]
        wasted = after.guesses["wasted"] - self.guesses["wasted"]
        if wasted:
            told.append(f"wasted reads {_signed(wasted, size(abs(wasted)))}")
        return f"{what}: " + (", ".join(told) or f"no part of a token moved by {LEAST_MS:g} ms")


def _signed(value: float, words: str) -> str:
    return ("\N{MINUS SIGN}" if value < 0 else "+") + words


def guesses(rows: np.ndarray) -> dict[str, int]:
    """Bytes of the prefetches among some events, by what became of each copy.

    What is resident before the first token, or after a change of settings, is no guess.
    """
    touches = rows[np.isin(rows["kind"], (e.PREFETCH, e.LOAD, e.HIT, e.SUBSTITUTE, e.EVICT))]
    key = touches["layer"].astype(np.int64) << 16 | touches["expert"]
    touches = touches[order := np.argsort(key, kind="stable")]  # of one expert, then of the next
    key = key[order]
    made = np.flatnonzero((touches["kind"] == e.PREFETCH) & (touches["at"] >= 0))
    then = touches[np.minimum(made + 1, len(touches) - 1)]
    cases = {
        "waiting": np.append(key, -1)[made + 1] != key[made],
        "late": (then["kind"] == e.HIT) & (then["cause"] == e.LATE),
        "right": np.isin(then["kind"], (e.HIT, e.SUBSTITUTE)),
    }
    fate = np.select(list(cases.values()), list(cases), "wasted")
    return {name: int(touches["bytes"][made[fate == name]].sum()) for name in FATES}


def bandwidth(rows: np.ndarray) -> float | None:
    """Bytes a second of the reads among some events, over the time in which any was going on."""
    reads = rows[np.isin(rows["kind"], (e.LOAD, e.PREFETCH)) & (rows["dur_ms"] > 0)]
    reads = reads[np.argsort(reads["start_ms"])]
    begins, ends = reads["start_ms"], reads["start_ms"] + reads["dur_ms"]
    before = np.maximum.accumulate(np.append(-np.inf, ends))[:-1]  # until then one was going on
    busy = np.clip(ends - np.maximum(begins, before), 0, None).sum()
    return float(1e3 * reads["bytes"].sum() / busy) if busy else None


def ending(ended: str, tokens: int, asked: int) -> str:
    """Why a run ended, in a sentence: ``end of text at 72 of 200 tokens``."""
    if ended == "length":
        return f"all {asked} tokens asked for"
    return f"{ended} at {tokens} of {asked} tokens" if ended else f"{tokens} of {asked} tokens"


ENDINGS: Sequence[str] = ("", "end of text", "length", "stopped", "failed")
"""Why a run ended; the first while it goes on, and in files of older versions."""
