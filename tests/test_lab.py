"""The public face: what lessons and benchmarks call, and what bad input is told."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

import moelab
from moelab.scheduling.events import KINDS
from moelab.scheduling.strategy import Shape
from moelab.settings import parse_budget
from moelab.store.blobs import BlobFile

PROMPT = "The following example shows how to"
SUMMARY = {
    "tokens_per_s", "ttft_ms", "tpot_ms_median", "tpot_ms_p99", "hit_ratio", "byte_hit_ratio",
    "bytes_per_token", "stall_share", "downgrades", "skips", "peak_resident_bytes",
}  # fmt: skip
EVENTS = [
    "token", "at", "layer", "expert", "kind", "bits_asked", "bits", "bytes", "start_ms", "dur_ms",
    "cause",
]  # fmt: skip
PER_TOKEN = {
    "token", "text", "compute_ms", "stall_ms", "bytes", "hits", "loads", "downgrades", "skips",
    "kl",
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(demo_store):
    with moelab.open("demo", budget="25%", measure_kl=False, progress=False) as lab:
        yield lab


def test_a_run_has_text_tokens_summary_events_and_a_trace(lab):
    run = lab.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
    assert len(run.tokens) == 12
    assert run.text == lab._tokenizer.decode(run.tokens, skip_special_tokens=True)
    assert "".join(r.text for r in run.token_reports) == run.text
    assert run.summary().keys() >= SUMMARY
    assert list(run.events.columns) == EVENTS
    assert set(run.per_token.columns) >= PER_TOKEN
    assert set(run.events.kind) <= set(KINDS)
    assert run.trace.tokens == 12
    assert run.summary()["peak_resident_bytes"] <= lab.settings.budget_bytes
    assert run.per_token.kl.isna().all()


def test_a_run_can_be_watched_stopped_and_joined(lab):
    run = lab.start(PROMPT, max_new_tokens=400, ignore_eos=True)
    assert run.running
    while len(run.tokens) < 3:
        time.sleep(0.01)
    assert run.text
    run.stop()
    run.join()
    assert 3 <= len(run.tokens) < 400
    assert run.stopped
    assert run.error is None
    assert not lab.generate(PROMPT, max_new_tokens=1).stopped


def test_the_same_seed_gives_the_same_text_and_another_seed_another(lab):
    texts = [
        lab.generate(PROMPT, max_new_tokens=16, temperature=1.0, seed=s).text for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_change_acts_on_the_next_token_and_is_marked(lab):
    run = lab.start(PROMPT, max_new_tokens=60, ignore_eos=True)
    while len(run.tokens) < 3:
        time.sleep(0.001)
    seen = len(run.tokens)
    lab.update(bits=4, budget="12%")
    run.join()
    (token, changed), *_ = run.changes
    assert seen <= token <= seen + 2
    assert changed["bits"] == "4"
    loads = run.events.query("kind == 'load'")
    assert set(loads.bits[loads.token > token]) <= {4}
    assert set(loads.bits[loads.token < token]) == {16}
    lab.update(bits=16, budget="25%")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"budget": "1KB"},
            r"below one layer's need.*raise it to \d+ bytes \(442 kB\) or more, or choose fewer",
        ),
        ({"budget": "lots"}, r"'8MB', '1.5GiB', '25%' or 'auto'"),
        ({"budget": -5}, "must be above 0"),
        ({"bits": 5}, r"bits=5 is not in this store; choose one of \[16, 8, 4, 3, 2\]"),
        ({"low_bits": 7}, "or None"),
        ({"strategy": "belady"}, "unknown strategy 'belady'; choose one of on_demand, lru"),
        ({"device": "floppy"}, "unknown device 'floppy'; choose one of disk"),
        ({"prefetch": 9}, "0 to 3"),
        ({"measure_kl": -1}, "True, False, or n for every n-th token"),
        ({"measure_kl": 0.5}, "True, False, or n for every n-th token"),
        ({"t1": 0.9, "t2": 0.1}, "need 0 <= t1 <= t2"),
        ({"bit": 4}, "unknown setting 'bit'; there are allocate, bits, budget"),
    ],
)
def test_a_refused_change_says_what_to_do_and_changes_nothing(lab, change, message):
    before = lab.settings
    with pytest.raises(ValueError, match=message):
        lab.update(**change)
    assert lab.settings is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "1 or more"),
        ({"temperature": -1}, "0 .greedy. or above"),
        ({"top_p": 1.5}, "0 .the likeliest token only. to 1 .off."),
        ({"top_k": -2}, "a whole number, 0 or -1 for off"),
        ({"changes": {"2": {"bits": 4}}}, "'2': ...}: a key is a token's number from 0"),
        ({"changes": {-1: {"bits": 4}}}, "a key is a token's number from 0"),
    ],
)
def test_a_refused_run_leaves_the_lab_free(lab, options, message):
    options = {"prompt": PROMPT} | options
    with pytest.raises(ValueError, match=message):
        lab.start(options.pop("prompt"), **options)
    assert lab.generate(PROMPT, max_new_tokens=2).tokens


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (lambda lab, **k: lab.generate("a", **k), {"bits": 4},
         r"lab.generate\(\) takes no 'bits', a setting: lab.update\(bits=4\)"),
        (lambda lab, **k: lab.start("a", **k), {"w_lru": 0.5},
         r"lab.start\(\) takes no 'w_lru', a setting: lab.update\(w_lru=0.5\)"),
        (lambda lab, **k: lab.generate("a", **k), {"max_tokens": 4},
         r"lab.generate\(\) takes no 'max_tokens'; 'max_new_tokens'\?; there are prompt, max_new"),
        (moelab.Lab.score, {"budget": "25%"},
         r"lab.score\(\) takes no 'budget', a setting: lab.update\(budget='25%'\)"),
        (lambda lab, **k: lab.calibrate("edgemoe", **k), {"token": 4},
         r"lab.calibrate\('edgemoe'\) takes no 'token'; .*.* quality, pairs, texts"),
        (moelab.Lab.update, {"token": 4}, "unknown setting 'token'; there are allocate, bits"),
        (lambda _, **k: moelab.open("demo", **k), {"evict": object()},
         r"moelab.open\(\) takes no 'evict', a setting: lab.update\(evict=...\)"),
    ],
)  # fmt: skip
def test_an_unknown_argument_is_answered_by_whom_it_was_given_to(lab, call, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(lab, **given)


def test_sizes_are_read_the_way_people_write_them():
    shape = Shape((4, 4), 2, {16: 1000, 4: 250})
    for text, want in [
        (123, 123), ("8MB", 8_000_000), ("1.5GiB", 3 * 2**29), ("25%", 2000), (" 64 kB ", 64_000),
        ("2mib", 2**21), (1e3, 1000),
    ]:  # fmt: skip
        assert parse_budget(text, shape) == want
    assert parse_budget(99_000, shape) == 99_000, "bytes may be more than all experts are"
    with pytest.raises(ValueError, match="budget '300%' is above 100 %.*write '100%'"):
        parse_budget("300%", shape)
    for text in ("", "%", "12 apples", "1e9999", None, True):
        with pytest.raises(ValueError, match="budget"):
            parse_budget(text, shape)


def test_info_counts_what_the_budget_holds(lab):
    info = lab.info()
    assert (
        info["all_experts_bytes"]
        == info["layers"] * info["experts_per_layer"] * info["expert_bytes"][16]
    )
    assert info["token_cycle_bytes"] == info["layers"] * info["top_k"] * info["expert_bytes"][16]
    assert info["minimum_budget_bytes"] == info["top_k"] * info["expert_bytes"][16]
    assert info["budget_experts"] == info["budget_bytes"] // info["expert_bytes"][16]


def test_the_cache_map_shows_what_is_resident(lab):
    run = lab.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    seen, info = lab.cache_map(), lab.info()
    assert seen["bits"].shape == (info["layers"], info["experts_per_layer"])
    assert (seen["bits"] > 0).sum() * info["expert_bytes"][16] == info["resident_bytes"]
    uses = run.events[run.events.kind.isin(["hit", "load"])].groupby(["layer", "expert"]).size()
    assert np.array_equal(seen["uses"][tuple(zip(*uses.index, strict=True))], uses.to_numpy())
    assert set(lab.why(*np.argwhere(seen["bits"] > 0)[0])) == {"uses since"}


def test_scoring_is_worse_at_fewer_bits_and_refuses_nothing_to_score(lab):
    full = lab.score("A short text to score.", progress=False)
    assert full.kl_mean < 1e-6
    assert full.same_top1 == 1
    assert full.perplexity_ratio == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="at least two tokens"):
        lab.score("a")
    assert lab.generate(PROMPT, max_new_tokens=2).tokens


def test_ctrl_c_stops_the_run_and_keeps_it(lab):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    lab.update(device="sd_card", strategy="on_demand")
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        lab.generate(PROMPT, max_new_tokens=500, ignore_eos=True)
    assert not lab.run.running
    assert 0 < len(lab.run.tokens) < 500
    lab.update(device="disk", strategy="lru")
    assert lab.generate(PROMPT, max_new_tokens=2).tokens


def test_opening_a_store_a_checkpoint_or_nothing(demo_store, tmp_path):
    with moelab.open(demo_store, bits=8, progress=False) as lab:
        assert lab.settings.bits == 8
        assert lab.prompts() == {}
    with moelab.open(moelab.demo.checkpoint(), tiers=(16, 4), progress=False) as lab:
        assert lab.info()["tiers"] == (16, 4)
    for nothing in ("no-such-model", tmp_path):
        with pytest.raises(ValueError, match="is not 'demo', 'smollm2-moe', 'synopsis', a store"):
            moelab.open(nothing)


def test_the_demo_brings_prompts_and_probes(lab):
    assert lab.prompts().keys() == lab.probes().keys()
    assert len(lab.prompts()) >= 5


def test_a_loads_trace_opens_in_perfetto(lab, tmp_path):
    import json

    lab.update(budget="12%")
    run = lab.generate(PROMPT, max_new_tokens=4, ignore_eos=True)
    doc = json.loads(run.log.to_perfetto(tmp_path / "trace.json").read_text())
    spans = [e for e in doc["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == run.events.kind.isin(["load", "prefetch", "stall"]).sum()
    lab.update(budget="25%")


def test_an_emulated_device_this_disk_cannot_follow_is_named_so(lab, monkeypatch):
    read = BlobFile.read_into

    def slow(self, *args, **more):
        read(self, *args, **more)
        time.sleep(0.002)

    lab.update(device="nvme", budget="25%")
    monkeypatch.setattr(BlobFile, "read_into", slow)
    run = lab.generate(PROMPT, max_new_tokens=4)
    assert run.outpaced == {"nvme"}
    titles = [origin["title"] for origin in run.recording().document["origins"]]
    assert titles == ["NVMe SSD, 3 GB/s, faster than this disk"]
    monkeypatch.undo()
    lab.update(device="sd_card")
    run = lab.generate(PROMPT, max_new_tokens=4)
    assert run.outpaced == set()
    assert "faster" not in run.recording().document["origins"][0]["title"]


def test_a_strategy_brings_low_bits_that_are_below_the_bits_in_force(lab):
    lab.update(strategy="lru", bits=4)
    assert lab.update(strategy="hobbit").low_bits == 3
    lab.update(strategy="lru", bits=2)
    assert lab.update(strategy="hobbit").low_bits == 4, "there is nothing below: as it brings it"
    lab.update(strategy="lru", bits=16)
    assert lab.update(strategy="hobbit").low_bits == 4


def test_what_is_no_run_and_no_token_is_said_with_what_is_asked_for(lab):
    run = lab.generate("Once", max_new_tokens=2)
    loaded = run.recording()
    for call, message in (
        (lambda: lab.what_if("x"), "this is a str; give a run of this session"),
        (lambda: lab.what_if(loaded), r"this is a Recording; give a run .* lab\.saved\.run"),
        (lambda: lab.save_run("x"), "this is a str; give what lab.generate returned"),
        (lambda: moelab.compare(a=1), "this is a int; give what lab.generate returned"),
        (lambda: moelab.perfetto(1, "x"), "this is a int; give what lab.generate returned"),
        (lambda: moelab.replay(loaded), "has none: run.trace.save keeps it"),
        (lambda: run.blame("x"), "no token 'x'; there are 0 to 1"),
        (lambda: run.blame(0.5), r"no token 0\.5; there are 0 to 1"),
        (lambda: loaded.cache_map("x"), "no token 'x'"),
        (lambda: lab.generate("x", max_new_tokens=0), "max_new_tokens=0: a whole number, 1 or"),
        (lambda: lab.generate("x", max_new_tokens=True), "max_new_tokens=True: a whole number"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_the_token_drawn_is_among_those_of_its_blame_however_unlikely(lab):
    run = lab.generate("Once upon", max_new_tokens=12, temperature=1.5, seed=3, ignore_eos=True)
    for token, best in zip(run.tokens, run.likeliest, strict=True):
        assert token in dict(best.served)
        assert len(best.served) == 5 + (token not in dict(best.served[:5]))
    assert max(len(best.served) for best in run.likeliest) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory are told apart on Linux only")
def test_what_the_process_takes_besides_does_not_grow_with_the_budget(demo_lab):
    demo_lab.update(strategy="in_ram", budget="10%")
    demo_lab.generate("The", max_new_tokens=2)
    before, budget = demo_lab.info()["process_bytes"], demo_lab.settings.budget_bytes
    demo_lab.update(budget="100%")
    demo_lab.generate("The", max_new_tokens=2)
    more = demo_lab.settings.budget_bytes - budget
    assert abs(demo_lab.info()["process_bytes"] - before) < more / 2
