"""What a user may rely on of ``lab.what_if``: the same run again, but for what was changed."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from moelab.replays.replay import replay
from moelab.runs.what_if import WhatIf, overlaid
from moelab.scheduling.budget import BudgetError, minimum_budget
from moelab.scheduling.events import KINDS
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import Knobs, Shape
from moelab.scheduling.trace import Trace
from moelab.spelling import shown_strategy
from moelab.strategies import NAMES, Evict, make

PROMPT = "Once upon a time"
TIMELESS = [name for name in NAMES if not make(name).observes & {"in_flight", "unread"}]


def decided(run):
    """Every row of the log but what a clock wrote."""
    rows = run.log.records()
    rows = rows[rows["kind"] != KINDS.index("stall")]
    return rows[["token", "at", "layer", "expert", "kind", "bits_asked", "bits"]].tolist()


def again(lab, run, **changes):
    return WhatIf(lab, run, changes, repeats=1).go()


# -- with no change -------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["lru", "hobbit"])
def test_with_no_change_text_and_decisions_are_the_same(demo_lab, strategy):
    demo_lab.update(strategy=strategy)
    demo_lab.generate("def main(", max_new_tokens=12)  # leaves a warm cache, and habits
    run = demo_lab.generate(
        PROMPT,
        max_new_tokens=20,
        temperature=0.8,
        seed=7,
        changes={6: {"budget": "12%"}, 11: {"bits": 4, "evict": "lfu"}, 15: {"strategy": "lru"}},
    )
    assert [t for t, _ in run.history] == [0, 6, 11, 15]
    second = again(demo_lab, run)
    assert second.tokens == run.tokens
    assert decided(second) == decided(run)
    assert [t for t, _ in second.history] == [0, 6, 11, 15]
    assert second.trace.resident == run.trace.resident
    assert replay(second.trace).decisions == replay(run.trace).decisions
    assert demo_lab.settings is run.history[-1][1], "the first lab is as it was"
    assert demo_lab.generate("The", max_new_tokens=2).tokens, "and goes on"


def test_a_stopped_run_is_repeated_as_far_as_it_went(demo_lab):
    run = demo_lab.start(PROMPT, max_new_tokens=2000)
    while len(run.tokens) < 5:
        pass
    run.stop()
    assert again(demo_lab, run.join()).tokens == run.tokens


# -- with a change --------------------------------------------------------------------------------


def test_the_text_parts_where_the_real_logits_say_so_and_nowhere_else(demo_lab):
    run = demo_lab.generate(PROMPT, max_new_tokens=24, temperature=0)
    same = again(demo_lab, run, budget="100%")
    assert same.tokens == run.tokens, "a budget costs time, not quality"
    rough = again(demo_lab, run, bits=2, measure_kl=True)
    parts = [a != b for a, b in zip(run.tokens, rough.tokens, strict=False)]
    first = parts.index(True)
    assert max(r.kl for r in rough.token_reports) > 1e-3
    served, full = (
        dict(best) for best in (rough.likeliest[first].served, run.likeliest[first].served)
    )
    assert max(served, key=served.get) == rough.tokens[first] != run.tokens[first]
    assert max(full, key=full.get) == run.tokens[first]


def test_a_threshold_of_hobbit_acts_and_the_rest_stays(demo_lab):
    demo_lab.update(strategy="hobbit", t1=1, t2=1)
    run = demo_lab.generate(PROMPT, max_new_tokens=16)
    assert run.summary()["downgrades"] == 0
    second = again(demo_lab, run, t1=0.1)
    assert second.summary()["downgrades"] > 0
    assert {s.t1 for _, s in second.history} == {0.1}
    assert {s.strategy.name for _, s in second.history} == {"hobbit"}


def test_changes_on_the_way_stay_and_the_override_lies_on_top(demo_lab):
    run = demo_lab.generate(
        PROMPT,
        max_new_tokens=12,
        changes={3: {"bits": 4}, 6: {"strategy": "lfu"}, 9: {"strategy": "hobbit", "w_lru": 0.5}},
    )
    plan = overlaid(
        run.history,
        {"strategy": "moe_infinity", "device": "hdd"},
        demo_lab._shape,
        demo_lab._strategies,
    )
    assert [(t, s.bits) for t, s in plan] == [(0, 16), (3, 4), (6, 4), (9, 4)]
    assert {s.strategy.name for _, s in plan} == {"moe_infinity"}
    later = plan[1][1].strategy
    assert all(s.strategy.shares(later) for _, s in plan), "one strategy that goes on learning"
    plan = overlaid(run.history, {"w_lru": 0.9}, demo_lab._shape, demo_lab._strategies)
    assert plan[-1][1].strategy.parameters["w_lru"][2] == 0.9
    same = [now is then for (_, now), (_, then) in zip(plan, run.history, strict=True)]
    assert same == [True, True, True, False]
    with pytest.raises(ValueError, match="unknown setting 'nonsense'"):
        overlaid(run.history, {"nonsense": 1}, demo_lab._shape, demo_lab._strategies)
    with pytest.raises(BudgetError, match=r"^from token 9 on: budget .* raise it to"):
        overlaid([(9, run.history[0][1])], {"budget": 1000}, demo_lab._shape, demo_lab._strategies)


def test_a_policy_of_ones_own_can_be_tried(demo_lab):
    class LowestIndex(Evict):
        def score(self, view):
            return -view.index_of

    run = demo_lab.generate(PROMPT, max_new_tokens=8)
    second = again(demo_lab, run, evict=LowestIndex())
    assert second.tokens == run.tokens
    assert decided(second) != decided(run)


# -- keep: an expert over which no part decides ---------------------------------------------------


def kept_throughout(run, keep):
    """An independent recount: resident at its bits from the first use on, never gone."""
    frame = run.events
    for (layer, expert), bits in keep.items():
        mine = frame[(frame.layer == layer) & (frame.expert == expert)]
        after = mine[mine["at"] >= 0]
        assert not (after.kind == "evict").any()
        assert not after.kind.isin(["load", "prefetch", "downgrade", "skip"]).any()
        assert set(after[after.kind.isin(["hit", "substitute"])].bits) <= {bits}
        start = dict(run.trace.resident).get(run.trace.shape.key(layer, expert))
        set_up = mine[(mine["at"] < 0) & (mine.kind == "prefetch")]
        assert start == bits or list(set_up.bits) == [bits]


@pytest.mark.parametrize("strategy", ["lru", "hobbit", "swapmoe", "in_ram"])
def test_a_kept_expert_stays_at_its_bits_within_the_budget(demo_lab, strategy):
    demo_lab.update(strategy=strategy, budget="15%")
    run = demo_lab.generate(PROMPT, max_new_tokens=10)
    keep = {(5, 3): 8, (0, 0): 16}
    second = again(demo_lab, run, pin=keep)
    kept_throughout(second, keep)
    budget = second.history[0][1].budget_bytes
    assert 0 < second.summary()["peak_resident_bytes"] <= budget
    assert all(r.resident_bytes <= budget for r in second.token_reports)
    uses = second.events
    assert ((uses.layer == 5) & (uses.expert == 3) & (uses["at"] < 0)).any()


def test_what_is_kept_is_kept_in_a_replay_from_a_file_too(demo_lab, tmp_path):
    demo_lab.update(pin={(2, 1): 8, (3, 4): 16}, budget="8%")
    run = demo_lab.generate(PROMPT, max_new_tokens=6)
    loaded = Trace.load(run.trace.save(tmp_path / "trace.json"))
    again = replay(loaded, strategies={"lru": make("lru")})
    assert again.decisions == replay(run.trace).decisions


def test_a_budget_that_cannot_hold_what_is_to_be_kept_is_refused(demo_lab):
    run = demo_lab.generate(PROMPT, max_new_tokens=3)
    keep = {(layer, 3): 16 for layer in range(6)}
    with pytest.raises(BudgetError, match=r"beside 6 pinned experts: .* raise it to (\d+) bytes"):
        demo_lab.what_if(run, pin=keep, budget="6%")
    for wrong, words in (
        ({(0, 99): 8}, "no expert 99 in layer 0"),
        ({(0, 1): 5}, r"pin={\(0, 1\): 5} is not in this store"),
        ({0: 8}, r"write \{\(layer, expert\): bits\}"),
    ):
        with pytest.raises(ValueError, match=words):
            demo_lab.what_if(run, pin=wrong)


def test_keep_outlives_another_choice_of_strategy_until_it_is_lifted(demo_lab):
    demo_lab.update(pin={(1, 2): 4})
    demo_lab.update(strategy="hobbit", w_lru=0.4)
    assert demo_lab.settings.strategy.pinned == {(1, 2): 4}
    assert demo_lab.cache_map()["bits"][1, 2] == 4
    assert shown_strategy(demo_lab.settings.strategy)["pin"] == "1.2 at 4 bit"
    demo_lab.update(pin={})
    assert demo_lab.settings.strategy.pinned == {}


SHAPE = Shape((6, 6, 6), 2, {16: 1600, 8: 800, 4: 400, 2: 200})


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_keeps_what_it_is_told_to_at_the_least_budget(name):
    keep = {(0, 5): 16, (1, 0): 4, (2, 3): 8}
    strategy = dataclasses.replace(make(name), pinned=keep)
    least = minimum_budget(SHAPE, strategy, Knobs(10**6, 8))
    assert least > minimum_budget(SHAPE, make(name), Knobs(10**6, 8))
    with pytest.raises(BudgetError):
        Scheduler(SHAPE, strategy, Knobs(least - 1, 8))
    scheduler, rng = Scheduler(SHAPE, strategy, Knobs(least, 8)), np.random.default_rng(3)
    scheduler.begin()
    for _ in range(40):
        for layer in range(3):
            mask = scheduler.mask(layer)
            mask = [True] * 6 if mask is None else mask
            experts = rng.permutation(np.flatnonzero(mask))[:2].tolist()
            given = LayerInput(layer, (tuple(experts),), ((0.7, 0.3)[: len(experts)],))
            scheduler.step(given)
            assert {k: scheduler.cache.bits[SHAPE.key(*k)] for k in keep} == keep
            assert scheduler.cache.used_bytes <= least
        scheduler.end_of_token()


# -- asked at the wrong time, and stopped ---------------------------------------------------------


def test_it_is_refused_while_a_run_goes_on_and_for_another_model(demo_lab):
    run = demo_lab.start(PROMPT, max_new_tokens=400)
    with pytest.raises(RuntimeError, match="still going on"):
        demo_lab.what_if(run)
    run.stop()
    run.join()
    run.model = "another"
    with pytest.raises(ValueError, match="of 'another'; the lab has 'demo' open"):
        demo_lab.what_if(run)


def test_it_can_be_stopped_and_answers_why_meanwhile(demo_lab):
    run = demo_lab.generate(PROMPT, max_new_tokens=60, ignore_eos=True)
    what, out = WhatIf(demo_lab, run, {"device": "hdd", "budget": "8%"}), []
    thread = threading.Thread(target=lambda: out.append(what.go()))
    thread.start()
    while what.run is None or not what.run.tokens:
        pass
    layer, expert = demo_lab._shape.place(next(iter(demo_lab._engine.resident)))
    assert demo_lab.why(layer, expert), "hovering over the map does not have to wait"
    with pytest.raises(RuntimeError, match="a run is going on"):
        demo_lab.start(PROMPT)
    what.stop()
    thread.join()
    assert 0 < len(out[0].tokens) < 60
    assert out[0].summary()["timing"] == "emulated"


def test_changes_given_beforehand_act_at_their_token_and_a_refused_one_ends_the_run(demo_lab):
    run = demo_lab.generate(PROMPT, max_new_tokens=6, changes={2: {"bits": 4}, 4: {"bits": 8}})
    assert [(t, s.bits) for t, s in run.history] == [(0, 16), (2, 4), (4, 8)]
    assert demo_lab.settings.bits == 8
    with pytest.raises(ValueError, match="raise it to"):
        demo_lab.generate(PROMPT, max_new_tokens=6, changes={3: {"budget": 10}})
    assert len(demo_lab.run.tokens) == 3
