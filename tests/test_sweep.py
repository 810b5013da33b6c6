"""Sweeps: every combination as replay decides it, wherever it is decided, and each once."""

from __future__ import annotations

import os
import signal

import pandas as pd
import pytest

import moelab
from moelab.replays.replay import replay
from moelab.runs import sweep as sweeps
from moelab.scheduling.steps import Change
from moelab.scheduling.stream import Knobs
from moelab.strategies import make
from test_policy_or_memory import stream

GRID = {"strategy": ["lru", "lfu", "hobbit"], "budget": ["40%", "60%", "1%"], "bits": [16, 4]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def trace():
    found = stream(3, tokens=60)
    found.changes = [Change(0, Knobs(budget_bytes=40_000), "lru", strategy=make("lru"))]
    return found


def swept(trace, grid=GRID, **how):
    return moelab.sweep(trace, grid, progress=False, **how)


def test_every_row_is_what_a_replay_decides(trace):
    table = swept(trace, workers=0)
    assert list(table[["strategy", "budget", "bits"]].itertuples(index=False, name=None)) == [
        (s, b, n) for s in GRID["strategy"] for b in GRID["budget"] for n in GRID["bits"]
    ]
    row = table[(table.strategy == "lfu") & (table.budget == "40%") & (table.bits == 16)].iloc[0]
    alone = replay(trace, make("lfu"), Knobs(budget_bytes=int(0.4 * 18 * 4000)))
    assert (row.hits, row.loads, row.hit_ratio) == (
        *(alone.counts[kind] for kind in ("hit", "load")),
        alone.hit_ratio,
    )
    assert row.bytes_per_token == alone.bytes / 60
    assert not row.approximate
    refused = table[table.budget == "1%"]
    assert refused.error.str.contains("below one layer").all()
    assert table[(table.budget != "1%") & (table.bits == 4)].approximate.all()
    for other in ({"strategy": ["hobbit"], "t1": [0.3]}, {"strategy": ["cache_prior"]}):
        assert swept(trace, {**other, "budget": ["40%"]}, workers=0).approximate.all(), other
    assert swept(trace, {"strategy": ["cache_prior", "lru"], "prefetch": [1]}).lacks.tolist() == [
        "look-ahead",
        "look-ahead",
    ]


def test_processes_decide_what_one_does_and_nothing_is_decided_twice(trace, monkeypatch):
    monkeypatch.setattr(sweeps, "BATCH", 2)
    several = swept(trace, workers=2)
    asked = []
    monkeypatch.setattr(sweeps, "_decide", lambda _trace, one: asked.append(one) or {"error": ""})
    assert swept(trace, workers=0).equals(several)
    assert not asked
    assert len(swept(trace, {**GRID, "bits": [16, 4, 4]}, workers=0)) == 27
    assert not asked
    swept(stream(4), workers=0)
    assert len(asked) == 18, "another stream"


def test_an_interrupted_sweep_goes_on_where_it_was(trace, monkeypatch, cache):
    monkeypatch.setattr(sweeps, "BATCH", 1)
    real, count = sweeps._decide, []

    def stopped(trace, one):
        if len(count) == 7:
            raise KeyboardInterrupt
        count.append(one)
        return real(trace, one)

    monkeypatch.setattr(sweeps, "_decide", stopped)
    with pytest.raises(KeyboardInterrupt):
        swept(trace, workers=0)
    (kept,) = (cache / "sweeps").iterdir()
    kept.write_bytes(kept.read_bytes() + b'["cut off')
    again = []
    monkeypatch.setattr(sweeps, "_decide", lambda trace, one: again.append(one) or real(trace, one))
    table = swept(trace, workers=0)
    assert len(again) == 18 - 7
    kept.unlink()
    pd.testing.assert_frame_equal(table, swept(trace, workers=0))


def test_what_is_not_in_the_grid_is_as_it_was_recorded(trace):
    alone = replay(trace)
    table = swept(trace, {"bits": [16]}, workers=0)
    assert table.hit_ratio[0] == alone.hit_ratio
    other = replay(trace, make("lfu"), Knobs(40_000))
    assert swept(trace, {"strategy": ["lfu"]}, workers=0).hit_ratio[0] == other.hit_ratio
    assert swept(trace, {"strategy": ["edgemoe", "lfu"]}, workers=0).lacks.tolist() == [
        "calibration", "",
    ]  # fmt: skip
    for wrong in ({"grid": {"bits": 16}}, {"grid": ["lru"]}, {"workers": -1}, {"client": "dask"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            swept(trace, **wrong)


def test_what_cannot_be_swept_is_refused(trace):
    with pytest.raises(ValueError, match="at least one value"):
        swept(trace, {"bits": []})
    with pytest.raises(ValueError, match="name strategies by words"):
        swept(trace, {"evict": [object()]}, workers=0)
    assert swept(trace, {"strategy": ["nobody"]}).error.str.contains("unknown strategy").all()


@pytest.mark.slow
def test_dask_decides_the_same_though_a_worker_is_killed(trace, monkeypatch, cache):
    distributed = pytest.importorskip("distributed")
    grid = {"strategy": ["lru", "lfu", "hobbit"], "budget": [f"{n}%" for n in range(40, 90, 2)]}
    serial = swept(trace, grid, workers=0)
    monkeypatch.setenv("MOELAB_CACHE", str(cache / "other"))
    monkeypatch.setattr(sweeps, "BATCH", 3)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        killed = []
        real = sweeps.Kept.add

        def kill_one(self, rows):
            if not killed:
                killed.append(next(iter(client.run(os.getpid).values())))
                os.kill(killed[0], signal.SIGKILL)
            real(self, rows)

        monkeypatch.setattr(sweeps.Kept, "add", kill_one)
        pd.testing.assert_frame_equal(swept(trace, grid, client=client), serial)
    assert killed
