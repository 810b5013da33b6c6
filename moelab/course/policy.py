"""Exercises of notebook 05: an eviction rule, a guess, and a router that is led a little."""

from __future__ import annotations

from typing import Any

import numpy as np

import moelab
from moelab.course.verdict import RefusedError, Said, a_number, exercise, kl_of, opened, recorded

ROOMS = (18, 24, 36)
"""Experts in memory at which an eviction rule is tried."""
FEWER, MORE = 0.25, 0.2
"""Loads on demand that prefetching is to spare, and bytes it may read more."""
KL_BORNE = 0.05


@exercise("05.1")
def beats_lfu(answer: Any) -> Said:
    """An `Evict` that hits more often than LFU, on average over three budgets."""
    from moelab.replays.bounds import belady_hits
    from moelab.scheduling.strategy import Knobs

    mine = _with("evict", answer)
    with opened() as lab:
        trace, one = recorded(lab), lab._shape.nbytes[16]
    rows, hits = [], []
    for room in ROOMS:
        knobs = Knobs(room * one)
        pair = [moelab.replay(trace, s, knobs).hit_ratio for s in (mine, moelab.strategies.lfu())]
        best = np.divide(*belady_hits(trace, room))
        rows.append(f"{room} experts: {pair[0]:.1%}, LFU {pair[1]:.1%}, Belady {best:.1%}")
        hits.append(pair)
    ours, lfu = np.mean(hits, axis=0)
    said = f"yours hits {ours:.1%} on average, LFU {lfu:.1%} ({'; '.join(rows)})"
    if ours <= lfu:
        return False, f"{said}. Beat LFU on average: think of whose turn comes last."
    return True, f"{said}."


@exercise("05.2")
def guesses_that_pay(answer: Any) -> Said:
    """A `Prefetch` that spares loads without reading much more."""
    from moelab.scheduling.strategy import Prefetch

    strategies = [_with("prefetch", part) for part in (Prefetch(), answer)]
    with opened() as lab:
        trace, knobs = recorded(lab, look_ahead=3), lab.settings.knobs()
    none, mine = (moelab.replay(trace, strategy, knobs) for strategy in strategies)
    fewer = 1 - mine.counts["load"] / none.counts["load"]
    more = mine.bytes / none.bytes - 1
    said = (
        f"loads on demand: {none.counts['load']} without, {mine.counts['load']} with yours "
        f"({-fewer:+.0%}); {mine.counts['prefetch']} prefetches, bytes read {more:+.0%}"
    )
    if fewer < FEWER:
        return False, f"{said}. Spare {FEWER:.0%} or more: who is asked early and not there yet?"
    if more > MORE:
        return False, f"{said}. Read {MORE:.0%} more at most: leave out the doubtful guesses."
    return True, f"{said}."


@exercise("05.3")
def half_way_to_belady(answer: Any) -> Said:
    """A head start λ that hits half-way between LRU and Belady at a small KL."""
    from moelab.replays.bounds import belady_hits

    lam = a_number(answer, "λ from 0 to 1")
    with opened(route="cache_prior") as lab:
        lab.update(lam=lam)
        led, kl = _hits(lab).summary()["hit_ratio"], kl_of(lab)
    with opened() as lab:
        plain = _hits(lab)
        best = np.divide(*belady_hits(plain.trace, lab.info()["budget_experts"]))
    lru = plain.summary()["hit_ratio"]
    said = (
        f"λ = {lam:g} hits {led:.1%} at KL {kl:.3f}; LRU {lru:.1%}, Belady on LRU's own "
        f"routing {best:.1%}"
    )
    if led < (lru + best) / 2:
        return False, f"{said}. Half-way is {(lru + best) / 2:.1%}: lead the router more."
    if kl > KL_BORNE:
        return False, f"{said}. KL is to stay under {KL_BORNE}: lead it less."
    return True, f"{said}. Belady's bound holds for a fixed routing; yours is not."


def _hits(lab: moelab.Lab) -> moelab.Run:
    prompt = "It is a truth universally acknowledged, that"
    return lab.generate(prompt, max_new_tokens=40, ignore_eos=True, seed=1)


def _with(role: str, part: Any) -> moelab.Strategy:
    """LRU, nothing ahead, with one part taken by the answer."""
    from moelab.strategies import Prefetch, lru

    try:
        return lru().replace(prefetch=Prefetch()).replace(**{role: part})
    except TypeError as error:
        raise RefusedError(str(error)) from error
