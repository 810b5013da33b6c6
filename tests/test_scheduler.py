"""What a user may rely on of the scheduler: pure decisions, and the budget is a promise."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.replays.bounds import belady_hits
from moelab.replays.replay import replay
from moelab.scheduling.budget import BudgetError, minimum_budget
from moelab.scheduling.cache import Cache
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.strategy import Knobs, LookAhead, Route, Shape
from moelab.scheduling.stream import ranked
from moelab.scheduling.trace import Change, LayerInput, Trace
from moelab.strategies import NAMES, Evict, lru, make

NBYTES = {16: 1600, 8: 800, 4: 400, 2: 200}
SHAPE = Shape((6, 6, 6), 2, NBYTES)


def step(layer: int, *experts: int, weights=None, prefill=False, ahead=()) -> LayerInput:
    weights = weights or tuple(1 / (i + 2) for i in range(len(experts)))
    return LayerInput(layer, (experts,), (tuple(weights),), prefill, tuple(ahead))


def knobs(**changes) -> Knobs:
    return Knobs(**({"budget_bytes": 16 * 1600} | changes))


def kinds(plan) -> list[tuple[str, int]]:
    return [(d.kind, d.expert) for d in plan.decisions(NBYTES)]


def token(scheduler: Scheduler, *layers: tuple[int, ...]) -> list[list[tuple[str, int]]]:
    out = [kinds(scheduler.step(step(i, *experts))) for i, experts in enumerate(layers)]
    scheduler.end_of_token()
    return out


def test_first_use_is_a_load_and_the_second_a_hit():
    s = Scheduler(SHAPE, lru(), knobs())
    assert token(s, (1, 2), (3, 4), (0, 5))[0] == [("load", 1), ("load", 2)]
    assert token(s, (1, 3), (3, 4), (0, 5)) == [
        [("hit", 1), ("load", 3)],
        [("hit", 3), ("hit", 4)],
        [("hit", 0), ("hit", 5)],
    ]


def test_lru_falls_off_the_cliff_at_one_token_cycle_minus_one_layer():
    at_cliff = Scheduler(SHAPE, lru(), knobs(budget_bytes=4 * 1600))  # k (L - 1) experts
    above = Scheduler(SHAPE, lru(), knobs(budget_bytes=6 * 1600))  # k L experts
    same = ((0, 1), (2, 3), (4, 5))
    for _ in range(3):
        cold, warm = token(at_cliff, *same), token(above, *same)
    assert not any(kind == "hit" for layer in cold for kind, _ in layer)
    assert all(kind == "hit" for layer in warm for kind, _ in layer)


def test_lru_evicts_the_least_recently_used_and_lfu_the_least_used():
    for name, victim in (("lru", 0), ("lfu", 2)):
        s = Scheduler(Shape((6,), 1, NBYTES), make(name), knobs(budget_bytes=3 * 1600))
        for expert in (0, 0, 1, 1, 2):
            s.step(step(0, expert))
        assert kinds(s.step(step(0, 3))) == [("evict", victim), ("load", 3)]


def test_on_demand_keeps_nothing():
    s = Scheduler(SHAPE, make("on_demand"), knobs())
    assert token(s, (1, 2), (3, 4), (0, 5))[0] == [
        ("load", 1),
        ("load", 2),
        ("evict", 1),
        ("evict", 2),
    ]
    assert len(s.cache) == 0


def test_layer_lru_keeps_every_layer_within_its_share():
    s = Scheduler(SHAPE, make("layer_lru"), knobs(budget_bytes=9 * 1600))
    for experts in ((0, 1), (2, 3), (4, 5)):
        s.step(step(0, *experts))
    assert s.cache.layer_bytes == [3 * 1600, 0, 0]


def test_unimportance_is_the_sum_of_the_weights_ranked_before():
    got = ranked((7, 3, 5), (0.2, 0.5, 0.1))
    assert [r.expert for r in got] == [3, 7, 5]
    assert [r.score for r in got] == pytest.approx([0, 0.5 / 0.8, 0.7 / 0.8])


@pytest.mark.parametrize(("first", "kind"), [(0.55, "load"), (0.75, "downgrade"), (0.95, "skip")])
def test_a_tier_pair_serves_misses_high_low_or_not_at_all(first, kind):
    s = Scheduler(SHAPE, lru(), knobs(low_bits=4))
    plan = s.step(step(0, 1, 2, weights=(first, 1 - first)))
    second = [d for d in plan.decisions(NBYTES) if d.expert == 2]
    assert second[-1].kind == kind
    assert (second[-1].bits_asked, second[-1].bits) == (
        16,
        {"load": 16, "downgrade": 4, "skip": 0}[kind],
    )


def test_a_low_copy_serves_a_low_request_and_a_high_copy_any():
    s = Scheduler(SHAPE, lru(), knobs(low_bits=4))
    s.step(step(0, 1, 2, weights=(0.75, 0.25)))  # 1 high, 2 low
    again = kinds(s.step(step(0, 1, 2, weights=(0.75, 0.25))))
    assert again == [("hit", 1), ("hit", 2), ("downgrade", 2)]
    swapped = kinds(s.step(step(0, 2, 1, weights=(0.75, 0.25))))
    assert swapped == [("hit", 1), ("evict", 2), ("load", 2)]
    assert s.cache.bits((0, 2)) == 16


def test_precision_rules_rest_during_prefill():
    s = Scheduler(SHAPE, lru(), knobs(low_bits=4))
    prompt = LayerInput(0, ((1, 2), (1, 3)), ((0.99, 0.01), (0.99, 0.01)), prefill=True)
    assert kinds(s.step(prompt)) == [("load", 1), ("load", 2), ("load", 3)]


def test_a_prompt_larger_than_the_budget_goes_in_waves():
    s = Scheduler(SHAPE, lru(), knobs(budget_bytes=2 * 1600))
    prompt = LayerInput(0, ((0, 1), (2, 3), (4, 5)), ((0.5, 0.5),) * 3, prefill=True)
    plan = s.step(prompt)
    assert [x.served for x in plan.serves] == [0, 1, 2, 3, 4, 5]
    assert [len(x.drops) for x in plan.serves] == [0, 0, 1, 1, 1, 1]
    assert s.cache.used_bytes == 2 * 1600


def test_look_ahead_fetches_what_the_next_router_names_and_protects_it():
    s = Scheduler(SHAPE, lru(), knobs(budget_bytes=6 * 1600, prefetch=1))
    assert s.depth(0, prefill=False) == 1
    assert s.depth(2, prefill=False) == 0  # the last layer has nobody ahead
    assert s.depth(0, prefill=True) == 0
    plan = s.step(step(0, 0, 1, ahead=[LookAhead(1, (4, 5), (0.6, 0.4))]))
    assert kinds(plan)[-2:] == [("prefetch", 4), ("prefetch", 5)]
    plan = s.step(step(1, 4, 5))
    assert [(x.load, x.cause) for x in plan.serves] == [(False, "prefetched")] * 2


def test_a_prefetch_never_evicts_what_this_layer_needs():
    s = Scheduler(SHAPE, lru(), knobs(budget_bytes=2 * 1600, prefetch=1))
    plan = s.step(step(0, 0, 1, ahead=[LookAhead(1, (4, 5), (0.6, 0.4))]))
    assert plan.fetches == []
    assert set(s.cache) == {(0, 0), (0, 1)}


def test_fewer_bits_let_go_of_copies_above_them():
    s = Scheduler(SHAPE, lru(), knobs())
    token(s, (0, 1), (2, 3), (4, 5))
    drops = s.change(knobs(bits=4))
    assert {d.cause for d in drops} == {"bits"}
    assert len(drops) == 6
    assert kinds(s.step(step(0, 0, 1))) == [("load", 0), ("load", 1)]
    assert s.cache.bits((0, 0)) == 4


def test_a_smaller_budget_evicts_at_once_by_the_strategy():
    s = Scheduler(SHAPE, lru(), knobs())
    token(s, (0, 1), (2, 3), (4, 5))
    assert [d.key for d in s.change(knobs(budget_bytes=2 * 1600))] == [
        (0, 0),
        (0, 1),
        (1, 2),
        (1, 3),
    ]


def test_a_stand_in_serves_a_missing_expert():
    class Nearest(Route):
        def stand_in(self, request, view):
            return next((e for layer, e in view.cache if layer == view.layer), None)

    s = Scheduler(SHAPE, lru().replace(route=Nearest()), knobs())
    s.step(step(0, 1, 2))
    assert kinds(s.step(step(0, 1, 5))) == [("hit", 1), ("substitute", 2)]


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_below_one_tokens_need_is_refused_with_the_number_that_would_do(name):
    need = minimum_budget(SHAPE, make(name), knobs())
    if name in ("on_demand", "lru", "lfu"):
        assert need == 2 * 1600
    if name == "layer_lru":
        assert need == 6 * 1600
    Scheduler(SHAPE, make(name), knobs(budget_bytes=need))
    with pytest.raises(BudgetError, match=f"raise it to {need} bytes"):
        Scheduler(SHAPE, make(name), knobs(budget_bytes=need - 1))


def test_the_cache_refuses_what_does_not_fit():
    cache = Cache(SHAPE, 1600)
    cache.add((0, 0), 16)
    with pytest.raises(AssertionError, match="needs 200 bytes, 0 are free"):
        cache.add((0, 1), 2)


def test_a_policy_in_under_ten_lines():
    class LowestIndexStays(Evict):
        def priority(self, key, view):
            return -key[1]

    strategy = lru().replace(evict=LowestIndexStays(), name="mine")
    s = Scheduler(Shape((6,), 1, NBYTES), strategy, knobs(budget_bytes=2 * 1600))
    for expert in (5, 1):
        s.step(step(0, expert))
    assert kinds(s.step(step(0, 2))) == [("evict", 5), ("load", 2)]
    assert s.why((0, 1)) == {"priority": -1}


def test_a_policy_that_ignores_what_is_allowed_is_named():
    class Newest(Evict):
        def victim(self, allowed, view):
            return list(view.cache)[-1]

    s = Scheduler(
        Shape((6,), 2, NBYTES), lru().replace(evict=Newest()), knobs(budget_bytes=2 * 1600)
    )
    s.step(step(0, 0, 1))
    with pytest.raises(ValueError, match=r"Newest.victim chose expert \(0, 2\).*allowed"):
        s.step(step(0, 2, 3))


def test_a_guess_that_finds_no_room_drops_nothing():
    s = Scheduler(SHAPE, lru(), knobs(budget_bytes=2 * 1600 + 400, low_bits=4, prefetch=1))
    s.step(step(1, 4, 5, weights=(0.25, 0.75)))  # 5 high, 4 low
    assert s.cache.bits((1, 4)) == 4
    s.step(step(0, 0, 1, weights=(0.5, 0.5)))
    held = dict(s.cache)
    plan = s.step(step(0, 0, 1, weights=(0.5, 0.5), ahead=[LookAhead(1, (4,), (1.0,))]))
    assert plan.fetches == [] == plan.after
    assert dict(s.cache) == held


def test_a_part_that_is_no_part_is_refused():
    with pytest.raises(TypeError, match="must be an object with.*victim"):
        lru().replace(evict=object())
    with pytest.raises(TypeError):
        lru().replace(evict=Evict)  # the class, not an object


# -- properties over random streams and random changes of settings -----------------------------

experts2 = st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True).map(tuple)
weights2 = st.floats(0.5, 1.0).map(lambda w: (w, 1 - w))


@st.composite
def streams(draw):
    """Tokens (one prompt first) and, between tokens, other settings."""
    steps: list = [("prompt", [draw(st.lists(experts2, min_size=1, max_size=6)) for _ in range(3)])]
    for _ in range(draw(st.integers(1, 12))):
        if draw(st.booleans()):
            steps.append(("knobs", draw(random_knobs()), draw(st.sampled_from(NAMES))))
        layers = [(draw(experts2), draw(weights2), draw(experts2)) for _ in range(3)]
        steps.append(("token", layers))
    return steps


@st.composite
def random_knobs(draw):
    bits = draw(st.sampled_from((16, 8, 4)))
    return Knobs(
        budget_bytes=draw(st.integers(6 * NBYTES[bits], 20 * 1600)),
        bits=bits,
        low_bits=draw(st.sampled_from((None, 4, 2))),
        prefetch=draw(st.integers(0, 2)),
    )


def run_stream(name: str, first: Knobs, stream) -> tuple[list, Trace, int]:
    """Drive a scheduler; check after every decision that decisions and cache agree."""
    first = enough(name, first)
    s, trace, decided, held = Scheduler(SHAPE, make(name), first), Trace(SHAPE), [], {}
    trace.changes.append(Change(0, first, name))
    s.new_sequence()
    decided += obeyed(held, s.begin(), s)
    for what, *rest in stream:
        if what == "knobs":
            fresh, name = rest[1] != name, rest[1]
            now = enough(name, rest[0])
            for drop in s.change(now, make(name) if fresh else None):
                assert held.pop(drop.key) == drop.bits
            trace.changes.append(Change(len(trace.steps), now, name, fresh))
            decided += obeyed(held, s.begin(), s)
        else:
            for given_layer in layer_inputs(what, rest[0], s):
                trace.steps.append(given_layer)
                decided += obeyed(held, s.step(given_layer), s)
            s.end_of_token()
        assert sum(NBYTES[b] for b in held.values()) <= s.cache.budget_bytes
    return decided, trace, len(held)


def enough(name: str, now: Knobs) -> Knobs:
    """The settings with a budget that the strategy takes."""
    least = minimum_budget(SHAPE, make(name), now)
    return dataclasses.replace(now, budget_bytes=max(now.budget_bytes, least))


def obeyed(held: dict, plan, s: Scheduler) -> list:
    """The decisions of a plan, carried out; the cache must show the same in the end."""
    decisions = list(plan.decisions(NBYTES))
    for d in decisions:
        obey(held, d, s.cache.budget_bytes)
    assert held == dict(s.cache)
    return decisions


def layer_inputs(what, layers, s):
    for i, row in enumerate(layers):
        if what == "prompt":
            yield LayerInput(i, tuple(row), ((0.7, 0.3),) * len(row), prefill=True)
        else:
            ahead = (LookAhead(i + 1, row[2], (0.8, 0.2)),) if s.depth(i, prefill=False) else ()
            yield LayerInput(i, (row[0],), (row[1],), look_ahead=ahead)


def obey(held: dict, d, budget: int) -> None:
    """What an engine does with one decision; the budget holds after every single one."""
    key = (d.layer, d.expert)
    if d.kind in ("load", "prefetch"):
        assert key not in held
        held[key] = d.bits
    elif d.kind == "evict":
        assert held.pop(key) == d.bits
    elif d.kind in ("hit", "substitute"):
        assert held[key] == d.bits
    assert sum(NBYTES[b] for b in held.values()) <= budget


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(NAMES), first=random_knobs(), stream=streams())
def test_the_budget_holds_after_every_decision_whatever_changes(name, first, stream):
    run_stream(name, first, stream)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), first=random_knobs(), stream=streams())
def test_a_replay_decides_the_same_again(name, first, stream):
    decided, trace, _ = run_stream(name, first, stream)
    again = replay(trace, strategies={n: make(n) for n in NAMES})
    assert again.decisions == decided


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(("lru", "lfu")), stream=streams())
def test_belady_is_at_least_as_good_as_any_policy(name, stream):
    first = Knobs(budget_bytes=5 * 1600)
    _, trace, _ = run_stream(name, first, [s for s in stream if s[0] == "token"])
    hits, asked = belady_hits(trace, 5)
    got = replay(trace, make(name), first)
    assert got.counts["hit"] <= hits <= asked


def test_a_trace_survives_the_disk(tmp_path):
    trace = Trace(
        SHAPE,
        [step(0, 1, 2, ahead=[LookAhead(1, (3,), (0.5,))])],
        [Change(0, knobs(), "lru", parameters={})],
        [((0, 3), 4)],
    )
    assert Trace.load(trace.save(tmp_path / "t.json")) == trace
    (tmp_path / "bad.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"bad.json is not a moelab trace"):
        Trace.load(tmp_path / "bad.json")
