"""HOBBIT and MoE-APEX against examples worked out by hand; calibrations whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.calibration import hobbit as calibration
from moelab.engine.log import EventLog
from moelab.replays.replay import replay
from moelab.scheduling.budget import BudgetError, minimum_budget
from moelab.scheduling.cache import Cache
from moelab.scheduling.events import CODES, Decision
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Knobs, LookAhead, Request, Shape, View
from moelab.scheduling.stream import ranked
from moelab.scheduling.trace import Trace
from moelab.scheduling.victims import Victims
from moelab.strategies.basics import LFU, LRU, TierPair
from moelab.strategies.edgemoe import edgemoe
from moelab.strategies.hobbit import FourTerms, TwoCaches, hobbit, miss_penalty, miss_shares
from moelab.strategies.moe_apex import CostAndDistance, moe_apex
from toy_engine import NBYTES, SHAPE, decided, places, resident

ROOMY = 24 * 1600


def knobs(budget_bytes: int = ROOMY, bits: int = 16) -> Knobs:
    return Knobs(budget_bytes, bits)


def view_at(token: int, layer: int, low: int | None = 4, **changes) -> View:
    k = knobs(**changes)
    view = View(SHAPE, k, Cache(SHAPE, k.budget_bytes))
    view.token, view.layer, view.precision = token, layer, TierPair(low)
    return view


def use(view: View, place: tuple[int, int], token: int, bits: int = 16) -> None:
    """The expert serves ``token``; 16 bit are asked for."""
    view.token = view.cache.token = token
    view.cache.use(SHAPE.key(*place), high=bits >= 16)


def terms(evict, place: tuple[int, int], view: View) -> list[float]:
    """Its terms by hand, and last its score: the priority that is told is what decides."""
    key = SHAPE.key(*place)
    *found, told = (float(values[key]) for values in evict.terms(view).values())
    assert told == evict.score(view)[key]
    return [*found, told]


def leaving(evict, view: View, *places: tuple[int, int]) -> list[tuple[int, int]]:
    """These experts in the order in which they leave."""
    mask = np.zeros(SHAPE.n, np.bool_)
    mask[[SHAPE.key(*place) for place in places]] = True
    view.cache.bits[mask] = 16
    return [SHAPE.place(k) for k in Victims(view.cache, evict.score(view), mask).allowed(0)]


def warm(s: Scheduler, *places: tuple[int, int], bits: int = 16) -> None:
    s.warm((SHAPE.key(*place), bits) for place in places)


def step(layer: int, experts, weights, *, ahead=(), prefill=False) -> LayerInput:
    return LayerInput(layer, (tuple(experts),), (tuple(weights),), prefill, tuple(ahead))


def decisions(plan) -> list[tuple[str, int, int]]:
    return [(d.kind, d.expert, d.bits) for d in decided(plan)]


# -- token level: high, low or skip, on a miss ---------------------------------------------------


def test_the_score_is_the_sum_of_the_weights_before():
    got = ranked((9, 4, 2), (0.2, 0.5, 0.3))
    assert [(r.expert, r.score) for r in got] == [(4, 0), (2, 0.5), (9, 0.8)]
    unnormalised = ranked((9, 4, 2), (0.4, 1.0, 0.6))
    assert [r.score for r in unnormalised] == pytest.approx([0, 0.5, 0.8])


@pytest.mark.parametrize(
    ("score", "bits"), [(0.0, 16), (0.6, 16), (0.61, 4), (0.9, 4), (0.91, 0), (0.999, 0)]
)
def test_up_to_t1_high_up_to_t2_low_then_skip(score, bits):
    request = Request(3, 0.1, 1, score)
    assert TierPair(4).tier(request, 16, view_at(0, 0)) == bits
    assert TierPair().tier(request, 16, view_at(0, 0)) == 16  # one precision


@pytest.mark.parametrize(("high", "low"), [(16, 4), (8, 2), (16, 8), (4, 2)])
def test_any_pair_of_tiers(high, low):
    s = Scheduler(SHAPE, hobbit(low=low), knobs(bits=high))
    assert decisions(s.step(step(0, (1, 2), (0.75, 0.25)))) == [
        ("load", 1, high),
        ("load", 2, low),
        ("downgrade", 2, low),
    ]


@pytest.mark.parametrize(
    ("have", "score", "outcome"),
    [
        (16, 0.5, "hit at 16"),  # a high copy serves any request
        (16, 0.75, "hit at 16"),
        (16, 0.95, "hit at 16"),  # a skip is for misses only
        (4, 0.75, "hit at 4"),  # a low copy serves a low request
        (4, 0.95, "hit at 4"),
        (4, 0.5, "load at 16"),  # ... only; the high copy takes its place
        (0, 0.5, "load at 16"),
        (0, 0.75, "load at 4"),
        (0, 0.95, "skip at 0"),
    ],
)
def test_which_copy_satisfies_which_request(have, score, outcome):
    s = Scheduler(SHAPE, hobbit(), knobs())
    warm(s, (0, 1))
    if have:
        warm(s, (0, 2), bits=have)
    plan = s.step(step(0, (1, 2), (score, 1 - score)))
    kind, _, bits = next(d for d in decisions(plan) if d[:2] not in {("hit", 1), ("evict", 2)})
    assert f"{kind} at {bits}" == outcome
    assert resident(s).get((0, 2), 0) == bits


def test_a_high_load_replaces_the_low_copy():
    s = Scheduler(SHAPE, hobbit(), knobs())
    warm(s, (0, 2), bits=4)
    assert ("evict", 2, 4) in decisions(s.step(step(0, (2, 1), (0.6, 0.4))))
    assert s.cache.used_bytes == 2 * 1600


def test_the_prompt_is_loaded_high_whatever_the_scores():
    s = Scheduler(SHAPE, hobbit(), knobs())
    plan = s.step(step(0, (1, 2), (0.99, 0.01), prefill=True))
    assert decisions(plan) == [("load", 1, 16), ("load", 2, 16)]


def test_the_miss_penalty_is_one_for_high_and_the_ratio_of_bytes_for_low():
    rows = [
        Decision("load", 0, 1, 16, 16, 1600, "on demand"),
        Decision("load", 0, 2, 16, 4, 400, "on demand"),
        Decision("downgrade", 0, 2, 16, 4, 0, "on demand"),
        Decision("skip", 1, 3, 16, 0, 0, "score"),
        Decision("hit", 1, 4, 16, 16, 1600, ""),
        Decision("prefetch", 2, 5, 16, 16, 1600, "ahead +1"),
        Decision("load", 2, 0, 8, 2, 200, "on demand"),
    ]
    assert miss_penalty(rows, NBYTES) == 1 + 400 / 1600 + 200 / 800
    assert miss_shares(rows) == {"high": 1 / 4, "low": 2 / 4, "skip": 1 / 4}
    assert miss_shares([]) == {"high": 0, "low": 0, "skip": 0}


def test_the_miss_penalty_reads_the_events_of_a_run_too():
    log = EventLog()
    for kind, bits in (("load", 16), ("load", 4), ("skip", 0), ("stall", 16)):
        log.add(1, 0, (CODES[kind], 0, 0, 16, bits, 0, 0), 0, 0.0)
    assert miss_penalty(log.frame().itertuples(), NBYTES) == 1.25
    assert miss_shares(log.frame().itertuples())["skip"] == pytest.approx(1 / 3)


# -- layer level: stacked gates with adaptive depth ----------------------------------------------


def ahead(layer: int, *experts: int, first: float = 0.6) -> LookAhead:
    return LookAhead(layer, experts, (first, 1 - first))


def fetched(s: Scheduler, *looks: LookAhead) -> list[tuple]:
    plan = s.step(step(0, (0, 1), (0.5, 0.5), ahead=looks))
    return [((d.layer, d.expert), d.bits) for d in decided(plan, "prefetch")]


def test_it_stops_at_the_first_layer_with_one_missing():
    s = Scheduler(SHAPE, hobbit(depth=3), knobs())
    warm(s, (1, 2))
    assert fetched(s, ahead(1, 2, 3), ahead(2, 4, 5), ahead(3, 0, 1)) == [((1, 3), 16)]


def test_it_goes_one_layer_further_while_all_are_resident():
    s = Scheduler(SHAPE, hobbit(depth=3), knobs())
    warm(s, (1, 2), (1, 3))
    assert fetched(s, ahead(1, 2, 3), ahead(2, 4, 5), ahead(3, 0, 1)) == [
        ((2, 4), 16),
        ((2, 5), 16),
    ]
    again = fetched(s, ahead(1, 2, 3), ahead(2, 4, 5), ahead(3, 0, 1))
    assert again == [((3, 0), 16), ((3, 1), 16)]  # what was issued counts as resident


def test_it_looks_no_further_than_the_depth_set():
    s = Scheduler(SHAPE, hobbit(depth=2), knobs())
    assert s.look_ahead(0, prefill=False) == 2
    assert s.look_ahead(2, prefill=False) == 1
    assert s.look_ahead(0, prefill=True) == 2  # -10 % of prefill, says the paper
    assert Scheduler(SHAPE, edgemoe(), knobs()).look_ahead(0, prefill=True) == 0


def test_a_prompt_is_looked_ahead_for_by_all_of_its_tokens_and_comes_high():
    s = Scheduler(SHAPE, hobbit(depth=1), knobs())
    coming = LookAhead.of(1, ((2, 3), (3, 4)), ((0.9, 0.1), (0.7, 0.3)))
    assert (coming.experts, coming.weights) == ((2, 3, 4), pytest.approx((0.9, 0.8, 0.3)))
    plan = s.step(step(0, (0, 1), (0.6, 0.4), ahead=[coming], prefill=True))
    assert decisions(plan)[2:] == [("prefetch", e, 16) for e in (2, 3, 4)]  # 4: s .85, and yet
    plan = s.step(step(0, (0, 1), (0.6, 0.4), ahead=[ahead(1, 5, 0, first=0.75)]))
    assert decisions(plan)[2:] == [("prefetch", 5, 16), ("prefetch", 0, 4)]


def test_a_layer_that_is_predicted_anew_lets_the_former_guess_go():
    s = Scheduler(SHAPE, hobbit(depth=2), knobs())
    shelter = lambda: [SHAPE.place(k) for k in np.flatnonzero(s.view.protected)]  # noqa: E731
    s.step(step(0, (0, 1), (0.6, 0.4), ahead=[ahead(1, 2, 3), ahead(2, 4, 5)]))
    assert shelter() == [(1, 2), (1, 3)]  # the first layer misses: no further
    s.step(step(1, (2, 3), (0.6, 0.4), ahead=[ahead(2, 4, 5)]))
    assert shelter() == [(2, 4), (2, 5)]
    s = Scheduler(SHAPE, hobbit(depth=2), knobs())
    warm(s, (1, 2), (1, 3))
    s.step(step(0, (0, 1), (0.6, 0.4), ahead=[ahead(1, 2, 3), ahead(2, 4, 5)]))
    s.step(step(1, (2, 3), (0.6, 0.4), ahead=[ahead(2, 0, 1)]))  # another guess for layer 2
    assert shelter() == [(2, 0), (2, 1)]


def test_three_low_requests_served_by_a_high_copy_are_no_use_at_high_precision():
    s = Scheduler(SHAPE, hobbit(), knobs())
    warm(s, (0, 1), (0, 2))
    for _ in range(3):
        plan = s.step(step(0, (1, 2), (0.75, 0.25)))
        assert decisions(plan) == [("hit", 1, 16), ("hit", 2, 16)]
    first, second = (SHAPE.key(0, e) for e in (1, 2))
    assert [s.view.uses[first], s.view.high_uses[first]] == [3, 3]
    assert [s.view.uses[second], s.view.high_uses[second]] == [3, 0]


def test_a_low_copy_is_missing_where_a_high_one_is_wanted():
    s = Scheduler(SHAPE, hobbit(depth=2), knobs())
    warm(s, (1, 2))
    warm(s, (1, 3), bits=4)
    assert fetched(s, ahead(1, 2, 3, first=0.75), ahead(2, 4, 5)) == [((2, 4), 16), ((2, 5), 16)]
    s = Scheduler(SHAPE, hobbit(depth=2), knobs())
    warm(s, (1, 2))
    warm(s, (1, 3), bits=4)
    assert fetched(s, ahead(1, 2, 3, first=0.55), ahead(2, 4, 5)) == [((1, 3), 16)]


def test_prefetches_come_at_mixed_precision_and_the_unimportant_not_at_all():
    s = Scheduler(SHAPE, hobbit(depth=1), knobs())
    assert fetched(s, ahead(1, 2, 3, first=0.75)) == [((1, 2), 16), ((1, 3), 4)]
    s = Scheduler(SHAPE, hobbit(depth=2), knobs())
    warm(s, (1, 2))
    assert fetched(s, ahead(1, 2, 3, first=0.95), ahead(2, 4, 5)) == [((2, 4), 16), ((2, 5), 16)]


def test_predicted_experts_are_protected_while_others_can_go():
    strategy = hobbit(weights=(0, 0, 0, 1), depth=1).tuned(low_bits=None)
    s = Scheduler(SHAPE, strategy, knobs(5 * 1600))
    warm(s, (1, 4), (1, 5), (2, 0), (3, 3))
    fetched(s, ahead(1, 4, 5))  # loads (0, 0), (0, 1): (3, 3) is farthest and leaves
    assert set(resident(s)) == {(0, 0), (0, 1), (1, 4), (1, 5), (2, 0)}
    plan = s.step(step(0, (2, 3), (0.5, 0.5)))
    assert set(places(decided(plan, "evict"))) == {(2, 0), (0, 0)}


def test_the_gates_protect_what_they_find_resident():
    strategy = hobbit(weights=(1, 0, 0, 0), depth=0).tuned(low_bits=None)
    s = Scheduler(SHAPE, strategy, knobs(4 * 1600))
    s.change(s.view.knobs, strategy.tuned(depth=1))
    warm(s, (1, 4), (1, 5))
    fetched(s, ahead(1, 4, 5))
    assert {SHAPE.place(k) for k in np.flatnonzero(s.view.protected)} == {(1, 4), (1, 5)}


def test_with_one_precision_every_predicted_expert_is_wanted_high():
    s = Scheduler(SHAPE, hobbit(depth=2).tuned(low_bits=None), knobs())
    warm(s, (1, 2))
    assert fetched(s, ahead(1, 2, 3, first=0.95), ahead(2, 0, 1)) == [((1, 3), 16)]


def test_a_trace_that_knows_more_gates_than_wanted_changes_nothing():
    looks = (ahead(1, 2, 3), ahead(2, 4, 5))
    for depth, layers in ((0, []), (1, []), (2, [(2, 4), (2, 5)])):
        s = Scheduler(SHAPE, hobbit(depth=depth), knobs())
        warm(s, (1, 2), (1, 3))
        assert [key for key, _ in fetched(s, *looks)] == layers


# -- sequence level: the four terms --------------------------------------------------------------


def with_history(*, second: int = 4, low: int | None = 4) -> View:
    """Expert (2, 5): used high in token 0, at ``second`` bits in token 2; now token 3, layer 3."""
    view = view_at(0, 2, low)
    use(view, (2, 5), 0)
    use(view, (2, 5), 2, second)
    view.token, view.layer = 3, 3
    return view


def test_each_term_by_hand():
    # T = 4 (tokens 0 to 3), R = 3 (the third), F = 2, H = 1; ((2 - 3 + 4) mod 4) / 4 = 3/4
    evict, view = FourTerms(0.4, 0.3, 0.2, 0.1), with_history()
    by_hand = [0.4 * 3 / 4, 0.3 * 2 / 4, 0.2 * 1 / 4, 0.1 * (1 - 3 / 4)]
    assert terms(evict, (2, 5), view) == pytest.approx([*by_hand, sum(by_hand)])
    assert list(evict.terms(view))[-1] == "priority"


@pytest.mark.parametrize(("layer", "near"), [(1, 1.0), (2, 3 / 4), (3, 2 / 4), (0, 1 / 4)])
def test_the_sooner_its_layer_comes_the_longer_it_stays(layer, near):
    """Seen from layer 1 of 4."""
    assert terms(FourTerms(0, 0, 0, 1), (layer, 0), view_at(5, 1))[3] == near


def test_an_expert_never_used_has_only_its_nearness():
    assert terms(FourTerms(), (0, 0), view_at(0, 0)) == [0, 0, 0, 0.25, 0.25]  # T is never 0


def test_the_terms_stay_between_zero_and_their_weights():
    view = view_at(0, 0)
    for token in range(5):
        use(view, (0, 0), token)
    assert terms(FourTerms(), (0, 0), view) == [0.25, 0.25, 0.25, 0.25, 1]


def test_weights_count_by_their_ratio():
    assert FourTerms(2, 1, 1, 0).weights == (0.5, 0.25, 0.25, 0)
    tuned = hobbit().tuned(w_lru=1.0, w_lfu=0.0, w_lhu=0.0, w_fld=0.0)
    assert tuned.evict.weights == (1, 0, 0, 0)
    assert tuned.tuned(w_lru=0.0).evict.weights == (0.25,) * 4
    for bad in ((0, 0, 0, 0), (-1, 1, 1, 1)):
        with pytest.raises(ValueError, match="none may be below 0"):
            FourTerms(*bad)


@pytest.mark.parametrize(
    ("weights", "victim"), [((1, 0, 0, 0), 0), ((0, 1, 0, 0), 1), ((0, 0, 1, 0), 2)]
)
def test_a_single_weight_is_the_policy_of_that_name(weights, victim):
    """0 was used longest ago, 1 least often, 2 least often at high precision."""
    view = view_at(0, 0)
    uses = [(0, 16), (0, 16), (0, 16), (0, 16), (2, 4), (2, 4), (2, 16), (1, 16), (1, 16)]
    for token, (expert, bits) in enumerate(uses):
        use(view, (0, expert), token, bits)
    assert leaving(FourTerms(*weights), view, (0, 0), (0, 1), (0, 2))[0] == (0, victim)


def test_the_farthest_layer_leaves():
    every = [(layer, 0) for layer in range(4)]
    gone = leaving(FourTerms(0, 0, 0, 1), view_at(0, 2), *every)
    assert gone == [(1, 0), (0, 0), (3, 0), (2, 0)]


@pytest.mark.parametrize("evict", [FourTerms(), CostAndDistance()])
def test_records_outlive_the_copy_and_end_with_the_sequence(evict):
    view, key = with_history(), SHAPE.key(2, 5)
    before = evict.score(view)[key]
    view.cache.add(key, 16)
    view.cache.remove(key)
    assert evict.score(view)[key] == before
    view.cache.new_sequence()
    assert evict.score(view)[key] < before
    assert view.uses[key] == view.high_uses[key] == view.last_token[key] == 0


def test_a_new_prompt_resets_the_records_but_not_the_cache():
    s = Scheduler(SHAPE, hobbit(), knobs())
    s.new_sequence()
    for layer in range(4):
        s.step(step(layer, (0, 1), (0.5, 0.5)))
    s.end_of_token()
    assert s.why(0)[0]["frequency (LFU)"] > 0
    s.new_sequence()
    assert s.why(0)[0]["frequency (LFU)"] == s.why(0)[0]["recency (LRU)"] == 0


def test_every_resident_expert_says_why():
    s = Scheduler(SHAPE, hobbit(depth=1), knobs(8 * 1600))
    for layer in range(4):
        look = () if layer == 3 else (ahead(layer + 1, 2, 3),)
        s.step(step(layer, (0, 1), (0.75, 0.25), ahead=look))
    told = {(layer, e): why for layer in range(4) for e, why in s.why(layer).items()}
    assert told.keys() == resident(s).keys()
    for why in told.values():
        *found, total = why.values()
        assert len(found) == 4
        assert sum(found) == pytest.approx(total)


# -- MoE-APEX ------------------------------------------------------------------------------------


def test_moe_apex_by_hand():
    evict, view = CostAndDistance(), with_history()
    # C = 1 + 400/1600 * 1; D = 3 + 0.1, for it was used in token 2, the pass before
    assert terms(evict, (2, 5), view) == pytest.approx([1.25 / 4, 1 / 3.1, 1.25 / 4 + 1 / 3.1])
    view.token = 4  # two passes ago now
    assert terms(evict, (2, 5), view) == [1.25 / 5, 0, 1.25 / 5]
    assert terms(evict, (0, 0), view) == [0, 0, 0]  # never used


@pytest.mark.parametrize(("layer", "distance"), [(3, 0.1), (0, 1.1), (1, 2.1), (2, 3.1)])
def test_the_distance_of_moe_apex_is_never_zero(layer, distance):
    view = view_at(0, 3)
    use(view, (layer, 0), 0)
    assert terms(CostAndDistance(), (layer, 0), view)[1] == pytest.approx(1 / distance)


def test_moe_apex_with_one_precision_counts_uses():
    assert terms(CostAndDistance(), (2, 5), with_history(second=16, low=None))[0] == 2 / 4


# -- two caches ----------------------------------------------------------------------------------


def test_the_high_cache_is_the_larger_and_together_they_are_the_budget():
    view = view_at(0, 0, budget_bytes=16000)
    assert (TwoCaches(0.75).tier_bytes(16, view), TwoCaches(0.75).tier_bytes(4, view)) == (
        12000,
        4000,
    )
    apex = moe_apex().allocate
    assert (apex.tier_bytes(16, view), apex.tier_bytes(4, view)) == (12800, 3200)
    view.precision = TierPair(None)
    assert TwoCaches().tier_bytes(16, view) is None  # one precision, one pool
    with pytest.raises(ValueError, match=r"high_share=0.3: from 0.5 to 0.95"):
        TwoCaches(0.3)


@pytest.mark.parametrize("share", [0.5, 0.75, 0.95])
@pytest.mark.parametrize(("high", "low"), [(16, 4), (8, 2), (16, 8), (4, 2)])
def test_each_cache_holds_what_a_token_needs_at_the_least_budget(share, high, low):
    strategy, k = hobbit(high_share=share, low=low), knobs(bits=high)
    need = minimum_budget(SHAPE, strategy, k)
    assert need == 2 * NBYTES[high] + 2 * NBYTES[low]  # top-2 in each
    with pytest.raises(BudgetError):
        Scheduler(SHAPE, strategy, dataclasses.replace(k, budget_bytes=need - 1))
    s = Scheduler(SHAPE, strategy, dataclasses.replace(k, budget_bytes=need))
    s.step(step(0, (0, 1), (0.5, 0.5), prefill=True))
    for token in range(6):
        for layer in range(4):
            s.step(step(layer, (token % 6, (token + 1) % 6), (0.75, 0.25)))


pairs = st.tuples(
    st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True).map(tuple),
    st.floats(0.5, 1.0).map(lambda w: (w, 1 - w)),
    st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True).map(tuple),
)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.lists(st.lists(pairs, min_size=4, max_size=4), min_size=1, max_size=10),
    budget=st.integers(2 * 1600 + 2 * 400, 14 * 1600),
    share=st.sampled_from((0.5, 0.75, 0.95)),
    maker=st.sampled_from((hobbit, moe_apex)),
    depth=st.integers(0, 3),
)
def test_neither_cache_ever_exceeds_its_share(tokens, budget, share, maker, depth):
    strategy = maker(depth=depth).replace(allocate=TwoCaches(share))
    s = Scheduler(SHAPE, strategy, knobs(budget))
    for t, layers in enumerate(tokens):
        for layer, (experts, weights, guess) in enumerate(layers):
            looks = tuple(ahead(layer + i, *guess) for i in range(1, depth + 1) if layer + i < 4)
            s.step(step(layer, experts, weights, ahead=looks, prefill=t == 0))
            for bits in (16, 4):
                held = sum(NBYTES[b] for b in resident(s).values() if b == bits)
                assert held == s.cache.tier_bytes[bits]
                assert held <= s.strategy.allocate.tier_bytes(bits, s.view)
            assert s.cache.used_bytes <= budget
        s.end_of_token()


# -- the strategies ------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [hobbit, moe_apex])
def test_a_profile_gives_thresholds_and_what_is_given_wins(maker):
    def chosen(strategy):
        values = strategy.values
        return strategy.bits, *(values[name] for name in ("low_bits", "t1", "t2", "depth"))

    assert chosen(maker()) == (None, 4, 0.6, 0.9, 2)
    profile = {"t1": 0.5, "t2": 0.8, "weights": [0.5, 0.5, 0, 0]}
    assert chosen(maker(profile)) == (None, 4, 0.5, 0.8, 2)
    assert chosen(maker(profile, t1=0.7, depth=1, high=8, low=2)) == (8, 2, 0.7, 0.8, 1)
    assert maker(profile).name == maker.__name__


def test_a_profile_gives_the_weights():
    profile = {"t1": 0.5, "t2": 0.8, "weights": [0.5, 0.5, 0, 0]}
    assert hobbit(profile).evict.weights == (0.5, 0.5, 0, 0)
    assert hobbit(profile, weights=(0, 0, 0, 1)).evict.weights == (0, 0, 0, 1)
    assert hobbit().evict.weights == (0.25,) * 4


# -- calibration ---------------------------------------------------------------------------------


def random_texts(tokens: int, *, texts: int = 2, hot: float = 0.0) -> Trace:
    """Texts of uniform routing; with ``hot``, so often two experts of a layer that never change."""
    rng, trace = random.Random(0), Trace(SHAPE)
    for token in range(tokens * texts):
        for layer in range(4):
            pair = rng.sample(range(2, 6), 2) if rng.random() >= hot else [0, 1]
            first = rng.uniform(0.5, 1)
            prompt = token % tokens == 0
            trace.steps.append(step(layer, pair, (first, 1 - first), prefill=prompt))
    return trace


def test_quantiles_of_a_known_distribution():
    assert calibration.quantiles(np.linspace(0, 1, 1001)) == pytest.approx((0.67, 0.97))


def test_thresholds_put_the_misses_where_the_paper_wants_them():
    trace, k = random_texts(150), knobs(budget_bytes=8 * 1600)

    def outcome(t1, t2):
        return calibration.decide(trace, hobbit(t1=t1, t2=t2, depth=0), k)

    t1, t2 = calibration.thresholds(trace, outcome)
    assert 0.5 < t1 < t2 < 1
    shares = outcome(t1, t2).shares
    for name, wanted in calibration.SHARES.items():
        assert shares[name] == pytest.approx(wanted, abs=0.03)


def test_thresholds_where_everything_fits_after_its_first_use():
    trace, k = random_texts(20), knobs(budget_bytes=40 * 1600)
    t1, t2 = calibration.thresholds(
        trace, lambda t1, t2: calibration.decide(trace, hobbit(t1=t1, t2=t2, depth=0), k)
    )
    assert 0 <= t1 <= t2 <= 1


def test_deciding_a_trace_counts_what_a_replay_decides_but_not_the_prompts():
    trace, k, strategy = random_texts(12), knobs(budget_bytes=6 * 1600), hobbit(depth=0)
    out, again = calibration.decide(trace, strategy, k), replay(trace, strategy, k)
    assert out.tokens == 2 * 11
    assert len(out.missed) == again.counts["load"] + again.counts["skip"]
    assert out.shares["skip"] == again.counts["skip"] / len(out.missed)
    prompts = 2 * 2 * 4  # two texts, one token each: top-2 in four layers, some of them hits
    everything = miss_penalty(again.decisions, NBYTES)
    assert 0 < everything - out.penalty * out.tokens <= prompts


@pytest.mark.parametrize("planted", [(8, 4, 0, 4), (9, 4, 2, 1), (16, 0, 0, 0), (1, 0, 13, 2)])
def test_the_search_finds_a_planted_optimum(planted):
    goal = [p / 16 for p in planted]
    found, seen = calibration.least_penalty(
        lambda w: sum((a - b) ** 2 for a, b in zip(w, goal, strict=True))
    )
    assert found == tuple(goal)
    assert seen[found] == min(seen.values()) == 0
    assert all(sum(w) == 1 and min(w) >= 0 for w in seen)


def test_where_all_weights_are_as_good_the_search_keeps_them_equal():
    assert calibration.least_penalty(lambda _: 1.0)[0] == (0.25, 0.25, 0.25, 0.25)


def test_the_search_learns_from_a_trace_that_frequency_pays():
    """Two experts of each layer are used half the time, the rest once in a while."""
    trace, k = random_texts(30, hot=0.5), knobs(budget_bytes=10 * 1600)

    def penalty(weights=calibration.EQUAL, **parts) -> float:
        strategy = hobbit(weights=weights).tuned(low_bits=None).replace(**parts)
        return calibration.decide(trace, strategy, k).penalty

    found, seen = calibration.least_penalty(penalty)
    assert found[1] + found[2] > found[0]
    assert seen[found] <= min(penalty(), penalty(evict=LRU()), penalty(evict=LFU()))
    assert seen[found] < 0.9 * penalty(evict=LRU())


def test_how_right_the_gates_are():
    trace = Trace(Shape((6, 6, 6), 2, NBYTES))
    trace.steps = [
        step(0, (0, 1), (0.6, 0.4), ahead=[ahead(1, 2, 3), ahead(2, 4, 5)]),
        step(1, (2, 5), (0.6, 0.4), ahead=[ahead(2, 1, 0)]),  # +1: first right, one of two named
        step(2, (1, 4), (0.6, 0.4)),  # +2: first wrong, one named; +1: first right, one named
    ]
    assert calibration.gate_accuracy(trace) == {
        "+1": {"first": 1.0, "top_k": 0.5, "first_by_layer": [1.0, 1.0]},
        "+2": {"first": 0.0, "top_k": 0.5, "first_by_layer": [0.0]},
    }


# -- on the bundled model ------------------------------------------------------------------------


def test_the_calibration_of_the_bundled_model_and_going_on_with_it(demo_lab):
    texts = [text[:80] for text in demo_lab.probes().values()]
    made, kept = calibration.made_from(demo_lab, max_tokens=8), {}
    data = calibration.make(demo_lab, texts, made, kept, progress=False)
    assert 0 < data["t1"] <= data["t2"] < 1
    assert sum(data["weights"]) == 1
    least = min(row[-1] for row in data["search"])
    assert data["calibration"]["penalty_ahead"]["hobbit"] == least
    assert {len(data[half]["missed"]) for half in ("calibration", "held_out")} == {101}
    seen = data["calibration"]["selected"]  # 67 % of all selections are at most T1, 97 % at most T2
    assert data["t1"] == pytest.approx(seen[67], abs=1e-3)
    assert data["t2"] == pytest.approx(seen[97], abs=1e-3)
    assert [data["t1"], data["t2"]] == data["thresholds"]["selections"]
    ours = calibration.made_from(demo_lab, max_tokens=8, over="misses")
    ours = calibration.make(demo_lab, texts, ours, kept, progress=False)
    assert [ours["t1"], ours["t2"]] == ours["thresholds"]["misses"] == data["thresholds"]["misses"]
    chance = 1 / 16
    assert all(gate["first"] > 2 * chance for gate in data["gates"].values())
    assert json.loads(json.dumps(data)) == data
    goal = (0.0, 1.0, 0.0, 0.0)  # what was measured before is not measured again
    kept.update(dict.fromkeys(kept, 1.0) | {f"penalty {goal}": 0.5})
    again = calibration.make(demo_lab, texts, made, kept, progress=False)
    assert again["weights"] == [*goal]


def test_a_calibration_refuses_what_cannot_be_a_pair_of_tiers(demo_lab):
    for options in ({"high": 4, "low": 4}, {"high": 4, "low": 8}, {"low": 5}):
        with pytest.raises(ValueError, match="choose two of"):
            calibration.made_from(demo_lab, **options)
    with pytest.raises(ValueError, match="over='all': thresholds are quantiles over selections or"):
        calibration.made_from(demo_lab, over="all")
    with pytest.raises(ValueError, match="depth=4: layers to look ahead, 0 to 3"):
        calibration.made_from(demo_lab, depth=4)
    a, b = (calibration.made_from(demo_lab, budget=x) for x in ("25%", "50%"))
    assert a != b == calibration.made_from(demo_lab, budget=b["budget_bytes"])


@pytest.mark.parametrize("maker", [hobbit, moe_apex])
def test_a_run_serves_high_low_and_not_at_all_within_two_caches(demo_lab, maker):
    demo_lab.update(strategy=maker(t1=0.6, t2=0.8, depth=1))
    run = demo_lab.start("The two angels came", max_new_tokens=16, temperature=0, ignore_eos=True)
    while run.running:
        held = demo_lab.cache_map()["bits"]
        assert set(np.unique(held)) <= {0, 4, 16}
        run.join(0.01)
    run.join()
    shares = miss_shares(run.events.query("token > 0").itertuples())
    assert min(shares.values()) > 0
    assert sum(shares.values()) == pytest.approx(1)
    nbytes, cache = demo_lab.info()["expert_bytes"], demo_lab._engine.scheduler.cache
    view, allocate = demo_lab._engine.scheduler.view, demo_lab._engine.scheduler.strategy.allocate
    for bits in (16, 4):
        held = sum(nbytes[b] for _, b in cache.items() if b == bits)
        assert 0 < held <= allocate.tier_bytes(bits, view)
    lows = run.events.query("token == 0 and kind == 'load' and bits < bits_asked")
    assert lows.empty  # the prompt comes high


def test_the_cache_of_a_run_says_why_by_four_terms(demo_lab):
    demo_lab.update(strategy="hobbit", w_lru=1, w_lfu=0, w_lhu=0, w_fld=0)
    demo_lab.generate("The two angels came", max_new_tokens=4, temperature=0, ignore_eos=True)
    layers, experts = demo_lab.cache_map()["bits"].nonzero()
    why = [demo_lab.why(int(at), int(e)) for at, e in zip(layers, experts, strict=True)]
    assert all(terms["priority"] == terms["recency (LRU)"] for terms in why)
    assert len({terms["priority"] for terms in why}) > 1
