"""Exercises of notebook 04: deal out experts by hand, and never wait at a better quality."""

from __future__ import annotations

from typing import Any

import moelab
from moelab.course.verdict import (
    RefusedError,
    Said,
    exercise,
    kl_of,
    numbers,
    opened,
    settings,
    unseen,
)

NEAR, BETTER = 1.1, 4.0
"""How near to the planner a hand-made plan is to come; how many times better the KL is to be."""


@exercise("04.1")
def plan_by_hand(answer: Any, *, slots: int = 33) -> Said:
    """Experts for each layer, with an estimated KL near the genetic algorithm's."""
    from moelab.strategies.swapmoe_planner import Estimates, Plan, plan_within, uniform

    given = numbers(answer, "experts of each layer")
    with opened() as lab:
        shape = lab._shape
        estimates = Estimates.of(lab.calibrate("swapmoe", progress=False).data)
    if len(given) != shape.layers:
        raise RefusedError(f"these are {len(given)} layers; the model has {shape.layers}")
    if not all(shape.top_k <= n <= most for n, most in zip(given, shape.experts, strict=True)):
        raise RefusedError(f"each layer keeps {shape.top_k} to {max(shape.experts)} experts")
    if sum(given) > slots:
        raise RefusedError(f"these are {sum(given)} experts; there is room for {slots}")
    best = plan_within(estimates, slots, shape, nats_per_slowdown=0.0)
    mine = estimates.kl(Plan(best.f, tuple(given)))
    planned, even = estimates.kl(best), estimates.kl(uniform(slots, shape, best.f))
    said = f"estimated KL {mine:.2f}; the genetic algorithm {planned:.2f}, an even split {even:.2f}"
    if mine > NEAR * planned:
        return False, f"{said}. Which layer's curve falls steepest? Give that one more."
    return True, f"{said}. Yours, found by looking: {given}."


@exercise("04.2")
def never_wait_and_better(answer: Any) -> Said:
    """Settings with which no token waits on the HDD, in a quarter of the memory, at a low KL."""
    given = settings(answer, '{"strategy": "swapmoe", "budget": "25%"}') | {"device": "hdd"}
    with opened(strategy="swapmoe", budget="25%") as lab:
        quarter, theirs = lab.settings.budget_bytes, kl_of(lab)
    with opened(**given) as lab:
        budget, stalls = lab.settings.budget_bytes, _stalls(lab)
        if budget > quarter:
            raise RefusedError(
                f"{budget / 1e6:.2f} MB is more than a quarter, {quarter / 1e6:.2f} MB"
            )
        ours = kl_of(lab) if not stalls else float("nan")
    if stalls:
        return False, f"tokens waited {stalls} times. Only resident experts may compute."
    said = f"nobody waited; KL {ours:.3f}, SwapMoE at 16 bit {theirs:.3f}"
    if ours > theirs / BETTER:
        return False, f"{said}. It is to be {BETTER:g} times less: what makes room for more?"
    return True, f"{said}. The same bytes hold far more experts."


def _stalls(lab: moelab.Lab, tokens: int = 16) -> int:
    """Times a decoded token waited for an expert."""
    run = lab.generate(unseen(lab, 1)[0][:200], max_new_tokens=tokens, ignore_eos=True)
    events = run.events
    return int(((events["kind"] == "stall") & (events["token"] > 0)).sum())
