"""What a user may rely on of mixing strategies: parts, presets, parameters, and what goes on."""

from __future__ import annotations

import pytest
import torch

import moelab
from moelab.replays.replay import replay
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Allocate, Prediction, Prefetch, Route
from moelab.scheduling.trace import Trace
from moelab.settings import Settings
from moelab.strategies import Evict, Parameter, hobbit, lru, make, swapmoe
from test_scheduler import NBYTES, SHAPE, kinds, knobs, resident, step, token

PLENTY = SHAPE.all_bytes(16)


def keys(*places) -> tuple[int, ...]:
    return tuple(SHAPE.key(*place) for place in places)


def flying(s: Scheduler) -> set[tuple[int, int]]:
    return {SHAPE.place(key) for key in s.view.in_flight.nonzero()[0]}


def some(**changes) -> Settings:
    return Settings(PLENTY, 16, lru()).change(SHAPE, **changes)


# -- settings -----------------------------------------------------------------------------------


def test_a_strategy_brings_its_settings_and_the_next_one_leaves_none_behind():
    chosen = some(strategy="hobbit")
    assert (chosen.low_bits, chosen.prefetch) == (4, 2)
    after = chosen.change(SHAPE, strategy="lfu")
    assert (after.low_bits, after.t1, after.t2, after.prefetch) == (None, 0.6, 0.9, 0)


def test_what_is_said_in_the_same_breath_comes_first():
    chosen = some(strategy=hobbit(t1=0.3, depth=1), low_bits=2)
    assert (chosen.low_bits, chosen.t1, chosen.prefetch) == (2, 0.3, 1)


def test_a_decision_of_another_strategy_brings_only_its_own_settings():
    mixed = some(precision="hobbit")
    assert (mixed.low_bits, mixed.prefetch) == (4, 0)
    assert type(mixed.strategy.evict) is type(lru().evict)
    assert mixed.strategy.name == "lru*"
    assert repr(mixed.strategy).startswith("<Strategy lru + precision hobbit: low_bits=4")
    assert some(evict="lfu").change(SHAPE, evict="lru").strategy.full_name == "lru"
    assert some(prefetch="hobbit").low_bits is None
    assert some(prefetch=2).prefetch == 2  # a number is how far to look


def test_a_parameter_is_a_setting():
    chosen = some(strategy="hobbit", w_lru=1.0)
    assert chosen.strategy.evict.w_lru == 1.0
    again = chosen.change(SHAPE, w_lru=0.5)
    assert (again.strategy.evict.w_lru, chosen.strategy.evict.w_lru) == (0.5, 1.0)
    assert again.strategy.name == "hobbit"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_lru": 0.3}, "unknown setting 'w_lru'.*parameters of 'lru': depth, low_bits, t1, t2"),
        ({"strategy": "hobbit", "w_lru": 7}, "w_lru=7: from 0 to 1"),
        ({"strategy": "hobbit", "w_lru": "much"}, "w_lru='much'"),
        ({"evict": "nobody"}, "unknown strategy 'nobody'"),
        ({"strategy": "nobody"}, "unknown strategy 'nobody'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(changes, message):
    with pytest.raises(ValueError, match=message):
        some(**changes)


def test_a_decision_must_be_one():
    with pytest.raises(TypeError, match="must be an object with"):
        some(evict=object())


# -- what goes on, what begins anew ---------------------------------------------------------------


def test_the_parts_that_stay_keep_what_they_have_learnt():
    s = Scheduler(SHAPE, make("edgemoe"), knobs())
    template = s.strategy
    token(s, (0, 1), (2, 3), (4, 5))
    live = s.strategy.evict
    s.change(knobs(), template.replace(prefetch=Prefetch()))
    assert s.strategy.evict is live
    s.change(knobs(), make("edgemoe"))
    assert s.strategy.evict is not live


def test_tuning_keeps_what_has_been_learnt():
    class Fickle(Evict):
        parameters = (Parameter("sign", "which end leaves", -1, 1, 2),)

        def __init__(self):
            self.sign, self.seen = 1, []

        def observe(self, given, view):
            self.seen += [(given.layer, e) for e in given.experts[0]]

        def score(self, view):
            return self.sign * view.index_of

    strategy = lru().replace(evict=Fickle())
    s = Scheduler(SHAPE, strategy, knobs(budget_bytes=2 * 1600))
    s.step(step(0, 1, 2))
    s.change(knobs(budget_bytes=2 * 1600), strategy.tuned(sign=-1))
    assert s.strategy.evict.seen == [(0, 1), (0, 2)]
    assert kinds(s.step(step(0, 4, 3)))[0] == ("evict", 2)
    assert strategy.evict.sign == 1  # the template is as it was


def test_one_object_in_several_decisions_stays_one():
    strategy = swapmoe()
    assert strategy.route is strategy.evict
    for copy in (strategy.fresh(), strategy.tuned(f=3), strategy.following(strategy.fresh())):
        assert copy.route is copy.evict is copy.prefetch


def test_a_part_is_told_once_of_each_layer_whatever_its_decisions():
    class Both(Evict, Route):
        told = 0

        def observe(self, given, view):
            self.told += 1

        def score(self, view):
            return view.last_use

    both = Both()
    s = Scheduler(SHAPE, lru().replace(evict=both, route=both), knobs())
    token(s, (0, 1), (2, 3), (4, 5))
    assert s.strategy.evict.told == 3


# -- shares, set-up, and what happened meanwhile ---------------------------------------------------


class Tiers(Allocate):
    """At most two copies at each tier."""

    def tier_bytes(self, bits, view):
        return 2 * NBYTES[bits]


def test_a_tier_keeps_to_its_share():
    s = Scheduler(SHAPE, lru().replace(allocate=Tiers()).tuned(low_bits=4), knobs())
    for experts in ((0, 1), (2, 3), (4, 5)):
        s.step(step(0, *experts, weights=(0.75, 0.25)))
        assert max(s.cache.tier_bytes[16] / 1600, s.cache.tier_bytes[4] / 400) <= 2
    assert resident(s) == {(0, 2): 16, (0, 3): 4, (0, 4): 16, (0, 5): 4}


def test_shares_that_no_budget_can_satisfy_are_refused():
    class Nothing(Allocate):
        def layer_bytes(self, layer, view):
            return 1600

    with pytest.raises(ValueError, match="no budget is enough"):
        Scheduler(SHAPE, lru().replace(allocate=Nothing()), knobs())


class Start(Prefetch):
    """Two experts before anything else."""

    def begin(self, view):
        return [Prediction(2, 5), Prediction(1, 4)]


def test_a_set_up_comes_before_the_first_token_and_only_once():
    s = Scheduler(SHAPE, lru().replace(prefetch=Start()), knobs())
    assert [(d.layer, d.expert, d.bits, d.cause) for d in s.begin().decisions(SHAPE)] == [
        (2, 5, 16, "set-up"),
        (1, 4, 16, "set-up"),
    ]
    assert s.begin().rows == []


def test_a_set_up_lets_go_of_others_but_never_of_its_own():
    s = Scheduler(SHAPE, lru().replace(prefetch=Start()), knobs(budget_bytes=2 * 1600))
    s.step(step(0, 0, 1))
    assert [k for k, _ in kinds(s.begin())] == ["evict", "prefetch"] * 2
    assert set(resident(s)) == {(2, 5), (1, 4)}


class Eager(Prefetch):
    observes = frozenset({"unread", "in_flight"})

    def predict(self, layer, look_ahead, view):
        return [Prediction(layer + 1, e) for e in (4, 5)] if layer == 0 else ()


def test_what_was_not_read_in_time_leaves_before_anything_else():
    s = Scheduler(SHAPE, lru().replace(prefetch=Eager()), knobs())
    s.step(step(0, 0, 1))
    assert flying(s) == {(1, 4), (1, 5)}
    late = LayerInput(1, ((4, 3),), ((0.5, 0.5),), unread=keys((1, 4), (1, 5)))
    assert kinds(s.step(late)) == [
        ("evict", 4), ("evict", 5), ("load", 3), ("load", 4),
    ]  # fmt: skip
    assert flying(s) == set()


def test_only_strategies_that_ask_are_told_what_was_not_read():
    s = Scheduler(SHAPE, lru(), knobs())
    s.step(step(1, 4, 5))
    late = LayerInput(1, ((4, 5),), ((0.5, 0.5),), unread=keys((1, 4)), in_flight=keys((1, 5)))
    assert kinds(s.step(late)) == [("hit", 4), ("hit", 5)]
    assert flying(s) == set()


def test_a_trace_with_everything_in_it_survives_the_disk(tmp_path):
    given = LayerInput(
        0, ((4, 3),), ((0.5, 0.5),), False, (), ((0, 1),), ((0.6, 0.4),), (2.5,), keys((0, 1)),
        keys((1, 2)),
    )  # fmt: skip
    trace = Trace(SHAPE, [given])
    assert Trace.load(trace.save(tmp_path / "t.json")).steps == [given]
    assert given.router_experts == ((0, 1),)
    assert given.router_weights == ((0.6, 0.4),)


# -- live -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(demo_store):
    with moelab.open("demo", budget="40%", measure_kl=False, progress=False) as lab:
        yield lab


PROMPT = "Elizabeth was not at all surprised to hear that"


def tokens(lab, n=10):
    return lab.generate(PROMPT, max_new_tokens=n, temperature=0, ignore_eos=True)


def decisions(run):
    live = run.events[run.events.kind != "stall"][["kind", "layer", "expert", "bits"]]
    return [tuple(r) for r in live.itertuples(index=False)]


def test_a_mask_hides_experts_and_the_routers_own_choice_is_told(lab):
    class Even(Route):
        observes = frozenset({"wanted", "norms"})

        def mask(self, layer, view):
            return [e % 2 == 0 for e in range(view.shape.experts[layer])]

    lab.update(strategy=lru().replace(route=Even(), name="even"))
    run = tokens(lab)
    chosen = {e for s in run.trace.steps for row in s.experts for e in row}
    wanted = {e for s in run.trace.steps for row in s.wanted for e in row}
    assert all(e % 2 == 0 for e in chosen)
    assert any(e % 2 for e in wanted)
    assert all(len(s.norms) == len(s.experts) and min(s.norms) > 0 for s in run.trace.steps)
    lab.update(strategy="lru")
    assert any(e % 2 for s in tokens(lab).trace.steps for row in s.experts for e in row)


def test_a_bias_moves_the_choice_and_leaves_the_gate_weights_alone(lab):
    class Prefer(Route):
        observes = frozenset({"wanted"})
        parameters = (Parameter("much", "how much expert 3 is preferred", 0, 2, 0.1),)

        def __init__(self):
            self.much = 2.0

        def bias(self, layer, view):
            return [self.much * (e == 3) for e in range(view.shape.experts[layer])]

    lab.update(strategy="lru")
    plain = tokens(lab).tokens
    lab.update(route=Prefer())
    steps = [s for s in tokens(lab).trace.steps if not s.prefill]
    assert all(3 in s.experts[0] for s in steps)
    both = [s for s in steps if set(s.experts[0]) == set(s.wanted[0])]
    assert both
    for s in both:  # the same two experts: the same weights
        assert dict(zip(s.experts[0], s.weights[0], strict=True)) == pytest.approx(
            dict(zip(s.wanted[0], s.wanted_weights[0], strict=True)), abs=1e-6
        )
    lab.update(much=0.0)
    assert tokens(lab).tokens == plain
    lab.update(strategy="lru")
    assert tokens(lab).tokens == plain


def test_decisions_by_name_that_belong_together_stay_together(lab):
    lab.update(strategy="swapmoe")
    lab.update(evict="lru")
    lab.update(evict="swapmoe")
    live = lab._engine.scheduler.strategy
    assert live.evict is live.route is live.prefetch
    lab.update(strategy="lru")


def test_a_set_up_is_no_tokens_wait_and_is_replayed(lab):
    lab.update(strategy="on_demand", budget="100%", device="hdd")
    lab.update(strategy="in_ram")
    run = tokens(lab)
    assert (run.per_token.stall_ms == 0).all()
    assert lab.info()["resident_bytes"] == lab.info()["all_experts_bytes"]
    lab._engine.recover()
    run = tokens(lab)
    setup = run.events[run.events.cause == "set-up"]
    assert len(setup) == 96
    assert run.summary()["setup_ms"] > 96 * 147456 / 50e6 * 1e3 * 0.9
    assert run.per_token.bytes.sum() == 0
    assert [(d.kind, d.layer, d.expert, d.bits) for d in replay(run.trace).decisions] == decisions(
        run
    )
    lab.update(device="disk", budget="40%", strategy="lru")


def test_changes_of_parts_during_a_run_are_marked_and_replayed(lab):
    lab.update(strategy="hobbit", budget="30%")
    run = lab.start(PROMPT, max_new_tokens=40, temperature=0, ignore_eos=True)
    script = iter([{"w_lru": 1.0}, {"evict": "lfu"}, {"t1": 0.2}, {"prefetch": "moe_infinity"}])
    seen = 0
    for change in script:
        while run.running and len(run.tokens) < seen + 6:
            torch.empty(1)
        seen = len(run.tokens)
        lab.update(**change)
    run.join()
    marked = [sorted(words) for _, words in run.changes]
    assert ["w_lru"] in marked
    assert any("evict" in words and "strategy" not in words for words in marked)
    again = replay(run.trace).decisions
    assert [(d.kind, d.layer, d.expert, d.bits) for d in again] == decisions(run)
    lab.update(strategy="lru", budget="40%")


def test_another_strategy_decides_a_trace_under_the_budgets_that_were_recorded(lab):
    lab.update(strategy="lru", budget="20%", bits=16)
    run = lab.generate(PROMPT, max_new_tokens=20, temperature=0, ignore_eos=True)
    first = run.trace.changes[0].knobs
    for name in ("lru", "lfu", "layer_lru", "on_demand"):
        told = replay(run.trace, make(name))
        assert told.decisions == replay(run.trace, make(name), first).decisions
        assert f"hit ratio {told.hit_ratio:.3f}" in repr(told)
    assert told.hit_ratio == 0 < replay(run.trace).hit_ratio
    with pytest.raises(TypeError, match=r"this is a Run; give a trace, as in run\.trace"):
        replay(run)
    with pytest.raises(ValueError, match="knobs= without strategy="):
        replay(run.trace, knobs=first)


def test_a_saved_run_is_decided_again_from_the_names_alone(lab, tmp_path):
    lab._engine.recover()
    lab.update(strategy="lru")
    lab.update(strategy="lfu")
    run = tokens(lab)
    loaded = Trace.load(run.trace.save(tmp_path / "run.json"))
    with pytest.raises(ValueError, match="'lfu'.*unknown"):
        replay(loaded)
    again = replay(loaded, strategies={"lfu": make("lfu")})
    assert [(d.kind, d.layer, d.expert, d.bits) for d in again.decisions] == decisions(run)
