"""Why an expert was evicted, found out afterwards: the run's own trace is decided once more.

A replay of a run's trace decides exactly what the run decided, so a scheduler that stops at an
eviction and asks the strategy for its terms learns what it went by, and a run that nobody asks
about costs nothing. It is a copy of the policy that is asked, made before it chose: policies may
keep books when they are asked, and then their next choice would be another.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import heapq
import math
from collections import deque
from collections.abc import Callable, Collection
from itertools import chain
from typing import Any

import numpy as np

from moelab.replays.replay import replay
from moelab.scheduling.parts import Evict
from moelab.scheduling.plan import Drop
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.stream import Key, View
from moelab.scheduling.trace import Trace
from moelab.settings import part_title

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
        a value that is not finite is None. ``error`` is what a policy raised when it was asked.

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


def until(trace: Trace, tokens: int) -> Trace:
    """The trace of the first tokens, which does not grow."""
    end = tokens * trace.shape.layers
    return Trace(trace.shape, trace.steps[:end], list(trace.changes), list(trace.resident))


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
        self._count, self._asked = 0, None
        super().__init__(*own)

    def _ask_victim(self, test: Callable[[Key], bool]) -> Key | None:
        if self._count in self._wanted:
            self._asked = _copied(self.strategy.evict), test
        return super()._ask_victim(test)

    def _drop(self, key: Key, cause: str) -> Drop:
        if self._count in self._wanted:
            mine = lambda k: cause == "not kept" and k[0] == key[0]  # noqa: E731
            policy, allowed = self._asked or (_copied(self.strategy.evict), mine)
            self._found[self._count] = _reason(policy, self.view, key, allowed)
        self._count, self._asked = self._count + 1, None
        if self._count > self._last:
            raise _EnoughError
        return super()._drop(key, cause)


class _EnoughError(Exception):
    """All that was wanted is known."""


def _reason(policy: Any, view: View, victim: Key, allowed: Callable[[Key], bool]) -> dict[str, Any]:
    """What a policy says of its victim and of those who would have been next."""
    told: dict[str, Any] = {"policy": part_title(policy), "terms": [], "texts": [], "error": ""}
    told |= {"victim": [*victim, view.cache.bits(victim)], "survivors": []}
    try:
        terms = {name: float(value) for name, value in policy.why(victim, view).items()}
        told["victim"] += map(_finite, terms.values())
        texts = getattr(policy, "explained", {})
        told |= {"terms": list(terms), "texts": [str(texts.get(name, "")) for name in terms]}
        for key in _next(policy, view, lambda k: k != victim and allowed(k)):
            own = policy.why(key, view)
            values = [_finite(own.get(name, math.nan)) for name in terms]
            told["survivors"].append([*key, view.cache.bits(key), *values])
    except Exception as error:  # noqa: BLE001, a policy of somebody's own: theirs to see
        told["error"] = f"{type(error).__name__}: {error}"
    return told


def _next(policy: Any, view: View, allowed: Callable[[Key], bool]) -> list[Key]:
    """Who would have gone next, and next but one: the policy chooses among ever fewer."""
    free = [k for k in view.cache if allowed(k) and k not in view.keep]
    if getattr(type(policy), "victim", None) is Evict.victim:
        return heapq.nsmallest(SHOWN, free, key=lambda k: policy.priority(k, view))
    left, out = set(free), []
    while left and len(out) < SHOWN:
        key = policy.victim(left.__contains__, view)
        if key not in left:
            break
        left.discard(key)
        out.append(key)
    return out


def _copied(policy: Any) -> Any:
    """A deep copy; what holds numbers only, by key or in a row, is copied as a whole."""
    plain = {id(own): copy.copy(own) for own in vars(policy).values() if _flat(own)}
    return copy.deepcopy(policy, plain)


def _flat(own: Any) -> bool:
    if not isinstance(own, (dict, list, set, deque)):
        return False
    kinds = set(map(type, own.values() if isinstance(own, dict) else own))
    if kinds == {tuple} and not isinstance(own, dict):  # experts' keys
        kinds = set(map(type, chain.from_iterable(own)))
    return kinds <= {int, float, str, bool}


def _finite(value: float) -> float | None:
    """A term as JSON has it, in six digits."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
