"""HOBBIT's calibration: T1, T2 and the four eviction weights, which no new model comes with.

Recorded texts are decided again and again by the scheduler alone, without the engine: seconds, not
hours. One half of every text calibrates, the other is only looked at, so that the profile tells
how far to believe it.

*T1, T2*: the paper takes them from the distribution of s over **all selections** of the router, so
that 67 / 30 / 3 % of them would come high, come low, be skipped if they missed. That is a fact of
the model: it holds for any budget. A rule of our own, ``over="misses"``, wants those shares of what
does miss. Which requests miss depends on the thresholds (a resident low copy serves a low request
and fails a high one), so quantiles are taken over the misses, again and again from those over all
selections on, and the round that comes nearest is kept. It reads less and loses more, at the budget
that it was made for; with prefetching on, what misses both is another mix.

*Weights*: the least miss penalty over a grid on w_lru + w_lfu + w_lhu + w_fld = 1, refined around
the best point; under prefetching as it will run, for that protects what is near anyway.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from moelab.calibration.probes import Text, parted, record
from moelab.calibration.profile import Kept, once
from moelab.scheduling.events import LOAD, SKIP
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.strategy import Knobs, Strategy
from moelab.scheduling.trace import Trace
from moelab.settings import parse_budget
from moelab.strategies.basics import LFU, LRU
from moelab.strategies.hobbit import EQUAL, FourTerms, hobbit, miss_penalty, miss_shares

if TYPE_CHECKING:
    from moelab.lab import Lab

SHARES = {"high": 0.67, "low": 0.30, "skip": 0.03}
"""Where the paper wants the selections to fall."""
OVER = ("selections", "misses")
ROUNDS = 6
AHEAD = 3
EVALUATIONS = 80
"""About how many replays the search takes, for the progress bar."""
Weights = tuple[float, float, float, float]


# -- a trace, decided ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one strategy did over the decoded tokens of a trace."""

    tokens: int
    missed: list[float]  # unimportance s of every request that missed
    shares: dict[str, float]  # of the misses: loaded high, loaded low, skipped
    penalty: float  # miss penalty per token


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
            missed += [score[row[2]] for row in plan.rows if row[0] in (LOAD, SKIP)]
            decisions += plan.decisions(trace.shape)
            tokens += given.layer == trace.shape.path().start
        if given.layer == trace.shape.layers - 1:
            scheduler.end_of_token()
    penalty = miss_penalty(decisions, nbytes) / max(tokens, 1)
    return Outcome(tokens, missed, miss_shares(decisions), penalty)


# -- T1 and T2 -----------------------------------------------------------------------------------


def scores(trace: Trace) -> list[float]:
    """Unimportance score of every selection of a decoded token."""
    return [r.score for step in trace.steps if not step.prefill for r in step.requests()]


def quantiles(found: Sequence[float]) -> tuple[float, float]:
    """T1 and T2 such that `SHARES` of these scores are up to T1, up to T2, above."""
    t1, t2 = np.quantile(found, (SHARES["high"], SHARES["high"] + SHARES["low"]))
    return float(t1), float(t2)


def thresholds(trace: Trace, outcome: Callable[[float, float], Outcome]) -> tuple[float, float]:
    """T1 and T2 under which the misses of a trace fall as nearly as can be into `SHARES` (ours).

    ``outcome`` decides the trace under T1 and T2.
    """
    now = quantiles(scores(trace))
    tried: list[tuple[float, tuple[float, float]]] = []
    for _ in range(ROUNDS):
        out = outcome(*now)
        tried.append((sum(abs(out.shares[name] - SHARES[name]) for name in SHARES), now))
        if not out.missed:  # everything fits: there is nothing to decide
            break
        now = quantiles(out.missed)
    return min(tried)[1]


# -- the weights ---------------------------------------------------------------------------------


def least_penalty(penalty: Callable[[Weights], float]) -> tuple[Weights, dict[Weights, float]]:
    """The weights of least penalty, and the penalty of every point that was looked at.

    A grid in quarters over the simplex (35 points), then from the best one steps of an eighth and
    of a sixteenth from one weight to another while that helps. Among equals the point nearest to
    equal weights is taken.
    """
    seen: dict[Weights, float] = {}

    def cost(weights: Weights) -> tuple[float, float]:
        if weights not in seen:
            seen[weights] = penalty(weights)
        return seen[weights], sum((part - 1 / 4) ** 2 for part in weights)

    quarters = (0.0, 1 / 4, 1 / 2, 3 / 4, 1.0)
    grid = itertools.product(quarters, quarters, quarters, quarters)
    best = min((weights for weights in grid if sum(weights) == 1), key=cost)
    for step in (1 / 8, 1 / 16):  # exact in binary, and so are their sums
        while cost(better := min(_around(best, step), key=cost)) < cost(best):
            best = better
    return best, seen


def _around(weights: Weights, step: float) -> Iterator[Weights]:
    """The points a step from one weight to another away."""
    for giver, taker in itertools.permutations(range(4), 2):
        if weights[giver] >= step:
            a, b, c, d = (w + step * ((n == taker) - (n == giver)) for n, w in enumerate(weights))
            yield a, b, c, d


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
            guess = [r.expert for r in ahead.requests()]
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
    max_tokens: int = 64,
    budget: int | str = "25%",
    high: int | None = None,
    low: int = 4,
    high_share: float = 0.75,
    depth: int = 2,
    over: str = "selections",
) -> dict[str, Any]:
    """What the profile depends on besides the texts.

    Parameters
    ----------
    max_tokens
        Tokens taken of each half of a text: the first calibrates, the second checks.
    budget
        What thresholds and weights are made for; as `moelab.open` takes it.
    high, low
        The pair of tiers; ``high`` None is the store's best.
    high_share
        Part of the budget for the high cache.
    depth
        Layers to look ahead while the weights are searched, 0 to 3 (0: for the cache alone).
    over
        What T1 and T2 are quantiles of: ``"selections"``, as in the paper, or ``"misses"``, ours.

    Raises
    ------
    ValueError
        A tier that is not in the store, or not below the other; a depth out of range; another rule.
    """
    best = max(lab._store.tiers) if high is None else high
    there = {low, best} <= {*lab._store.tiers}
    if not there or not lab._shape.below(low, best):
        tiers = sorted(lab._store.tiers, reverse=True)
        raise ValueError(f"high={best}, low={low}: choose two of {tiers}, the lower as low")
    if depth not in range(AHEAD + 1):
        raise ValueError(f"depth={depth!r}: layers to look ahead, 0 to {AHEAD}")
    if over not in OVER:
        raise ValueError(f"over={over!r}: thresholds are quantiles over {' or '.join(OVER)}")
    made = {"max_tokens": max_tokens, "budget_bytes": parse_budget(budget, lab._shape)}
    made |= {"high": best, "low": low, "high_share": high_share, "depth": depth}
    # Version 0.3 knew the rule of misses only: its profiles are named as it named them.
    return made | {"shares": SHARES} | ({"over": over} if over != "misses" else {})


def make(
    lab: Lab, texts: Sequence[Text], made: dict[str, Any], kept: Kept, *, progress: bool
) -> dict[str, Any]:
    """T1, T2, the weights, and what they are worth on texts they were not made from.

    Returns
    -------
    dict
        ``t1``, ``t2``, ``weights``; ``thresholds`` [T1, T2] by either rule; ``gates``, see
        `gate_accuracy`; ``search`` every point looked at, (w_lru, w_lfu, w_lhu, w_fld, miss penalty
        per token). ``calibration`` and ``held_out`` are what was done over those texts: ``tokens``;
        ``selected``, 101 quantiles of s over all selections; with prefetching off ``shares`` of the
        misses, ``missed``, the quantiles of theirs, and ``penalty`` per token of hobbit, equal
        (weights), lru, lfu; ``penalty_ahead`` with it on.
    """
    how = {"tokens": made["max_tokens"], "look_ahead": AHEAD}
    trace, held_out = (record(lab, half, **how) for half in parted(texts, 0.5))
    alike = {"budget_bytes": made["budget_bytes"], "bits": made["high"], "low_bits": made["low"]}
    depth, share = made["depth"], made["high_share"]

    def decided(on: Trace, strategy: Strategy, t1: float, t2: float, depth: int = 0) -> Outcome:
        # under settings as of a run, but without the experts that the lab keeps for good
        own = {"strategy": strategy, "t1": t1, "t2": t2, "depth": depth, "pin": {}}
        now = lab.settings.change(lab._shape, **alike, **own)
        return decide(on, now.strategy, now.knobs())

    with tqdm(total=EVALUATIONS, disable=not progress, desc="hobbit") as bar:
        plain = hobbit(high_share=share)
        by_rule = {
            "selections": [*quantiles(scores(trace))],
            "misses": [*thresholds(trace, lambda *at: decided(trace, plain, *at))],
        }
        t1, t2 = by_rule[made.get("over", "misses")]

        def penalty(weights: Weights) -> float:
            bar.update()
            ours = hobbit(weights=weights, high_share=share)
            measure = lambda: decided(trace, ours, t1, t2, depth).penalty  # noqa: E731
            return once(kept, f"penalty {weights}", measure)

        weights, seen = least_penalty(penalty)
        bar.total = bar.n
    strategy = hobbit(weights=weights, high_share=share)
    evicts = {"equal": FourTerms(*EQUAL), "lru": LRU(), "lfu": LFU()}
    contenders = {"hobbit": strategy} | {n: strategy.replace(evict=e) for n, e in evicts.items()}

    def judged(on: Trace) -> dict[str, Any]:
        alone, ahead = (
            {n: decided(on, s, t1, t2, layers) for n, s in contenders.items()}
            for layers in (0, depth)
        )
        every = np.linspace(0, 1, 101)
        selected, missed = (
            np.quantile(found or [0.0], every).round(4).tolist()
            for found in (scores(on), alone["hobbit"].missed)
        )
        return {
            "tokens": alone["hobbit"].tokens,
            "shares": alone["hobbit"].shares,
            "selected": selected,
            "missed": missed,
            "penalty": {name: out.penalty for name, out in alone.items()},
            "penalty_ahead": {name: out.penalty for name, out in ahead.items()},
        }

    found = {"t1": t1, "t2": t2, "weights": list(weights), "thresholds": by_rule}
    return found | {
        "calibration": judged(trace),
        "held_out": judged(held_out),
        "gates": gate_accuracy(held_out),
        "search": [[*point, value] for point, value in sorted(seen.items())],
    }
