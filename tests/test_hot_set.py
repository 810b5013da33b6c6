"""The hot set: counted over runs, in memory before the next, and worth what a replay says."""

from __future__ import annotations

import json

import numpy as np
import pytest

import moelab
from moelab.replays.replay import replay
from moelab.runs.hot_set import FADES, HotSet
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Knobs, Shape
from moelab.scheduling.trace import Trace
from moelab.strategies import layer_lru, lru
from toy_engine import NBYTES

SHAPE = Shape((4, 4), 2, NBYTES)
SAY = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}


def trace(*tokens) -> Trace:
    """A prompt of one token and those that follow: the experts of both layers."""
    steps = [
        LayerInput(layer, (experts,), ((0.5, 0.5),), prefill=not at)
        for at, token in enumerate(tokens)
        for layer, experts in enumerate(token)
    ]
    return Trace(SHAPE, steps)


ONE = trace(((0, 1), (2, 3)), ((0, 2), (2, 3)), ((0, 1), (2, 1)))


@pytest.fixture
def hot(tmp_path):
    return HotSet(SHAPE, tmp_path / "hot.json")


def test_uses_are_counted_over_runs_and_fade(hot):
    hot.learn(ONE)
    assert hot.uses.tolist() == [3, 2, 1, 0, 0, 1, 3, 2]
    hot.learn(trace(((3, 1), (0, 1))))
    assert hot.uses.tolist() == pytest.approx(
        [3 * FADES, 2 * FADES + 1, FADES, 1, 1, FADES + 1, 3 * FADES, 2 * FADES]
    )


def test_the_most_used_that_fit_are_there_and_the_least_used_of_them_goes_first(hot):
    hot.learn(ONE)
    live = hot.warmed(lru(), Knobs(5 * 1600))
    order = [SHAPE.place(key) for key, _ in live.cache.items()]
    assert order == [(0, 2), (1, 3), (0, 1), (1, 2), (0, 0)]  # 1, 2, 2, 3, 3 uses


def test_shares_of_layers_hold_and_who_was_never_used_is_not_fetched(hot):
    hot.learn(trace(((0, 1), (2, 3)), ((0, 2), (2, 3))))
    live = hot.warmed(layer_lru(), Knobs(4 * 1600))
    assert live.cache.layer_bytes == [2 * 1600, 2 * 1600]
    everything = hot.warmed(lru(), Knobs(8 * 1600))
    assert len(everything.cache) == 5  # of eight
    assert len(HotSet(SHAPE, hot.path).warmed(lru(), Knobs(8 * 1600)).cache) == 0


def test_what_was_counted_comes_back(hot):
    hot.learn(ONE)
    assert HotSet(SHAPE, hot.save()).uses.tolist() == hot.uses.tolist()


@pytest.mark.parametrize(
    "data",
    [
        b"not json",
        b"[1]",
        b'{"format": 1, "experts": [4, 4]}',
        b'{"format": 9, "experts": [4, 4], "uses": [0,0,0,0,0,0,0,0]}',
        b'{"format": 1, "experts": [4, 5], "uses": [0,0,0,0,0,0,0,0]}',
        b'{"format": 1, "experts": [4, 4], "uses": [0,0,0,0,0,0,0]}',
        b'{"format": 1, "experts": [4, 4], "uses": [0,0,0,0,0,0,0,-1]}',
        b'{"format": 1, "experts": [4, 4], "uses": [0,0,0,0,0,0,0,NaN]}',
        b'{"format": 1, "experts": [4, 4], "uses": [0,0,0,0,0,0,0,"7"]}',
        b"[" * 100_000,
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_begun_anew(tmp_path, data):
    path = tmp_path / "hot.json"
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"the hot set .*hot\.json is begun anew"):
        found = HotSet(SHAPE, path)
    assert not found.uses.any()
    found.learn(ONE)
    found.save()
    assert HotSet(SHAPE, path).uses.any()


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    hot = HotSet(SHAPE, tmp_path / "file" / "hot.json")
    hot._heard(ONE)
    assert hot.uses.any()
    with pytest.raises(OSError, match="file"):
        hot.save()


def test_what_it_helps_is_what_replays_of_the_next_run_say(hot):
    hot.learn(ONE)
    coming = trace(((3, 2), (0, 1)), ((0, 1), (2, 3)), ((0, 1), (2, 3)), ((3, 2), (0, 1)))
    found = hot.helps(coming, lru(), Knobs(8 * 1600), tokens=2)
    # cold: the prompt loads 4, the first token 4 more, the second hits all; warm: two were missing
    assert (found.tokens, found.cold, found.warm) == (2, 0.5, 1.0)
    assert (found.cold_loads, found.warm_loads, found.fetched) == (8, 2, 6)
    assert "50.0% without the hot set, 100.0% with it" in str(found)


# -- on the bundled model --------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch, demo_store):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hot_sets"


def opened(store, **how):
    return moelab.open(store, budget="30%", measure_kl=False, progress=False, **how)


def test_the_next_lab_begins_with_what_the_last_ones_runs_used_most(demo_store, cache):
    with opened(demo_store) as lab:
        lab.generate("The king", **SAY)
    assert not cache.exists()  # off unless asked for
    with opened(demo_store, hot_set=True) as lab:
        steps = lab.generate("The king", **SAY).trace.steps
    (file,) = cache.iterdir()
    uses = np.array(json.loads(file.read_text())["uses"])
    assert uses.sum() == sum(len(row) for step in steps for row in step.experts)
    with opened(demo_store, hot_set=True) as lab:
        run = lab.generate("The king", **SAY)
        budget = lab.settings.budget_bytes
    there = [key for key, _ in run.trace.resident]
    size = run.trace.shape.nbytes[16]
    assert len(there) == min(budget // size, (uses > 0).sum())
    assert sorted(uses[there]) == sorted(uses)[-len(there) :]
    live = run.events[run.events.kind != "stall"]
    decided = [(d.kind, d.layer, d.expert) for d in replay(run.trace).decisions]
    assert decided == list(live[["kind", "layer", "expert"]].itertuples(index=False, name=None))
    assert json.loads(file.read_text())["uses"] != uses.tolist()  # and this run is counted
