"""Exercises of notebook 02: a loss that fits, a buffer where LRU wins, guesses that were used."""

from __future__ import annotations

from typing import Any

import moelab
from moelab.course.verdict import RefusedError, Said, a_number, exercise, is_run, opened, recorded

SHARE = 0.7
"""Of the bytes of all experts at 4 bits."""
STEP = 0.01
"""P is to be the least to within this."""


@exercise("02.1")
def least_loss_that_fits(answer: Any) -> Said:
    """The smallest tolerated loss with which all experts fit into `SHARE` of what 4 bits take."""
    p = a_number(answer, "the tolerated loss P, 0.02 is 2 %")
    with opened(strategy="edgemoe", tolerated=p) as lab:
        room = SHARE * lab._shape.all_bytes(4)
        size = _all_bytes(lab)
        lab.update(tolerated=max(0.0, p - STEP))
        below = _all_bytes(lab)
    said = f"with P = {p:.1%} all experts take {size / 1e6:.2f} MB of the {room / 1e6:.2f} MB"
    if size > room:
        return False, f"{said}: too much. Tolerate more."
    if below <= room:
        return False, f"{said}, but so they do with P = {max(0.0, p - STEP):.1%}. Tolerate less."
    return True, f"{said}; with P = {p - STEP:.1%} it would be {below / 1e6:.2f} MB."


def _all_bytes(lab: moelab.Lab) -> int:
    """Bytes of every expert at the bits that the strategy asks for it."""
    from moelab.scheduling.cache import Cache
    from moelab.scheduling.strategy import View

    now, shape = lab.settings, lab._shape
    view = View(shape, now.knobs(), Cache(shape, now.budget_bytes))
    keys = ((layer, e) for layer, count in enumerate(shape.experts) for e in range(count))
    return sum(shape.nbytes[now.strategy.allocate.bits(key, view)] for key in keys)


@exercise("02.2")
def where_lru_wins(answer: Any) -> Said:
    """A buffer size at which LRU hits more often than EdgeMoE's rule as described."""
    from moelab.scheduling.strategy import Knobs
    from moelab.strategies import make
    from moelab.strategies.edgemoe import FrequencyOverDistance

    room = a_number(answer, "experts in the buffer")
    with opened(bits=4) as lab:
        least, most = lab.info()["minimum_budget_bytes"], lab._shape.all_bytes(4)
        one, trace = lab._shape.nbytes[4], recorded(lab, tokens=40)
    if not least <= room * one <= most:
        raise RefusedError(
            f"a buffer of {room:g} experts: give {-(-least // one)} to {most // one}"
        )
    lru, plain = make("lru"), make("lru").replace(evict=FrequencyOverDistance())
    hits = [moelab.replay(trace, s, Knobs(int(room * one), bits=4)).hit_ratio for s in (lru, plain)]
    said = f"with room for {room:g} experts LRU hits {hits[0]:.1%}, EdgeMoE's rule {hits[1]:.1%}"
    if hits[0] <= hits[1]:
        return False, f"{said}. Where does the rule know no more than the order of use?"
    return True, f"{said}. No rule wins everywhere."


@exercise("02.3")
def guesses_used(answer: Any, *, run: moelab.Run) -> Said:
    """The share of preloaded experts that a token used, of the decoded tokens of a run."""
    share = a_number(answer, "a share, 0.5 is half")
    events = is_run(run, least=8).events.query("token > 0")
    made = int((events["kind"] == "prefetch").sum())
    if not made:
        raise RefusedError("this run preloaded nothing; take one with EdgeMoE's prefetch")
    used = int(((events["kind"] == "hit") & (events["cause"] == "prefetched")).sum())
    said = f"{used} of {made} preloaded experts were used"
    if abs(share - used / made) > 0.01:
        return False, f"{share:.0%} is not it. Count prefetch events, and hits caused by them."
    return True, f"{said}: {used / made:.0%}. The other bytes were read for nothing."
