"""HOBBIT's calibration: T1, T2 and the four eviction weights, which no new model comes with.

Recorded texts are decided again and again by the scheduler alone, without the engine: seconds, not
hours. One half of every text calibrates, the other is only looked at, so that the profile tells
how far to believe it.

*T1, T2*: the paper wants 67 / 30 / 3 % of the **misses** to come high, to come low, to be skipped.
Which requests miss depends on the thresholds (a resident low copy serves a low request and fails a
high one). So the quantiles of s are taken over the misses, again and again from those over all
requests on, and the round that comes nearest is kept. They hold for the budget they were made at,
and for what misses the cache: with prefetching on, what misses both is another mix.

*Weights*: the least miss penalty over a grid on w_lru + w_lfu + w_lhu + w_fld = 1, refined around
the best point; under prefetching as it will run, for that protects what is near anyway.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from moelab.calibration.measure import digest_of, record, texts_of
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.strategy import Knobs, Strategy
from moelab.scheduling.stream import ranked
from moelab.scheduling.trace import Trace
from moelab.settings import parse_budget
from moelab.strategies.basics import LFU, LRU
from moelab.strategies.hobbit import EQUAL, FourTerms, hobbit, miss_penalty, miss_shares

if TYPE_CHECKING:
    from moelab.calibration.profile import Partial
    from moelab.lab import Lab

SHARES = {"high": 0.67, "low": 0.30, "skip": 0.03}
"""Where the paper wants the misses to fall."""
ROUNDS = 6
AHEAD = 3
EVALUATIONS = 80
"""About how many replays the search takes, for the progress bar."""
PARTS = 16
"""Weights are searched in sixteenths."""

Weights = tuple[float, float, float, float]


# -- a trace, decided ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one strategy did over the decoded tokens of a trace.

    Attributes
    ----------
    tokens
        How many.
    missed
        Unimportance score s of every request that missed.
    shares
        Of the misses: loaded high, loaded low, skipped.
    penalty
        Miss penalty per token.
    """

    tokens: int
    missed: list[float]
    shares: dict[str, float]
    penalty: float


def decide(trace: Trace, strategy: Strategy, knobs: Knobs) -> Outcome:
    """Decide a recorded trace; the cache is kept from text to text, the records are not."""
    scheduler, nbytes = Scheduler(trace.shape, strategy, knobs), dict(trace.shape.nbytes)
    tokens, missed, decisions = 0, [], []
    for given in trace.steps:
        if given.prefill and given.layer == 0:
            scheduler.new_sequence()
        plan = scheduler.step(given)
        if not given.prefill:
            score = {r.expert: r.score for r in given.requests()}
            missed += [score[s.expert] for s in plan.serves if s.load]
            missed += [score[expert] for expert, _ in plan.skips]
            decisions += plan.decisions(nbytes)
            tokens += given.layer == 0
        if given.layer == trace.shape.layers - 1:
            scheduler.end_of_token()
    penalty = miss_penalty(decisions, nbytes) / max(tokens, 1)
    return Outcome(tokens, missed, miss_shares(decisions), penalty)


# -- T1 and T2 -----------------------------------------------------------------------------------


def scores(trace: Trace) -> list[float]:
    """Unimportance score of every decoded request."""
    return [r.score for step in trace.steps if not step.prefill for r in step.requests()]


def quantiles(found: Sequence[float]) -> tuple[float, float]:
    """T1 and T2 such that `SHARES` of these scores are up to T1, up to T2, above."""
    t1, t2 = np.quantile(found, (SHARES["high"], SHARES["high"] + SHARES["low"]))
    return float(t1), float(t2)


def thresholds(
    trace: Trace,
    strategy: Strategy,
    knobs: Knobs,
    tick: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """T1 and T2 under which the misses of a trace fall as nearly as can be into `SHARES`."""
    now = quantiles(scores(trace))
    tried: list[tuple[float, tuple[float, float]]] = []
    for _ in range(ROUNDS):
        out = decide(trace, strategy, dataclasses.replace(knobs, t1=now[0], t2=now[1]))
        shares = out.shares
        tried.append((sum(abs(shares[name] - SHARES[name]) for name in SHARES), now))
        tick()
        if not out.missed:  # everything fits: there is nothing to decide
            break
        now = quantiles(out.missed)
    return min(tried)[1]


# -- the weights ---------------------------------------------------------------------------------


def least_penalty(
    penalty: Callable[[Weights], float], tick: Callable[[], object] = lambda: None
) -> tuple[Weights, dict[Weights, float]]:
    """The weights of least penalty, and the penalty of every point that was looked at.

    A grid in quarters over the simplex (35 points), then from the best one steps of an eighth and
    of a sixteenth from one weight to another while that helps. Among equals the point nearest to
    equal weights is taken.
    """
    seen: dict[tuple[int, ...], float] = {}

    def cost(point: tuple[int, ...]) -> tuple[float, int]:
        if point not in seen:
            seen[point] = penalty(_weights(point))
            tick()
        return seen[point], sum((part - PARTS // 4) ** 2 for part in point)

    quarter = range(0, PARTS + 1, PARTS // 4)
    grid = [p for p in itertools.product(quarter, repeat=4) if sum(p) == PARTS]
    best = min(grid, key=cost)
    for step in (PARTS // 8, PARTS // 16):
        while (better := min(_around(best, step), key=cost)) and cost(better) < cost(best):
            best = better
    return _weights(best), {_weights(p): value for p, value in seen.items()}


def _around(point: tuple[int, ...], step: int) -> list[tuple[int, ...]]:
    """The points a step from one weight to another away."""
    out = []
    for giver, taker in itertools.permutations(range(4), 2):
        moved = list(point)
        moved[giver] -= step
        moved[taker] += step
        if moved[giver] >= 0:
            out.append(tuple(moved))
    return out


def _weights(point: tuple[int, ...]) -> Weights:
    a, b, c, d = (part / PARTS for part in point)
    return a, b, c, d


# -- the gates -----------------------------------------------------------------------------------


def gate_accuracy(trace: Trace) -> dict[str, dict[str, Any]]:
    """How right the coming routers are when asked early, by how many layers ahead.

    Returns
    -------
    dict
        ``"+1"`` ... -> ``first``: how often the expert they rank first is first in the end;
        ``top_k``: the part they named of the experts chosen in the end; ``first_by_layer``: as
        ``first``, by the layer that asked.
    """
    first: dict[int, list[list[bool]]] = {}  # layers ahead -> layer that asked -> right or not
    named: dict[int, list[float]] = {}
    for i, given in enumerate(trace.steps):
        for ahead in given.look_ahead:
            far = ahead.layer - given.layer
            guess = [r.expert for r in ranked(ahead.experts, ahead.weights)]
            truth = [r.expert for r in trace.steps[i + far].requests()]
            if guess and truth:
                rows = first.setdefault(far, [[] for _ in range(trace.shape.layers - far)])
                rows[given.layer].append(guess[0] == truth[0])
                named.setdefault(far, []).append(len({*guess} & {*truth}) / len(truth))
    return {
        f"+{far}": {
            "first": float(np.mean(list(itertools.chain(*rows)))),
            "top_k": float(np.mean(named[far])),
            "first_by_layer": [float(np.mean(row)) if row else None for row in rows],
        }
        for far, rows in sorted(first.items())
    }


# -- the calibration -----------------------------------------------------------------------------


def made_from(
    lab: Lab,
    *,
    texts: Sequence[str] | None = None,
    max_tokens: int = 64,
    budget: int | str = "25%",
    high: int | None = None,
    low: int = 4,
    high_share: float = 0.75,
    depth: int = 2,
) -> dict[str, Any]:
    """Everything the profile depends on.

    Parameters
    ----------
    lab
        Its model is recorded, whatever its settings are.
    texts
        Default the model's own probes. The first half of each calibrates, the second checks.
    max_tokens
        Tokens taken of each half.
    budget
        What thresholds and weights are made for; as `moelab.open` takes it.
    high, low
        The pair of tiers; ``high`` None is the store's best.
    high_share
        Part of the budget for the high cache.
    depth
        Layers to look ahead while the weights are searched, 0 to 3 (0: for the cache alone).

    Raises
    ------
    ValueError
        A tier that is not in the store, or not below the other; a depth out of range.
    """
    best = max(lab._store.tiers) if high is None else high
    if low not in lab._store.tiers or best not in lab._store.tiers or low >= best:
        tiers = sorted(lab._store.tiers, reverse=True)
        raise ValueError(f"high={best}, low={low}: choose two of {tiers}, the lower as low")
    if depth not in range(AHEAD + 1):
        raise ValueError(f"depth={depth!r}: layers to look ahead, 0 to {AHEAD}")
    return {
        "texts": digest_of(texts_of(lab, texts)),
        "max_tokens": max_tokens,
        "budget_bytes": parse_budget(budget, lab._shape),
        "high": best,
        "low": low,
        "high_share": high_share,
        "depth": depth,
        "shares": SHARES,
    }


def make(
    lab: Lab,
    *,
    progress: bool,
    partial: Partial,
    texts: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """T1, T2, the weights, and what they are worth on texts they were not made from.

    Options as in `made_from`.

    Returns
    -------
    dict
        ``t1``, ``t2``, ``weights``; ``t1_all``, ``t2_all`` quantiles over all requests instead of
        misses; ``calibration`` and ``held_out``, see `_judged`; ``gates``, see `gate_accuracy`;
        ``search`` every point looked at, (w_lru, w_lfu, w_lhu, w_fld, miss penalty per token).
    """
    made = made_from(lab, texts=texts, **options)
    halves = zip(*map(_halves, texts_of(lab, texts)), strict=True)
    with tqdm(total=EVALUATIONS, disable=not progress, desc="hobbit") as bar:
        trace, held_out = (
            record(lab, half, tokens=made["max_tokens"], look_ahead=AHEAD) for half in halves
        )
        share = made["high_share"]
        knobs = Knobs(made["budget_bytes"], made["high"], made["low"])
        t1, t2 = thresholds(trace, hobbit(high_share=share), knobs, bar.update)
        knobs = dataclasses.replace(knobs, t1=t1, t2=t2, prefetch=made["depth"])

        def penalty(weights: Weights) -> float:
            key = f"penalty {weights}"
            found = partial.get(key)
            if found is None:
                strategy = hobbit(weights=weights, high_share=share)
                found = decide(trace, strategy, knobs).penalty
                partial.put(key, found)
            return found

        weights, seen = least_penalty(penalty, bar.update)
        bar.total = bar.n
    contenders = _contenders(weights, share)
    t1_all, t2_all = quantiles(scores(trace))
    return {
        "t1": t1,
        "t2": t2,
        "weights": list(weights),
        "t1_all": t1_all,
        "t2_all": t2_all,
        "calibration": _judged(trace, contenders, knobs),
        "held_out": _judged(held_out, contenders, knobs),
        "gates": gate_accuracy(held_out),
        "search": [[*point, value] for point, value in sorted(seen.items())],
    }


def _halves(text: str) -> tuple[str, str]:
    """The text cut in two, between words."""
    middle = text.find(" ", len(text) // 2)
    cut = len(text) // 2 if middle < 0 else middle
    return text[:cut], text[cut:]


def _contenders(weights: Weights, share: float) -> dict[str, Strategy]:
    """The calibrated strategy, and others that differ in who leaves."""
    strategy = hobbit(weights=weights, high_share=share)
    evicts = {"equal": FourTerms(*EQUAL), "lru": LRU(), "lfu": LFU()}
    return {"hobbit": strategy} | {n: strategy.replace(evict=e) for n, e in evicts.items()}


def _judged(trace: Trace, contenders: dict[str, Strategy], knobs: Knobs) -> dict[str, Any]:
    """What each would have done over this trace.

    ``tokens``; with prefetching off ``shares`` of the misses, ``missed`` (101 quantiles of their s)
    and ``penalty`` per token of hobbit, equal (weights), lru, lfu; ``penalty_ahead`` with it on.
    """
    off = dataclasses.replace(knobs, prefetch=0)
    alone = {name: decide(trace, s, off) for name, s in contenders.items()}
    ours = alone["hobbit"]
    return {
        "tokens": ours.tokens,
        "shares": ours.shares,
        "missed": np.quantile(ours.missed or [0.0], np.linspace(0, 1, 101)).round(4).tolist(),
        "penalty": {name: out.penalty for name, out in alone.items()},
        "penalty_ahead": {n: decide(trace, s, knobs).penalty for n, s in contenders.items()},
    }
