"""Why an expert was evicted, found out afterwards: the run's own trace is decided once more.

A replay of a run's trace decides exactly what the run decided, so a scheduler that asks its
strategy for the terms of an eviction learns what it went by, and a run that nobody asks about costs
nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from moelab.replays.replay import replay
from moelab.scheduling.cache import Cache
from moelab.scheduling.events import NOT_KEPT, LayerPlan
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.strategy import part_title
from moelab.scheduling.stream import Key, View
from moelab.scheduling.trace import Trace
from moelab.scheduling.victims import Victims

SHOWN = 8
"""Survivors told of at most: those who would have been next."""

ASKED_AT_MOST = 1_000_000
"""Evictions times residents a whole run is asked about: beyond it, every n-th eviction."""


def reasons(trace: Trace, wanted: Collection[int]) -> dict[int, dict[str, Any]]:
    """The terms of the evictions with these numbers, counted from 0 in the order of the log.

    Parameters
    ----------
    trace
        Of a run, in memory: it carries the strategy with what it had learnt.
    wanted
        Numbers of evictions; those the trace does not reach are left out.

    Returns
    -------
    dict
        By number: ``policy``, ``terms`` (names), ``texts`` (a line about each), ``victim`` and
        ``survivors`` as [layer, expert, bits, value of each term], those nearest to going first;
        a value that is not finite is None. ``tie``: how many of these scored the same as the
        victim, where the least recently used leaves. ``error`` is what a policy raised when asked.

    Examples
    --------
    >>> reasons(run.trace, {0})[0]["victim"]  # doctest: +SKIP
    [3, 17, 16, 212.0]
    """
    found: dict[int, dict[str, Any]] = {}
    if wanted:
        with contextlib.suppress(_EnoughError):
            replay(trace, make=functools.partial(_Asking, frozenset(wanted), found))
    return found


def until(trace: Trace, passes: int) -> Trace:
    """The trace of the first passes, which does not grow."""
    end = trace.shape.steps_of(passes)
    resident, kept = list(trace.resident), dict(trace.kept)
    return Trace(trace.shape, trace.steps[:end], list(trace.changes), resident, kept=kept)


def by_row(trace: Trace, rows: np.ndarray) -> dict[str, dict[str, Any]]:
    """The `reasons` of a whole run by row of its log; of too many evictions every n-th.

    Parameters
    ----------
    trace
        Of the run.
    rows
        Indices of its evict events.
    """
    budget = max((c.knobs.budget_bytes for c in trace.changes), default=0)
    held = max(1, budget // max(trace.shape.nbytes.values()))
    most = min(len(rows), 1 + ASKED_AT_MOST // held)
    numbers = np.unique(np.linspace(0, len(rows) - 1, most).astype(int)) if most else []
    found = reasons(trace, [int(n) for n in numbers])
    return {str(rows[n]): {"row": int(rows[n]), **entry} for n, entry in found.items()}


class _Asking(Scheduler):
    """Decides as its parent does, and asks at the evictions that are wanted."""

    def __init__(self, wanted: frozenset[int], found: dict[int, dict[str, Any]], *own: Any) -> None:
        self._wanted, self._last, self._found = wanted, max(wanted), found
        self._count = 0
        super().__init__(*own)

    def _evict(self, key: Key, cause: int, plan: LayerPlan, victims: Victims | None = None) -> int:
        if self._count in self._wanted:
            others = victims.allowed(Cache.NEEDED | Cache.PINNED) if victims else iter(())
            if cause == NOT_KEPT:
                others = iter(self.view.residents(self.shape.place(key)[0]).tolist())
            survivors = list(itertools.islice((k for k in others if k != key), SHOWN))
            # Asked in a copy: a policy of somebody's own may keep books when it is asked.
            policy = copy.deepcopy(self.strategy.evict)
            self._found[self._count] = _reason(policy, self.view, [key, *survivors])
        self._count += 1
        if self._count > self._last:
            raise _EnoughError
        return super()._evict(key, cause, plan, victims)


class _EnoughError(Exception):
    """All that was wanted is known."""


def _reason(policy: Any, view: View, keys: list[Key]) -> dict[str, Any]:
    """What a policy says of its victim, the first, and of those who would have been next."""
    rows = [[*view.shape.place(key), int(view.bits[key])] for key in keys]
    told: dict[str, Any] = {"policy": part_title(policy), "terms": [], "texts": [], "error": ""}
    told |= {"victim": rows[0], "survivors": rows[1:], "tie": 0}
    try:
        score = policy.score(view)[keys]
        told["tie"] = int((score[1:] == score[0]).sum())
        terms: Mapping[str, np.ndarray] = policy.terms(view)
        texts = getattr(policy, "explained", {})
        told |= {"terms": list(terms), "texts": [str(texts.get(name, "")) for name in terms]}
        for key, row in zip(keys, rows, strict=True):
            row += [_finite(float(values[key])) for values in terms.values()]
    except Exception as error:  # noqa: BLE001, a policy of somebody's own: theirs to see
        told["error"] = f"{type(error).__name__}: {error}"
        told |= {"terms": [], "texts": [], "victim": rows[0][:3], "survivors": []}
    return told


def _finite(value: float) -> float | None:
    """A term as JSON has it, in six digits."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
