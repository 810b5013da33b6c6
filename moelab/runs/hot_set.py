"""A hot set: which experts earlier runs of a model used most, in memory before the next run.

`moelab.open(..., hot_set=True)` begins with the most used experts that fit, and counts every run
for the next time. What was counted lies in the user's cache folder, one small file a model; a run
fades by a tenth with each that follows, so that the set follows what is asked for; repeats of a
what-if are runs like others. Nothing is pinned: from the first token on the strategy decides over
these experts as over any other, and one that says itself who is there at the start goes before.

Whether it helps hangs on the prompt: a long one uses so many experts that little of the set is left
when the first token is decoded. `HotSet.helps` replays the next run with it and without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moelab.replays.replay import Replay, replay
from moelab.runs.session import Session
from moelab.scheduling.events import LOAD
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Knobs, Shape
from moelab.scheduling.trace import Trace
from moelab.scheduling.writing import write_atomically
from moelab.store.paths import cache_dir
from moelab.store.store import Store

FORMAT = 1
FADES = 0.9
"""What is left of a run's uses when another has been counted."""
MOST_BYTES = 64 * 2**20
_UNUSABLE = (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError)


class Helps(NamedTuple):
    """One run with a hot set and without: hits over its first tokens, by replay.

    Attributes
    ----------
    tokens
        Decoded tokens that were looked at, after the prompt.
    cold, warm
        Hits per request of these tokens without the set, and with it.
    cold_loads, warm_loads
        Experts loaded on demand, those of the prompt included.
    fetched
        Experts of the set that were read before the run.
    """

    tokens: int
    cold: float
    warm: float
    cold_loads: int
    warm_loads: int
    fetched: int

    def __str__(self) -> str:
        return (
            f"hits over the first {self.tokens} tokens {self.cold:.1%} without the hot set, "
            f"{self.warm:.1%} with it; loads on demand, prompt included, {self.cold_loads} and "
            f"{self.warm_loads}; {self.fetched} experts were read before"
        )


class HotSet:
    """Uses of each expert of a model in earlier runs.

    Parameters
    ----------
    shape
        Of the model.
    path
        Where they are kept; a file that cannot be used is named in a warning and begun anew.
    """

    def __init__(self, shape: Shape, path: Path) -> None:
        self.shape, self.path = shape, path
        self.uses = np.zeros(shape.n)
        if path.exists():
            try:
                self.uses = _read(path, shape)
            except _UNUSABLE as error:
                warnings.warn(f"the hot set {path} is begun anew: {error}", stacklevel=3)

    @classmethod
    def of(cls, store: Store) -> HotSet:
        """That of a store's model, in the user's cache folder."""
        return cls(store.shape, cache_dir() / "hot_sets" / f"{store.manifest.source_digest}.json")

    def learn(self, trace: Trace) -> None:
        """Count a run, each token that chose an expert once."""
        self.uses *= FADES
        for given in trace.learnt():
            experts = np.concatenate([np.array(row, int) for row in given.router_experts])
            np.add.at(self.uses, self.shape.offset[given.layer] + experts, 1)

    def save(self) -> Path:
        """Write it; returns where.

        Raises
        ------
        OSError
            The folder cannot be written; the error names the file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        doc = {"format": FORMAT, "experts": self.shape.experts, "uses": self.uses.round(3).tolist()}
        write_atomically(self.path, json.dumps(doc, separators=(",", ":")).encode())
        return self.path

    def warmed(self, strategy: Strategy, knobs: Knobs) -> Scheduler:
        """A scheduler with the most used experts in its cache, as many as its budget takes.

        They are at the bits asked for, and within the strategy's shares; the most used count as
        used last.
        """
        order = np.argsort(-self.uses, kind="stable")
        used = order[self.uses[order] > 0].tolist()
        first, live = (Scheduler(self.shape, strategy, knobs) for _ in range(2))
        allocate, view, cache = first.strategy.allocate, first.view, first.cache
        for key in used:
            layer, bits = int(self.shape.layer_of[key]), int(view.asked[key])
            shares = (
                (allocate.layer_bytes(layer, view), cache.layer_bytes[layer]),
                (allocate.tier_bytes(bits, view), cache.tier_bytes[bits]),
            )
            size = self.shape.size(key, bits)
            if all(most is None or have + size <= most for most, have in shares):
                first.warm([(key, bits)])
        live.warm(reversed(cache.items()))
        return live

    def begin(self, session: Session) -> None:
        """Put the set into memory, and count this session's runs from here on."""
        settings = session.settings
        session.stand(settings, self.warmed(settings.strategy, settings.knobs()))
        session.heard = self._heard

    def helps(self, trace: Trace, strategy: Strategy, knobs: Knobs, *, tokens: int = 32) -> Helps:
        """Replay the beginning of a run that came after, from an empty cache and from this set.

        Parameters
        ----------
        trace
            Of a run that is not among those counted (``run.trace``).
        strategy, knobs
            Under which it is decided.
        tokens
            Decoded tokens to look at, after the prompt.
        """
        shape = trace.shape
        end = shape.steps_of(1 + tokens)
        head = dataclasses.replace(trace, steps=trace.steps[:end], resident=[])
        resident = self.warmed(strategy, knobs).cache.items()
        cold, warm = (
            replay(dataclasses.replace(head, resident=there), strategy, knobs)
            for there in ([], resident)
        )
        seen = sum(given.layer == shape.path().start and not given.prefill for given in head.steps)
        loads = {"cold_loads": _loads(cold), "warm_loads": _loads(warm)}
        return Helps(seen, cold.hit_ratio, warm.hit_ratio, fetched=len(resident), **loads)

    def _heard(self, trace: Trace) -> None:
        try:
            self.learn(trace)
            with contextlib.suppress(OSError):  # a cache that cannot be written: of this session
                self.save()
        except Exception as error:  # noqa: BLE001 the run is whole, whatever becomes of this
            warnings.warn(f"the hot set did not learn from this run: {error}", stacklevel=1)


def _loads(found: Replay) -> int:
    return sum(row[0] == LOAD for row in found.rows)


def _read(path: Path, shape: Shape) -> np.ndarray:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    doc = json.loads(path.read_text("utf-8"))
    if doc["format"] != FORMAT or tuple(doc["experts"]) != shape.experts:
        raise ValueError("it is of another format or model")
    if any(type(value) not in (int, float) for value in doc["uses"]):
        raise ValueError("a use is no number")
    uses = np.array(doc["uses"], float)
    if uses.shape != (shape.n,) or not np.isfinite(uses).all() or (uses < 0).any():
        raise ValueError(f"its uses are not {shape.n} numbers from 0 on")
    return uses
