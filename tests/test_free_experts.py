"""Experts without weights (LongCat-Flash, MoE++) are hits of 0 bytes: recorded, counted, named."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import transformers

import moelab
import tiny_models
from moelab import strategies
from moelab.replays.bounds import belady_hits
from moelab.replays.clock import Clock, Computing
from moelab.replays.replay import replay
from moelab.runs.shadows import Shadows
from moelab.runs.tokens import table
from moelab.scheduling import events as e
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import MIXED, Knobs, Shape
from moelab.scheduling.trace import Trace
from moelab.spelling import named
from moelab.store.architecture import Architecture
from reference import logits_of

E, FREE, K = 6, 3, 3
PROMPT = "A prompt of several tokens, one byte each."
LORA = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
SIZES = {"hidden_size": 128, "ffn_hidden_size": 160, "expert_ffn_hidden_size": 64, "head_dim": 8}
CONFIG = {n: v for n, v in tiny_models._COMMON.items() if n != "num_hidden_layers"} | LORA | SIZES
CONFIG |= {
    "num_layers": 3,
    "num_key_value_heads": 4,
    "v_head_dim": 16,
    "routed_scaling_factor": 1.0,
}
CONFIG |= {"n_routed_experts": E, "zero_expert_num": FREE, "moe_topk": K}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("longcat")
    model = transformers.LongcatFlashForCausalLM(transformers.LongcatFlashConfig(**CONFIG))
    return tiny_models.write(model, place)


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    def as_on_the_hub(tensors):  # transformers writes rows for all nine, the hub has six
        own = {n: int(m[1]) for n in tensors if (m := re.search(r"experts\.(\d+)\.", n))}
        assert max(own.values()) == E + FREE - 1
        for name, expert in own.items():
            if expert >= E:
                del tensors[name]

    real = tiny_models.edit(folder, tmp_path_factory.mktemp("hub") / "real", as_on_the_hub)
    with moelab.open(real, tiers=(16, 4, 2), budget="50%", measure_kl=False, progress=False) as lab:
        yield lab


@pytest.fixture(scope="module")
def run(lab):
    return lab.generate(PROMPT, max_new_tokens=24, temperature=0, ignore_eos=True)


@pytest.mark.slow
def test_sixteen_bits_are_stock_transformers(lab, run, folder):
    ids = lab._encode(PROMPT)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([[*ids, *run.tokens[:-1]]])).logits[0][len(ids) - 1 :]
    assert (logits_of(lab, ids, run.tokens[:-1]) - expected).abs().max() <= 1e-4


def test_they_are_hits_of_0_bytes_never_loaded_and_never_evicted(lab, run):
    rows = run.log.records()
    free = rows[rows["expert"] >= E]
    assert len(free) > 24
    assert set(free["kind"]) == {e.HIT}
    assert not free["bytes"].any()
    assert not free["bits"].any()
    told = [
        (s.layer, one) for s in run.trace.steps for one in sorted({x for r in s.free for x in r})
    ]
    assert told == list(zip(free["layer"].tolist(), free["expert"].tolist(), strict=True))
    for step in run.trace.steps:
        both = zip(step.experts, step.free, step.free_weights, strict=True)
        assert all(len(own) + len(more) == K == len(own) + len(w) for own, more, w in both)
    assert lab.info()["free_experts"] == FREE
    assert not lab.cache_map()["bits"][:, E:].any()
    assert run.summary()["peak_resident_bytes"] <= lab.settings.budget_bytes


def test_the_hit_ratio_counts_them_and_says_how_many(run):
    s = run.summary()
    rows = run.log.records()
    decoded = rows[(rows["token"] > 0) & (rows["at"] >= 0)]
    hits, loads = ((decoded["kind"] == kind).sum() for kind in (e.HIT, e.LOAD))
    assert s["free_hits"] == (decoded["expert"] >= E).sum() > 0
    assert s["hit_ratio"] == pytest.approx(hits / (hits + loads))
    assert s["free_hits"] < hits
    assert f"({s['free_hits'] / (hits + loads):.0%} of 0 bytes)" in run.sentence()


def test_a_budget_counts_those_alone_that_take_memory(lab, run):
    offered, layers = lab.dashboard().options, lab.info()["layers"]
    assert (offered["experts"], offered["free_experts"]) == (E + FREE, FREE)
    assert offered["all_experts"] == layers * E
    assert offered["all_bytes"]["16"] == lab.info()["all_experts_bytes"]
    assert run.recording().document["model"]["free_experts"] == FREE
    assert f"{layers} layers x {E} experts, top {K}" in moelab.report(run)._head()[0]


def test_a_model_without_them_says_nothing(demo_lab):
    plain = demo_lab.generate("Once", max_new_tokens=4)
    assert "free_hits" not in plain.summary()
    assert "0 bytes" not in plain.sentence()
    assert "free_experts" not in demo_lab.info()
    assert plain.trace.document()["format"] == 5


def test_a_replay_decides_the_same_also_from_a_file(run, tmp_path):
    rows = run.log.records()
    live = rows[rows["kind"] != e.STALL][["kind", "layer", "expert", "bits"]].tolist()
    for trace in (run.trace, *(Trace.load(run.trace.save(tmp_path / f)) for f in FILES)):
        again = moelab.replay(trace, strategies=named())
        assert [row[:3] + row[4:5] for row in again.rows] == live
        assert again.free == run.summary()["free_hits"]
        assert again.hit_ratio == pytest.approx(run.summary()["hit_ratio"])
        assert f"{again.free} of the hits of 0 bytes" in repr(again)


FILES = ("trace.json", "trace.parquet")


def test_a_recording_shows_them_with_their_gate_weights(run, tmp_path):
    found = moelab.Recording.load(run.save(tmp_path / "run"))
    table = found.blame(5)
    assert len(table) == 3 * K
    assert table["weight"].notna().all()
    free = table[table["expert"] >= E]
    assert len(free)
    assert set(free["outcome"]) == {"hit"}
    assert found.cache_map()["bits"].shape == (3, E + FREE)


@pytest.mark.parametrize("name", [n for n in named() if n not in strategies.NEEDS_CALIBRATION])
def test_every_strategy_decides_around_them(run, lab, name):
    found = moelab.replay(run, name, budget="50%")
    assert found.free == run.summary()["free_hits"]
    loaded = [row for row in found.rows if row[0] != e.HIT]
    assert all(row[2] < E for row in loaded)
    assert np.isfinite(found.hit_ratio)


@pytest.mark.slow
def test_a_masked_router_may_still_choose_them(lab):
    lab.update(strategy="max_rank", budget=lab.info()["minimum_budget_bytes"])
    steered = lab.generate(PROMPT, max_new_tokens=8, temperature=0, ignore_eos=True)
    assert steered.error is None
    assert steered.summary()["free_hits"] > 0


def test_own_sizes_have_places_where_free_experts_are():
    shape = Shape((2, 1), 1, {16: 8, MIXED: 4}, free=2, own={MIXED: (3, 4, 2)})
    assert shape.own_cells() == {MIXED: [3, 4, 0, 0, 2, 0, 0, 0]}


@pytest.mark.slow
def test_beside_the_mixed_tier_frames_and_recordings_have_them(lab, tmp_path):
    texts = ["The ship sailed out of the harbour and nobody saw it again."]
    lab.calibrate("mixed", texts=texts, max_tokens=8, progress=False)
    with moelab.open(
        lab._store.path, bits="mixed", budget="50%", measure_kl=False, progress=False
    ) as mixed:
        own = mixed.generate(PROMPT, max_new_tokens=4, ignore_eos=True)
        assert own.error is None
        assert moelab.Recording.load(own.save(tmp_path / "run")).cache_map()["bits"].any()
        board = mixed.dashboard()
        assert board._repr_mimebundle_()
        board.close()  # its thread is counted elsewhere


def test_the_best_evictions_hit_ratio_counts_them_as_the_others_do(run, lab):
    found = moelab.replay(run)
    room = lab._shape.all_bytes(16) // 2 // lab._shape.nbytes[16]
    best, asked = belady_hits(run.trace, room)
    assert asked == found.tally[e.HIT] + found.tally[e.LOAD]
    assert best >= found.tally[e.HIT]
    assert belady_hits(run.trace, room // 3, per_layer=True)[1] == asked
    judged = moelab.policy_or_memory(run)
    assert (judged.now, judged.best) == (found.hit_ratio, best / asked)
    assert judged.lru[0] == found.free / asked > 0
    assert judged.lru[judged.cliff] > judged.lru[judged.cliff - 1] == judged.lru[0]
    assert "LRU hits nothing but experts of 0 bytes below" in judged.sentence()
    shadows = Shadows(run, lab._strategies)
    while shadows.advance(1):
        pass
    told = {one["name"]: one["hit_ratio"] for one in shadows.told(table(run.token_reports))}
    assert told["belady"] == best / asked >= told["lru"]


def test_what_a_draft_rolls_back_takes_its_free_choices_with_it(lab, tmp_path):
    how = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    lab.update(strategy="lru", budget="50%")
    drafted = lab.generate(PROMPT, **how, draft_bits=2, draft_length=7)
    trace = drafted.trace
    assert trace.kept
    for given in trace.learnt():
        rows = zip(given.experts, given.free, given.free_weights, strict=True)
        assert all(len(own) + len(more) == K == len(own) + len(w) for own, more, w in rows)
    again = Trace.load(trace.save(tmp_path / "trace.json"))
    rows = drafted.log.records()
    live = rows[rows["kind"] != e.STALL][["kind", "layer", "expert", "bits"]].tolist()
    for told in (trace, again):
        found = moelab.replay(told, strategies=named())
        assert [row[:3] + row[4:5] for row in found.rows] == live


def test_the_clock_computes_those_with_weights_only():
    shape = Shape((4,), 3, {16: 1000}, free=2)
    experts, weights = ((0, 1), (0,), (2,)), ((0.5, 0.5), (0.5,), (0.5,))
    free, own = ((4,), (4, 5), (5, 4)), ((0.1,), (0.1, 0.1), (0.1, 0.1))
    step = LayerInput(0, experts, weights, free=free, free_weights=own)
    clock = Clock(shape, Computing(0.0, 0.0, {16: 1.0}), {0: Bus()})
    replay(Trace(shape, [step]), strategies.make("lru"), Knobs(4000), clock=clock)
    assert [spent.compute_ms for spent in clock.tokens] == [pytest.approx(4.0)]


class Bus:
    queue = 1

    def due(self, _nbytes, now):
        return now


def test_modelled_routing_says_that_it_does_not_ask_for_them():
    assert Architecture(CONFIG | {"model_type": "longcat_flash"}).lacking.startswith(
        f"no request goes to the {FREE} experts of a layer that have no weights"
    )
    assert not Architecture("olmoe-1b-7b").lacking
