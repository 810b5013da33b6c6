"""Policy or memory: LRU at every budget as counted by brute force, and the verdict it leads to."""

from __future__ import annotations

import random

import numpy as np
import plotly.io
import pytest

import moelab
from moelab.replays.bounds import NEVER, belady_hits, requests, reuse_distances, working_set
from moelab.replays.replay import replay
from moelab.scheduling.steps import Change, LayerInput
from moelab.scheduling.stream import Knobs, Shape
from moelab.scheduling.trace import Trace
from moelab.strategies import Evict, make
from moelab.views.policy_or_memory import policy_or_memory

SHAPE = Shape((6, 6, 6), 2, {16: 4000, 4: 1000})


def stream(seed: int, tokens: int = 40, warm: int = 0) -> Trace:
    """A prompt of three tokens, then decoded ones, whose experts are popular to a degree."""
    rng, trace = random.Random(seed), Trace(SHAPE)
    popular = [[rng.random() ** 2 for _ in range(6)] for _ in range(3)]

    def chosen(layer: int) -> tuple[int, ...]:
        return tuple(sorted(range(6), key=lambda e: -rng.random() * popular[layer][e])[:2])

    for token in range(-1, tokens):
        for layer in range(3):
            rows = tuple(chosen(layer) for _ in range(3 if token < 0 else 1))
            weights = ((0.6, 0.4),) * len(rows)
            trace.steps.append(LayerInput(layer, rows, weights, prefill=token < 0))
    trace.resident = [(key, 16) for key in rng.sample(range(18), warm)]
    return trace


def lru(trace: Trace, room: int) -> int:
    """Hits of the decoded tokens, counted with a list."""
    resident, hits = [], 0
    for key, counted in requests(trace):
        hits += counted and key in resident
        resident = [k for k in resident if k != key][-(room - 1) :] if room > 1 else []
        resident.append(key)
    return hits


@pytest.mark.parametrize("seed", range(12))
def test_every_budget_at_once_is_every_budget_one_by_one(seed):
    trace = stream(seed, warm=seed % 5)
    found = policy_or_memory(trace, experts=7)
    hits = found.lru * len(reuse_distances(trace))
    assert [round(h) for h in hits] == [0, *(lru(trace, room) for room in range(1, 19))]
    for room, ratio in found.belady.items():
        assert found.lru[room] <= ratio <= found.all
    assert found.best == found.belady[7]
    assert found.lru[found.cliff] > 0 == found.lru[found.cliff - 1]
    assert found.lru[found.enough] >= 0.9 * found.best > found.lru[found.enough - 1]


@pytest.mark.parametrize("name", ["on_demand", "lru", "lfu", "layer_lru", "mixtral_offloading"])
def test_no_strategy_of_fixed_routing_and_one_size_beats_the_best_eviction(name):
    for seed in range(40):
        trace = stream(seed, warm=seed % 4)
        got = replay(trace, make(name), Knobs(budget_bytes=9 * 4000))
        assert set(got.counts) <= {"hit", "load", "evict"}
        assert got.counts["hit"] <= belady_hits(trace, 9)[0]


def test_libcachesim_counts_the_same():
    """An independent simulator: LRU and Belady, to the request."""
    oracle = pytest.importorskip("libcachesim")
    for seed in range(4):
        trace = stream(seed, tokens=120)
        asked = [(6 * layer + expert, counted) for (layer, expert), counted in requests(trace)]
        coming, last = [], {}
        for at, (key, _) in reversed(list(enumerate(asked))):
            coming.append(last.get(key, 1 << 62))
            last[key] = at

        def hits(cache):
            found = 0
            for (key, counted), at in zip(asked, reversed(coming), strict=True):  # noqa: B023
                request = oracle.Request(obj_id=key, obj_size=1)
                request.next_access_vtime = at
                found += bool(cache.get(request)) and counted
            return found

        for room in (3, 7, 12):
            assert hits(oracle.LRU(cache_size=room)) == lru(trace, room)
            assert hits(oracle.Belady(cache_size=room)) == belady_hits(trace, room)[0]


class SinceLoaded(Evict):
    """Uses since an expert was loaded, and when that was."""

    def __init__(self):
        self.uses, self.loaded, self.now = np.zeros(18), np.zeros(18), 0

    def observe(self, given, view):
        (key,) = given.experts[0]
        self.now += 1
        if not view.bits[key]:
            self.uses[key], self.loaded[key] = 0, self.now
        self.uses[key] += 1


class Fifo(SinceLoaded):
    def score(self, view):
        return self.loaded


class LfuInCache(SinceLoaded):
    def score(self, view):
        return 1e6 * self.uses + view.last_use


def test_libcachesim_counts_the_same_for_any_policy_of_one_expert_a_step():
    """With one layer and one expert a token a scheduler is a plain cache."""
    oracle = pytest.importorskip("libcachesim")
    shape, rng = Shape((18,), 1, {16: 1000}), random.Random(3)
    popular = [rng.random() ** 3 for _ in range(18)]
    keys = rng.choices(range(18), popular, k=1500)
    trace = Trace(shape, [LayerInput(0, ((key,),), ((1.0,),)) for key in keys])
    for room in (3, 6, 12):
        for policy, other in (
            (make("lru"), oracle.LRU),
            (make("lru").replace(evict=Fifo()), oracle.FIFO),
            (make("lru").replace(evict=LfuInCache()), oracle.LFU),
        ):
            cache = other(cache_size=room)
            asked = (oracle.Request(obj_id=key, obj_size=1) for key in keys)
            hits = sum(bool(cache.get(request)) for request in asked)
            assert replay(trace, policy, Knobs(room * 1000)).counts["hit"] == hits


def test_belady_bounds_every_strategy_of_one_size():
    for seed in range(200):
        bounded(seed)


def bounded(seed: int) -> None:
    trace, room = stream(seed, tokens=8, warm=seed % 7), 6 + seed % 9
    best, asked = belady_hits(trace, room)
    for name in ("on_demand", "lru", "lfu", "layer_lru"):
        assert replay(trace, make(name), Knobs(room * 4000)).counts["hit"] <= best
    bypass, _ = belady_hits(trace, room, bypass=True)
    per_layer = belady_hits(trace, room // 3, per_layer=True)
    assert best <= bypass <= asked == per_layer[1]
    assert per_layer[0] <= best
    if seed < 4:
        small = stream(seed, tokens=3)
        for capacity in (1, 2, 4):
            assert belady_hits(small, capacity, bypass=True)[0] == by_trying(small, capacity)


def by_trying(trace: Trace, capacity: int) -> int:
    """The most hits that any cache of so many experts can have, by every choice at every miss."""
    best: dict[frozenset, int] = {frozenset(): 0}
    for key, counted in requests(trace):
        following: dict[frozenset, int] = {}
        for there, hits in best.items():
            if key in there:
                ways = [there]
            else:
                ways = [there, *(there - {other} | {key} for other in there)]
                ways += [there | {key}] if len(there) < capacity else []
            for way in ways:
                now = hits + (counted and key in there)
                following[way] = max(following.get(way, -1), now)
        best = following
    return max(best.values())


def test_the_verdict_says_what_has_more_to_give(monkeypatch):
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")  # as in a notebook
    cycle = Trace(SHAPE)
    for token in range(30):  # three pairs of each layer in turn: 18 experts, each after 17 others
        for layer in range(3):
            pair = (2 * (token % 3), 2 * (token % 3) + 1)
            cycle.steps.append(LayerInput(layer, (pair,), ((0.5, 0.5),)))
    found = policy_or_memory(cycle, experts=12)
    assert (found.cliff, found.now, found.verdict) == (18, 0.0, "policy")
    assert found.best > 0.4
    assert "LRU hits nothing below 18 experts (72 kB)" in found.sentence()
    assert policy_or_memory(cycle, experts=2).verdict == "memory"
    assert policy_or_memory(cycle, experts=18).verdict == "neither"
    assert working_set(cycle).tolist() == [6, 12, *[18] * 28]
    assert set(reuse_distances(cycle)) == {NEVER, 18}
    drawn = found.figure()
    assert {t.name for t in drawn.data} == {"LRU", "best eviction (Belady)", "LRU, now"}
    shown = found._repr_mimebundle_()
    assert shown["text/plain"] == found.sentence() == drawn.layout.title.text.replace("<br>", " ")
    assert "application/vnd.plotly.v1+json" in shown


def test_what_is_recorded_is_what_is_judged():
    trace = stream(1)
    with pytest.raises(ValueError, match="records 0 settings; say how much memory"):
        policy_or_memory(trace)
    trace.changes = [Change(0, Knobs(budget_bytes=40_000, bits=4), "lfu", strategy=make("lfu"))]
    found = policy_or_memory(trace)
    assert (found.policy, found.experts, found.expert_bytes) == ("LFU", 40, 1000)
    assert found.now == replay(trace).hit_ratio
    with pytest.raises(ValueError, match="experts=0: room for at least one"):
        policy_or_memory(trace, experts=0)
    with pytest.raises(ValueError, match="nothing was decoded"):
        policy_or_memory(Trace(SHAPE))


def test_a_run_is_judged_by_what_it_did(demo_lab):
    run = demo_lab.generate("Once upon a time", max_new_tokens=12, temperature=0)
    found = moelab.policy_or_memory(run)
    assert found.experts == demo_lab.info()["budget_experts"]
    assert found.now == pytest.approx(run.summary()["hit_ratio"])
    assert np.diff(found.lru).min() >= 0
