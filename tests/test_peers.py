"""The peers' rules against examples small enough to compute by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moelab.calibration.adapmoe import costs_of_first_only, hit_ratios, tau_for
from moelab.engine.generation import Ids
from moelab.replays.bounds import belady_hits
from moelab.replays.replay import replay
from moelab.scheduling.budget import minimum_budget
from moelab.scheduling.cache import Cache
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Knobs, LookAhead, Request, Shape, View
from moelab.scheduling.stream import ranked
from moelab.scheduling.trace import Trace
from moelab.strategies import Precision, layer_lru, make
from moelab.strategies.adapmoe import BestShares, SensitivityGate, adapmoe, best_shares
from moelab.strategies.basics import DropIfCold, drop_if_cold, in_ram
from moelab.strategies.cache_prior import CachePrior, cache_prior
from moelab.strategies.emoe import emoe
from moelab.strategies.mixtral_offloading import mixtral_offloading
from moelab.strategies.moe_infinity import LeastActivated, NearestSequence, moe_infinity
from moelab.strategies.oracle import oracle
from moelab.strategies.pregated import pregated
from toy_engine import NBYTES, decided, places, resident

SHAPE = Shape((4, 4, 4), 2, NBYTES)
ROOMY = 12 * 1600


def view(budget_bytes: int = ROOMY) -> View:
    return View(SHAPE, Knobs(budget_bytes), Cache(SHAPE, budget_bytes))


def prompt(layer: int, *tokens: tuple[int, ...]) -> LayerInput:
    return LayerInput(layer, tokens, tuple((1.0,) * len(t) for t in tokens), prefill=True)


def step(layer: int, *experts: int, weights=(0.7, 0.3), ahead=()) -> LayerInput:
    return LayerInput(layer, (experts,), (weights,), look_ahead=tuple(ahead))


def did(plan) -> list[tuple[str, int]]:
    return [(d.kind, d.expert) for d in decided(plan)]


# -- MoE-Infinity ------------------------------------------------------------------------------

A = ((0, 0, 1), (2, 2, 2), (3, 3, 1))  # layer by layer: the experts of three tokens
B = ((3, 3, 2), (0, 0, 1), (0, 1, 2))


def seen(part, sequence, at: View, layers=3):
    for layer, experts in enumerate(sequence[:layers]):
        part.observe(prompt(layer, *((e,) for e in experts)), at)
    return part


def test_the_activation_matrix_counts_every_token_of_this_sequence_only():
    part, at = NearestSequence(), view()
    seen(part, A, at)
    assert part.eam.tolist() == [[2, 1, 0, 0], [0, 0, 3, 0], [0, 1, 0, 2]]
    part.new_sequence()
    assert not part.eam.any()
    assert part.eamc[0].tolist() == [[2, 1, 0, 0], [0, 0, 3, 0], [0, 1, 0, 2]]


def test_the_nearest_sequence_is_by_cosine_over_the_layers_seen_so_far():
    part, at = NearestSequence(), view()
    for sequence in (A, B):
        seen(part, sequence, at).new_sequence()
    part.observe(prompt(0, (0,), (0,)), at)
    # row (2,0,0,0) with (2,1,0,0): 4 / (2 √5); with (0,0,1,2): 0
    assert part.similarity(part.pass_eam) == pytest.approx([2 / 5**0.5, 0])
    part.observe(prompt(1, (0,)), at)  # row (1,0,0,0) with (0,0,3,0): 0; with (2,1,0,0): 2/√5
    assert part.similarity(part.pass_eam) == pytest.approx([1 / 5**0.5, 1 / 5**0.5])


def test_what_is_compared_is_this_token_or_on_request_this_sequence():
    part, at = NearestSequence(guesses=1), view()
    for sequence in (A, B):
        seen(part, sequence, at).new_sequence()
    seen(part, A, at)  # the prompt is like A, the token that follows like B
    part.observe(step(0, 3, 2), at)
    assert places(part.predict(0, (), at)) == [(1, 0)]
    part.match = "sequence"
    assert places(part.predict(0, (), at)) == [(1, 2)]


def test_prefetch_priority_is_share_times_layer_proximity():
    part, at = NearestSequence(depth=2), view()
    seen(part, A, at).new_sequence()
    part.observe(step(0, 0, 1), at)
    # layer 1: p(2) = 1, proximity 1 - 1/3; layer 2: p(3) = 2/3, p(1) = 1/3, proximity 1 - 2/3
    got = part.predict(0, (), at)
    assert places(got) == [(1, 2), (2, 3), (2, 1)]  # 0.667, 0.222, 0.111
    assert [g.weight for g in got] == pytest.approx([1, 2 / 3, 1 / 3])
    assert [g.rank for g in got] == [0, 0, 1]
    assert part.predict(2, (), at) == []  # the last layer has nobody ahead
    part.depth = 0
    assert part.predict(0, (), at) == []


def test_without_an_earlier_sequence_nothing_is_guessed():
    part, at = NearestSequence(depth=2), view()
    part.observe(step(0, 0, 1), at)
    assert part.predict(0, (), at) == []


def test_a_full_collection_gives_up_the_sequence_nearest_to_the_new_one():
    part, at = NearestSequence(collection=2), view()
    for sequence in (A, B, A):
        seen(part, sequence, at).new_sequence()
    assert len(part.eamc) == 2
    assert part.eamc[0][0].tolist() == [0, 0, 1, 2]  # B stays, the first A made room for the second
    assert part.eamc[1][0].tolist() == [2, 1, 0, 0]


def test_the_least_activated_leave_and_late_layers_before_early_ones():
    part, at = LeastActivated(), view()
    seen(part, A, at)
    terms, key = part.terms(at), SHAPE.key(2, 3)
    assert terms["activation ratio"][key] == pytest.approx(2 / 3)
    assert terms["layer decay"][key] == pytest.approx(1 / 3)
    assert terms["priority"][key] == part.score(at)[key] == pytest.approx(2 / 9, abs=1e-5)
    best = [(0, 0), (0, 1), (2, 3), (0, 3), (2, 0)]  # 2/3, 1/3, 2/9, ε, ε/3
    assert sorted(best, key=lambda place: -part.score(at)[SHAPE.key(*place)]) == best


def test_moe_infinity_learns_from_the_first_sequence_and_prefetches_in_the_second():
    s = Scheduler(SHAPE, moe_infinity(guesses=1), Knobs(4 * 1600))
    first = [did(s.step(step(layer, layer, layer + 1))) for layer in range(3)]
    assert not any(kind == "prefetch" for layer in first for kind, _ in layer)
    s.new_sequence()
    second = [did(s.step(step(layer, layer, layer + 1))) for layer in range(3)]
    # in memory: layer 0's (most useful without prefetching) and layer 2's
    assert second[0] == [("hit", 0), ("hit", 1), ("evict", 2), ("prefetch", 1)]
    assert second[1] == [("hit", 1), ("evict", 3), ("load", 2), ("evict", 0), ("prefetch", 2)]
    assert second[2][0] == ("hit", 2)


# -- mixtral-offloading ------------------------------------------------------------------------


def test_mixtral_offloading_keeps_equal_shares_and_asks_the_next_gate():
    s = Scheduler(SHAPE, mixtral_offloading(guesses=1), Knobs(9 * 1600))
    plan = s.step(step(0, 0, 1, ahead=[LookAhead(1, (3, 2), (0.6, 0.4))]))
    assert did(plan) == [("load", 0), ("load", 1), ("prefetch", 3)]  # the likeliest only
    s.step(step(0, 2, 3))
    assert s.cache.layer_bytes == [3 * 1600, 1600, 0]  # three experts a layer
    assert set(resident(s)) == {(0, 1), (0, 2), (0, 3), (1, 3)}  # the least recently used has left


def test_mixtral_offloading_comes_with_one_layer_ahead_and_two_guesses():
    strategy = mixtral_offloading()
    assert strategy.values == {"depth": 1, "guesses": 2}
    guesses = strategy.prefetch.predict(0, [LookAhead(1, (3, 2, 0), (0.5, 0.3, 0.2))], view())
    assert places(guesses) == [(1, 3), (1, 2)]


# -- AdapMoE -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "dropped"), [(0.19, True), (0.21, False)])
def test_a_second_expert_is_dropped_below_the_root_of_tau_over_h(weight, dropped):
    gate = SensitivityGate(h=(1.0, 4.0), tau=0.16)  # sqrt(0.16 / 4) = 0.2
    assert gate.threshold(0) == pytest.approx(0.4)
    assert gate.threshold(1) == pytest.approx(0.2)
    second = Request(3, weight, rank=1, layer=1)
    assert gate.tier(second, 16, view()) == (0 if dropped else 16)
    assert gate.tier(second._replace(rank=0), 16, view()) == 16  # the first always stays


def test_an_insensitive_layer_needs_its_first_expert_only_and_tau_0_drops_nothing():
    assert SensitivityGate(h=(0.0,), tau=0.1).tier(Request(1, 0.49, 1), 16, view()) == 0
    assert SensitivityGate(h=(1.0,), tau=0.0).tier(Request(1, 0.01, 1), 16, view()) == 16


def test_a_resident_expert_is_used_however_little_it_weighs():
    s = Scheduler(SHAPE, adapmoe(tau=0.16), Knobs(ROOMY))
    assert did(s.step(step(0, 0, 1, weights=(0.5, 0.5)))) == [("load", 0), ("load", 1)]
    assert did(s.step(step(0, 0, 1, weights=(0.9, 0.1)))) == [("hit", 0), ("hit", 1)]
    assert did(s.step(step(0, 2, 3, weights=(0.9, 0.1)))) == [("load", 2), ("skip", 3)]


def test_shares_by_dynamic_programming_equal_trying_them_all():
    rng = np.random.default_rng(0)
    for room in (3, 5, 8, 12, 15):
        hits = np.sort(rng.random((3, 5)), axis=1)  # three layers of four experts
        every = [
            c for c in itertools.product(range(1, 5), repeat=3) if sum(c) <= room
        ]  # all allocations with at least one expert each
        best = max(every, key=lambda c: sum(hits[i][n] for i, n in enumerate(c)))
        assert best_shares(hits.tolist(), room, 1) == best
    with pytest.raises(ValueError, match="room for 2 experts"):
        best_shares(hits.tolist(), 2, 1)


def test_a_layer_that_reuses_more_gets_more_within_the_budget():
    steep, flat = (0, 0.1, 0.3, 0.6, 0.9), (0, 0.4, 0.5, 0.5, 0.5)
    allocate = BestShares((flat, flat, steep))
    at = view(budget_bytes=9 * 1600 + 400)
    shares = [allocate.layer_bytes(layer, at) for layer in range(3)]
    # at least 2 each; the 3 left over: 2 more for the steep layer, one that helps nobody
    assert [s // 1600 for s in shares] == [2, 2, 4]
    assert sum(shares) <= 9 * 1600 + 400
    assert BestShares().layer_bytes(0, at) == (9 * 1600 + 400) // 3  # nothing measured: equal


def test_adapmoe_needs_no_more_budget_than_equal_shares():
    hits = ((0, 0.4, 0.5, 0.5, 0.5),) * 2 + ((0, 0.1, 0.3, 0.6, 0.9),)
    strategy = adapmoe({"h": [1, 1, 1], "hits": hits})
    assert minimum_budget(SHAPE, strategy, Knobs(ROOMY)) == 6 * 1600


def test_hits_at_every_cache_size_come_from_stack_distances():
    shape = Shape((3,), 1, NBYTES)
    steps = [step(0, e, weights=(1.0,)) for e in (0, 1, 0, 2, 1, 0)]
    # distances: new, new, 2, new, 3, 3
    assert hit_ratios(Trace(shape, steps)) == [[0, 0, pytest.approx(1 / 6), pytest.approx(3 / 6)]]


@pytest.mark.parametrize(("k", "tolerance"), [(1, 1e-9), (2, 0.05)])
def test_a_hit_curve_is_what_an_lru_of_that_size_really_hits(k, tolerance):
    """Exact for one expert at a time; of two, the scheduler touches hits before loads."""
    rng = np.random.default_rng(1)
    shape, steps = Shape((6, 6), k, NBYTES), []
    for i in range(160):
        chosen = rng.choice(6, k, replace=False, p=(0.3, 0.25, 0.2, 0.1, 0.1, 0.05))
        steps.append(step(i % 2, *map(int, chosen), weights=(0.7, 0.3)[:k]))
    curves = hit_ratios(Trace(shape, steps))
    for size in (2, 3, 5):
        got = replay(Trace(shape, steps), layer_lru(), Knobs(2 * size * 1600))
        expected = (curves[0][size] + curves[1][size]) / 2
        assert got.hit_ratio == pytest.approx(expected, abs=tolerance)


def test_tau_leaves_out_a_quarter_of_all_activations():
    weights = ((0.7, 0.3), (0.9, 0.1), (0.6, 0.4), (0.8, 0.2))
    trace = Trace(SHAPE, [step(0, 0, 1, weights=w) for w in weights])
    tau = tau_for(trace, [1.0, 1.0, 1.0])
    assert tau == pytest.approx(0.065)  # half of 0.01 0.04 0.09 0.16: two of eight activations
    gate = SensitivityGate((1.0, 1.0, 1.0), tau)
    asked = [r for w in weights for r in ranked((0, 1), w)]
    assert sum(gate.tier(r, 16, view()) == 0 for r in asked) == 2


def test_the_cost_of_the_first_expert_only_is_what_the_engine_would_lose(demo_lab):
    class DropSeconds(Precision):
        def tier(self, request, asked, view):
            return 0 if request.layer == 2 and request.rank else asked

    text = "It was a dark and stormy night; the rain fell in torrents, except at intervals."
    ids = Ids(demo_lab._encode(text))
    costs = costs_of_first_only(demo_lab._engine, ids)
    assert all(kl > 0 and squares > 0 for kl, squares in costs)
    shorter = costs_of_first_only(demo_lab._engine, Ids(ids[:-1]))
    demo_lab.update(strategy="on_demand", precision=DropSeconds())
    score = demo_lab.score(text, progress=False, max_tokens=len(ids))
    assert shorter[2][0] / (len(ids) - 1) == pytest.approx(score.kl_mean, rel=1e-3)


# -- cache-prior routing -----------------------------------------------------------------------


def test_resident_experts_get_a_head_start_of_lambda_while_decoding():
    s = Scheduler(SHAPE, cache_prior(lam=0.25), Knobs(ROOMY))
    s.step(step(1, 0, 2))
    assert s.bias(1).tolist() == [0.25, 0, 0.25, 0]
    assert s.bias(0).tolist() == [0, 0, 0, 0]
    s.new_sequence()  # a prompt is coming: routed as the router says
    assert s.bias(1) is None
    s.step(prompt(0, (0, 2)))
    s.end_of_token()  # the first decoded token is coming, from its first layer on
    assert s.bias(0).tolist() == [0.25, 0, 0.25, 0]
    assert CachePrior(0.0).bias(0, view()) is None


# -- drop-if-cold ------------------------------------------------------------------------------


def test_a_missing_expert_below_f_over_k_is_dropped_and_the_first_never_is():
    rule = DropIfCold(factor=0.6)  # k = 2: below 0.3
    assert [rule.tier(r, 16, view()) for r in ranked((0, 1), (0.71, 0.29))] == [16, 0]
    assert [rule.tier(r, 16, view()) for r in ranked((0, 1), (0.69, 0.31))] == [16, 16]
    strictest = DropIfCold(factor=1.0)
    assert [strictest.tier(r, 16, view()) for r in ranked((0, 1), (0.5, 0.5))] == [16, 16]
    s = Scheduler(SHAPE, drop_if_cold(), Knobs(ROOMY))
    assert did(s.step(step(0, 0, 1, weights=(0.8, 0.2)))) == [("load", 0), ("skip", 1)]


# -- everything in memory ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_everything_is_loaded_before_the_first_token_and_never_again(bits):
    s = Scheduler(SHAPE, in_ram(), Knobs(12 * NBYTES[bits], bits=bits))
    assert [(d.kind, d.bits) for d in decided(s.begin())] == [("prefetch", bits)] * 12
    assert s.begin().rows == []  # nothing left to load
    assert s.cache.used_bytes == 12 * NBYTES[bits]
    assert did(s.step(step(2, 0, 3))) == [("hit", 0), ("hit", 3)]


def test_where_not_all_fit_every_layer_gets_as_many():
    s = Scheduler(SHAPE, in_ram(), Knobs(7 * 1600))
    assert places(decided(s.begin())) == [
        (0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2),
    ]  # fmt: skip
    assert did(s.step(step(0, 0, 3))) == [("hit", 0), ("evict", 0), ("load", 3)]


@pytest.mark.parametrize(
    ("maker", "name", "wrong"),
    [
        (mixtral_offloading, "guesses", 0),
        (moe_infinity, "collection", 0),
        (adapmoe, "tau", -0.1),
        (cache_prior, "lam", 1.5),
        (drop_if_cold, "factor", "much"),
    ],
)
def test_a_parameter_out_of_range_is_refused_when_it_is_made_and_when_it_is_tuned(
    maker, name, wrong
):
    with pytest.raises(ValueError, match=name):
        maker(**{name: wrong})
    with pytest.raises(ValueError, match=name):
        maker().tuned(**{name: wrong})


# -- Pre-gated MoE, eMoE ------------------------------------------------------------------------


SIX = Shape((6, 6, 6), 2, NBYTES)


def test_who_the_layer_before_named_is_fetched_and_alone_may_serve():
    s = Scheduler(SIX, pregated(), Knobs(18 * 1600))
    assert s.look_ahead(0, prefill=False) == 1
    assert s.mask(0) is None
    ahead = (LookAhead(1, (4, 2), (0.7, 0.3)),)
    plan = s.step(LayerInput(0, ((0, 1),), ((0.6, 0.4),), look_ahead=ahead))
    assert places(decided(plan, "prefetch")) == [(1, 4), (1, 2)]
    assert np.flatnonzero(s.mask(1)).tolist() == [2, 4]
    assert s.mask(2) is None  # nobody has named its experts yet
    s.step(LayerInput(1, ((2, 4),), ((0.5, 0.5),)))  # its coming router could not be asked
    assert s.mask(2) is None
    s.step(LayerInput(0, ((0, 1),), ((0.6, 0.4),), prefill=True, look_ahead=ahead))
    assert s.mask(1) is None  # prompts are routed as usual


def test_experts_that_prompts_asked_for_most_are_kept_and_renewed_between_prompts_only():
    s = Scheduler(SIX, emoe(p=2), Knobs(9 * 1600))  # three of six a layer
    s.begin()
    kept = lambda: [s.view.index_of[s.view.residents(at)].tolist() for at in range(3)]  # noqa: E731
    assert [sorted(row) for row in kept()] == [[0, 1, 2]] * 3
    for prompt in range(2):
        s.new_sequence()
        s.begin()
        assert [sorted(row) for row in kept()] == [[0, 1, 2]] * 3, prompt
        for _ in range(3):
            for layer in range(3):
                s.step(LayerInput(layer, ((0, 1),), ((0.5, 0.5),),
                                  wanted=((5, 4),), wanted_weights=((0.6, 0.4),)))  # fmt: skip
            s.end_of_token()
        assert np.flatnonzero(s.mask(0)).tolist() == [0, 1, 2]
    s.new_sequence()
    plan = s.begin()
    assert [sorted(row) for row in kept()] == [[0, 4, 5]] * 3
    assert len(decided(plan, "evict")) == 6
    assert np.flatnonzero(s.mask(0)).tolist() == [0, 4, 5]


def test_demand_begins_with_what_was_counted():
    s = Scheduler(SIX, emoe({"counts": [[0, 1, 5, 2, 4, 3]] * 3}), Knobs(9 * 1600))
    s.begin()
    assert sorted(s.view.index_of[s.view.residents(0)].tolist()) == [2, 4, 5]
    with pytest.raises(ValueError, match="p=0: from 1 to 100"):
        emoe(p=0)


# -- the oracle ----------------------------------------------------------------------------------


def a_stream(seed: int, tokens: int = 60) -> Trace:
    """A prompt of two tokens and then single ones; some experts are favourites."""
    rng, trace = np.random.default_rng(seed), Trace(SIX)
    favour = rng.dirichlet([0.7] * 6, 3)
    pick = lambda layer: tuple(map(int, rng.choice(6, 2, False, favour[layer])))  # noqa: E731
    for layer in range(3):
        trace.steps.append(LayerInput(layer, (pick(layer), pick(layer)), ((0.5, 0.5),) * 2, True))
    for _ in range(tokens):
        trace.steps += [LayerInput(layer, (pick(layer),), ((0.6, 0.4),)) for layer in range(3)]
    return trace


@pytest.mark.parametrize("slots", [7, 9, 13])
def test_the_oracle_evicts_as_belady_and_nobody_is_better(slots):
    for seed in range(12):
        trace, knobs = a_stream(seed), Knobs(slots * 1600)
        best, asked = belady_hits(trace, slots)
        found = replay(trace, oracle(trace), knobs)
        others = [replay(trace, make(name), knobs).counts["hit"] for name in ("lru", "lfu")]
        assert max(others) <= found.counts["hit"] <= best
        assert found.counts["hit"] >= best - 0.02 * asked  # its own layer's experts have to stay


def test_the_oracles_prefetches_are_all_right():
    trace, knobs = a_stream(1), Knobs(13 * 1600)
    found, alone = (replay(trace, oracle(trace, depth=d), knobs) for d in (1, 0))
    assert found.counts["load"] == 0 < alone.counts["load"]
    assert found.bytes == pytest.approx(alone.bytes, rel=0.1)


def test_an_oracle_that_was_told_another_text_says_so():
    trace, other = a_stream(1, tokens=2), a_stream(2, tokens=2)
    with pytest.raises(ValueError, match="asks for experts .* the run that the oracle was given"):
        replay(trace, oracle(other), Knobs(9 * 1600))
    with pytest.raises(ValueError, match=r"given for \[\]: give it one of this prompt"):
        replay(a_stream(1, tokens=3), oracle(trace), Knobs(9 * 1600))
    with pytest.raises(TypeError, match="give a run, or its trace"):
        oracle("The")


def test_the_oracle_live_hits_what_belady_does(demo_lab):
    say = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    first = demo_lab.update(strategy="lru", budget="25%") and demo_lab.generate("The king", **say)
    demo_lab.update(strategy=oracle(first))
    again = demo_lab.generate("The king", **say)
    assert again.text == first.text
    hits = [int(run.per_token["hits"].iloc[1:].sum()) for run in (first, again)]
    slots = demo_lab.settings.budget_bytes // demo_lab.info()["expert_bytes"][16]
    assert hits[0] < hits[1] <= belady_hits(again.trace, slots)[0]
    with pytest.raises(ValueError, match="the run that the oracle was given"):
        demo_lab.generate("A queen", **say)


def test_experts_renewed_for_a_prompt_are_those_its_first_layer_may_choose(demo_lab):
    demo_lab.update(strategy=emoe(p=1), budget="40%")
    say = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    for text in ("The king of the north", "def sort(numbers):", "Elizabeth was not at all"):
        events = demo_lab.generate(text, **say).events
        assert not (events.kind == "load").any(), text
    assert (events.query("kind == 'prefetch'").cause == "set-up").any()  # it did renew
