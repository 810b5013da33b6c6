"""Rules of eviction from papers: against hand-computed cases and against their textbooks."""

from __future__ import annotations

import random
from collections import Counter, deque

import numpy as np
import pytest

from moelab.calibration.checks import check
from moelab.calibration.flashmoe import features, hit_ratios, labels, made_from, trained, uses
from moelab.replays.bounds import belady_hits
from moelab.replays.replay import replay
from moelab.scheduling.cache import Cache
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Knobs, Shape, View
from moelab.scheduling.trace import Trace
from moelab.strategies import make
from moelab.strategies.arc import ARC
from moelab.strategies.flashmoe import LearnedReuse, Net, flashmoe
from moelab.strategies.hermes import hermes
from moelab.strategies.least_stale import LeastStale, least_stale
from moelab.strategies.s3fifo import S3FIFO
from toy_engine import NBYTES, decided, places, resident

SHAPE = Shape((4, 4, 4), 2, NBYTES)
SLOT = NBYTES[16]


def step(layer: int, *experts: int, prefill: bool = False) -> LayerInput:
    return LayerInput(layer, (experts,), (tuple(1 / (2 + e) for e in experts),), prefill)


def view(shape: Shape = SHAPE) -> View:
    return View(shape, Knobs(shape.n * SLOT), Cache(shape, shape.n * SLOT))


def did(plan) -> list[tuple[str, int]]:
    return [(d.kind, d.expert) for d in decided(plan)]


# -- one layer, one expert a token: a plain cache -----------------------------------------------


def a_stream(seed: int, requests: int = 1500, names: int = 18) -> list[int]:
    """Favourites that change, and now and then a scan over all names."""
    rng, keys = random.Random(seed), []
    while len(keys) < requests:
        favour = [rng.random() ** 4 for _ in range(names)]
        keys += rng.choices(range(names), favour, k=rng.randrange(20, 200))
        keys += range(names) if rng.random() < 0.3 else ()
    return keys


def hits(name: str, keys: list[int], room: int, names: int = 18) -> list[bool]:
    """Whether each request is a hit, of the strategy in the scheduler."""
    s = Scheduler(Shape((names,), 1, NBYTES), make(name), Knobs(room * SLOT))
    return [did(s.step(step(0, key)))[0][0] == "hit" for key in keys]


def arc_of_the_paper(keys: list[int], c: int) -> list[bool]:  # noqa: C901
    """Megiddo & Modha, fig. 4, case by case; lists with the least recently used first."""
    t1, t2, b1, b2, p, out = [], [], [], [], 0.0, []

    def replace(x: int) -> None:
        if t1 and (len(t1) > p or (x in b2 and len(t1) == p)):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in keys:
        out.append(x in t1 or x in t2)
        if out[-1]:  # case I
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
        elif x in b1:  # case II
            p = min(c, p + max(len(b2) / len(b1), 1))
            replace(x)
            b1.remove(x)
            t2.append(x)
        elif x in b2:  # case III
            p = max(0, p - max(len(b1) / len(b2), 1))
            replace(x)
            b2.remove(x)
            t2.append(x)
        else:  # case IV
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    replace(x)
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                replace(x)
            t1.append(x)
    return out


def s3fifo_of_the_paper(keys: list[int], c: int) -> list[bool]:  # noqa: C901
    """Yang et al., algorithm 1; heads on the left. One eviction for one insertion."""
    s, m, g, freq, out = deque(), deque(), deque(maxlen=int(0.9 * c)), Counter(), []

    def evict_s() -> bool:
        while s:
            t = s.pop()
            if freq[t] > 1:
                m.appendleft(t)
                freq[t] = 0
            else:
                g.appendleft(t)
                return True
        return False

    def evict_m() -> bool:
        while True:
            t = m.pop()
            if freq[t] == 0:
                return True
            m.appendleft(t)
            freq[t] -= 1

    for x in keys:
        out.append(x in s or x in m)
        if out[-1]:
            freq[x] = min(freq[x] + 1, 3)
            continue
        if len(s) + len(m) == c:
            while not (evict_s() if len(s) >= 0.1 * c else evict_m()):
                pass
        freq[x] = 0
        if x in g:
            g.remove(x)
            m.appendleft(x)
        else:
            s.appendleft(x)
    return out


@pytest.mark.parametrize(
    ("name", "textbook"), [("arc", arc_of_the_paper), ("s3fifo", s3fifo_of_the_paper)]
)
@pytest.mark.parametrize("room", [1, 2, 3, 6, 10, 12, 17])
def test_every_request_hits_or_misses_as_in_the_textbook(name, textbook, room):
    for seed in range(4):
        keys = a_stream(seed)
        assert hits(name, keys, room) == textbook(keys, room)


def test_more_names_than_ghosts_hit_or_miss_as_in_the_textbook_too():
    keys = a_stream(9, requests=4000, names=120)
    assert hits("arc", keys, 30, 120) == arc_of_the_paper(keys, 30)
    assert hits("s3fifo", keys, 30, 120) == s3fifo_of_the_paper(keys, 30)
    assert hits("lru", keys, 30, 120) != arc_of_the_paper(keys, 30)


def told(part, keys: str, slots: int):
    """The part after these requests, of a model of one layer."""
    shape = Shape((10,), 1, NBYTES)
    at = View(shape, Knobs(slots * SLOT), Cache(shape, slots * SLOT))
    for key in keys:
        part.observe(step(0, int(key)), at)
    return part


def test_arc_learns_from_its_ghosts_whether_recency_or_frequency_pays():
    lists = lambda arc: ["".join(map(str, q)) for q in (arc.t1, arc.t2, arc.b1, arc.b2)]  # noqa: E731
    arc = told(ARC(), "0012", slots=3)
    assert (lists(arc), arc.p) == (["12", "0", "", ""], 0)
    told(arc, "3", slots=3)  # |T1| = 2 > p: who was used once leaves
    assert (lists(arc), arc.p) == (["23", "0", "1", ""], 0)
    told(arc, "1", slots=3)  # it was needed: T1 is to have 1
    assert (lists(arc), arc.p) == (["3", "01", "2", ""], 1)
    told(arc, "4", slots=3)  # |T1| = 1 = p: who was used again leaves
    assert (lists(arc), arc.p) == (["34", "1", "2", "0"], 1)
    told(arc, "0", slots=3)  # that was wrong: T1 is to have none
    assert (lists(arc), arc.p) == (["4", "10", "23", ""], 0)


def test_s3fifo_lets_go_what_was_used_once_and_keeps_what_its_ghosts_knew():
    queues = lambda s: ["".join(map(str, q)) for q in (s.small, s.main, s.ghost)]  # noqa: E731
    s = told(S3FIFO(), "0001234", slots=5)
    assert queues(s) == ["01234", "", ""]
    told(s, "5", slots=5)  # 0 was used twice more and goes on to M, 1 leaves
    assert queues(s) == ["2345", "0", "1"]
    told(s, "10", slots=5)  # the ghost is back, in M at once; 0 is used again
    assert queues(s) == ["345", "01", "2"]
    told(s, "678", slots=5)  # S gives while it has a tenth, here one
    assert queues(s) == ["678", "01", "2345"]


def test_whom_the_textbook_has_dropped_leaves_first_then_its_lower_queue():
    arc = told(ARC(), "00123", slots=3)  # T1 = 2 3, T2 = 0, B1 = 1
    at = view(Shape((10,), 1, NBYTES))
    order = sorted((1, 2, 3, 0), key=lambda key: arc.score(at)[key])
    assert order == [1, 2, 3, 0]
    assert arc.terms(at)["queue"][[1, 2, 3, 0]].tolist() == [0, 1, 1, 2]
    assert arc.terms(at)["moves since"][[3, 1]].tolist() == [0, 1]


@pytest.mark.parametrize("part", [ARC, S3FIFO])
def test_fewer_slots_are_taken_at_once(part):
    after = told(told(part(), "0011223344556677", slots=9), "8", slots=3)
    queues = (after.t1, after.t2) if part is ARC else (after.small, after.main)
    assert sum(map(len, queues)) == 3


# -- Least-Stale --------------------------------------------------------------------------------


def test_what_this_pass_has_not_used_leaves_first_and_the_farthest_turn_before_others():
    s = Scheduler(SHAPE, least_stale(), Knobs(9 * SLOT))
    for layer in range(3):
        s.step(step(layer, 0, 1))
    s.end_of_token()
    s.step(step(0, 0, 2))
    s.step(step(1, 2, 3))  # nine are there: 0 0 0, 1 1 1 1, 2 2; this pass used two and two
    terms, score = s.strategy.evict.terms(s.view), s.strategy.evict.score(s.view)
    place = SHAPE.key
    assert terms["layers to its turn"].tolist() == [2] * 4 + [3] * 4 + [1] * 4
    assert np.flatnonzero(terms["used in this pass"]).tolist() == [0, 2, place(1, 2), place(1, 3)]
    stale = [(1, 0), (0, 1), (2, 0)]  # layer 1 has its turn last, layer 2 next
    used = [(1, 2), (0, 0)]
    order = sorted(used + stale, key=lambda at: score[place(*at)])
    assert order == stale + used
    assert did(s.step(step(2, 2, 3)))[:2] == [("evict", 0), ("load", 2)]
    assert (1, 0) in resident(s)  # layer 2 is at work now: its own stale ones go first
    assert (2, 0) not in resident(s)


def test_a_cycle_of_layers_larger_than_the_cache_is_hit_where_lru_never_hits():
    steps = [step(layer, 0, 1) for _ in range(20) for layer in range(3)]
    found = {
        name: replay(Trace(SHAPE, steps), make(name), Knobs(4 * SLOT)).counts["hit"]
        for name in ("lru", "least_stale")
    }
    assert found["lru"] == 0
    assert found["least_stale"] == 19 * 2  # the first layer's stay: theirs is the next turn
    assert LeastStale().terms(view())["used in this pass"].sum() == 0


# -- Hermes -------------------------------------------------------------------------------------


def test_the_next_layer_is_loaded_whole_and_a_layer_leaves_after_use():
    s = Scheduler(SHAPE, hermes(), Knobs(8 * SLOT))
    plan = s.step(step(0, 0, 3))
    assert places(decided(plan, "load")) == [(0, 0), (0, 3)]
    assert places(decided(plan, "prefetch")) == [(1, e) for e in range(4)]
    assert places(decided(plan, "evict")) == [(0, 0), (0, 3)]
    plan = s.step(step(1, 1, 2))
    assert not decided(plan, "load")
    assert places(decided(plan, "prefetch")) == [(2, e) for e in range(4)]
    plan = s.step(step(2, 1, 2))
    assert places(decided(plan, "prefetch")) == [(0, e) for e in range(4)]  # the next token's
    assert sorted(resident(s)) == [(0, e) for e in range(4)]


def test_two_layers_ahead_in_flight_and_every_byte_of_the_model_a_token():
    steps = [step(layer, 0, 1, prefill=not token) for token in range(5) for layer in range(3)]
    found = replay(Trace(SHAPE, steps), hermes(depth=2), Knobs(12 * SLOT))
    assert found.counts == {"hit": 24, "prefetch": 48, "evict": 48}
    assert found.bytes == 4 * 12 * SLOT
    needed = replay(Trace(SHAPE, steps), make("on_demand"), Knobs(12 * SLOT))
    assert needed.bytes == 4 * 6 * SLOT


def test_where_a_layer_does_not_fit_beside_the_one_at_work_goes_what_there_is_room_for():
    s = Scheduler(SHAPE, hermes(depth=2), Knobs(5 * SLOT))
    plan = s.step(step(0, 0, 3))
    assert places(decided(plan, "prefetch")) == [(1, 0), (1, 1), (1, 2)]
    plan = s.step(step(1, 2, 3))
    assert did(plan)[0] == ("hit", 2)
    assert places(decided(plan, "load")) == [(1, 3)]
    assert places(decided(plan, "evict"))[:2] == [(1, 0), (1, 1)]  # this layer's own have no use
    assert places(decided(plan, "prefetch")) == [(2, 0), (2, 1), (2, 2)]
    with pytest.raises(ValueError, match="depth=9: from 0 to 8"):
        hermes(depth=9)


# -- FlashMoE -----------------------------------------------------------------------------------

ABAC = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]], bool)  # four tokens, three experts


def test_recency_is_one_over_the_tokens_since_and_frequency_of_the_most_used():
    recency, frequency = np.hsplit(features(ABAC), 2)
    assert recency.tolist() == [
        [1, 0, 0],
        [1 / 2, 1, 0],
        [1, 1 / 2, 0],
        [1 / 2, 1 / 3, 1],
    ]
    assert frequency.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1 / 2, 0], [1, 1 / 2, 1 / 2]]


def test_labels_are_tokens_to_the_next_use_clipped_to_three_quarters_of_the_experts():
    tokens = [[2, 1, 2.25], [1, 2.25, 2], [2.25, 2.25, 1], [2.25, 2.25, 2.25]]
    assert labels(ABAC) == pytest.approx(np.array(tokens) / 2.25)


def nets_of(shape: Shape, hidden: int = 5) -> list:
    rng, h = np.random.default_rng(0), hidden
    return [
        [[rng.standard_normal((o, i)).tolist(), rng.standard_normal(o).tolist()]
         for i, o in ((2 * n, h), (h, h), (h, n))]
        for n in shape.experts
    ]  # fmt: skip


def test_a_net_is_three_layers_with_silu_between_and_an_absolute_value():
    one = Net(
        [
            ([[2.0, 1.0]], [0.5]),
            ([[1.0]], [0.0]),
            (
                [
                    [-1.0],
                ],
                [0.0],
            ),
        ]
    )
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    assert one(np.array([1.0, 0.5])) == pytest.approx(silu(silu(3.0)), rel=1e-6)
    huge = Net([([[-1e4, 1e4]], [0.0]), ([[1e4]], [0.0]), ([[1e4]], [0.0])])
    assert np.isfinite(huge(np.array([1.0, 0.0]))).all()


def test_a_layers_net_sees_in_a_run_what_it_saw_in_training():
    rng, steps = np.random.default_rng(0), []
    for token in range(12):
        for layer in range(3):
            rows = 3 if not token else 1
            chosen = tuple(tuple(map(int, rng.choice(4, 2, False))) for _ in range(rows))
            steps.append(LayerInput(layer, chosen, ((0.6, 0.4),) * rows, not token))
    nets = nets_of(SHAPE)
    part, at = LearnedReuse([Net(net) for net in nets]), view()
    for given in steps:
        part.observe(given, at)
    (text,) = uses(Trace(SHAPE, steps))
    for layer, used in enumerate(text):
        assert used.shape == (14, 4)
        seen = features(used)[-1]
        keys = SHAPE.keys(layer)
        terms = part.terms(at)
        assert terms["recency"][keys] == pytest.approx(seen[:4])
        assert terms["frequency"][keys] == pytest.approx(seen[4:])
        assert part.score(at)[keys] == pytest.approx(-Net(nets[layer])(seen))
    part.new_sequence()
    assert not part.score(at).any()


def test_a_trained_net_knows_who_comes_again_and_the_seed_decides_it_all():
    used = np.zeros((120, 4), bool)
    used[np.arange(120), [0, 1, 0, 2] * 30] = True  # 0 every second token, 3 never
    how = {"hidden": 8, "epochs": 150, "seed": 1}
    net = trained(features(used), labels(used), **how)
    assert net == trained(features(used), labels(used), **how)
    assert net != trained(features(used), labels(used), **how | {"seed": 2})
    said = Net(net)(features(used)[99])  # 2 was just used: next come 0, 1, 0 and 2
    assert said[0] < said[1] < min(said[2], said[3])


def test_the_longest_predicted_time_leaves_within_its_layers_share():
    shape = Shape((4, 4), 2, NBYTES)
    last = [[np.zeros((1, 8)).tolist(), [0.0]], [[[0.0]], [0.0]]]
    says = lambda *times: [*last, [[[0.0]] * 4, list(times)]]  # noqa: E731
    strategy = flashmoe({"nets": [says(0.1, 0.9, 0.2, 0.3), says(0.9, 0.1, 0.2, 0.3)]})
    s = Scheduler(shape, strategy, Knobs(6 * SLOT))  # three a layer
    for layer in (0, 1):
        s.step(step(layer, 0, 1))
        s.step(step(layer, 2, 0))
    assert did(s.step(step(0, 3, 2)))[:3] == [("hit", 2), ("evict", 1), ("load", 3)]
    assert did(s.step(step(1, 3, 2)))[:3] == [("hit", 2), ("evict", 0), ("load", 3)]
    assert s.why(0)[3]["time to next use"] == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"nets for 2 layers of \[4\] experts, the model has 3 of"):
        Scheduler(SHAPE, strategy, Knobs(12 * SLOT)).step(step(0, 0, 1))


def test_without_nets_it_is_lfu_within_each_layer():
    rng, steps = random.Random(0), []
    favour = [rng.random() for _ in range(4)]
    for token in range(80):
        chosen = sorted(range(4), key=lambda e: -favour[e] - rng.random())[:1]
        steps += [step(layer, *chosen, prefill=not token) for layer in range(3)]
    trace, knobs = Trace(SHAPE, steps), Knobs(6 * SLOT)
    lfu = make("layer_lru").replace(evict=make("lfu").evict)
    assert replay(trace, make("flashmoe"), knobs).rows == replay(trace, lfu, knobs).rows


def test_a_damaged_net_is_refused_before_it_is_used():
    nets = nets_of(SHAPE)
    check("flashmoe", {"nets": nets}, SHAPE)
    for wrong in (nets[:2], [*nets[:2], nets[2][:2]], [*nets[:2], [*nets[2][:2], nets[2][0]]]):
        with pytest.raises(ValueError, match="nets"):
            check("flashmoe", {"nets": wrong}, SHAPE)
    nets[1][2][1][0] = 1e9
    with pytest.raises(ValueError, match=r"nets\[1\]\[2\]\[1\]\[0\] must be smaller"):
        check("flashmoe", {"nets": nets}, SHAPE)


def test_options_out_of_range_are_refused():
    assert made_from(None, hidden=128)["hidden"] == 128
    for wrong in ({"hidden": 0}, {"epochs": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*a whole number from 1"):
            made_from(None, **wrong)


def test_the_demos_nets_beat_lru_and_no_more_than_tie_lfu_on_text_they_have_not_seen(demo_lab):
    profile = demo_lab.calibrate("flashmoe")
    for row in profile.data["held_out"].values():
        assert row["lru"] < row["flashmoe"] < row["belady"]
        assert abs(row["flashmoe"] - row["lfu"]) < 0.02


def test_what_is_told_of_held_out_text_is_what_replay_and_belady_say():
    rng = np.random.default_rng(3)
    steps = [
        LayerInput(layer, (tuple(map(int, rng.choice(4, 2, False, (0.5, 0.3, 0.1, 0.1)))),),
                   ((0.6, 0.4),), not token)
        for token in range(50)
        for layer in range(3)
    ]  # fmt: skip
    trace, data = Trace(SHAPE, steps), {"nets": nets_of(SHAPE)}
    found = hit_ratios(trace, data)
    assert set(found) == {"2", "3"}  # one of four has no room for two
    for room, row in found.items():
        knobs = Knobs(int(room) * 3 * SLOT)
        assert row["lru"] == replay(trace, make("layer_lru"), knobs).hit_ratio
        assert row["flashmoe"] == replay(trace, flashmoe(data), knobs).hit_ratio
        hit, asked = belady_hits(trace, int(room), per_layer=True)
        assert row["belady"] == hit / asked
