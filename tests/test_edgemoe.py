"""What a user may rely on of EdgeMoE: formulas checked by hand, and preloading changes no token."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moelab
from moelab.calibration import edgemoe as calibration
from moelab.calibration import find_profile
from moelab.calibration import profile as profiles
from moelab.calibration.figures import FIGURES
from moelab.replays.replay import replay
from moelab.scheduling.cache import Cache
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Knobs, Shape, View
from moelab.scheduling.trace import LookAhead, Trace
from moelab.scheduling.victims import Victims
from moelab.strategies import Prefetch
from moelab.strategies.basics import KeepNothing
from moelab.strategies.edgemoe import (
    BitAssignment,
    FrequencyOverDistance,
    PairTable,
    PathTable,
    Preload,
    Sensitivity,
    assign,
    bracket,
    by_importance,
    distance,
    edgemoe,
    mixed,
)
from toy_engine import NBYTES, decided, places

SHAPE = Shape((6, 6, 6), 2, NBYTES)
PROMPT = "Elizabeth was not at all surprised to hear that"

IMPORTANCE = [[0.1, 0.4], [0.2, 0.3]]
LEVELS = {16: 0.0, 8: 0.001, 4: 0.01, 2: 0.3}
CURVES = {(2, 4): [(0, 0.01), (1, 0.015), (3, 0.019), (4, 0.3)], (4, 8): [(0, 0.001), (4, 0.01)]}
SENSITIVITY = Sensitivity(IMPORTANCE, LEVELS, CURVES)


def step(layer: int, *experts: int, prefill=False, unread=()) -> LayerInput:
    keys = tuple(SHAPE.key(*place) for place in unread)
    return LayerInput(layer, (experts,), ((0.6, 0.4)[: len(experts)],), prefill, unread=keys)


def knobs(**changes) -> Knobs:
    return Knobs(**({"budget_bytes": 18 * 1600} | changes))


def kinds(plan) -> list[tuple[str, tuple[int, int]]]:
    return [(d.kind, (d.layer, d.expert)) for d in decided(plan)]


def preloaded(plan) -> list[tuple[int, int]]:
    return places(decided(plan, "prefetch"))


def view(layer: int = 0, **changes) -> View:
    made = Scheduler(SHAPE, edgemoe(), knobs(**changes)).view
    made.layer = layer
    return made


# -- bits per expert ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tolerated", "levels"),
    [
        (0.02, (2, 4)),
        (0.01, (2, 4)),
        (0.005, (4, 8)),
        (0.0, (8, 16)),
        (0.5, (2, 2)),
        (-1, (16, 16)),
    ],
)
def test_the_levels_that_bracket_the_tolerated_loss(tolerated, levels):
    assert bracket(LEVELS, tolerated) == levels


def test_the_least_important_experts_come_first():
    assert by_importance(IMPORTANCE) == [(0, 0), (1, 0), (1, 1), (0, 1)]
    assert mixed(by_importance(IMPORTANCE), 2, 2, 4) == {
        (0, 0): 2, (1, 0): 2, (1, 1): 4, (0, 1): 4,
    }  # fmt: skip


def test_k_is_searched_until_the_measured_loss_reaches_p():
    """Losses add up here: .1, .1 + .2, .1 + .2 + .3, and 1.0 with all four at INT2."""
    asked = []

    def loss(bits):
        asked.append(sum(b == 2 for b in bits.values()))
        return sum(IMPORTANCE[layer][e] for (layer, e), b in bits.items() if b == 2)

    bits, curve = assign(IMPORTANCE, 2, 4, loss, tolerated=0.35)
    assert bits == {(0, 0): 2, (1, 0): 2, (1, 1): 4, (0, 1): 4}
    assert curve == [(0, 0.0), (2, pytest.approx(0.3)), (3, pytest.approx(0.6)), (4, 1.0)]
    assert asked == [0, 4, 2, 3]


@given(st.lists(st.floats(-0.1, 1.0), min_size=9, max_size=9), st.floats(0.0, 1.0))
def test_whatever_the_losses_the_k_found_was_measured_within_p_or_is_none(losses, tolerated):
    importance = [[0.0, 3.0, 1.0, 2.0], [7.0, 6.0, 5.0, 4.0]]
    bits, curve = assign(
        importance, 2, 4, lambda b: losses[sum(x == 2 for x in b.values())], tolerated
    )
    k = sum(b == 2 for b in bits.values())
    assert dict(curve)[k] == losses[k]
    assert k == 0 or losses[k] <= tolerated
    assert {key for key, b in bits.items() if b == 2} == set(by_importance(importance)[:k])


def test_p_chooses_among_the_measured_assignments():
    assert SENSITIVITY.choose(0.02) == (2, 4, 3)
    assert SENSITIVITY.choose(0.018) == (2, 4, 1)
    assert SENSITIVITY.choose(0.005) == (4, 8, 0)
    assert SENSITIVITY.choose(0.5) == (2, 2, 0)  # even INT2 everywhere is within P
    assert set(SENSITIVITY.bits(0.5).values()) == {2}


def test_bits_are_never_above_the_setting_and_follow_p_at_once():
    part = BitAssignment(SENSITIVITY)
    keys = [SHAPE.key(*place) for place in by_importance(IMPORTANCE)]
    assert part.bits(view())[keys].tolist() == [2, 2, 2, 4]
    assert part.bits(view(bits=2))[keys].tolist() == [2, 2, 2, 2]
    part.tolerated = 0.018
    assert part.bits(view())[keys].tolist() == [2, 4, 4, 4]
    assert set(BitAssignment(None).bits(view(bits=8))) == {8}


def test_the_scheduler_asks_for_the_assigned_bits():
    strategy = edgemoe().replace(allocate=BitAssignment(SENSITIVITY), name="mixed")
    plan = Scheduler(Shape((2, 2), 2, NBYTES), strategy, knobs()).step(step(0, 0, 1))
    assert [(d.kind, d.expert, d.bits_asked, d.bits) for d in decided(plan)] == [
        ("load", 0, 2, 2), ("load", 1, 4, 4),
    ]  # fmt: skip


# -- the path table -----------------------------------------------------------------------------

A, B, C = (0, 1), (2, 3), (4, 5)


def likeliest(table: PathTable | PairTable, layer: int, before) -> list[tuple[int, float]]:
    return list(table.probabilities(layer, before))


def test_probabilities_are_shares_of_the_sightings_of_a_key():
    table = PathTable()
    table.count(2, (A, B), (1, 5))
    table.count(2, (A, B), (3, 5))
    table.count(2, (A, B), (2, 5))
    table.count(2, (A, C), (0, 4))
    table.count(1, (A, B), (0, 4))
    third = pytest.approx(1 / 3)
    assert likeliest(table, 2, (A, B)) == [(5, 1.0), (1, third), (2, third), (3, third)]
    assert table.known(2, (A, B)) == 2


def test_an_unseen_key_backs_off_to_one_layer_then_to_the_layers_frequencies():
    table = PathTable()
    table.count(2, (A, B), (1, 5))
    table.count(2, (C, B), (3, 5))
    table.count(2, (A, C), (0, 5))
    assert table.known(2, (B, B)) == 1
    assert likeliest(table, 2, (B, B)) == [
        (5, 1.0),
        (1, 0.5),
        (3, 0.5),
    ]  # after B, whatever before
    assert table.known(2, (C, A)) == 0
    assert likeliest(table, 2, (C, A))[0] == (5, 1.0)
    assert likeliest(table, 2, (C, A))[1] == (0, pytest.approx(1 / 3))
    assert table.known(0, (C, A)) is None
    assert likeliest(table, 0, (C, A)) == []


def test_a_table_survives_json_and_is_then_shared_and_closed():
    table = PathTable()
    for before, experts in (((A, B), (1, 5)), ((A, B), (3, 5)), ((B,), (4,)), ((), (2, 5))):
        table.count(2, before, experts)
    again = PathTable.of(json.loads(json.dumps(table.to_json())))
    for before in ((A, B), (C, B), (C, C), ()):
        assert likeliest(again, 2, before) == likeliest(table, 2, before)
    assert copy.deepcopy(again) is PathTable.of(table.to_json()) is again
    with pytest.raises(ValueError, match="part of a profile"):
        again.count(2, (), (1,))
    own = copy.deepcopy(table)
    own.count(2, (), (0,))
    assert likeliest(own, 2, ()) != likeliest(table, 2, ())


def test_pairs_add_up_what_followed_each_expert_of_the_layer_before():
    table = PairTable((6, 6, 6))
    table.count(1, ((0, 1),), (2, 3))
    table.count(
        1, ((0, 2),), (2, 4)
    )  # after 0: 2 always, 3 and 4 half; after 1: 2, 3; after 2: 2, 4
    assert likeliest(table, 1, ((0, 1),)) == [(2, 1.0), (3, 0.75), (4, 0.25)]
    assert likeliest(table, 1, (B, (1, 2))) == [
        (2, 1.0),
        (3, 0.5),
        (4, 0.5),
    ]  # a pair never seen
    assert likeliest(table, 1, ((1, 5),)) == [(2, 1.0), (3, 1.0)]  # 5 was never seen
    assert likeliest(table, 1, ((4, 5),)) == [(2, 1.0), (3, 0.5), (4, 0.5)]  # frequencies
    assert likeliest(table, 2, ((0, 1),)) == []


def test_pairs_out_of_a_table_of_sets_are_as_if_counted_and_shared_where_that_is():
    sets, pairs = PathTable(), PairTable(SHAPE.experts)
    for before, experts in (((A, B), (1, 5)), ((C, B), (3, 5)), ((B,), (4,)), ((), (2, 5))):
        sets.count(2, before, experts)
        pairs.count(2, before, experts)
    for before in ((B,), (A, C), ((2, 4),), ()):
        assert likeliest(sets.pairs(SHAPE.experts), 2, before) == likeliest(pairs, 2, before)
    frozen = PathTable.of(sets.to_json()).pairs(SHAPE.experts)
    assert copy.deepcopy(frozen) is PathTable.of(sets.to_json()).pairs(SHAPE.experts) is frozen
    with pytest.raises(ValueError, match="part of a profile"):
        frozen.count(2, (), (1,))
    own = copy.deepcopy(pairs)
    own.count(2, (B,), (0,))
    assert likeliest(own, 2, (B,)) != likeliest(pairs, 2, (B,))


def walk(*tokens, look_ahead=()) -> Trace:
    """Tokens of three layers each; the first is a prompt."""
    steps = []
    for t, layers in enumerate(tokens):
        for layer, experts in enumerate(layers):
            ahead = tuple(LookAhead(*a) for a in look_ahead if t and a[0] == layer + 1)
            one = LayerInput(layer, (experts,), ((0.5, 0.5),), t == 0, ahead)
            steps.append(one)
    return Trace(SHAPE, steps)


def test_a_path_goes_on_over_the_border_of_two_tokens_and_ends_at_a_prompt():
    two = walk((A, B, C), (B, C, A))
    two.steps += walk((C, C, C), (A, A, A)).steps
    assert list(calibration.sightings(two.steps)) == [
        (0, (B, C), B), (1, (C, B), C), (2, (B, C), A),
        (0, (C, C), A), (1, (C, A), A), (2, (A, A), A),
    ]  # fmt: skip


def test_accuracy_is_the_share_of_activations_among_the_n_likeliest():
    table = PathTable()
    table.count(0, (B, C), (0, 2))  # 2 was: of (0, 1), the first guess finds 0, the second nothing
    table.count(1, (C, A), (1, 3))
    table.count(1, (C, A), (1, 2))  # 1, then 2, then 3: of (2, 4), the second guess finds 2
    found = calibration.accuracy(table, walk((A, B, C), (A, (2, 4), C)))
    assert found["recall"] == pytest.approx([1 / 6, 2 / 6, 2 / 6, 2 / 6, 2 / 6, 2 / 6])
    assert found["by_layer"] == [0.5, 0.5, 0.0]
    assert found["coverage"] == pytest.approx({"2": 2 / 3, "1": 0, "0": 0})


# -- preloading ---------------------------------------------------------------------------------


def known_paths(width: int = 3, **parts) -> Scheduler:
    table = PathTable()
    for experts in ((3, 4), (3, 5), (3, 4), (1, 4)):
        table.count(1, ((), A), experts)  # after A in layer 0: 3 and 4 (3 of 4), 1, 5 (1 of 4)
    table.count(0, (B, C), (5,))
    strategy = edgemoe(width=width).replace(prefetch=Preload(table, width), **parts)
    return Scheduler(SHAPE, strategy, knobs())


def test_the_coming_layers_likeliest_experts_are_preloaded_in_that_order():
    plan = known_paths(width=3).step(step(0, *A))
    assert kinds(plan) == [
        ("load", (0, 0)), ("load", (0, 1)),
        ("prefetch", (1, 3)), ("prefetch", (1, 4)), ("prefetch", (1, 1)),
    ]  # fmt: skip
    assert [d.cause for d in decided(plan, "prefetch")] == ["ahead +1"] * 3


def test_no_more_than_width_are_preloaded():
    assert preloaded(known_paths(width=1).step(step(0, *A))) == [(1, 3)]
    assert preloaded(known_paths(width=0).step(step(0, *A))) == []


def test_what_is_in_memory_is_no_preload_and_the_next_likeliest_are():
    s = known_paths(width=2)
    s.warm([(SHAPE.key(1, 3), 16), (SHAPE.key(1, 4), 16)])
    assert preloaded(s.step(step(0, *A))) == [(1, 1), (1, 5)]
    s = known_paths(width=2)
    s.warm([(SHAPE.key(1, 3), 4), (SHAPE.key(1, 4), 16)])  # at too few bits is not there
    assert preloaded(s.step(step(0, *A))) == [(1, 3), (1, 1)]


@pytest.mark.parametrize(("top_k", "key", "by_pairs"), [
    (2, "auto", False), (3, "auto", True), (3, "sets", False), (1, "pairs", True),
])  # fmt: skip
def test_paths_are_known_by_pairs_where_a_set_hardly_ever_recurs(top_k, key, by_pairs):
    shape = Shape(SHAPE.experts, top_k, SHAPE.nbytes)
    view = View(shape, Knobs(9600, 16), Cache(shape, 9600))
    part = Preload(width=2, key=key)
    assert isinstance(part.paths(view), PairTable) is by_pairs
    with pytest.raises(ValueError, match="choose one of auto, sets, pairs"):
        Preload(key="both")


def test_pairs_guess_nobody_below_chance():
    s = Scheduler(SHAPE, edgemoe(width=6, key="pairs"), knobs())
    for experts in ((3, 4), (3, 5), (3, 4), (3, 4)):
        s.step(step(0, *A))
        s.step(step(1, *experts))
        s.step(step(2, *C))
        s.end_of_token()
    for key in np.flatnonzero(s.view.bits).tolist():
        s.cache.remove(key)
    assert preloaded(s.step(step(0, *A))) == [(1, 3), (1, 4)]  # 5: a quarter, below 2 of 6


def test_after_the_last_layer_the_next_tokens_first_one_is_preloaded():
    s = known_paths()
    for layer, experts in enumerate((A, B, C)):
        plan = s.step(step(layer, *experts))
    assert preloaded(plan) == [(0, 5)]
    assert decided(plan, "prefetch")[0].cause == "ahead +1"


def test_prefill_preloads_nothing_but_the_first_token_knows_its_last_two_layers():
    s = known_paths()
    s.new_sequence()
    for layer, experts in enumerate((A, B, C)):
        assert preloaded(s.step(step(layer, *experts, prefill=True))) == []
    s.end_of_token()
    assert s.strategy.prefetch.table.known(0, s.strategy.prefetch._before) == 2
    s.new_sequence()
    assert s.strategy.prefetch._before == ()


def test_what_was_not_begun_when_the_router_spoke_is_withdrawn():
    s = known_paths()
    s.step(step(0, *A))
    plan = s.step(step(1, 3, 2, unread=((1, 4), (1, 1))))
    assert kinds(plan)[:4] == [
        ("evict", (1, 4)), ("evict", (1, 1)), ("hit", (1, 3)), ("load", (1, 2)),
    ]  # fmt: skip
    assert [d.cause for d in decided(plan, "evict")] == ["unread"] * 2
    assert SHAPE.key(1, 4) not in s.cache


def test_a_withdrawn_expert_that_is_needed_is_a_plain_miss():
    s = known_paths()
    s.step(step(0, *A))
    plan = s.step(step(1, 3, 4, unread=((1, 3),)))
    assert kinds(plan)[:3] == [("evict", (1, 3)), ("hit", (1, 4)), ("load", (1, 3))]
    assert [d.cause for d in decided(plan, "hit", "load")] == ["prefetched", "on demand"]


def test_without_a_profile_the_table_is_counted_while_decoding():
    s = Scheduler(SHAPE, edgemoe(), knobs())
    path = (A, B, C)
    fetched = []
    for _ in range(2):
        for layer, experts in enumerate(path):
            fetched.append(preloaded(s.step(step(layer, *experts))))
        s.end_of_token()
    assert fetched[:3] == [[], [], []]  # everything is new
    assert likeliest(s.strategy.prefetch.table, 1, (C, A)) == [(2, 1.0), (3, 1.0)]
    assert all(SHAPE.key(1, e) in s.cache for e in (2, 3))


# -- eviction -----------------------------------------------------------------------------------


def test_layer_distance_by_hand():
    """S = 4, I = 1: described counts layers ahead, printed behind; at i = I a whole round."""
    assert [distance(i, 1, 4) for i in range(4)] == [3, 4, 1, 2]
    assert [distance(i, 1, 4, "printed") for i in range(4)] == [1, 4, 3, 2]


def used(rule: str) -> FrequencyOverDistance:
    """Of four tokens (0, 0) was in all, (0, 1) in one, (1, 2) in two, (2, 3) in all."""
    part = FrequencyOverDistance(rule)
    for t in range(4):
        part.observe(step(0, *((0, 1) if t == 0 else (0, 4))), view())
        part.observe(step(1, *((2,) if t < 2 else (5,))), view())
        part.observe(step(2, 3), view())
    return part


def terms(part: FrequencyOverDistance, layer: int, expert: int, at: View) -> dict[str, float]:
    key = SHAPE.key(layer, expert)
    found = {name: values[key] for name, values in part.terms(at).items()}
    assert part.score(at)[key] == -found["L"]
    return found


def test_l_is_frequency_over_distance_as_described():
    part, at = used("described"), view(layer=1)
    # S = 3, I = 1: layer 2 is next (d = 1), layer 0 after it (2), layer 1 last (3)
    assert terms(part, 0, 0, at) == {"f": 1.0, "d": 2.0, "L": -1 / 2}
    assert terms(part, 0, 1, at) == {"f": 0.25, "d": 2.0, "L": -0.25 / 2}
    assert terms(part, 1, 2, at) == {"f": 0.5, "d": 3.0, "L": -0.5 / 3}
    assert terms(part, 2, 3, at) == {"f": 1.0, "d": 1.0, "L": -1.0}


def test_l_as_printed():
    part = used("printed")
    at = view(layer=1)  # (S - i + I) mod S: 1 for layer 0, 0 -> 3 for layer 1, 2 for layer 2
    assert terms(part, 0, 0, at) == {"f": 1.0, "d": 1.0, "L": -1.0}
    assert terms(part, 1, 2, at) == {"f": 0.5, "d": 3.0, "L": -0.5 / 3}
    assert terms(part, 2, 3, at) == {"f": 1.0, "d": 2.0, "L": -1 / 2}


def leaving(part: FrequencyOverDistance, at: View, *places: tuple[int, int]) -> list:
    """These experts, loaded in this order, in the order in which they leave."""
    for place in places:
        at.cache.add(SHAPE.key(*place), 16)
    victims = Victims(at.cache, part.score(at), at.bits > 0)
    return [SHAPE.place(key) for key in victims.allowed(0)]


@pytest.mark.parametrize(("rule", "first"), [("described", (0, 0)), ("printed", (2, 3))])
def test_the_highest_l_leaves_and_printed_sends_the_next_layer_away(rule, first):
    """Of two equally frequent ones, described keeps the next layer's, printed the one just past."""
    assert leaving(used(rule), view(layer=1), (0, 0), (2, 3))[0] == first


def test_the_seldom_used_leave_first_and_among_equals_the_least_recently_used():
    places = ((0, 0), (0, 1), (0, 5), (0, 3))  # the last two were never activated
    gone = leaving(used("described"), view(layer=1), *places)
    assert gone == [(0, 5), (0, 3), (0, 1), (0, 0)]


def test_f_counts_every_token_of_this_sequence_its_prompt_included():
    part = FrequencyOverDistance()
    part.observe(LayerInput(0, ((0, 1), (0, 2), (0, 3)), ((0.5, 0.5),) * 3, prefill=True), view())
    part.observe(step(0, 1, 2), view())
    assert part.frequency(view()).tolist() == [0.75, 0.5, 0.5, 0.25] + [0.0] * 14
    part.new_sequence()
    assert not part.frequency(view()).any()


def test_bad_parameters_are_refused_with_what_would_do():
    with pytest.raises(ValueError, match="rule='literal'.*described, printed"):
        edgemoe(rule="literal")
    with pytest.raises(ValueError, match="width=-1"):
        edgemoe(width=-1)
    with pytest.raises(ValueError, match="tolerated=-0.1"):
        edgemoe(tolerated=-0.1)


def test_its_parameters_can_be_turned_while_it_runs():
    strategy = edgemoe()
    assert {n: v for n, (_, _, v) in strategy.parameters.items()} == {
        "tolerated": 0.02, "rule": "described", "width": 1, "key": "auto",
    }  # fmt: skip
    assert strategy.tuned(rule="printed").evict.rule == "printed"


# -- calibration --------------------------------------------------------------------------------


class StubEvaluator:
    """NLL 1 at full precision; every expert at 4 bit adds .001, at 2 bit as much as it is worth."""

    calls = 0
    fails_at = -1

    def __init__(self, lab, texts, *, max_tokens, quality, most):
        self.shape, self.figure = lab._shape, object.__new__(FIGURES[quality])

    def __call__(self, bits):
        if StubEvaluator.calls == StubEvaluator.fails_at:
            raise KeyboardInterrupt
        StubEvaluator.calls += 1
        worth = {16: lambda _: 0, 8: lambda _: 0, 4: lambda _: 0.001, 2: lambda e: 0.002 + e / 100}
        keys = ((layer, e) for layer, n in enumerate(self.shape.experts) for e in range(n))
        return [1 + sum(worth[bits(key)](key[1]) for key in keys)]


class StubLab:
    _shape = SHAPE


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(calibration, "Evaluator", StubEvaluator)
    monkeypatch.setattr(
        calibration, "record",
        lambda lab, texts, **_: walk((A, B, C), (B, C, A), look_ahead=((1, (4, 3), (0.5, 0.5)),)),
    )  # fmt: skip
    StubEvaluator.calls, StubEvaluator.fails_at = 0, -1
    return StubLab()


def make(lab, kept):
    texts, made = ["a few words that are to be counted and held out"], calibration.made_from(lab)
    return calibration.make(lab, texts, made, kept, progress=False)


def test_importance_is_the_loss_with_one_expert_at_int2_and_the_others_at_int4(stub):
    data = make(stub, {})
    for layer in range(3):
        for e in range(6):
            want = math.exp(17 * 0.001 + 0.002 + e / 100) - 1
            assert data["importance"][layer][e] == pytest.approx(want)


def test_the_profile_holds_levels_curves_and_the_search_for_k(stub):
    data = make(stub, {})
    assert data["levels"]["8"] == 0
    assert data["levels"]["4"] == pytest.approx(math.exp(18 * 0.001) - 1)
    curve = dict(data["curves"]["2/4"])
    within = max(k for k, loss in curve.items() if loss <= 0.02)
    assert curve[within + 1] > 0.02  # searched down to neighbours, not only on the grid
    strategy = edgemoe(json.loads(json.dumps(data)))
    assert sum(b == 2 for b in strategy.allocate.sensitivity.bits(0.02).values()) == within
    assert strategy.prefetch.table.frozen
    assert data["accuracy"]["stale_gate"] == 0.5  # layer 1: said 4 and 3, chose 4 and 5


def test_an_interrupted_calibration_goes_on_where_it_stopped(stub):
    whole = make(stub, {})
    needed = StubEvaluator.calls
    kept = {}
    StubEvaluator.calls, StubEvaluator.fails_at = 0, 11
    with pytest.raises(KeyboardInterrupt):
        make(stub, kept)
    assert len(kept) == 11
    StubEvaluator.fails_at = -1
    assert make(stub, kept) == whole
    assert StubEvaluator.calls == needed


def test_a_store_without_two_levels_is_refused_with_what_would_do(stub):
    stub._shape = Shape((6,), 2, {16: 1600, 3: 300})
    with pytest.raises(ValueError, match="pack it again with tiers"):
        make(stub, {})


def test_a_text_is_cut_between_two_words():
    assert calibration.split("one two three four") == ("one two three", " four")
    with pytest.raises(ValueError, match="too short"):
        calibration.split("one")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A calibration of seconds, kept apart: importance is taken for granted."""
    monkeypatch.setattr(profiles, "_folders", lambda store: [tmp_path])
    monkeypatch.setattr(calibration, "CURVE_POINTS", 1)
    monkeypatch.setattr(
        calibration, "importance",
        lambda loss, experts, low, others: [[float(e) for e in range(n)] for n in experts],
    )  # fmt: skip


TEXT = [" ".join(moelab.demo.probes()["novel"].split()[:60])]


def test_a_profile_of_other_texts_or_options_is_made_again(demo_lab, small):
    first = demo_lab.calibrate("edgemoe", texts=TEXT, progress=False)
    assert demo_lab.calibrate("edgemoe", texts=TEXT, progress=False) == first
    other = demo_lab.calibrate("edgemoe", texts=TEXT, tolerated=0.05, progress=False)
    assert other.made_from != first.made_from
    assert other.data["tolerated"] == 0.05
    assert find_profile(demo_lab._store, "edgemoe") == other
    demo_lab.update(strategy="edgemoe")
    assert demo_lab.settings.strategy.allocate.tolerated == 0.05


# -- in the engine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(demo_store):
    with moelab.open("demo", budget="100%", measure_kl=False, progress=False) as lab:
        yield lab


@pytest.fixture(scope="module")
def profile():
    """Half of the experts at INT2, and a path table of a few words."""
    importance = [[(layer * 16 + e) * 7 % 96 for e in range(16)] for layer in range(6)]
    table = PathTable()
    for layer in range(6):
        for e in range(0, 16, 2):
            table.count(layer, (), (e, e + 1))
    curves = {"2/4": [(0, 0.0), (48, 0.02), (96, 0.2)]}
    levels = {"16": 0.0, "8": 0.0, "4": 0.0, "2": 0.2}
    return {
        "importance": importance, "levels": levels, "curves": curves, "tolerated": 0.02,
        "paths": table.to_json(),
    }  # fmt: skip


def tokens(lab, strategy, budget, device="disk") -> moelab.runs.run.Run:
    lab.update(strategy=strategy, budget=budget, device=device)
    return lab.generate(PROMPT, max_new_tokens=24, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("device", ["disk", "tx2_ssd"])
@pytest.mark.parametrize("budget", ["100%", "6%"])
def test_preloading_and_the_buffer_change_no_token(lab, profile, budget, device):
    whole = edgemoe(profile)
    only_bits = whole.replace(evict=KeepNothing(), prefetch=Prefetch(), name="only bits")
    want = tokens(lab, only_bits, "100%")
    run = tokens(lab, whole, budget, device)
    assert run.tokens == want.tokens
    assert (run.events.kind == "prefetch").any()
    served = run.events[run.events.kind.isin(("hit", "load"))]
    assert set(served.bits) == {2, 4}
    bits = whole.allocate.sensitivity.bits(0.02)
    assert all(bits[r.layer, r.expert] == r.bits for r in served.itertuples())
    assert run.summary()["peak_resident_bytes"] <= lab.settings.budget_bytes


def test_a_run_that_withdrew_preloads_is_replayed_exactly(lab, profile):
    """The read that had not begun is a fact of the clock: it is recorded, so a replay knows it."""
    run = tokens(lab, edgemoe(profile, width=8), "10%", "hdd")
    lab.update(device="disk")
    causes = set(run.events[run.events.kind == "evict"].cause)
    assert "unread" in causes
    live = run.events[run.events.kind != "stall"][["kind", "layer", "expert", "bits"]]
    assert [tuple(r) for r in live.itertuples(index=False)] == [
        (d.kind, d.layer, d.expert, d.bits) for d in replay(run.trace).decisions
    ]


def test_moving_p_while_it_runs_changes_the_bits_at_once(lab, profile):
    lab.update(strategy=edgemoe(profile), budget="50%")
    lab.generate(PROMPT, max_new_tokens=4, ignore_eos=True)
    lab.update(tolerated=0.01)
    run = lab.generate(PROMPT, max_new_tokens=4, ignore_eos=True)
    served = run.events[run.events.kind.isin(("hit", "load"))]
    assert set(served.bits) == {4}
    lab.update(tolerated=0.25)
    assert set(lab.cache_map()["bits"].ravel()) <= {0, 2}
