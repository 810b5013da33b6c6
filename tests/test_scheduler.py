"""What a user may rely on of the scheduler: pure decisions, and the budget is a promise."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.replays.bounds import belady_hits
from moelab.replays.replay import replay
from moelab.scheduling.budget import BudgetError, minimum_budget
from moelab.scheduling.cache import Cache
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import Change, LayerInput
from moelab.scheduling.strategy import Knobs, LookAhead, Route, Shape, Strategy
from moelab.scheduling.stream import ranked
from moelab.scheduling.trace import Trace
from moelab.scheduling.victims import Victims
from moelab.strategies import NAMES, Allocate, Evict, Prefetch, lru, make
from toy_engine import NBYTES, decided, enough, places, resident

SHAPE = Shape((6, 6, 6), 2, NBYTES)


def step(layer: int, *experts: int, weights=None, prefill=False, ahead=()) -> LayerInput:
    weights = weights or tuple(1 / (i + 2) for i in range(len(experts)))
    return LayerInput(layer, (experts,), (tuple(weights),), prefill, tuple(ahead))


def knobs(**changes) -> Knobs:
    return Knobs(**({"budget_bytes": 16 * 1600} | changes))


def kinds(plan) -> list[tuple[str, int]]:
    return [(d.kind, d.expert) for d in decided(plan)]


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
    s = Scheduler(SHAPE, lru().tuned(low_bits=4), knobs())
    plan = s.step(step(0, 1, 2, weights=(first, 1 - first)))
    second = [d for d in plan.decisions(SHAPE) if d.expert == 2]
    assert second[-1].kind == kind
    assert (second[-1].bits_asked, second[-1].bits) == (
        16,
        {"load": 16, "downgrade": 4, "skip": 0}[kind],
    )


def test_a_low_copy_serves_a_low_request_and_a_high_copy_any():
    s = Scheduler(SHAPE, lru().tuned(low_bits=4), knobs())
    s.step(step(0, 1, 2, weights=(0.75, 0.25)))  # 1 high, 2 low
    again = kinds(s.step(step(0, 1, 2, weights=(0.75, 0.25))))
    assert again == [("hit", 1), ("hit", 2), ("downgrade", 2)]
    swapped = kinds(s.step(step(0, 2, 1, weights=(0.75, 0.25))))
    assert swapped == [("hit", 1), ("evict", 2), ("load", 2)]
    assert resident(s)[0, 2] == 16


def test_precision_rules_rest_during_prefill():
    s = Scheduler(SHAPE, lru().tuned(low_bits=4), knobs())
    prompt = LayerInput(0, ((1, 2), (1, 3)), ((0.99, 0.01), (0.99, 0.01)), prefill=True)
    assert kinds(s.step(prompt)) == [("load", 1), ("load", 2), ("load", 3)]


def test_a_prompt_larger_than_the_budget_goes_in_waves():
    s = Scheduler(SHAPE, lru(), knobs(budget_bytes=2 * 1600))
    prompt = LayerInput(0, ((0, 1), (2, 3), (4, 5)), ((0.5, 0.5),) * 3, prefill=True)
    did = kinds(s.step(prompt))
    assert [kind for kind, _ in did] == ["load", "load"] + ["evict", "load"] * 4
    assert [expert for kind, expert in did if kind == "load"] == [0, 1, 2, 3, 4, 5]
    assert s.cache.used_bytes == 2 * 1600


def test_look_ahead_fetches_what_the_next_router_names_and_protects_it():
    s = Scheduler(SHAPE, lru().tuned(depth=1), knobs(budget_bytes=6 * 1600))
    assert s.look_ahead(0, prefill=False) == 1
    assert s.look_ahead(2, prefill=False) == 0  # the last layer has nobody ahead
    assert s.look_ahead(0, prefill=True) == 0
    plan = s.step(step(0, 0, 1, ahead=[LookAhead(1, (4, 5), (0.6, 0.4))]))
    assert kinds(plan)[-2:] == [("prefetch", 4), ("prefetch", 5)]
    assert {s.shape.place(int(k)) for k in np.flatnonzero(s.view.protected)} == {(1, 4), (1, 5)}
    plan = s.step(step(1, 4, 5))
    assert [(d.kind, d.cause) for d in decided(plan)] == [("hit", "prefetched")] * 2
    assert not s.view.protected.any()  # their layer has come


def test_a_prefetch_never_evicts_what_this_layer_needs():
    s = Scheduler(SHAPE, lru().tuned(depth=1), knobs(budget_bytes=2 * 1600))
    plan = s.step(step(0, 0, 1, ahead=[LookAhead(1, (4, 5), (0.6, 0.4))]))
    assert kinds(plan) == [("load", 0), ("load", 1)]
    assert set(resident(s)) == {(0, 0), (0, 1)}


def test_fewer_bits_let_go_of_copies_above_them():
    s = Scheduler(SHAPE, lru(), knobs())
    token(s, (0, 1), (2, 3), (4, 5))
    assert [(d.kind, d.cause) for d in decided(s.change(knobs(bits=4)))] == [("evict", "bits")] * 6
    assert kinds(s.step(step(0, 0, 1))) == [("load", 0), ("load", 1)]
    assert resident(s)[0, 0] == 4


def test_a_smaller_budget_evicts_at_once_by_the_strategy():
    s = Scheduler(SHAPE, lru(), knobs())
    token(s, (0, 1), (2, 3), (4, 5))
    plan = s.change(knobs(budget_bytes=2 * 1600))
    assert places(decided(plan, "evict")) == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert len(plan.rows) == 4


def test_a_stand_in_serves_a_missing_expert():
    class Nearest(Route):
        def stand_in(self, request, view):
            return next((int(view.index_of[k]) for k in view.residents(view.layer)), None)

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
    cache.add(0, 16)
    with pytest.raises(AssertionError, match="needs 200 bytes, 0 are free"):
        cache.add(1, 2)


def test_a_policy_in_under_ten_lines():
    class LowestIndexStays(Evict):
        def score(self, view):
            return -view.index_of

    strategy = lru().replace(evict=LowestIndexStays(), name="mine")
    s = Scheduler(Shape((6,), 1, NBYTES), strategy, knobs(budget_bytes=2 * 1600))
    for expert in (5, 1):
        s.step(step(0, expert))
    assert kinds(s.step(step(0, 2))) == [("evict", 5), ("load", 2)]
    assert s.why(0) == {1: {"score": -1}, 2: {"score": -2}}


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ([1.0, 2.0], r"Wrong.score returned float64 of shape \(2,\).*shape \(6,\)"),
        (["a"] * 6, r"Wrong.score returned <U1.*one number for each expert"),
        ([float("nan")] * 6, r"\.score is not a number \(NaN\) for the resident expert \(0, "),
    ],
)
def test_scores_that_are_not_one_number_for_each_expert_are_refused(scores, told):
    class Wrong(Evict):
        def score(self, view):
            return np.array(scores)

    strategy = lru().replace(evict=Wrong())
    s = Scheduler(Shape((6,), 2, NBYTES), strategy, knobs(budget_bytes=2 * 1600))
    s.step(step(0, 0, 1))
    with pytest.raises(ValueError, match=told):
        s.step(step(0, 2, 3))


@pytest.mark.parametrize(
    ("role", "base", "method", "now"),
    [
        ("evict", Evict, "priority", r"score\(self, view\)"),
        ("evict", Evict, "victim", r"score\(self, view\)"),
        ("evict", Evict, "used", r"observe\(self, given, view\)"),
        ("evict", Evict, "loaded", r"observe\(self, given, view\)"),
        ("evict", Evict, "gone", "view.bits"),
        ("evict", Evict, "why", r"terms\(self, view\)"),
        ("prefetch", Prefetch, "depth", r"look_ahead\(self, view\)"),
    ],
)
def test_a_policy_of_version_0_3_is_refused_with_what_to_define_instead(role, base, method, now):
    old = type("Old", (base,), {method: lambda self, *_: 0})()
    told = rf"{role}=Old\(\) defines {method}\(\), as in moelab 0.3; define instead: .*{now}"
    with pytest.raises(TypeError, match=told):
        lru().replace(**{role: old})


def test_bits_of_one_expert_are_refused_with_what_to_define_instead():
    class Old(Allocate):
        def bits(self, key, view):
            return 4

    with pytest.raises(TypeError, match=r"Old\(\) defines bits\(key, view\), as in moelab 0.3"):
        lru().replace(allocate=Old())


def test_a_guess_that_finds_no_room_drops_nothing():
    s = Scheduler(SHAPE, lru().tuned(low_bits=4, depth=1), knobs(budget_bytes=2 * 1600 + 400))
    s.step(step(1, 4, 5, weights=(0.25, 0.75)))  # 5 high, 4 low
    assert resident(s)[1, 4] == 4
    s.step(step(0, 0, 1, weights=(0.5, 0.5)))
    held = resident(s)
    plan = s.step(step(0, 0, 1, weights=(0.5, 0.5), ahead=[LookAhead(1, (4,), (1.0,))]))
    assert kinds(plan) == [("hit", 0), ("hit", 1)]
    assert resident(s) == held


def test_a_part_need_not_be_a_subclass():
    class Nobody:
        title, parameters, observes = "nobody", (), frozenset()

        def look_ahead(self, view):
            return 1

        def predict(self, layer, look_ahead, view):
            return ()

        def begin(self, view):
            return ()

        def observe(self, given, view):
            pass

        def new_sequence(self):
            pass

        def check(self):
            pass

    s = Scheduler(SHAPE, lru().replace(prefetch=Nobody()), knobs())
    assert (s.look_ahead(0, prefill=False), s.look_ahead(0, prefill=True)) == (1, 0)
    s.step(step(0, 0, 1, weights=(0.5, 0.5)))


def test_a_part_that_is_no_part_is_refused():
    with pytest.raises(TypeError, match="must be an object with.*score"):
        lru().replace(evict=object())
    with pytest.raises(TypeError):
        lru().replace(evict=Evict)  # the class, not an object


# -- who leaves: a selection that must equal a sort -----------------------------------------------

FLAGS = (0, Cache.NEEDED, Cache.PROTECTED, Cache.PINNED, Cache.NEEDED | Cache.PROTECTED)


@st.composite
def crowds(draw):
    """A cache of n experts, some held, with scores that tie often, and who may go."""
    n = draw(st.integers(1, 90))
    rng = random.Random(draw(st.integers(0, 2**32)))
    cache = Cache(Shape((n,), 1, NBYTES), n * 1600)
    for key in rng.sample(range(n), rng.randint(1, n)):  # the order of their last use
        cache.add(key, rng.choice((16, 4)))
    cache.held[:] = [rng.choice(FLAGS) for _ in range(n)]
    spread = draw(st.sampled_from((1, 3, 1000)))
    score = np.array([rng.randrange(spread) for _ in range(n)], draw(st.sampled_from("fiu")) + "8")
    if score.dtype.kind == "f":
        score[[rng.random() < 0.1 for _ in range(n)]] = rng.choice((np.inf, -np.inf))
    return cache, score, (cache.bits > 0) & (np.array(rng.choices((True, False), (5, 1), k=n)))


@settings(max_examples=150, deadline=None)
@given(crowds(), st.sampled_from(FLAGS), st.lists(st.tuples(st.integers(0, 12), st.booleans())))
def test_they_leave_by_score_and_among_equals_by_their_last_use(crowd, held, turns):
    """One layer's step: some are evicted, some held from then on, and more are asked for."""
    cache, score, mask = crowd
    victims = Victims(cache, score, mask)

    def in_order() -> list[int]:
        keys = np.flatnonzero(mask & (cache.bits > 0) & (cache.held & held == 0)).tolist()
        return sorted(keys, key=lambda k: (score[k], cache.last_use[k]))

    for count, protects in turns:
        for want, key in zip(in_order()[:count], victims.allowed(held), strict=False):
            assert key == want
            cache.remove(key)
        for key in in_order()[:1] if protects else ():
            cache.held[key] |= Cache.PROTECTED
    assert list(victims.allowed(held)) == in_order()


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
    """Settings, and parameters for a strategy that has them."""
    bits = draw(st.sampled_from((16, 8, 4)))
    budget = draw(st.integers(6 * NBYTES[bits], 20 * 1600))
    return Knobs(budget, bits), {
        "low_bits": draw(st.sampled_from((None, 4, 2))),
        "depth": draw(st.integers(0, 2)),
    }


def chosen(name: str, setting) -> tuple[Strategy, Knobs]:
    now, values = setting
    strategy = make(name)
    strategy = strategy.tuned(**{n: v for n, v in values.items() if n in strategy.parameters})
    return strategy, enough(strategy, now, SHAPE)


def run_stream(name: str, first, stream) -> tuple[list, Trace, int]:
    """Drive a scheduler; check after every decision that decisions and cache agree."""
    strategy, now = chosen(name, first)
    s, trace, done, held = Scheduler(SHAPE, strategy, now), Trace(SHAPE), [], {}
    trace.changes.append(Change(0, now, name, True, strategy.values))
    s.new_sequence()
    done += obeyed(held, s.begin(), s)
    for what, *rest in stream:
        if what == "knobs":
            fresh, name = rest[1] != name, rest[1]
            other, now = chosen(name, rest[0])
            strategy = other if fresh else strategy.tuned(**other.values)
            done += obeyed(held, s.change(now, strategy), s)
            values = strategy.values
            trace.changes.append(Change(len(trace.steps), now, name, fresh, values))
            done += obeyed(held, s.begin(), s)
        else:
            for given_layer in layer_inputs(what, rest[0], s):
                trace.steps.append(given_layer)
                done += obeyed(held, s.step(given_layer), s)
            s.end_of_token()
        assert sum(NBYTES[b] for b in held.values()) <= s.cache.budget_bytes
    return done, trace, len(held)


def obeyed(held: dict, plan, s: Scheduler) -> list:
    """The decisions of a plan, carried out; the cache must show the same in the end."""
    for d in decided(plan):
        obey(held, d, s.cache.budget_bytes)
    assert held == resident(s)
    return decided(plan)


def layer_inputs(what, layers, s):
    for i, row in enumerate(layers):
        if what == "prompt":
            yield LayerInput(i, tuple(row), ((0.7, 0.3),) * len(row), prefill=True)
        else:
            ahead = (
                (LookAhead(i + 1, row[2], (0.8, 0.2)),) if s.look_ahead(i, prefill=False) else ()
            )
            yield LayerInput(i, (row[0],), (row[1],), look_ahead=ahead)


def obey(held: dict, d, budget: int) -> None:
    """What an engine does with one decision; the budget holds after every load."""
    key = (d.layer, d.expert)
    if d.kind in ("load", "prefetch"):
        assert key not in held
        held[key] = d.bits
        assert sum(NBYTES[b] for b in held.values()) <= budget
    elif d.kind == "evict":
        assert held.pop(key) == d.bits
    elif d.kind in ("hit", "substitute"):
        assert held[key] == d.bits


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(NAMES), first=random_knobs(), stream=streams())
def test_the_budget_holds_after_every_decision_whatever_changes(name, first, stream):
    run_stream(name, first, stream)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), first=random_knobs(), stream=streams())
def test_a_replay_decides_the_same_again(name, first, stream):
    done, trace, _ = run_stream(name, first, stream)
    again = replay(trace, strategies={n: make(n) for n in NAMES})
    assert again.decisions == done


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(("lru", "lfu")), stream=streams())
def test_belady_is_at_least_as_good_as_any_policy(name, stream):
    first = Knobs(budget_bytes=5 * 1600)
    _, trace, _ = run_stream(name, (first, {}), [s for s in stream if s[0] == "token"])
    hits, asked = belady_hits(trace, 5)
    got = replay(trace, make(name), first)
    assert got.counts["hit"] <= hits <= asked


def test_a_trace_survives_the_disk(tmp_path):
    trace = Trace(
        SHAPE,
        [step(0, 1, 2, ahead=[LookAhead(1, (3,), (0.5,))])],
        [Change(0, knobs(), "lru", parameters={})],
        [(3, 4)],
    )
    assert Trace.load(trace.save(tmp_path / "t.json")) == trace
    (tmp_path / "bad.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"bad.json is not a moelab trace"):
        Trace.load(tmp_path / "bad.json")
