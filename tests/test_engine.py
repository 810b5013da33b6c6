"""What a user may rely on of the engine: stock output, honest counters, the budget, memory back."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moelab
from moelab.engine.compute import Routed, Serve
from moelab.engine.generation import Decoder, likeliest
from moelab.replays.replay import replay
from moelab.runs import quality
from moelab.store.devices import DEVICES, Device, Throttle
from moelab.strategies import NAMES
from reference import logits_of

PROMPT = "Elizabeth was not at all surprised to hear that"


@pytest.fixture(scope="module")
def lab(demo_store):
    with moelab.open("demo", budget="100%", measure_kl=False, progress=False) as lab:
        yield lab


@pytest.fixture(autouse=True)
def plain(lab):
    """Every test starts from the same settings."""
    lab.update(
        budget="100%", bits=16, low_bits=None, strategy="lru", prefetch=0, device="disk",
        measure_kl=False, t1=0.6, t2=0.9,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stock():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        moelab.demo.checkpoint(), dtype=torch.float32, experts_implementation="eager"
    ).eval()


def test_full_precision_equals_stock_transformers(lab, stock):
    ids = lab._encode(PROMPT)
    with torch.inference_mode():
        want = stock.generate(
            torch.tensor([ids]), max_new_tokens=200, min_new_tokens=200, do_sample=False,
            repetition_penalty=1.0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    run = lab.generate(
        PROMPT, max_new_tokens=200, temperature=0, repetition_penalty=1, ignore_eos=True
    )
    assert run.tokens == want.sequences[0, len(ids) :].tolist()
    ours = logits_of(lab, ids, run.tokens[:60])
    assert (ours - torch.cat(want.logits[:61])).abs().max() <= 1e-4


def test_whatever_is_resident_the_logits_are_the_same_to_the_last_bit(lab):
    """Experts arrive in another order then; what they sum up to must not hang on it."""
    story = lab._encode(PROMPT)
    answer = lab.generate(PROMPT, max_new_tokens=20, ignore_eos=True).tokens
    warm = logits_of(lab, story, answer)
    for budget in ("25%", "50%", "100%"):  # each begins with what the one before it left
        lab.update(budget=budget)
        assert torch.equal(logits_of(lab, story, answer), warm), budget


@pytest.mark.parametrize("tokens", [1, 8, 40, 150])
@pytest.mark.parametrize("kind", ["kernels", "torch", "scaled input"])
def test_experts_add_up_to_the_same_bits_in_whatever_groups_they_arrive(
    lab, monkeypatch, tokens, kind
):
    compute, random = lab._engine.compute, np.random.default_rng(tokens)
    width = compute.layout.tensors[1][1][0]
    monkeypatch.setattr(compute, "fast", kind == "kernels")
    x = torch.from_numpy(random.standard_normal((tokens, width), np.float32))
    idx = np.stack([random.permutation(16)[:6] for _ in range(tokens)])
    gates = random.random((tokens, 6), np.float32)
    routed = Routed(torch.from_numpy(idx), torch.from_numpy(gates), 16)
    left_out = idx[0, 3]  # a strategy may skip one: the rest must not wait for it
    there = [e for e in np.unique(idx).tolist() if e != left_out]

    def output(order: list[int], group: int) -> torch.Tensor:
        batch = compute.batch(2, x, routed, scale_input=kind == "scaled input")
        for at in range(0, len(order), group):
            some = [(e, 16 if e % 2 else 4) for e in order[at : at + group]]
            batch.add(
                [(Serve(e, b), compute._read(2, Serve(e, b), i)) for i, (e, b) in enumerate(some)]
            )
        return batch.result()

    whole = output(there, len(there))
    assert whole.abs().max() > 0
    for group in (1, 2, 3):
        assert torch.equal(output(random.permutation(there).tolist(), group), whole)


@pytest.mark.alone
@pytest.mark.slow
def test_decoding_in_memory_is_as_fast_as_stock_transformers(lab):
    """The same tokens in turn, so that a busy machine slows both; medians, 10 % for noise."""
    from transformers import AutoModelForCausalLM, DynamicCache

    ids, rivals, times = lab._encode(PROMPT), {}, {"moelab": []}
    lab.generate(PROMPT, max_new_tokens=40, ignore_eos=True)  # everything is resident now
    lab._engine.new_sequence()
    decoder = Decoder(lab._engine)
    decoder.step(ids)
    lab._engine.end_of_token()
    for kind in ("eager", "batched_mm", "grouped_mm"):
        model = AutoModelForCausalLM.from_pretrained(
            moelab.demo.checkpoint(), dtype=torch.float32, experts_implementation=kind
        ).eval()
        rivals[kind], times[kind] = (model, DynamicCache(config=model.config)), []
    with torch.inference_mode():
        for model, cache in rivals.values():
            model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        for token in range(5, 85):
            decoder.step([token])
            lab._engine.end_of_token()
            times["moelab"].append(decoder.seconds)
            for kind, (model, cache) in rivals.items():
                begun = time.perf_counter()
                model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                times[kind].append(time.perf_counter() - begun)
    median = {kind: float(np.median(t[10:])) for kind, t in times.items()}
    assert median.pop("moelab") <= 1.1 * min(median.values()), median


@pytest.mark.parametrize("name", ["lru", "lfu", "layer_lru"])
def test_a_run_in_a_warm_cache_is_replayed_exactly(lab, name):
    lab.update(strategy=name, budget="30%", prefetch=1)
    lab.generate("def main():", max_new_tokens=12, ignore_eos=True)
    run = lab.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
    assert run.trace.resident
    live = run.events[run.events.kind != "stall"][["kind", "layer", "expert", "bits"]]
    again = replay(run.trace).decisions
    assert [tuple(r) for r in live.itertuples(index=False)] == [
        (d.kind, d.layer, d.expert, d.bits) for d in again
    ]


@pytest.mark.parametrize("name", ["on_demand", "lru", "lfu", "layer_lru", "in_ram"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_no_strategy_changes_what_is_computed_at_one_precision(lab, name, prefetch):
    want = lab.generate(PROMPT, max_new_tokens=24, temperature=0, ignore_eos=True).tokens
    lab.update(strategy=name, prefetch=prefetch if name != "in_ram" else 0, budget="25%")
    run = lab.generate(PROMPT, max_new_tokens=24, temperature=0, ignore_eos=True)
    assert run.tokens == want


def test_a_prompt_larger_than_the_budget_gives_the_same_logits(lab):
    ids = lab._encode(moelab.demo.probes()["novel"])[:120]
    full = logits_of(lab, ids, [])
    lab.update(budget=lab.info()["minimum_budget_bytes"])
    assert torch.allclose(logits_of(lab, ids, []), full, atol=1e-4)


def test_counters_equal_an_independent_recount_from_the_trace(lab):
    lab.update(budget="25%")
    run = lab.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    capacity = lab.settings.budget_bytes // lab.info()["expert_bytes"][16]
    size = lab.info()["expert_bytes"][16]
    events = run.events
    assert (events.query("kind == 'load'").bytes == size).all()
    # an LRU written anew, warmed by the loads and hits of the prompt as they were issued
    cache: OrderedDict = OrderedDict()
    prompt = events[(events.token == 0) & events.kind.isin(["hit", "load"])]
    for key in zip(prompt.layer, prompt.expert, strict=True):
        cache[key] = None
        cache.move_to_end(key)
    while len(cache) > capacity:
        cache.popitem(last=False)
    hits = asked = 0
    for given_layer in (s for s in run.trace.steps if not s.prefill):
        wanted = [(given_layer.layer, r.expert) for r in given_layer.requests()]
        hits += sum(k in cache for k in wanted)
        asked += len(wanted)
        for key in sorted(wanted, key=lambda k: k not in cache):
            cache[key] = None
            cache.move_to_end(key)
            if len(cache) > capacity:
                cache.popitem(last=False)
    summary, table = run.summary(), run.per_token
    assert summary["hit_ratio"] == pytest.approx(hits / asked)
    later = events[events.token > 0]
    assert (later.kind == "hit").sum() == hits == table.hits[1:].sum()
    assert later.bytes[later.kind == "load"].sum() == table.bytes[1:].sum()


def budget_from_events(run) -> np.ndarray:
    """Resident bytes after each event, rebuilt from the log alone (from an empty cache)."""
    sizes, sign = run.trace.shape.nbytes, {"load": 1, "prefetch": 1, "evict": -1}
    return np.cumsum([sign.get(r.kind, 0) * sizes.get(r.bits, 0) for r in run.events.itertuples()])


changes = st.fixed_dictionaries(
    {},
    optional={
        "budget": st.sampled_from(["6%", "10%", "25%", "60%", "100%"]),
        "bits": st.sampled_from([16, 8, 4, 3, 2]),
        "low_bits": st.sampled_from([None, 4, 2]),
        "strategy": st.sampled_from(NAMES),
        "prefetch": st.integers(0, 3),
    },
)


@pytest.mark.filterwarnings("ignore:.* has no effect")
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(script=st.lists(st.tuples(st.integers(0, 15), changes), max_size=6), seed=st.integers(0, 9))
def test_the_budget_is_never_exceeded_whatever_changes_at_whatever_token(lab, script, seed):
    lab._engine.recover()  # an empty cache, so that the log tells all
    due, seen = dict(script), []
    arena, take = lab._engine.arena, lab._engine.arena.take

    def watched(*copy):
        slot = take(*copy)
        seen.append(arena.held_bytes <= arena.limit_bytes == lab._engine.settings.budget_bytes)
        return slot

    obey = lab._session._obey

    def changing(run, changes):  # just before the next token: a set-up is under its own settings
        if (now := len(run.tokens) - 1) in due:
            try:
                lab.update(**due.pop(now))
            except ValueError as e:
                assert "below one layer" in str(e)  # noqa: PT017
        obey(run, changes)

    arena.take, lab._session._obey = watched, changing
    try:
        run = lab.start(PROMPT, max_new_tokens=16, ignore_eos=True, seed=seed).join()
    finally:
        del arena.take, lab._session._obey
    assert all(seen)
    held = budget_from_events(run)
    limits = run.per_token.set_index("token").budget_bytes
    # Whoever takes memory is within the budget; while a smaller one is being answered between
    # tokens, evictions and their waits for a read that has begun are not.
    taking = run.events.kind.isin(["load", "prefetch"])
    within = held <= limits.reindex(run.events.token).fillna(np.inf).to_numpy()
    assert within[taking].all()
    again = replay(run.trace)
    live = run.events[~run.events.kind.isin(["stall"])]
    mine = live[["kind", "layer", "expert", "bits_asked", "bits"]]
    assert [tuple(r) for r in mine.itertuples(index=False)] == [
        (d.kind, d.layer, d.expert, d.bits_asked, d.bits) for d in again.decisions
    ]


def test_memory_returns_to_the_system_when_the_budget_shrinks(lab):
    import psutil

    process = psutil.Process()
    lab.generate(moelab.demo.probes()["docs"], max_new_tokens=60, ignore_eos=True)
    before, held = process.memory_info().rss, lab.info()["resident_bytes"]
    assert held > 8e6
    lab.update(budget="10%")
    freed = before - process.memory_info().rss
    assert lab.info()["resident_bytes"] <= lab.settings.budget_bytes
    assert freed > 0.8 * (held - lab.settings.budget_bytes)


def test_quality_moves_with_the_bits(lab):
    kl = {}
    for bits in (16, 8, 4, 2):
        lab.update(bits=bits)
        kl[bits] = lab.score(max_tokens=24, progress=False).kl_mean
    assert kl[16] < 1e-6 < kl[8] < kl[4] < kl[2]


def test_kl_measured_in_a_run_is_that_of_the_same_context(lab, stock):
    lab.update(bits=2, measure_kl=True)
    run = lab.generate(PROMPT, max_new_tokens=6, temperature=0, ignore_eos=True)
    ids, tokens = lab._encode(PROMPT), run.tokens[:-1]
    degraded = logits_of(lab, ids, tokens).double().log_softmax(-1)
    with torch.inference_mode():
        full = (
            stock(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 :].double().log_softmax(-1)
        )
    want = (full.exp() * (full - degraded)).sum(-1)
    assert [r.kl for r in run.token_reports] == pytest.approx(want.tolist(), abs=1e-4)


def test_an_emulated_device_takes_its_time_and_says_so(lab):
    lab.update(strategy="on_demand", device="hdd", budget="25%")
    run = lab.generate(PROMPT, max_new_tokens=5, ignore_eos=True)
    loads = run.events.query("kind == 'load' and token > 0")
    hdd = DEVICES["hdd"]
    least_ms = loads.bytes.iloc[0] / hdd.bandwidth_bytes_s * 1e3
    assert loads.dur_ms.min() >= least_ms
    span = (loads.start_ms + loads.dur_ms).max() - loads.start_ms.min()
    assert loads.bytes.sum() / (span / 1e3) <= hdd.bandwidth_bytes_s * 1.05
    assert run.summary()["timing"] == "emulated"
    lab.update(device="disk")
    assert lab.generate(PROMPT, max_new_tokens=3).summary()["timing"] == "measured"


def test_a_throttle_shares_the_bus_and_overlaps_latencies():
    slow = Device("test", bandwidth_bytes_s=1000.0, latency_ms=100.0, queue=2)
    throttle = Throttle()
    assert throttle.due(slow, 100, 0.0) == pytest.approx(0.2)  # latency, then 0.1 s on the bus
    assert throttle.due(slow, 100, 0.0) == pytest.approx(0.3)  # its latency passed meanwhile
    assert throttle.due(slow, 100, 0.0) == pytest.approx(0.4)  # begins at 0.2, ready at 0.3
    assert throttle.due(slow, 100, 5.0) == pytest.approx(5.2)  # an idle device starts afresh


def test_prefetched_experts_are_hits_and_late_ones_are_waited_for(lab):
    lab.update(strategy="lru", prefetch=1, device="hdd", budget="40%")
    run = lab.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    events = run.events[run.events.token > 0]
    assert (events.kind == "prefetch").any()
    assert ((events.kind == "hit") & (events.cause == "prefetched")).any()
    stalls = set(events.cause[events.kind == "stall"])
    assert stalls <= {"on demand", "prefetch late"}
    assert "prefetch late" in stalls


def test_times_add_up_to_what_a_watch_shows(lab, monkeypatch):
    lab.update(budget="12%", device="sd_card", prefetch=3, measure_kl=3)
    monkeypatch.setattr(quality, "likeliest", lambda *x: time.sleep(0.01) or likeliest(*x))
    begun, later = time.perf_counter(), {6: {"strategy": "in_ram", "prefetch": 0, "budget": "100%"}}
    run = lab.generate(PROMPT, max_new_tokens=12, ignore_eos=True, changes=later)
    watch, table = 1e3 * (time.perf_counter() - begun), run.per_token
    last_hit = run.events.start_ms[run.events.kind == "hit"].max()
    assert last_hit < sum(r.wall_ms for r in run.token_reports) <= watch
    measured = table.token % 3 == 0
    assert (table.kl.notna() == measured).all()
    assert (table.measuring_ms >= 10 + 10 * measured).all()
    assert set(table.token[table.setup_ms > 0]) == {6}
    assert table.setup_ms.sum() == pytest.approx(run.summary()["setup_ms"])
    assert np.allclose(table.total_ms, table.compute_ms + table.deciding_ms + table.stall_ms)
    assert (table.compute_ms > 0).all()
    assert (table.deciding_ms > 0).all()
    stalls = run.events.query("kind == 'stall'").groupby("token").dur_ms.sum()
    assert np.allclose(stalls.reindex(table.token, fill_value=0.0), table.stall_ms)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [1, 3, 5, 63, 64, 65, 321, 1000, 49152])
def test_the_likeliest_tokens_are_those_of_a_whole_sort(size, ties):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 4
    logits[size // 2 : size // 2 + size // 3] = -torch.inf
    logits = logits.round() if ties else logits
    ids, shares = zip(*((i, p) for i, p in likeliest(logits) if p), strict=True)
    every = logits.softmax(-1)
    want = [p for p in every.sort(descending=True).values[:5].tolist() if p]
    assert shares == pytest.approx(want, rel=1e-4)
    assert every[list(ids)].tolist() == pytest.approx(want, rel=1e-4)  # of equals, any
    assert len(set(ids)) == len(ids)


def test_a_store_damaged_while_running_ends_the_run_not_the_lab(demo_store, tmp_path):
    import shutil

    store = shutil.copytree(demo_store, tmp_path / "store")
    with moelab.open(store, budget="10%", measure_kl=False, progress=False) as lab:
        file = store / "experts-16.bin"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 4])
        run = lab.start(PROMPT, max_new_tokens=8)
        with pytest.raises(OSError, match="experts-16.bin"):
            run.join()
        assert run.error is not None
        assert lab.info()["resident_bytes"] == 0
        lab.update(bits=4)
        assert len(lab.generate(PROMPT, max_new_tokens=4, ignore_eos=True).tokens) == 4
        file.write_bytes(whole)  # by whomever: it is opened again before it is read again
        lab.update(bits=16)
        with pytest.raises(OSError, match=r"experts-16\.bin.*written to since it was opened"):
            lab.generate(PROMPT, max_new_tokens=4)
    with moelab.open(store, budget="10%", measure_kl=False, progress=False) as lab:
        assert len(lab.generate(PROMPT, max_new_tokens=4, ignore_eos=True).tokens) == 4


def test_started_stopped_and_set_a_hundred_times_from_threads(lab):
    errors: list[BaseException] = []
    done = threading.Event()
    lab.update(budget="25%")
    before = threading.active_count()  # how many readers a loader has is this disk's matter

    def fiddle(i: int) -> None:
        n = 0
        while not done.is_set():
            try:
                lab.update(
                    bits=(16, 8, 4)[n % 3], budget=("25%", "60%")[(n + i) % 2], prefetch=n % 2
                )
            except Exception as e:  # noqa: BLE001
                errors.append(e)
            n += 1
            time.sleep(0.003)

    threads = [threading.Thread(target=fiddle, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    try:
        for _ in range(100):
            run = lab.start(PROMPT, max_new_tokens=50, ignore_eos=True)
            while not run.tokens and run.running:
                time.sleep(0.001)
            run.stop()
            run.join(30)
            assert not run.running
            assert run.tokens
    finally:
        done.set()
        for t in threads:
            t.join()
    assert errors == []
    assert threading.active_count() <= before + 2


def test_a_second_run_at_once_is_refused(lab):
    lab.update(device="hdd", strategy="on_demand")
    run = lab.start(PROMPT, max_new_tokens=200)
    try:
        with pytest.raises(RuntimeError, match=r"run.stop\(\)"):
            lab.start(PROMPT)
    finally:
        run.stop()
        run.join()
