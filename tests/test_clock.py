"""The virtual clock and what stands on it: predictions, plans, shadows; traces as Parquet."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest

import moelab
from moelab.replays.bounds import belady_hits
from moelab.replays.clock import Clock, Computing, Spent, _Line
from moelab.replays.replay import replay
from moelab.runs.fitting import typical
from moelab.runs.prediction import approximate, decided
from moelab.runs.shadows import SHADOWS, Shadows
from moelab.runs.tokens import table
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import Knobs, LookAhead, Shape
from moelab.scheduling.trace import Trace
from moelab.store.devices import Device, Throttle
from moelab.strategies import make
from test_policy_or_memory import SHAPE, stream

MACHINE = Computing(2.0, 5.0, dict.fromkeys((16, 8, 4, 3, 2), 1.0), deciding_ms=1.0)


class Even:
    """A device that takes ``ms`` for each load, ``queue`` of them at once."""

    def __init__(self, ms: float, queue: int = 1) -> None:
        self.ms, self.queue = ms, queue

    def due(self, _nbytes: int, now: float) -> float:
        return now + self.ms / 1e3


def decode(experts: list[tuple[int, ...]], ahead: dict[int, tuple[int, ...]] | None = None):
    """One decoded token of a model with a layer for each entry, one expert a layer."""
    weights = ((1.0,),)
    return [
        LayerInput(
            layer,
            (chosen,),
            weights,
            look_ahead=tuple(
                LookAhead(at, e, (1.0,)) for at, e in (ahead or {}).items() if at > layer
            ),
        )
        for layer, chosen in enumerate(experts)
    ]


def told(trace: Trace, strategy, bus, computing=MACHINE, rooms: int = 2) -> list[Spent]:
    clock = Clock(trace.shape, computing, {0: bus})
    replay(trace, strategy, Knobs(rooms * 1000), clock=clock)
    return clock.tokens


def test_a_token_by_hand():
    shape = Shape((4, 4), 1, {16: 1000})
    trace = Trace(shape, decode([(0,), (1,)]) + decode([(0,), (2,)]))
    # Each layer: 2 before the router has spoken, 1 deciding, the load, 1 expert; then 5.
    first, second = told(trace, make("lru"), Even(10.0))
    assert first == Spent(2 * (2 + 1) + 5, 2.0, pytest.approx(20.0))
    assert second == Spent(2 * (2 + 1) + 5, 2.0, pytest.approx(10.0))


def test_what_is_read_while_something_computes_is_not_waited_for():
    shape = Shape((4, 4), 1, {16: 1000})
    trace = Trace(shape, decode([(0,), (1,)], {1: (1,)}))
    ahead = make("mixtral_offloading")
    (spent,) = told(trace, ahead, Even(10.0, queue=2), rooms=4)
    # The guess is asked for with the first load; both are there after 10, the second for nothing.
    assert spent.stall_ms == pytest.approx(10.0)
    (one_by_one,) = told(trace, ahead, Even(10.0), rooms=4)
    # One at a time: from 3 to 13, then to 23; the second layer asks at 13 + 1 + 3.
    assert one_by_one.stall_ms == pytest.approx(10.0 + 6.0)


def test_a_wait_wakes_late_and_the_core_after_it_is_slow():
    shape = Shape((4,), 1, {16: 1000})
    trace = Trace(shape, decode([(0,)]))
    slow = Computing(2.0, 0.0, {16: 4.0}, call_ms=1.0, wake_ms=0.5, after_wait=2.0)
    # The reader wakes 0.5 after it is asked, whoever waits 0.5 after it is done.
    assert told(trace, make("lru"), Even(10.0), slow) == [
        Spent(2 + 2 * 5, 0.0, pytest.approx(11.0))
    ]


def test_a_reader_that_is_at_work_needs_not_wake():
    shape = Shape((4,), 2, {16: 1000})
    trace = Trace(shape, [LayerInput(0, ((0, 1),), ((0.5, 0.5),))])
    slow = Computing(2.0, 0.0, {16: 4.0}, wake_ms=0.5)
    (spent,) = told(trace, make("lru"), Even(10.0), slow)
    # Done at 10.5 and 20.5; the first is computed from 11.0 to 15.0.
    assert spent.stall_ms == pytest.approx(11.0 + (20.5 - 15.0 + 0.5))


@pytest.mark.parametrize("seed", range(8))
def test_the_line_is_the_loader(seed):
    """Against a simulation that looks every millisecond."""
    rng = random.Random(seed)
    queue, now = rng.choice((1, 2, 3)), 0
    asked = []
    for _ in range(30):
        now += rng.choice((1, 1, 1, 2, 9))
        asked.append((now, rng.randint(1, 6), rng.random() < 0.5))

    line, loads = _Line(Sized(queue)), []
    for when, takes, urgent in asked:
        loads.append(line.submit(takes, when, urgent=urgent))
    line.run(1e9)

    waiting, active, done = list(range(30)), {}, {}
    for tick in range(1000):
        active = {i: end for i, end in active.items() if end > tick}
        # A place that is free goes to those who wait for it, before one who comes just now.
        for ready in (
            [i for i in waiting if asked[i][0] < tick],
            [i for i in waiting if asked[i][0] == tick],
        ):
            for i in sorted(ready, key=lambda i: (not asked[i][2], i)):
                if len(active) < queue:
                    active[i] = done[i] = tick + asked[i][1]
                    waiting.remove(i)
    assert [load.done for load in loads] == [done[i] for i in range(30)]


class Sized(Even):
    """A load takes as long as it is large."""

    def __init__(self, queue: int) -> None:
        super().__init__(0.0, queue)

    def due(self, nbytes: int, now: float) -> float:
        return now + nbytes


def test_what_is_urgent_goes_first_and_a_late_guess_becomes_urgent():
    line = _Line(Even(10_000.0))
    first = line.submit(1, 0, urgent=True)
    guess, other = (line.submit(1, 1, urgent=False) for _ in range(2))
    last = line.submit(1, 2, urgent=True)
    assert line.wait(first, 2) == 10
    assert line.wait(other, 10) == 30  # behind the one on demand, before the other guess
    assert last.done == 20
    assert line.cancel(guess, 29)
    assert not line.cancel(last, 29)


@pytest.mark.parametrize("name", ["lru", "lfu", "layer_lru", "hobbit", "moe_infinity", "adapmoe"])
def test_decisions_do_not_hang_on_the_clock(name):
    for seed in range(4):
        trace = stream(seed)
        plain = replay(trace, make(name), Knobs(9 * 4000))
        for bus in (Even(0.0), Even(50.0, 2)):
            clock = Clock(SHAPE, MACHINE, {0: bus})
            assert replay(trace, make(name), Knobs(9 * 4000), clock=clock).rows == plain.rows
            assert len(clock.tokens) == 40


def test_what_goes_by_time_goes_by_the_clock(demo_lab):
    demo_lab.update(strategy="edgemoe", device="sd_card", budget="25%")
    run = demo_lab.generate("The sea", max_new_tokens=10, ignore_eos=True)
    quick = Clock(run.trace.shape, MACHINE, {0: Even(0.0, 8)})
    slow = Clock(run.trace.shape, MACHINE, {0: Even(80.0)})
    counts = [replay(run.trace, clock=clock).counts for clock in (quick, slow)]
    assert counts[0]["prefetch"] > 0 < counts[1]["prefetch"]
    withdrawn = [
        sum(row[5] == moelab.scheduling.events.UNREAD for row in replay(run.trace, clock=c).rows)
        for c in (
            Clock(run.trace.shape, MACHINE, {0: Even(0.0, 8)}),
            Clock(run.trace.shape, MACHINE, {0: Even(80.0)}),
        )
    ]
    assert withdrawn[0] == 0 < withdrawn[1]


def test_a_strategy_that_swaps_in_the_background_goes_by_the_clock_too(demo_lab):
    demo_lab.update(strategy="swapmoe", budget="30%")
    run = demo_lab.generate("The sea", max_new_tokens=12, ignore_eos=True)
    for device in ("sd_card", "disk"):
        assert len(moelab.predict(run, demo_lab, device=device).replay.tokens) == 11
    assert followed(run, demo_lab) == {}, "its stream is steered: nobody else's"
    assert "landed" in moelab.predict(run, demo_lab).approximate


def test_what_is_no_run_is_told_what_to_give(demo_lab):
    run = demo_lab.generate("The", max_new_tokens=4)
    recording = run.recording()
    for call in (
        moelab.replay, moelab.predictors, moelab.policy_or_memory,
        lambda of: moelab.predict(of, demo_lab), lambda of: moelab.sweep(of, {"bits": [4]}),
    ):  # fmt: skip
        for wrong in (demo_lab, None, recording):
            with pytest.raises(TypeError, match="give a run or a trace"):
                call(wrong)
    for wrong in ("demo", None):
        with pytest.raises(TypeError, match="give the lab"):
            moelab.predict(run, wrong)
    with pytest.raises(ValueError, match="lab has: moelab.predict"):
        moelab.replay(run, "edgemoe")
    for changes in ({"bits": "4"}, {"strategy": 3}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            demo_lab.update(**changes)


def test_nothing_changed_is_the_run_itself(demo_lab):
    demo_lab.update(strategy="hobbit", budget="25%")
    run = demo_lab.generate(
        "The sea", max_new_tokens=12, ignore_eos=True, changes={5: {"budget": "40%"}}
    )
    trace, history = run.trace, run.history
    assert len(trace.changes) == len(history) == 2
    assert decided(trace, history, history).rows == replay(trace).rows
    assert moelab.replay(run).rows == moelab.replay(trace).rows == replay(trace).rows
    found = moelab.predict(run, demo_lab)
    assert found.replay.rows == replay(trace).rows
    assert len(found.per_token) == 11


def test_a_replay_in_words(demo_lab):
    demo_lab.update(strategy="lru", budget="25%")
    run = demo_lab.generate("The sea", max_new_tokens=12, changes={5: {"budget": "40%"}})
    plain = moelab.replay(run)
    for other in (moelab.replay(run, "lfu"), moelab.replay(run.trace, strategy="lfu")):
        assert other.rows == moelab.replay(run, make("lfu")).rows != plain.rows
    assert moelab.replay(run, budget="100%").counts["load"] < plain.counts["load"]
    knobs = run.trace.changes[0].knobs
    assert (
        moelab.replay(run, "lfu", knobs).rows == moelab.replay(run.trace, make("lfu"), knobs).rows
    )
    for bad, said in (({"budget": "1%"}, "below"), ({"strategy": "no"}, "no"), ({"t1": 1}, "t1")):
        with pytest.raises(ValueError, match=said):
            moelab.replay(run, **bad)
    with pytest.raises(ValueError, match="knows no time"):
        moelab.replay(run, device="nvme")
    with pytest.raises(TypeError, match="a str"):
        moelab.replay("run", "lfu")


def test_what_computes_something_else_is_called_approximate(demo_lab):
    demo_lab.update(strategy="lru", budget="25%", bits=16)
    run = demo_lab.generate("The sea", max_new_tokens=12)
    said = {
        name: moelab.predict(run, demo_lab, **changes).approximate
        for name, changes in {
            "lfu": {"strategy": "lfu"}, "bits": {"bits": 4},
            "edgemoe": {"strategy": "edgemoe"},
            "ahead": {"prefetch": 2},
            "prior": {"strategy": "cache_prior"}, "hobbit": {"strategy": "hobbit", "budget": "15%"},
        }.items()
    }  # fmt: skip
    assert said["lfu"] == ""
    assert "other bits" in said["bits"]
    assert "steered" in said["prior"]
    assert "landed" in said["edgemoe"]
    assert "0 layers are recorded" in said["ahead"]
    assert said["hobbit"]
    ahead = demo_lab.update(prefetch=2) and demo_lab.generate("The sea", max_new_tokens=4)
    said = moelab.predict(ahead, demo_lab, strategy="hobbit").approximate
    assert "so far ahead in the prompt: 0 layers are recorded" in said  # HOBBIT asks there too
    demo_lab.update(prefetch=0)
    lfu = demo_lab.settings.change(demo_lab._shape, strategy="lfu")
    assert approximate(run.trace, lfu, moelab.replay(run, "lfu")) == ""


def test_what_bounds_a_prediction(demo_lab):
    demo_lab.update(strategy="lru", budget="25%", bits=16, device="disk")
    run = demo_lab.generate("The sea", max_new_tokens=16, ignore_eos=True)
    found = moelab.predict(run, demo_lab, device="sd_card")
    bounds, tokens = found.bounds(), found.replay.tokens
    assert bounds["io_ms"] == pytest.approx(1e3 * found.replay.bytes / 15 / 40e6)
    assert bounds["belady_io_ms"] <= bounds["io_ms"] <= bounds["hidden_ms"]
    assert sum(spent.total_ms for spent in tokens) / 15 >= bounds["io_ms"]
    assert found.replay.hit_ratio <= bounds["belady"] <= bounds["belady_bypass"] <= 1


def test_the_same_bus_as_the_loader():
    device, throttle = Device("x", 1e6, 5.0, 2), Throttle()
    dues = [throttle.due(device, 1000, 0.0) for _ in range(4)]
    assert dues == pytest.approx([0.006, 0.007, 0.012, 0.013])


@pytest.mark.alone
def test_a_prediction_holds_on_a_slow_device(demo_lab):
    """Emulated waits are most of such a token: what else the machine does hardly shows."""
    demo_lab.update(strategy="lru", budget="25%", bits=16, device="disk", measure_kl=False)
    run = demo_lab.generate("The sea", max_new_tokens=16, ignore_eos=True)
    found = moelab.predict(run, demo_lab, device="sd_card")
    assert "of the recorded run this model is" in repr(found)
    checked = found.check(repeats=1)
    assert checked["predicted_hits"] == pytest.approx(checked["measured_hits"], abs=1e-9)
    assert checked["shared"] == 1.0
    assert checked["error"] == pytest.approx(0, abs=0.3)
    assert typical(found.replay.tokens).stall_ms > 10
    with pytest.raises(ValueError, match="can be made"):
        moelab.predict(run.trace, demo_lab).check()


def test_a_machine_is_measured_once(demo_lab):
    first = demo_lab._session.machine()
    assert demo_lab._session.machine() is first
    assert set(first.computing.expert_ms) == set(demo_lab.info()["tiers"])
    assert first.computing.after_wait >= 1
    assert first.disk.bandwidth_bytes_s > 1e6
    assert demo_lab._engine.loader.profile.title == "this machine's disk"
    trace = demo_lab.generate("The", max_new_tokens=4).trace
    assert len(moelab.predict(trace, first, device="nvme").replay.tokens) == 3
    trace.changes.clear()
    with pytest.raises(ValueError, match="no settings"):
        moelab.predict(trace, first, strategy="lru")
    assert len(moelab.predict(trace, first, strategy="lru", budget="25%").replay.tokens) == 3


# -- shadows ----------------------------------------------------------------------------------


def followed(run, lab, *, each: float = 1.0) -> dict[str, tuple[float, int]]:
    shadows = Shadows(run, lab._strategies)
    while shadows.advance(each):
        pass
    values = table(run.token_reports)
    return {told["name"]: (told["hit_ratio"], told["tokens"]) for told in shadows.told(values)}


def test_shadows_have_what_a_replay_would_have(demo_lab):
    demo_lab.update(strategy="lru", budget="25%", bits=16)
    run = demo_lab.generate("The sea", max_new_tokens=20, ignore_eos=True)
    found = followed(run, demo_lab)
    assert list(found) == ["run", *SHADOWS, "belady"]
    assert {tokens for _, tokens in found.values()} == {19}
    assert found["lru"][0] == moelab.replay(run).hit_ratio == pytest.approx(found["run"][0])
    for name in ("lfu", "layer_lru", "hobbit"):
        with_profile = demo_lab._strategies(name, None, "")
        assert found[name][0] == moelab.replay(run, with_profile).hit_ratio, name
    room = run.trace.changes[0].knobs.budget_bytes // run.trace.shape.nbytes[16]
    hits, asked = belady_hits(run.trace, room)
    best = max(found[name][0] for name in ("lru", "lfu", "layer_lru"))
    assert found["belady"][0] == hits / asked >= best


def test_shadows_obey_changes_of_budget_and_belady_then_says_nothing(demo_lab):
    demo_lab.update(strategy="lru", budget="25%", bits=16)
    changes = {8: {"budget": "50%"}}
    run = demo_lab.generate("The sea", max_new_tokens=20, ignore_eos=True, changes=changes)
    found = followed(run, demo_lab)
    assert found["lru"][0] == moelab.replay(run).hit_ratio
    assert found["lfu"][0] == moelab.replay(run, make("lfu")).hit_ratio
    assert "belady" not in found
    less = {8: {"budget": "13%", "bits": 4}}
    run = demo_lab.generate("The sea", max_new_tokens=20, ignore_eos=True, changes=less)
    assert "lru" in followed(run, demo_lab)


def test_shadows_of_a_run_that_goes_on_are_of_one_token_and_say_which(demo_lab):
    demo_lab.update(strategy="lru", budget="25%", bits=16, device="hdd")
    run = demo_lab.start("The sea", max_new_tokens=200, ignore_eos=True)
    shadows = Shadows(run, demo_lab._strategies)
    while len(run.tokens) < 12:
        time.sleep(0.01)
    while not (told := shadows.told(table(run.token_reports))) or told[0]["tokens"] < 4:
        shadows.advance(0.001)
    run.stop()
    run.join()
    assert {one["tokens"] for one in told} == {told[0]["tokens"]}
    assert told[0]["name"] == "run"
    assert told[-1]["name"] == "belady", "he is asked again and again, not at the end alone"


def test_shadows_take_no_more_time_than_they_are_given(demo_lab, monkeypatch):
    run = demo_lab.generate("The sea", max_new_tokens=60, ignore_eos=True)
    shadows, given, pieces = Shadows(run, demo_lab._strategies), 0.0, []
    assert shadows.told(table(run.token_reports)) == []
    clock = SimpleNamespace(perf_counter=lambda: 0.002 * len(pieces))  # a piece takes 2 ms of it
    monkeypatch.setattr("moelab.runs.shadows.time", clock)
    monkeypatch.setattr(shadows, "_piece", lambda: pieces.append(None) or True)
    for _ in range(100):
        given += 0.0005
        shadows.advance(0.0005)
    assert 0.5 * given <= 0.002 * len(pieces) <= given + 0.004


# -- traces as Parquet ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lru", "hobbit", "edgemoe", "swapmoe", "cache_prior"])
def test_a_trace_comes_back_from_parquet_as_it_was(demo_lab, tmp_path, name):
    demo_lab.update(strategy=name, budget="30%", device="emmc")
    if name == "hobbit":
        demo_lab.update(pin={(1, 2): 16})
    trace = demo_lab.generate("The sea", max_new_tokens=6, changes={3: {"budget": "40%"}}).trace
    as_json = moelab.Trace.load(trace.save(tmp_path / "a.json"))
    path = trace.save(tmp_path / "a.parquet")
    again = moelab.Trace.load(path)
    for part in ("shape", "steps", "changes", "resident", "lacks"):
        assert getattr(again, part) == getattr(as_json, part), part
    header = json.loads(pq.read_schema(path).metadata[b"moelab"])
    assert header["prompts"] == [0]
    assert header["depth"] == max(
        (a.layer - s.layer for s in trace.steps for a in s.look_ahead), default=0
    )
    rows = pq.read_table(path).to_pandas()
    chosen = rows[rows.what == "chosen"]
    assert len(chosen) == sum(len(row) for s in trace.steps for row in s.experts)


def test_a_token_of_no_expert_comes_back_too(tmp_path):
    shape = Shape((4,), 2, {16: 1000})
    trace = Trace(shape, [
        LayerInput(0, ((0, 1), (), (2,)), ((0.5, 0.5), (), (1.0,)), prefill=True),
        LayerInput(0, ((),), ((),), look_ahead=(LookAhead(0, (), ()), LookAhead(0, (3,), (1.0,)))),
    ])  # fmt: skip
    assert moelab.Trace.load(trace.save(tmp_path / "a.parquet")).steps == trace.steps
    empty = Trace(shape)
    assert moelab.Trace.load(empty.save(tmp_path / "b.parquet")) == empty


def test_a_broken_parquet_is_refused_by_name(tmp_path, monkeypatch):
    trace = stream(1, tokens=3)
    data = trace.save(tmp_path / "a.parquet").read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        cut = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            cut[rng.randrange(len(cut))] = rng.randrange(256)
        file = tmp_path / "b.parquet"
        file.write_bytes(cut[: rng.randrange(8, len(cut) + 1)] if rng.random() < 0.3 else cut)
        with contextlib.suppress(ValueError):  # nothing else
            moelab.Trace.load(file)
    other = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(other)
    with pytest.raises(ValueError, match="not a moelab trace"):
        moelab.Trace.load(other)
    monkeypatch.setattr("moelab.replays.parquet.MOST_ROWS", 10)
    with pytest.raises(ValueError, match="10 at most"):
        moelab.Trace.load(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="needs pyarrow"):
        trace.save(tmp_path / "c.parquet")
