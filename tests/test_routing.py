"""Modelled routing: the curves of the real traces that it was fitted to, as they were published."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import moelab
from moelab.replays.bounds import belady_hits, reuse_distances
from moelab.replays.routing import PROFILES, Profile

REAL = {
    "qwen3-30b-a3b, one prompt, top 6": (
        *(28, 128, (0.580, 0.826, 0.963), (0.806, 0.934, 0.971), 0.380, 0.864),
    ),
    "gemma-4-26b-a4b, one prompt, top 6": (
        *(29, 128, (0.588, 0.792, 0.957), (0.789, 0.916, 0.964), 0.357, 0.853),
    ),
    "gpt-oss-120b, one prompt, top 2": (
        *(85, 64, (0.632, 0.768, 0.891), (0.845, 0.891, 0.891), 0.179, 0.957),
    ),
}
"""Of BigMoeOnEdge's traces (Apache-2.0): tokens of the prompt and decoded; hit ratios of LRU and of
Belady with 12.5, 25 and 50 % of the experts; experts used by the next token too; requests to a
layer's most used quarter."""


@pytest.mark.parametrize("name", REAL)
def test_it_behaves_like_the_trace_it_was_fitted_to(name):
    prompt, tokens, lru, belady, again, skew = REAL[name]
    found = {"lru": [], "belady": [], "again": [], "skew": []}
    for seed in range(3):
        trace = moelab.routing(name, tokens=tokens, prompt=prompt, seed=seed)
        rooms = [trace.shape.n // part for part in (8, 4, 2)]
        distances = reuse_distances(trace)
        found["lru"].append([(distances <= room).mean() for room in rooms])
        found["belady"].append([np.divide(*belady_hits(trace, room)) for room in rooms])
        rows = np.array([s.experts[0] for s in trace.steps if not s.prefill])
        rows = rows.reshape(tokens, trace.shape.layers, -1)
        shared = [len(set(a) & set(b)) for x, y in pairwise(rows)
                  for a, b in zip(x, y, strict=True)]  # fmt: skip
        found["again"].append(np.mean(shared) / trace.shape.top_k)
        counts = np.stack([np.bincount(r.ravel(), minlength=128) for r in rows.swapaxes(0, 1)])
        most = np.sort(counts, 1)[:, -32:].sum() / counts.sum()
        found["skew"].append(most)
    mean = {what: np.mean(values, 0) for what, values in found.items()}
    assert mean["lru"] == pytest.approx(lru, abs=0.05)
    assert mean["belady"] == pytest.approx(belady, abs=0.03)
    assert mean["again"] == pytest.approx(again, abs=0.06)
    assert mean["skew"] == pytest.approx(skew, abs=0.06)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_makes_a_trace_that_says_what_it_is(name, tmp_path):
    trace = moelab.routing(name, tokens=4, prompt=3, seed=1)
    assert trace.lacks[0] == f"a real run: modelled after {name}"
    again = moelab.routing(name, tokens=4, prompt=3, seed=1)
    assert trace == again != moelab.routing(name, tokens=4, prompt=3, seed=2)
    assert trace.tokens == 5
    assert moelab.Trace.load(trace.save(tmp_path / "a.parquet")) == trace
    known = "bytes of an expert" not in trace.lacks
    assert set(trace.shape.nbytes) == ({16, 8, 4} if known else {16})
    found = moelab.replay(trace, "lfu", budget="25%")
    assert found.counts["load"] + found.counts["hit"] == 4 * trace.shape.layers * trace.shape.top_k
    if "gate weights" not in trace.lacks and known:
        assert moelab.replay(trace, "hobbit", budget="25%").counts["downgrade"] > 0


def test_paths_can_be_predicted_and_kinds_of_token_come_back():
    table = moelab.predictors(moelab.routing("qwen3-30b-a3b, one prompt, top 6", tokens=128))
    assert table.recall["path (pairs)"] > table.recall["previous token"] > 0.25
    assert table.recall["path (pairs)"] == pytest.approx(0.53, abs=0.06), "published with the fit"


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="no routing is known of 'llama'; there are qwen3"):
        moelab.routing("llama")
    with pytest.raises(ValueError, match="tokens=0"):
        moelab.routing("olmoe-1b-7b", tokens=0)
    small = Profile(2, 8, 2, *(0.5, 0.9, 0.1, 0.5, 30, 0.8, 0.9, 0.5, 9, 0.3, 0.3), None)
    assert moelab.routing(small, tokens=3, prompt=0).lacks[0].endswith("a profile of your own")
