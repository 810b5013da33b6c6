"""Exercises of notebooks 02, 03 and 04: what EdgeMoE, HOBBIT and SwapMoE decide."""

from __future__ import annotations

import dataclasses
from typing import Any

import moelab
from moelab.course.verdict import (
    RefusedError,
    Said,
    a_number,
    exercise,
    given,
    hit_ratio,
    is_run,
    judged,
    kl_of,
    opened,
    recorded,
    settings,
    unseen,
    written,
)

SHARE, STEP = 0.7, 0.01
"""Of the bytes of all experts at 4 bits; P is to be the least to within a step."""
SAVED, WORSE = 0.15, 2.0
"""Bytes to be saved against the calibrated thresholds, and how many times their KL is borne."""
NEAR, BETTER = 1.1, 4.0
"""How near to the planner a hand-made plan is to come; how many times better the KL is to be."""


@exercise("02.1")
def least_loss_that_fits(answer: Any) -> Said:
    """The smallest tolerated loss with which all experts fit into `SHARE` of what 4 bits take."""
    p = a_number(answer, "the tolerated loss P, 0.02 is 2 %")
    less = max(0.0, p - STEP)
    with opened(strategy="edgemoe", tolerated=p) as lab:
        room, size = SHARE * lab._shape.all_bytes(4), _all_bytes(lab)
        lab.update(tolerated=less)
        below = _all_bytes(lab)
    return judged(
        f"with P = {p:.1%} all experts take {size / 1e6:.2f} MB of the {room / 1e6:.2f} MB, with "
        f"P = {less:.1%} {below / 1e6:.2f} MB",
        (size > room, "Tolerate more."),
        (below <= room, "Tolerate less."),
    )


def _all_bytes(lab: moelab.Lab) -> int:
    """Bytes of every expert at the bits that the strategy asks for it."""
    from moelab.scheduling.budget import asked_bits
    from moelab.scheduling.cache import Cache
    from moelab.scheduling.stream import View

    now, shape = lab.settings, lab._shape
    view = View(shape, now.knobs(), Cache(shape, now.budget_bytes))
    return sum(shape.nbytes[bits] for bits in asked_bits(now.strategy, view).tolist())


@exercise("02.2")
def where_lru_wins(answer: Any) -> Said:
    """A buffer size at which LRU hits more often than EdgeMoE's rule as described."""
    from moelab.strategies import make
    from moelab.strategies.edgemoe import FrequencyOverDistance

    room = a_number(answer, "experts in the buffer", whole=True)
    with opened(bits=4) as lab:
        least, most = lab.info()["minimum_budget_bytes"], lab._shape.all_bytes(4)
        one, trace = lab._shape.nbytes[4], recorded(lab, tokens=40)
    if not least <= room * one <= most:
        raise RefusedError(
            f"a buffer of {room:g} experts: give {-(-least // one)} to {most // one}"
        )
    both = make("lru"), make("lru").replace(evict=FrequencyOverDistance())
    lru, rule = (hit_ratio(trace, strategy, int(room * one), 4) for strategy in both)
    return judged(
        f"with room for {room:g} experts LRU hits {lru:.1%}, EdgeMoE's rule {rule:.1%}",
        (lru <= rule, "Where does the rule know no more than the order of use?"),
        right="No rule wins everywhere.",
    )


@exercise("02.3")
def guesses_used(answer: Any, *, run: moelab.Run) -> Said:
    """The share of preloaded experts that a token used, of the decoded tokens of a run."""
    share = a_number(answer, "a share, 0.5 is half")
    events = is_run(run, least=8).events.query("token > 0")
    made = int((events["kind"] == "prefetch").sum())
    if not made:
        raise RefusedError("this run preloaded nothing; take one with EdgeMoE's prefetch")
    from moelab.scheduling.events import GUESSED

    used = int(((events["kind"] == "hit") & events["cause"].isin(GUESSED)).sum())
    if abs(share - used / made) > 0.01:
        return False, f"{share:.0%} is not it. Count prefetches, and hits by them, late ones too."
    said = f"{used} of {made} preloaded experts were used: {used / made:.0%}"
    return judged(said, right="The other bytes were read for nothing.")


@exercise("03.1")
def better_thresholds(answer: Any) -> Said:
    """T1 and T2 that read less than the calibrated ones at about the same KL."""
    mine = settings(answer, example := '{"t1": 0.5, "t2": 0.7}')
    if mine.keys() != {"t1", "t2"}:
        raise RefusedError(f"give t1 and t2, nothing else: {example}")
    with opened(strategy="hobbit", prefetch=0) as lab:
        trace = recorded(lab)
        calibrated = _bytes_and_kl(lab, trace)
        lab.update(**mine)
        ours = _bytes_and_kl(lab, trace)
    saved, worse = 1 - ours[0] / calibrated[0], ours[1] / calibrated[1]
    return judged(
        f"your thresholds read {ours[0] / 1e6:.2f} MB a token at KL {ours[1]:.4f}, the calibrated "
        f"ones {calibrated[0] / 1e6:.2f} MB at KL {calibrated[1]:.4f}: {saved:.0%} less to read, "
        f"{worse:.1f} times the KL",
        (saved < SAVED, f"Read {SAVED:.0%} less: let more misses come low."),
        (worse > WORSE, "Too dear: which costs more, a low copy or none?"),
        right="Low copies are nearly free here, skipping is not.",
    )


def _bytes_and_kl(lab: moelab.Lab, trace: moelab.Trace) -> tuple[float, float]:
    """Bytes read per decoded token of a trace, and KL, under the lab's settings."""
    done = moelab.replay(trace, lab.settings.strategy, lab.settings.knobs())
    return done.bytes / trace.decoded, kl_of(lab, tokens=12)


@exercise("03.2")
def which_decision(answer: Any) -> Said:
    """The one decision of HOBBIT's, its prefetcher apart, that saves LRU the most."""
    from moelab.calibration.hobbit import decide
    from moelab.scheduling.strategy import ROLES
    from moelab.strategies import Precision, make

    roles = [role for role in ROLES if role != "prefetch"]
    answer = answer.strip().lower() if isinstance(answer, str) else answer
    if answer not in roles:
        raise RefusedError(f"give one of {', '.join(roles)} as a word; this is {answer!r}")
    with opened(strategy="hobbit", prefetch=0) as lab:
        trace, knobs, whole = recorded(lab), lab.settings.knobs(), lab.settings.strategy
    plain = make("lru").replace(precision=Precision())
    mixed = {role: plain.replace(**{role: whole.parts[role]}) for role in roles}
    lru = decide(trace, plain, knobs).penalty
    change = {role: decide(trace, mixed[role], knobs).penalty / lru - 1 for role in roles}
    best = min(change, key=change.__getitem__)
    others = ", ".join(f"{role} {c:+.0%}" for role, c in change.items() if role != best)
    return judged(
        f"LRU with HOBBIT's {answer} changes the miss penalty by {change[answer]:+.0%}",
        (answer != best, "Another decision saves more."),
        right=f"The others alone: {others}.",
    )


@exercise("03.3")
def next_to_leave(answer: Any, *, lab: moelab.Lab) -> Said:
    """The resident expert with the lowest sum of the four terms."""
    given(answer, tuple, "(layer, expert)", length=2)
    bits = lab.cache_map()["bits"]
    terms = {
        (layer, e): why["priority"]
        for layer in range(len(bits))
        for e, why in lab.why(layer).items()
        if bits[layer, e] == lab.settings.bits
    }
    if answer not in terms:
        raise RefusedError(f"{answer} is not resident at {lab.settings.bits} bit now")
    lower = sum(p < terms[answer] for p in terms.values())
    return judged(
        f"{answer} has p = {terms[answer]:.3f}",
        (lower > 0, f"{lower} others have less."),
        right=f"It is the lowest of {len(terms)}.",
    )


@exercise("04.1")
def plan_by_hand(answer: Any, *, slots: int = 33) -> Said:
    """Experts for each layer, with an estimated KL near the genetic algorithm's."""
    from moelab.strategies.swapmoe_planner import Estimates, Plan, plan_within, uniform

    what = "a list of whole numbers, experts of each layer"
    dealt = [given(n, int, what) for n in given(answer, (list, tuple), what)]
    with opened() as lab:
        shape = lab._shape
        found = Estimates.of(lab.calibrate("swapmoe", progress=False).data)
        estimates = dataclasses.replace(found, network=None)  # what the notebook's curves show
    if len(dealt) != shape.layers:
        raise RefusedError(f"these are {len(dealt)} layers; the model has {shape.layers}")
    if not all(shape.top_k <= n <= most for n, most in zip(dealt, shape.experts, strict=True)):
        raise RefusedError(f"each layer keeps {shape.top_k} to {max(shape.experts)} experts")
    if sum(dealt) > slots:
        raise RefusedError(f"these are {sum(dealt)} experts; there is room for {slots}")
    best = plan_within(estimates, slots, shape, nats_per_slowdown=0.0)
    mine = estimates.kl(Plan(best.f, tuple(dealt)))
    planned, even = estimates.kl(best), estimates.kl(uniform(slots, shape, best.f))
    return judged(
        f"estimated KL {mine:.2f}; the genetic algorithm {planned:.2f}, an even split {even:.2f}",
        (mine > NEAR * planned, "Which layer's curve falls steepest? Give that one more."),
        right=f"Yours, found by looking: {dealt}.",
    )


@exercise("04.2")
def never_wait_and_better(answer: Any) -> Said:
    """Settings with which no token waits on the HDD, in a quarter of the memory, at a low KL."""
    mine = settings(answer, '{"strategy": "swapmoe", "budget": "25%"}', device="hdd")
    with opened(strategy="swapmoe", budget="25%", device="hdd") as lab:
        quarter, theirs = lab.settings.budget_bytes, kl_of(lab)
    with opened(**mine) as lab:
        events = written(lab, unseen(lab, 1)[0][:200], 16).events
        stalls = len(events.query("kind == 'stall' and token > 0"))
        if (budget := lab.settings.budget_bytes) > quarter:
            raise RefusedError(
                f"{budget / 1e6:.2f} MB is more than a quarter, {quarter / 1e6:.2f} MB"
            )
        if stalls:
            return False, f"tokens waited {stalls} times. Only resident experts may compute."
    with opened(**mine) as lab:  # from where theirs began, not where that run has led
        ours = kl_of(lab)
    return judged(
        f"no token waited; KL {ours:.3f}, SwapMoE at 16 bit {theirs:.3f}",
        (ours > theirs / BETTER, f"It is to be {BETTER:g} times less: what makes room for more?"),
        right="The same bytes hold far more experts.",
    )
