"""Exercises of notebook 03: thresholds, the decision that saves, and who leaves next."""

from __future__ import annotations

from typing import Any

import moelab
from moelab.course.verdict import (
    RefusedError,
    Said,
    exercise,
    kl_of,
    opened,
    recorded,
    settings,
)

SAVED, WORSE = 0.15, 2.0
"""Bytes to be saved against the calibrated thresholds, and how many times their KL is borne."""


@exercise("03.1")
def better_thresholds(answer: Any) -> Said:
    """T1 and T2 that read less than the calibrated ones at about the same KL."""
    given = settings(answer, '{"t1": 0.5, "t2": 0.7}')
    if given.keys() != {"t1", "t2"}:
        raise RefusedError('give t1 and t2, nothing else: {"t1": 0.5, "t2": 0.7}')
    with opened(strategy="hobbit", prefetch=0) as lab:
        trace = recorded(lab)
        calibrated = _bytes_and_kl(lab, trace)
        lab.update(**given)
        ours = _bytes_and_kl(lab, trace)
    saved, worse = 1 - ours[0] / calibrated[0], ours[1] / calibrated[1]
    said = (
        f"your thresholds read {ours[0] / 1e6:.2f} MB a token at KL {ours[1]:.4f}, the calibrated "
        f"ones {calibrated[0] / 1e6:.2f} MB at KL {calibrated[1]:.4f}: {saved:.0%} less to read, "
        f"{worse:.1f} times the KL"
    )
    if saved < SAVED:
        return False, f"{said}. Read {SAVED:.0%} less: let more misses come low."
    if worse > WORSE:
        return False, f"{said}. Too dear: which costs more, a low copy or none?"
    return True, f"{said}. Low copies are nearly free here, skipping is not."


def _bytes_and_kl(lab: moelab.Lab, trace: moelab.Trace) -> tuple[float, float]:
    """Bytes read per decoded token of a trace, and KL, under the lab's settings."""
    done = moelab.replay(trace, lab.settings.strategy, lab.settings.knobs())
    decoded = sum(1 for s in trace.steps if s.layer == 0 and not s.prefill)
    return done.bytes / decoded, kl_of(lab, tokens=12)


@exercise("03.2")
def which_decision(answer: Any) -> Said:
    """The one decision of HOBBIT's that saves LRU the most."""
    from moelab.calibration.hobbit import decide
    from moelab.scheduling.strategy import ROLES
    from moelab.strategies import Precision, make

    if answer not in ROLES:
        raise RefusedError(f"give one of {', '.join(ROLES)} as a word; this is {answer!r}")
    with opened(strategy="hobbit", prefetch=0) as lab:
        trace, knobs, whole = recorded(lab), lab.settings.knobs(), lab.settings.strategy
    plain = make("lru").replace(precision=Precision())
    lru = decide(trace, plain, knobs).penalty
    saved = {
        role: 1 - decide(trace, plain.replace(**{role: whole.parts[role]}), knobs).penalty / lru
        for role in ROLES
    }
    best = max(saved, key=saved.__getitem__)
    if answer != best:
        return False, (
            f"LRU with HOBBIT's {answer} changes the miss penalty by {-saved[answer]:+.0%}; "
            "another decision saves more."
        )
    others = ", ".join(f"{role} {-s:+.0%}" for role, s in saved.items() if role != best)
    return True, (
        f"LRU with HOBBIT's {best} changes the miss penalty by {-saved[best]:+.0%}; "
        f"the others alone: {others} (without looking ahead)."
    )


@exercise("03.3")
def next_to_leave(answer: Any, *, lab: moelab.Lab) -> Said:
    """The resident expert with the lowest sum of the four terms."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise RefusedError(f"give (layer, expert); this is {answer!r}")
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
    if lower:
        return False, f"{answer} has p = {terms[answer]:.3f}; {lower} others have less."
    return True, f"{answer} has the lowest p of {len(terms)}: {terms[answer]:.3f}."
