"""SwapMoE: no token waits, the budget holds, the important experts come in, the planner plans."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time

import numpy as np
import pytest

from moelab.calibration.swapmoe_network import configurations, off, unseen
from moelab.calibration.swapmoe_quality import numbers_kept, renewed
from moelab.replays.replay import replay
from moelab.scheduling.budget import BudgetError, minimum_budget
from moelab.scheduling.cache import Cache
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Knobs, Shape, View
from moelab.store.devices import DEVICES, Device
from moelab.strategies.static_pruning import static_pruning
from moelab.strategies.swapmoe import swapmoe
from moelab.strategies.swapmoe_planner import (
    Estimates,
    Network,
    Plan,
    deal,
    fits,
    largest,
    plan_to_the_bend,
    plan_within,
    search,
    uniform,
    usable,
)
from toy_engine import decided, places

B = 1600  # bytes of an expert at 16 bit
SHAPE = Shape((6, 6), 2, {16: B, 4: 400})
ONE_LAYER = Shape((6,), 2, {16: B})


def begun(shape: Shape, slots: int, strategy=None) -> Scheduler:
    s = Scheduler(shape, strategy or swapmoe(), Knobs(slots * B))
    s.begin()
    return s


def told(
    layer: int, *experts: int, wanted=None, norm=1.0, gates=(0.5, 0.5), in_flight=()
) -> LayerInput:
    """One decoded token: served by ``experts``, the router itself wanted ``wanted``."""
    return LayerInput(
        layer,
        (experts,),
        (tuple(gates) if wanted is None else (0.5,) * len(experts),),
        wanted=None if wanted is None else (tuple(wanted),),
        wanted_weights=None if wanted is None else (tuple(gates),),
        norms=(norm,),
        in_flight=tuple(in_flight),
    )


def fetched(plan) -> list[int]:
    return [d.expert for d in decided(plan, "prefetch")]


def evicted(plan) -> list[int]:
    return [d.expert for d in decided(plan, "evict")]


def keys(s: Scheduler, plan) -> set[int]:
    """What a plan fetches."""
    return {s.shape.key(*place) for place in places(decided(plan, "prefetch"))}


def residents(s: Scheduler, layer: int = 0) -> set[int]:
    return set(s.view.index_of[s.view.residents(layer)].tolist())


def visible(s: Scheduler, layer: int = 0) -> list[int]:
    """The experts that the mask lets the router choose."""
    return np.flatnonzero(s.mask(layer)).tolist()


def swapped(plan) -> list[tuple[int, int]]:
    return places(decided(plan, "prefetch"))


def virtual(s: Scheduler):
    return s.strategy.route


def importance(s: Scheduler) -> list[float]:
    return virtual(s).terms(s.view)["importance since the update"].tolist()


# -- importance --------------------------------------------------------------


def test_importance_is_norm_of_the_input_times_gate_times_norm_of_the_expert():
    """I(E_i, X) = sum over x routed to E_i of ‖x‖ · ‖G(x)_i‖ · ‖E_i‖, by hand."""
    profile = {"norms": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]}
    s = begun(ONE_LAYER, 4, swapmoe(profile, f=100))
    s.step(told(0, 5, 4, wanted=(0, 1), norm=10.0, gates=(0.75, 0.25)))
    s.step(told(0, 5, 4, wanted=(1, 5), norm=2.0, gates=(0.5, 0.5)))
    by_hand = [10 * 0.75 * 1, 10 * 0.25 * 2 + 2 * 0.5 * 2, 0, 0, 0, 2 * 0.5 * 6]
    assert importance(s) == pytest.approx(by_hand)
    assert s.why(0)[5]["importance since the update"] == 6


def test_a_prompt_counts_every_token_of_it():
    s = begun(ONE_LAYER, 4, swapmoe(f=100))
    s.step(LayerInput(0, ((0, 1), (0, 2)), ((1, 1), (0.5, 1)), True, norms=(1.0, 4.0)))
    assert importance(s) == [1 + 4 * 0.5, 1, 4, 0, 0, 0]
    assert virtual(s)._inputs[0] == 2


def test_an_absent_expert_comes_back_because_the_router_is_asked_without_the_mask():
    s = begun(ONE_LAYER, 3, swapmoe(f=2))
    assert residents(s) == {0, 1, 2}
    plans = [s.step(told(0, 0, 1, wanted=(5, 0), gates=(0.9, 0.1))) for _ in range(2)]
    assert [fetched(p) for p in plans] == [[], [5]]
    assert residents(s) == {0, 1, 5}


def test_scored_by_the_masked_choice_it_would_never_come_back():
    s = begun(ONE_LAYER, 3, swapmoe(f=2))
    plans = [s.step(told(0, 0, 1, gates=(0.9, 0.1))) for _ in range(40)]
    assert not any(map(fetched, plans))
    assert residents(s) == {0, 1, 2}


def test_what_an_update_forgets_and_what_carry_keeps():
    for carry, first in ((0.0, 4), (0.9, 5)):
        s = begun(ONE_LAYER, 3, swapmoe(f=4, carry=carry))
        for norm, expert in [(5.0, 5)] * 4 + [(1.0, 4)] * 4:
            s.step(told(0, 0, 1, wanted=(expert, 0), norm=norm, gates=(0.9, 0.1)))
        assert virtual(s).order(0, s.view)[0] == first


# -- when --------------------------------------------------------------


@pytest.mark.parametrize("f", [1, 3, 8])
def test_the_virtual_experts_are_renewed_every_f_tokens(f):
    s = begun(ONE_LAYER, 3, swapmoe(f=f))
    when = []
    for token in range(24):
        wanted = (3 + token // f % 3, 0, 1)  # another expert in each stretch of f tokens
        if fetched(s.step(told(0, 0, 1, wanted=wanted, gates=(0.8, 0.1, 0.1)))):
            when.append(token + 1)
    assert when == list(range(f, 25, f))


def test_the_virtual_experts_are_renewed_every_f_sequences():
    s = begun(ONE_LAYER, 3, swapmoe(f=2, unit="sequences"))
    when = []
    for sequence in range(6):
        s.new_sequence()
        s.step(LayerInput(0, ((0, 1),), ((0.5, 0.5),), True, norms=(1.0,)))
        for _ in range(5):
            wanted = (3 + sequence // 2, 0)
            if fetched(s.step(told(0, 0, 1, wanted=wanted, gates=(0.9, 0.1)))):
                when.append(sequence)
    assert when == [2, 4]  # before the third and the fifth, with what the sequences before said


def test_f_can_be_changed_while_it_runs_and_what_was_learnt_stays():
    s = begun(ONE_LAYER, 3, swapmoe(f=100))
    template = s.strategy
    for _ in range(5):
        s.step(told(0, 0, 1, wanted=(5, 0), gates=(0.9, 0.1)))
    s.change(Knobs(3 * B), template.tuned(f=6))
    assert fetched(s.step(told(0, 0, 1, wanted=(0, 1)))) == [5]


@pytest.mark.parametrize(
    "wrong", [{"f": -1}, {"unit": "words"}, {"swaps": 9}, {"carry": 1.5}, {"f": "often"}]
)
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        swapmoe(**wrong)


# -- how: amortised, asynchronous --------------------------------------------------------------


def exchanging(swaps: int, slots: int = 5) -> tuple[Scheduler, list[list[int]]]:
    """A layer that wants all of its experts exchanged; loads land after one more token."""
    s = begun(Shape((12,), 2, {16: B}), slots, swapmoe(f=20, swaps=swaps))
    out, flying = [], []
    for token in range(40):
        wanted = (6 + token % 5, 11) if token < 20 else (11, 6)
        plan = s.step(told(0, 0, 1, wanted=wanted, in_flight=flying))
        flying = keys(s, plan)
        out.append(fetched(plan))
    return s, out


def test_an_update_is_spread_over_tokens():
    _, one = exchanging(1)
    assert max(map(len, one)) == 1
    assert [t for t, f in enumerate(one) if f][:2] == [19, 21]  # 20 waits until the first is there
    _, three = exchanging(3)
    assert max(map(len, three)) == 3


def test_experts_that_serve_the_token_now_do_not_leave_for_a_swap():
    s, _ = exchanging(1)
    assert {0, 1} <= residents(s)


def test_a_newcomer_is_seen_by_the_router_only_when_it_has_landed():
    s = begun(ONE_LAYER, 3, swapmoe(f=1))
    plan = s.step(told(0, 0, 1, wanted=(5, 0), gates=(0.9, 0.1)))
    assert fetched(plan) == [5]
    assert visible(s) == [0, 1]
    s.step(told(0, 0, 1, wanted=(5, 0), gates=(0.9, 0.1), in_flight=[5]))
    assert visible(s) == [0, 1]
    s.step(told(0, 0, 1, wanted=(5, 0), gates=(0.9, 0.1)))
    assert visible(s) == [0, 1, 5]


def test_what_is_on_its_way_does_not_leave():
    """To evict a copy that is being read the engine would have to wait for it."""
    s = begun(ONE_LAYER, 4, swapmoe(f=1, swaps=8))
    flying: set[int] = set()
    rng = random.Random(0)
    for _ in range(200):
        given = told(0, 0, 1, wanted=rng.sample(range(6), 2), in_flight=sorted(flying))
        plan = s.step(given)
        assert not flying & set(evicted(plan))
        flying |= keys(s, plan)
        flying = {k for k in flying if rng.random() < 0.8}


def test_with_room_for_everybody_there_is_no_mask():
    s = begun(ONE_LAYER, 6)
    assert s.mask(0) is None


# -- top-k --------------------------------------------------------------


def test_with_exactly_top_k_and_no_free_slot_nothing_is_swapped():
    s = begun(SHAPE, 4, swapmoe(f=1))
    for layer in (0, 1):
        assert not fetched(s.step(told(layer, 0, 1, wanted=(5, 4))))


def test_with_top_k_and_a_free_slot_the_newcomer_lands_before_the_old_one_leaves():
    s = begun(SHAPE, 5, swapmoe(f=1))
    assert (residents(s, 0), residents(s, 1)) == ({0, 1}, {0, 1})
    plan = s.step(told(0, 0, 1, wanted=(5, 0), gates=(0.9, 0.1)))
    assert (fetched(plan), evicted(plan)) == ([5], [])
    assert sum(s.mask(0)) == 2
    assert not fetched(s.step(told(1, 0, 1, wanted=(5, 0), in_flight=[5])))  # slot taken
    plan = s.step(told(0, 0, 1, wanted=(5, 0), gates=(0.9, 0.1)))
    assert (fetched(plan), evicted(plan)) == ([], [1])
    assert visible(s) == [0, 5]
    assert fetched(s.step(told(1, 0, 1, wanted=(5, 0)))) == [5]  # now it is the other layer's


def masked_choice(s: Scheduler, layer: int, rng: random.Random) -> tuple[tuple, tuple]:
    """(served, wanted) of a router that the mask bound."""
    count, top_k = s.shape.experts[layer], s.shape.top_k
    wanted = tuple(rng.sample(range(count), top_k))
    mask = [True] * count if s.mask(layer) is None else s.mask(layer)
    allowed = [e for e in range(count) if mask[e]]
    assert len(allowed) >= top_k
    served = [e for e in wanted if mask[e]] + [e for e in allowed if e not in wanted]
    return tuple(served[:top_k]), wanted


@pytest.mark.parametrize("seed", range(12))
def test_no_expert_is_ever_loaded_on_demand_whatever_changes(seed):
    """Random streams, landings, budgets, bits and parameters: hits only, and the budget holds."""
    rng = random.Random(seed)
    shape = Shape((8, 6, 8), 2, {16: B, 8: 800, 4: 400})
    s = begun(shape, rng.randint(6, 22), swapmoe(f=rng.choice((1, 3, 7)), swaps=rng.randint(1, 4)))
    flying: set[int] = set()
    for step in range(300):
        layer = step % 3
        served, wanted = masked_choice(s, layer, rng)
        flying = {key for key in flying if key in s.cache}
        given = told(layer, *served, wanted=wanted, norm=rng.random() + 0.1, in_flight=flying)
        plan = s.step(dataclasses.replace(given, prefill=rng.random() < 0.05))
        assert sorted(places(decided(plan, "hit"))) == sorted((layer, e) for e in served)
        assert not decided(plan, "load", "skip", "substitute", "downgrade")
        assert not flying & {shape.key(*place) for place in places(decided(plan, "evict"))}
        flying |= keys(s, plan)
        flying = {k for k in flying if rng.random() < 0.7}
        assert s.cache.used_bytes <= s.cache.budget_bytes
        if layer == 2 and rng.random() < 0.1:
            bits = rng.choice((16, 8, 4))
            s.change(
                Knobs(rng.randint(6, 30) * shape.nbytes[bits], bits),
                s.strategy.tuned(f=rng.choice((1, 5)), swaps=rng.randint(1, 4)),
            )
            s.begin()
            flying.clear()
            assert s.cache.used_bytes <= s.cache.budget_bytes


def test_an_update_under_way_when_a_sequence_begins_is_not_waited_for():
    s = begun(ONE_LAYER, 4, swapmoe(f=1))
    s.step(told(0, 0, 1, wanted=(5, 4), gates=(0.6, 0.4)))
    assert residents(s) == {0, 1, 2, 5}
    s.new_sequence()
    assert s.begin().rows == []
    assert fetched(s.step(told(0, 0, 1, wanted=(5, 4)))) == [4]


def test_every_layer_begins_with_its_most_important_experts_and_keeps_the_learnt_ones():
    profile = {"norms": [[1, 2, 3, 4, 5, 6]] * 2, "importance": [[9, 1, 8, 1, 7, 1]] * 2}
    s = Scheduler(SHAPE, swapmoe(profile, f=1), Knobs(6 * B))
    plan = s.begin()
    assert places(decided(plan, "prefetch")) == [(0, 0), (1, 0), (0, 2), (1, 2), (0, 4), (1, 4)]
    assert {d.cause for d in decided(plan)} == {"set-up"}
    for _ in range(3):
        s.step(told(0, 0, 2, wanted=(5, 0), gates=(0.9, 0.1)))
    assert residents(s) == {0, 2, 5}
    s.change(Knobs(4 * B))
    s.begin()
    assert residents(s) == {0, 5}


@pytest.mark.parametrize("maker", [swapmoe, static_pruning])
def test_a_budget_must_hold_top_k_experts_of_every_layer_at_once(maker):
    for shape in (SHAPE, Shape((4, 8, 4), 2, {16: B, 4: 400})):
        need = minimum_budget(shape, maker(), Knobs(16 * B))
        assert need == shape.layers * 2 * B
        with pytest.raises(BudgetError):
            Scheduler(shape, maker(), Knobs(need - 1))


def test_a_part_of_it_alone_falls_back_to_the_router():
    from moelab.strategies import lru

    s = Scheduler(SHAPE, lru().replace(route=swapmoe().route), Knobs(8 * B))
    assert s.mask(0) is None  # nothing is resident yet: the router chooses, and it is loaded
    s.step(told(0, 3, 4))
    assert visible(s) == [3, 4]


# -- an encoder --------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "decoder"), [(2, 3), (3, 2), (5, 2), (1, 1)])
@pytest.mark.parametrize("kept", [2, 3])
def test_an_encoders_experts_are_swapped_for_the_next_source_while_its_text_is_decoded(
    encoder, decoder, kept
):
    shape = Shape((6,) * (encoder + decoder), 2, {16: B}, encoder_layers=encoder)
    # With top-k of each layer one free slot is all there is to swap by: it must come back.
    s = begun(shape, kept * shape.layers + (kept == 2), swapmoe(f=1))
    flying, came = set(), []

    def step(layer, **own):
        held = s.cache.used_bytes
        plan = s.step(dataclasses.replace(told(layer, 0, 1, in_flight=flying), **own))
        by = {"hit": [], "prefetch": [], "evict": []}
        for d in plan.decisions(shape):
            by[d.kind].append((d.layer, d.expert))
            held += B * ((d.kind == "prefetch") - (d.kind == "evict"))
            assert held <= s.cache.budget_bytes
        assert by["hit"] == [(layer, 0), (layer, 1)]
        assert not flying & {shape.key(*at) for at in by["evict"]}
        flying.clear()
        flying.update(shape.key(*at) for at in by["prefetch"])  # they land one layer on
        return by["prefetch"]

    for layer in shape.path(prefill=True):
        gates = {"wanted": ((5, 4),), "wanted_weights": ((0.6, 0.4),)} if layer < encoder else {}
        assert not step(layer, prefill=True, **gates)
    for _ in range(5 * encoder):
        s.end_of_token()
        for layer in shape.path():
            came += step(layer)
    assert sorted(came) == [(at, e) for at in range(encoder) for e in (4, 5)]
    for at in range(shape.layers):
        called_for = {4, 5, 0} if kept == 3 else {4, 5}
        assert residents(s, at) == (called_for if at < encoder else set(range(kept)))
    s.new_sequence()
    assert s.begin().rows == []
    assert visible(s, 0) == sorted(residents(s, 0))


# -- in the engine -------------------------------------------------------------------------


def waits(run) -> int:
    """How often a token waited, by the events and by the reports; evictions included."""
    stalls = run.events[run.events.kind == "stall"]
    between = stalls.cause == "evict"  # a change of settings may wait for a copy to come and go
    return int((~between).sum()) + sum(1 for r in run.token_reports if any(r.stall_ms.values()))


PROMPT = "SCENE II. Another part of the wood."


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "f"), [("15%", 1), ("25%", 4), ("60%", 1), ("100%", 4)])
def test_no_token_waits_on_a_slow_disk_and_experts_are_swapped_meanwhile(
    demo_lab, monkeypatch, budget, f
):
    monkeypatch.setitem(DEVICES, "snail", Device("5 MB/s", 5e6, 1.0, 1))
    demo_lab.update(strategy=swapmoe(f=f, swaps=2), budget=budget)
    demo_lab.update(device="snail")
    for _ in range(2):  # the second begins with the swaps of the first on their way
        run = demo_lab.generate(PROMPT, max_new_tokens=24, ignore_eos=True)
        events = run.events
        assert waits(run) == 0
        assert not events.kind.isin(["load", "skip", "substitute", "downgrade"]).any()
        assert events[events.cause != "set-up"].kind.eq("prefetch").any() == (budget != "100%")
        assert max(r.resident_bytes for r in run.token_reports) <= demo_lab.settings.budget_bytes
        assert run.summary()["peak_resident_bytes"] <= demo_lab.settings.budget_bytes


@pytest.mark.slow
def test_no_token_waits_whatever_is_changed_meanwhile(demo_lab):
    demo_lab.update(strategy=swapmoe(f=1, swaps=4), budget="40%", device="hdd")
    run = demo_lab.start(PROMPT, max_new_tokens=60, ignore_eos=True)
    changes = [{"budget": "20%"}, {"f": 2}, {"bits": 4}, {"budget": "50%"}, {"bits": 16}]
    for i, change in enumerate(changes, 1):
        while run.running and len(run.token_reports) < 8 * i:
            time.sleep(0.01)
        demo_lab.update(**change)
    events = run.join().events
    assert len(run.changes) == len(changes)
    assert waits(run) == 0
    assert not events.kind.isin(["load", "downgrade"]).any()
    assert all(r.resident_bytes <= r.budget_bytes for r in run.token_reports)
    assert run.summary()["setup_ms"] > 0


@pytest.mark.slow
def test_a_run_replayed_swaps_the_same_experts_at_the_same_time(demo_lab):
    demo_lab.update(strategy=swapmoe(f=2), budget="30%")
    run = demo_lab.generate(PROMPT, max_new_tokens=16, ignore_eos=True)
    again = [(d.kind, d.layer, d.expert) for d in replay(run.trace).decisions]
    events = run.events[run.events.kind != "stall"]
    assert again == list(zip(events.kind, events.layer, events.expert, strict=True))
    assert (events.cause.str.startswith("ahead")).any()


@pytest.mark.slow
def test_with_all_experts_resident_the_output_is_the_models_own(demo_lab):
    texts = []
    for strategy in ("lru", swapmoe(f=1), static_pruning()):
        demo_lab.update(strategy=strategy, budget="100%")
        texts.append(demo_lab.generate(PROMPT, max_new_tokens=12, temperature=0).text)
    assert texts[0] == texts[1] == texts[2]


# -- static pruning --------------------------------------------------------------


def test_static_pruning_keeps_the_largest_experts_for_ever():
    profile = {"norms": [[1, 2, 3, 4, 5, 6]] * 2, "counts": [[6, 5, 4, 3, 2, 1]] * 2}
    for by, kept in (("norm", {3, 4, 5}), ("count", {0, 1, 2})):
        s = begun(SHAPE, 6, static_pruning(profile, by=by))
        for _ in range(50):
            first, second = sorted(kept)[:2]
            plan = s.step(told(0, first, second, wanted=(2, 3)))
            assert not decided(plan, "prefetch", "evict")
        assert residents(s) == kept
        assert visible(s) == sorted(kept)


def test_static_pruning_changes_its_mind_at_once_when_told_to():
    profile = {"norms": [[1, 2, 3, 4, 5, 6]] * 2, "counts": [[6, 5, 4, 3, 2, 1]] * 2}
    s = begun(SHAPE, 6, static_pruning(profile))
    s.change(Knobs(6 * B), s.strategy.tuned(by="count"))
    s.begin()
    assert residents(s) == {0, 1, 2}


# -- the planner --------------------------------------------------------------

MODEL = Shape((8,) * 4, 2, {16: B})


def planted(best: Plan):
    """Dearer with every step away from ``best``."""
    return lambda p: (
        abs(p.f - best.f) + sum((a - b) ** 2 for a, b in zip(p.experts, best.experts, strict=True))
    )


@pytest.mark.parametrize("best", [Plan(4, (3, 8, 5, 4)), Plan(64, (7, 3, 3, 7))])
def test_the_planner_finds_a_planted_optimum(best):
    found = search(
        planted(best),
        lambda p: sum(p.experts) <= 20,
        [uniform(20, MODEL)],
        every=(1, 4, 16, 64),
        low=2,
        high=MODEL.experts,
    )
    assert found == best


def test_the_planner_drops_what_violates_the_memory():
    tried = []

    def fits(plan):
        tried.append(sum(plan.experts))
        return tried[-1] <= 20

    best = search(
        lambda p: -sum(p.experts) - 5 * p.experts[0],
        fits,
        [uniform(20, MODEL)],
        every=(1,),
        low=2,
        high=MODEL.experts,
    )
    assert max(tried) > 20  # such children are born, and do not live
    assert sum(best.experts) == 20
    assert best.experts[0] == 8
    with pytest.raises(ValueError, match="none of the starting"):
        search(len, fits, [uniform(32, MODEL)], every=(1,), low=2, high=MODEL.experts)


def estimates(layers: int = 4) -> Estimates:
    """Later layers lose more, rarer updates lose more and swap less."""
    every, kept = (4, 16, 64), (2, 4, 8)
    loss = [[[(la + 1) * f * x for x in (1e-2, 2e-3, 0)] for la in range(layers)] for f in every]
    swaps = [[[1 / f, 0.5 / f, 0] for _ in range(layers)] for f in every]
    return Estimates(every, kept, loss, swaps, 10.0, 5.0)


def test_estimates_are_straight_between_what_was_measured_and_never_worse_with_more_experts():
    table = [[[4.0, 1.0, 2.0]]]
    e = Estimates((1,), (2, 4, 8), table, table, 10.0, 2.0)
    assert [e.kl(Plan(1, (n,))) for n in (1, 2, 3, 4, 6, 8, 9)] == [4, 4, 2.5, 1, 1, 1, 1]
    assert e.ms(Plan(1, (3,))) == 10 + 2 * 2.5
    assert e.cost(Plan(1, (3,)), 0.5) == 2.5 + 0.5 * 0.5


def test_a_plan_is_never_dearer_than_uniform_nor_with_more_memory():
    e, before, costs = estimates(), [], []
    for slots in range(8, 33, 4):
        plan = plan_within(e, slots, MODEL, nats_per_slowdown=0.1, start=before)
        assert sum(plan.experts) <= slots
        assert min(plan.experts) >= 2
        assert fits(plan.experts, slots, MODEL)
        costs.append(e.cost(plan, 0.1))
        even = [uniform(slots, MODEL, f) for f in e.every]
        assert costs[-1] <= min(e.cost(p, 0.1) for p in even)
        before.append(plan)
    assert costs == sorted(costs, reverse=True)
    late = before[3]  # 20 slots
    assert late.experts[3] > late.experts[0]  # the layer that loses more keeps more


def test_the_planner_comes_within_two_percent_of_the_true_optimum():
    """Estimates are sums over layers, so that dynamic programming knows the best there is."""
    rng = np.random.default_rng(3)
    shape, every, kept = Shape((16,) * 8, 2, {16: B}), (4, 16), (2, 4, 8, 16)
    loss = rng.lognormal(-2, 1.5, (2, 8, 1)) * np.array([1, 0.5, 0.2, 0])
    e = Estimates(every, kept, loss.tolist(), np.zeros((2, 8, 4)).tolist(), 10.0, 1.0)
    for slots in (30, 60, 90):
        best = min(knapsack(e.prices(f, shape, 0.0), slots - 1, least=2) for f in every)
        assert e.kl(plan_within(e, slots, shape, nats_per_slowdown=0.0)) <= 1.02 * best


def knapsack(prices: list[list[float]], slots: int, least: int) -> float:
    """The least sum of one price of each row, with at most ``slots`` experts."""
    best = {0: 0.0}
    for row in prices:
        new: dict[int, float] = {}
        for used, cost in best.items():
            for n in range(least, min(len(row), slots - used + 1)):
                new[used + n] = min(new.get(used + n, np.inf), cost + row[n])
        best = new
    return min(best.values())


def test_what_a_slowdown_costs_decides_between_fresh_and_fast():
    fresh = plan_within(estimates(), 20, MODEL, nats_per_slowdown=0.0)
    fast = plan_within(estimates(), 20, MODEL, nats_per_slowdown=100.0)
    assert (fresh.f, fast.f) == (4, 64)


def test_the_same_seed_plans_the_same():
    plans = [plan_within(estimates(), 19, MODEL, nats_per_slowdown=0.1, seed=7) for _ in range(2)]
    assert plans[0] == plans[1]


def test_a_memory_without_top_k_of_every_layer_is_refused():
    with pytest.raises(ValueError, match="fewer than top-2"):
        plan_within(estimates(), 7, MODEL, nats_per_slowdown=0.1)


def test_one_slot_stays_free_where_a_layer_could_not_swap_without_it():
    assert [usable(n, MODEL) for n in (8, 9, 11, 12, 13)] == [8, 8, 10, 12, 13]
    assert uniform(11, MODEL).experts == (3, 3, 2, 2)
    assert deal((4, 2, 2), 3, (8, 8, 3)) == (4, 4, 3)
    assert deal((1, 1), 9, (2, 2)) == (2, 2)


def test_a_layer_may_keep_top_k_where_a_slot_is_left_for_its_swaps():
    assert fits((2, 2, 2, 8), 15, MODEL)
    assert not fits((2, 2, 2, 8), 14, MODEL)
    assert fits((3, 3, 3, 5), 14, MODEL)
    assert fits((2, 2, 2, 2), 8, MODEL)  # nothing is ever swapped
    assert fits((8, 8, 8, 8), 32, MODEL)
    steep = Estimates((4,), (2, 8), [[[9.0, 0.0], *[[0.1, 0.0]] * 3]], [[[0, 0]] * 4], 10.0, 1.0)
    assert plan_within(steep, 15, MODEL, nats_per_slowdown=0.0).experts == (8, 2, 2, 2)
    plans = {15: Plan(4, (8, 2, 2, 2))}
    assert largest(plans, 15, MODEL) == plans[15]
    assert largest(plans, 16, MODEL) == Plan(4, (8, 3, 2, 2))
    assert largest(plans, 17, MODEL) == Plan(4, (8, 3, 3, 3))  # each can swap within its own


def test_the_network_is_what_its_weights_say_and_no_loss_where_all_is_whole():
    network = Network([[8.0, 1.0, 0.0], [0.0, -4.0, 2.0]], [1.0, 0.0], [0.5, -2.0], 0.25, [4, 8])
    assert network.inputs(Plan(4, (2, 2))).tolist() == [0.25, 0.5, 0.25]
    # hidden: 2 + .5 + 1 = 3.5, and -2 + .5 below 0
    assert network.kl(Plan(4, (2, 2))) == pytest.approx(math.exp(3.5 * 0.5 + 0.25))
    assert network.kl(Plan(4, (4, 8))) == 0.0
    table = [[[4.0, 1.0], [4.0, 1.0]]]
    e = Estimates((4,), (2, 4), table, table, 10.0, 2.0, network)
    assert e.kl(Plan(4, (2, 2))) == network.kl(Plan(4, (2, 2)))
    assert e.added(Plan(4, (2, 2))) == 8.0


def test_the_network_learns_what_adding_up_layers_cannot_know():
    experts = (16,) * 5
    some = configurations(experts, 2, (4, 16, 64), 48, seed=1)
    assert all(2 <= n <= 16 for plan in some for n in plan.experts)
    assert {plan.f for plan in some} == {4, 16, 64}
    short = [[1 - n / 16 for n in plan.experts] for plan in some]
    pairs = zip(some, short, strict=True)
    true = [math.exp(3 * sum(row) ** 0.5 - 4 + 0.1 * math.log2(p.f)) for p, row in pairs]
    said = unseen(some, true, experts)
    assert off(said, true) < 1.25
    alone = [sum(math.exp(3 * x**0.5 - 4) for x in row) for row in short]
    assert off(said, true) < off(alone, true)


def test_updates_are_as_frequent_as_they_may_be_before_the_time_bends_up():
    def e(swap_ms):
        return dataclasses.replace(estimates(), swap_ms=swap_ms)

    assert plan_to_the_bend(e(0.01), 20, MODEL).f == 4
    assert plan_to_the_bend(e(2.0), 20, MODEL).f == 16
    assert plan_to_the_bend(e(50.0), 20, MODEL).f == 64
    assert plan_to_the_bend(e(50.0), 20, MODEL, bend=100.0).f == 4
    assert sum(plan_to_the_bend(e(2.0), 20, MODEL).experts) <= 20


def test_simple_scheduling_counts_and_swaps_all_at_once():
    s = begun(ONE_LAYER, 4, swapmoe(f=1, importance="count", swaps=0))
    plan = s.step(told(0, 0, 1, wanted=(4, 5), norm=9.0))
    assert swapped(plan) == [(0, 4), (0, 5)]
    s = begun(ONE_LAYER, 4, swapmoe(f=1))
    assert len(swapped(s.step(told(0, 0, 1, wanted=(4, 5))))) == 1
    heavy, often = swapmoe(f=3), swapmoe(f=3, importance="count")
    for strategy, first in ((heavy, 4), (often, 5)):
        s = begun(ONE_LAYER, 4, strategy)
        s.step(told(0, 0, 1, wanted=(4, 0), norm=9.0))
        for _ in range(2):
            plan = s.step(told(0, 0, 1, wanted=(5, 0), norm=1.0))
        assert swapped(plan)[0] == (0, first)


def test_the_largest_plan_that_fits_is_taken_and_the_rest_dealt_out():
    plans = {12: Plan(8, (2, 2, 3, 5)), 20: Plan(32, (3, 4, 5, 8))}
    assert largest(plans, 12, MODEL) == plans[12]
    assert largest(plans, 15, MODEL) == Plan(8, (4, 3, 3, 5))
    assert largest(plans, 31, MODEL) == Plan(32, (8, 8, 7, 8))
    assert largest(plans, 13, MODEL) == plans[12]  # a slot for the swaps of the first two layers
    assert largest(plans, 10, MODEL) == uniform(10, MODEL)


def test_the_plan_of_a_profile_gives_the_layers_their_experts_and_f():
    profile = {"plans": {"6": {"f": 3, "experts": [4, 2]}}}
    s = begun(SHAPE, 6, swapmoe(profile))
    assert (len(residents(s, 0)), len(residents(s, 1))) == (4, 2)
    assert virtual(s).every(s.view) == 3
    s.change(Knobs(6 * B), s.strategy.tuned(f=9))
    assert virtual(s).every(s.view) == 9


# -- the profiling -------------------------------------------------------------------------------


@pytest.mark.parametrize(("f", "n"), [(1, 3), (4, 4), (8, 5)])
def test_the_profiling_renews_a_layer_as_the_strategy_does(f, n):
    """The masks under which quality is estimated are those that a run would have."""
    rng, shape = np.random.default_rng(0), Shape((8,), 2, {16: B})
    start, scores = rng.random(8), np.zeros((40, 8))
    for token in scores:
        token[rng.permutation(8)[:2]] = rng.dirichlet((2, 1))
    part = swapmoe({"importance": [start.tolist()]}, f=f).route
    for token, chosen in enumerate(np.repeat(list(renewed(scores, start, f, n)), f, axis=0)):
        view = View(shape, Knobs(n * B), Cache(shape, n * B))
        assert set(part.order(0, view)[:n]) == set(chosen)
        for e in chosen:
            view.cache.add(e, 16)  # every swap has landed
        wanted = np.flatnonzero(scores[token])
        part.observe(told(0, 0, 1, wanted=wanted, gates=scores[token, wanted]), view)


def test_quality_is_measured_more_densely_where_few_experts_are_kept():
    assert numbers_kept(2, 16) == (2, 3, 4, 6, 8, 12, 16)
    assert numbers_kept(8, 64) == (8, 9, 16, 24, 32, 48, 64)
    assert numbers_kept(1, 4) == (1, 2, 3, 4)


@pytest.mark.slow
def test_a_profile_is_measured_of_the_model_and_its_plans_beat_uniform(demo_lab, monkeypatch):
    from moelab.calibration import swapmoe as maker

    made = maker.made_from(demo_lab, max_tokens=6, every=(3, 6), percent=(25, "50%", 100), tried=12)
    assert made["percent"] == [25, 50, 100]
    texts, kept = [PROMPT * 2], {}
    data = json.loads(json.dumps(maker.make(demo_lab, texts, made, kept, progress=False)))
    assert np.shape(data["norms"]) == np.shape(data["importance"]) == (6, 16)
    assert np.sum(data["counts"]) == 6 * 6 * 2
    assert np.shape(data["loss"]) == np.shape(data["swaps"]) == (2, 6, 7)
    short, whole = np.array(data["loss"])[..., 0], np.array(data["loss"])[..., -1]
    assert (short > 0).all()
    assert (whole == 0).all()
    assert data["base_ms"] > 0
    assert list(data["plans"]) == ["24", "48", "96"]
    for slots, plan in data["plans"].items():
        assert sum(plan["experts"]) <= int(slots)
        assert plan["kl"] <= plan["uniform_kl"]
    assert len(data["tried"]) == 12
    with pytest.raises(ValueError, match="tried=3: at least 12 configurations"):
        maker.made_from(demo_lab, tried=3)
    assert min(data["off"].values()) > 1
    assert data["planned_by"] == min(data["off"], key=data["off"].get)
    assert Estimates.of(data | {"planned_by": "network"}).network
    assert Estimates.of(data | {"planned_by": "added"}).network is None
    ours = maker.make(demo_lab, texts, made | {"tried": 0}, dict(kept), progress=False)
    assert Estimates.of(ours).network is None
    demo_lab.update(strategy=swapmoe(data), budget="50%")
    held = (demo_lab.cache_map()["bits"] > 0).sum(1).tolist()
    # A plan may leave a slot free for its swaps: what was there before stays in it until then.
    more = np.array(held) - data["plans"]["48"]["experts"]
    assert set(more.tolist()) <= {0, 1}
    assert sum(held) <= 48

    monkeypatch.setattr(maker, "ShortLayers", lambda *_: None)  # nothing is measured again
    again = maker.make(demo_lab, texts, made, kept, progress=False)
    assert again["loss"] == data["loss"]
