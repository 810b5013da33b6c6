"""What the tier "mixed" may be relied on for: sizes, kernels, choice, budget, replay."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moelab
from moelab.bench import floor
from moelab.bench.cases import run_figures
from moelab.bench.roofline import roofline
from moelab.calibration import hobbit, mixed
from moelab.calibration import profile as profiles
from moelab.calibration.mixed import compared
from moelab.calibration.mixed_choice import UNITS, choose, chosen_forms, costs_of
from moelab.calibration.profile import find_profile
from moelab.calibration.representations import losses
from moelab.engine import kernels, pace, vectors
from moelab.models.gating import SWIGLU
from moelab.replays.bounds import belady_hits
from moelab.replays.replay import replay
from moelab.runs.compare import code_of
from moelab.runs.shadows import Shadows
from moelab.runs.tokens import table
from moelab.scheduling.budget import bits_in_words
from moelab.scheduling.events import STALL
from moelab.scheduling.stream import MIXED, Knobs, Shape
from moelab.scheduling.trace import Trace
from moelab.settings import Settings
from moelab.spelling import merge_changes, opened, reread, sentence, short
from moelab.store import codecs
from moelab.store import mixed as tier
from moelab.store.codecs import PAGE, Layout
from moelab.store.groups import TERNARY
from moelab.store.manifest import StoreError
from moelab.store.mixed import (
    FORMS,
    MixedStore,
    decode,
    encode_piece,
    forms_of,
    joined,
    nbytes,
    pieces,
)
from moelab.strategies import lru, make

PROMPT = "Once upon a time there was a little"
LAYOUT = Layout((("gate_up_proj", (256, 192)), ("down_proj", (192, 128))), "bfloat16")
BIASED = Layout(
    (*LAYOUT.tensors, ("gate_up_proj_bias", (256,)), ("down_proj_bias", (192,))), "bfloat16"
)
TURNED = Layout(
    tuple((name, shape[::-1]) for name, shape in LAYOUT.tensors), "bfloat16", turned=True
)


def expert(layout: Layout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).bfloat16() * 0.1 for n, s in layout.tensors}


def encode(layout: Layout, form: int) -> np.ndarray:
    tensors = expert(layout)
    return joined([encode_piece(tensors[p[0]], layout, p) for p in pieces(layout, form)])


def test_sizes_are_those_of_the_pieces():
    # A matrix [128, 192] or [192, 128] is 384 groups: 8 bytes a bit, and 4 of scale and offset.
    def payload(g, u, d):
        return 384 * (8 * (g + u + d) + 3 * 4)

    for form in FORMS:
        of = (form // 100, form // 10 % 10, form % 10)
        assert nbytes(LAYOUT, form) == -(-payload(*of) // PAGE) * PAGE
        assert encode(LAYOUT, form).shape == (nbytes(LAYOUT, form),)
    assert nbytes(LAYOUT, 842) == -(-384 * (8 * 14 + 12) // 4096) * 4096 == 49152
    assert nbytes(BIASED, 842) == -(-(384 * 124 + 2 * 448) // 4096) * 4096


@pytest.mark.parametrize("layout", [LAYOUT, BIASED, TURNED])
def test_alike_bits_are_the_tier_to_the_byte(layout):
    for bits in (8, 4, 3, 2):
        whole = codecs.encode(expert(layout), layout, bits)
        assert (encode(layout, 111 * bits) == whole).all()
        assert nbytes(layout, bits) == len(whole)


@pytest.mark.parametrize("layout", [LAYOUT, BIASED, TURNED])
def test_each_projection_decodes_as_the_tier_of_its_bits(layout):
    of = {
        b: codecs.decode(codecs.encode(expert(layout), layout, b), layout, b) for b in (8, 4, 3, 2)
    }
    along = int(layout.turned)
    for form in (842, 248, 322, 444, 283):
        found = decode(encode(layout, form), layout, form)
        gate, up = found["gate_up_proj"].chunk(2, along)
        assert torch.equal(gate, of[form // 100]["gate_up_proj"].chunk(2, along)[0])
        assert torch.equal(up, of[form // 10 % 10]["gate_up_proj"].chunk(2, along)[1])
        assert torch.equal(found["down_proj"], of[form % 10]["down_proj"])


def reference(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    h = x @ tensors["gate_up_proj"].T
    if "gate_up_proj_bias" in tensors:
        h = h + tensors["gate_up_proj_bias"]
    y = SWIGLU(h) @ tensors["down_proj"].T
    return y + tensors["down_proj_bias"] if "down_proj_bias" in tensors else y


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("layout", [LAYOUT, BIASED])
def test_the_kernels_compute_every_form_as_torch_does_its_decoded_weights(layout, tokens):
    x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(1))
    for form in forms_of(layout):
        blob = encode(layout, form)
        found = kernels.compute_prefill(blob, form, layout, x, SWIGLU)
        exact = reference(decode(blob, layout, form), x)
        # Activations are rounded to 8 bit (16 at 8-bit weights), as at the plain tiers.
        assert (found - exact).norm() < 0.02 * exact.norm(), form


def test_a_form_of_alike_bits_computes_what_the_tier_does_bit_for_bit():
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    for bits in (8, 4, 3, 2):
        blob = encode(LAYOUT, 111 * bits)
        mixed = kernels.compute_prefill(blob, 111 * bits, LAYOUT, x)
        assert torch.equal(mixed, kernels.compute_prefill(blob, bits, LAYOUT, x))


# -- the choice ---------------------------------------------------------------------------------


def by_brute_force(costs: np.ndarray, sizes: np.ndarray, room: int) -> float:
    every = itertools.product(range(costs.shape[1]), repeat=len(costs))
    at = np.arange(len(costs))
    fitting = [costs[at, pick].sum() for pick in map(list, every) if sizes[at, pick].sum() <= room]
    return min(fitting)


@pytest.mark.parametrize("seed", range(30))
def test_no_other_choice_within_the_bytes_costs_less(seed):
    rng = np.random.default_rng(seed)
    count, options = rng.integers(1, 6), rng.integers(1, 6)
    sizes = 4096 * rng.integers(1, 12, (count, options)) * rng.choice([1, 3])
    costs = rng.random((count, options)).round(int(rng.integers(1, 4)))
    for room in rng.integers(sizes.min(1).sum(), sizes.max(1).sum() + 9000, 4):
        picks = choose(costs, sizes, int(room))
        at = np.arange(count)
        assert sizes[at, picks].sum() <= room
        assert costs[at, picks].sum() == pytest.approx(by_brute_force(costs, sizes, room))


def test_what_does_not_fit_at_all_is_refused():
    with pytest.raises(ValueError, match="the fewest bits take 8 bytes; give as much, not 7"):
        choose(np.zeros((2, 2)), np.array([[4, 8], [4, 8]]), 7)


def test_costs_by_hand():
    """Two experts share a layer's KL as their errors are, each projection for itself."""
    kl = [[[0.0, 1.0, 2.0, 4.0], [0.0, 0.0, 0.0, 8.0], [0.0, 10.0, 20.0, 30.0]]]
    one, three = [[0.0, 1.0, 1.0, 1.0]] * 3, [[0.0, 3.0, 3.0, 1.0]] * 3
    data = {"projections": [[0], [1], [2]], "kl": kl, "errors": [[one, three]]}
    # 432: gate at 4 (1.0), up at 3 (0), down at 2 (30, shared evenly); 888 costs nothing.
    assert costs_of(data, [888, 432, 442]).tolist() == [[0, 15.25, 15.25], [0, 15.75, 15.75]]
    assert costs_of(data, [283]).tolist() == [[2 + 5], [2 + 15]]


def test_units_share_a_form_and_stay_within_the_bytes(demo_lab):
    data, shape = find_profile(demo_lab._store, "mixed").data, demo_lab._shape
    layout = demo_lab._store.layout
    for room in (shape.n * nbytes(layout, 3), shape.n * nbytes(layout, 4) - 5):
        spent = {}
        for unit in UNITS:
            forms = chosen_forms(shape, layout, data, room, unit)
            assert sum(nbytes(layout, form) for form in forms) <= room
            spent[unit] = sum(costs_of(data, [f])[i, 0] for i, f in enumerate(forms))
            if unit == "layer":
                assert all(len(set(forms[at : at + 16])) == 1 for at in range(0, shape.n, 16))
        assert spent["expert"] <= spent["layer"] <= spent["model"]
        assert len(set(chosen_forms(shape, layout, data, room, "model"))) == 1


# -- the tier of a store --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(demo_store):
    with moelab.open("demo", bits="mixed", budget="8%", measure_kl=False, progress=False) as lab:
        yield lab


def test_the_tiers_file_holds_every_expert_in_its_form(lab):
    store, sizes = lab._store, lab._shape.own[MIXED]
    assert store.tiers == (16, 8, MIXED, 4, 3, 2)
    assert len(set(sizes)) > 1
    assert lab._shape.all_bytes(MIXED) == sum(sizes) <= lab._shape.all_bytes(3)
    assert lab._shape.nbytes[MIXED] == max(sizes) == lab.info()["expert_bytes"][MIXED]
    for layer, expert in [(0, 0), (2, 7), (5, 15)]:
        form = store.coded(layer, expert, MIXED)
        blob = store.read(layer, expert, MIXED)
        assert len(blob) == nbytes(store.layout, form) == sizes[lab._shape.key(layer, expert)]
        tensors = codecs.decode(store.read(layer, expert, 16), store.layout, 16)
        parts = [encode_piece(tensors[p[0]], store.layout, p) for p in pieces(store.layout, form)]
        assert (joined(parts) == blob).all()
    store.verify()


def test_a_file_that_was_cut_or_edited_is_told(lab, tmp_path):
    store = lab._store
    copy = tmp_path / "mixed.bin"
    copy.write_bytes(store.files[MIXED].path.read_bytes())
    with pytest.raises(StoreError, match="not whole, or of another store or choice; remove it"):
        MixedStore(store, [444, *store.forms[1:]], copy)
    with copy.open("r+b") as file:
        file.seek(store.location(1, 2, MIXED)[1])
        file.write(b"\xff" * 9)
    with pytest.raises(StoreError, match="layer 1 expert 2"):
        MixedStore(store, store.forms, copy).verify()
    os.truncate(copy, copy.stat().st_size - 4096)
    with pytest.raises(StoreError, match="not whole"):
        MixedStore(store, store.forms, copy)


@pytest.mark.parametrize("strategy", ["lru", "hobbit", "edgemoe", "mixtral_offloading"])
def test_a_replay_decides_what_the_run_did_and_the_budget_holds_each_ones_bytes(lab, strategy):
    lab._engine.recover()
    low = {"low_bits": 2} if strategy == "hobbit" else {}
    lab.update(strategy=strategy, budget="8%", **low)
    lab.update(bits="mixed")
    arena, seen = lab._engine.arena, []
    take, cache = arena.take, lab._engine.scheduler.cache

    def watched(bits, nbytes):
        slot = take(bits, nbytes)
        seen.append((bits, nbytes, arena.held_bytes <= arena.limit_bytes))
        return slot

    arena.take = watched
    try:
        run = lab.generate(PROMPT, max_new_tokens=12, ignore_eos=True, seed=1)
    finally:
        del arena.take
    assert all(within for *_, within in seen)
    if strategy != "edgemoe":  # whose bits are its own
        assert len({nbytes for bits, nbytes, _ in seen if bits == MIXED}) > 1
    cache = lab._engine.scheduler.cache
    assert cache.used_bytes == sum(lab._shape.size(*copy) for copy in cache.items())
    assert cache.used_bytes == sum(slot.nbytes for slot, _ in lab._engine.resident.values())
    assert run_figures(run)["tokens_above_budget"] == 0
    again = replay(run.trace)
    decided = [r for r in run.log.records() if r["kind"] != STALL]
    assert [(r["kind"], r["layer"], r["expert"], r["bits"]) for r in decided] == [
        (row[0], row[1], row[2], row[4]) for row in again.rows
    ]
    loads = run.events.query("kind in ('load', 'prefetch') and token > 0")
    if strategy == "lru":  # of the others some prefetches are withdrawn, or never used
        assert again.bytes == loads["bytes"].sum()


def test_a_trace_keeps_the_sizes_and_a_recording_the_bytes(lab, tmp_path):
    lab.update(strategy="lru", bits="mixed", budget="8%")
    run = lab.generate(PROMPT, max_new_tokens=6, ignore_eos=True, seed=1)
    saved = Trace.load(run.trace.save(tmp_path / "trace.json"))
    assert saved.shape == run.trace.shape
    assert saved.shape.own == {MIXED: lab._shape.own[MIXED]}
    assert replay(saved, lru(), Knobs(lab.settings.budget_bytes, MIXED)).bytes > 0
    recording = moelab.Recording.load(run.save(tmp_path / "run.moelab"))
    assert [*recording.per_token["resident_bytes"]] == [*run.per_token["resident_bytes"]]


def test_a_tier_is_called_as_in_the_views():
    assert [bits_in_words(b) for b in (16, MIXED, TERNARY)] == ["16 bit", "mixed bits", "ternary"]
    both = bits_in_words(16, 4), bits_in_words(MIXED, 4), bits_in_words(16, TERNARY)
    assert both == ("16/4 bit", "mixed/4 bit", "16/ternary")


def test_pins_and_drafts_are_written_as_bits_are(lab):
    lab.update(strategy="lru", bits="mixed", budget="30%", pin={(0, 1): "mixed"})
    try:
        assert lab.settings.strategy.pinned == {(0, 1): MIXED}
        assert (code := opened("demo", lab.settings)).endswith("lab.update(pin={(0, 1): 'mixed'})")
        assert reread(code) == code
        assert "expert 0.1 pinned at mixed bits" in short(lab.settings, lab._shape)
        with pytest.raises(ValueError, match=r"choose one of \[16, 8, 'mixed', 4, "):
            lab.update(pin={(0, 1): 7})
    finally:
        lab.update(pin={})
    ahead = {"draft_bits": "mixed", "draft_length": 2, "temperature": 0}
    run = lab.generate(PROMPT, max_new_tokens=6, ignore_eos=True, **ahead)
    assert run.request.draft_bits == MIXED
    assert "draft_bits='mixed', draft_length=2" in code_of(run.recording().document)
    with pytest.raises(ValueError, match="draft_bits=7: one of the store's tiers, .* 'mixed', 8"):
        lab.generate(PROMPT, max_new_tokens=6, **ahead | {"draft_bits": 7})


def test_a_budget_is_counted_in_what_an_expert_takes_on_average(lab):
    lab.update(strategy="lru", bits="mixed", budget="8%")
    total, n = lab._shape.all_bytes(MIXED), lab._shape.n
    assert lab.info()["budget_experts"] == lab.settings.budget_bytes * n // total
    assert total < n * lab._shape.nbytes[MIXED]
    offered = lab.dashboard().options
    assert (offered["all_experts"], offered["own_sizes"]) == (n, [MIXED])
    assert offered["all_bytes"] == {str(b): lab._shape.all_bytes(b) for b in lab._shape.nbytes}
    words = sentence(lab.settings, lab._shape)
    assert f"about {lab.info()['budget_experts']} experts, mixed bits, LRU" in words


def test_settings_spell_it_in_words(lab):
    lab.update(strategy="lru", bits=4, budget="8%")
    assert lab.update(bits="mixed").bits == MIXED
    assert ', bits="mixed", ' in opened("demo", lab.settings)
    assert ", mixed bits, " in short(lab.settings, lab._shape)
    assert merge_changes([(3, {"bits": "5"})])[0]["label"] == "bits mixed"
    refused = pytest.raises(ValueError, match=r"no mixed tier; open it with moelab.open\(bits=")
    with moelab.open("demo", measure_kl=False, progress=False) as plain, refused:
        plain.update(bits="mixed")


def test_the_mixed_text_is_nearer_than_that_of_the_tier_of_its_bytes(lab):
    text = "The little ship sailed out of the harbour, and nobody saw it come back."
    kl = {}
    for bits in ("mixed", 3):
        lab.update(bits=bits)
        kl[bits] = lab.score(text, progress=False).kl_mean
    assert kl["mixed"] < kl[3]


def test_mixed_tiers_beside_the_tiers_in_whose_bytes_they_are(lab):
    text = "The little ship sailed out of the harbour, and nobody saw it come back. " * 3
    found = compared(lab, (3,), ("expert", "layer"), [text]).set_index("by")
    assert [*found.index] == ["plain", "expert", "layer"]
    assert (found.loc[["expert", "layer"], "bytes"] <= found.loc["plain", "bytes"]).all()
    assert found.loc["plain", "bits"] == 8 * 49152 / (3 * 192 * 192)
    assert found.loc["expert", "KL"] < found.loc["plain", "KL"]


def test_a_calibration_goes_on_where_it_was_stopped_and_another_size_measures_nothing(
    demo_store, tmp_path, monkeypatch
):
    monkeypatch.setattr(profiles, "SHIPPED", tmp_path / "none")
    folders = lambda store: iter([tmp_path / "profiles"])  # noqa: E731
    monkeypatch.setattr(profiles, "_folders", folders)
    monkeypatch.setattr(mixed, "_folders", folders)
    measured, measure = [], mixed._kl

    def stops(*args):
        if len(measured) == 7:
            measured.append(None)
            raise KeyboardInterrupt
        measured.append(args[-1])
        return measure(*args)

    monkeypatch.setattr(mixed, "_kl", stops)
    of = {"texts": ["The ship sailed out of the harbour and nobody saw it again."]}
    of |= {"max_tokens": 8, "progress": False}
    with moelab.open("demo", measure_kl=False, progress=False) as lab:
        with pytest.raises(ValueError, match="needs a calibration of this model: run"):
            mixed.opened(lab._store)
        with pytest.raises(KeyboardInterrupt):
            lab.calibrate("mixed", **of)
        first = lab.calibrate("mixed", **of)
        assert len(measured) == 7 + 1 + (6 * 10 - 7) + 5  # held out: four tiers and this one
        other = lab.calibrate("mixed", within=4, unit="layer", **of)
        assert len(measured) == 66 + 5
        assert other.data["kl"] == first.data["kl"]
        assert other.data["forms"] != first.data["forms"]
        assert len(list((tmp_path / "profiles").glob("mixed-*.bin"))) == 1
        assert mixed.opened(lab._store).forms == tuple(other.data["forms"])
        for wrong in ({"within": 1000}, {"unit": "row"}):
            with pytest.raises(ValueError, match="2 bits everywhere|one of expert, layer, model"):
                lab.calibrate("mixed", **wrong, **of)


# -- beside other work ----------------------------------------------------------------------------


def test_the_machine_is_timed_with_memory_of_each_ones_size(lab, monkeypatch):
    lab.update(strategy="lru", bits="mixed", budget="8%")
    assert roofline(lab, (1, 64), measured=False).roofs["computing"].gt(0).all()
    engine = lab._engine
    monkeypatch.setattr(engine.compute, "fast", False)  # by torch, which checks sizes
    assert pace.measure(engine).computing.expert_ms.keys() == {*engine.store.tiers}
    read, submit = set(), engine.loader.submit

    def watched(file, offset, into, *, urgent):
        read.add((offset, len(into)))
        return submit(file, offset, into, urgent=urgent)

    monkeypatch.setattr(engine.loader, "submit", watched)
    assert floor.bandwidth(engine, MIXED, seconds=0.05) > 0
    places = [lab._shape.place(key) for key in range(lab._shape.n)]
    assert read <= {engine.store.location(*place, MIXED)[1:] for place in places}


def test_the_best_eviction_of_one_size_is_no_bound_of_many(lab):
    lab.update(strategy="lru", bits="mixed", budget="8%")
    run = lab.generate(PROMPT, max_new_tokens=12, ignore_eos=True, seed=1)
    shadows = Shadows(run, lab._strategies)
    while shadows.advance(1):
        pass
    assert "belady" not in {one["name"] for one in shadows.told(table(run.token_reports))}
    assert moelab.policy_or_memory(run).own
    found, least = moelab.predict(run, lab), min(lab._shape.own[MIXED])
    hits, asked = belady_hits(run.trace, lab.settings.budget_bytes // least)
    bounds = found.bounds()
    assert found.replay.hit_ratio <= bounds["belady"] == hits / asked
    assert bounds["belady_io_ms"] <= bounds["io_ms"]


def test_a_tier_of_fewer_bits_and_as_many_bytes_is_no_low_tier_of_it():
    own = {MIXED: (300, 400, 200, 100)}
    shape = Shape((2, 2), 1, {16: 1600, 8: 800, MIXED: 400, 4: 400, 3: 300}, own=own)
    assert [shape.below(low, MIXED) for low in (4, 3)] == [False, True]
    assert shape.below(4, 8)
    assert shape.below(MIXED, 8)
    high = Settings(6400, 16, make("hobbit")).change(shape, low_bits=4)
    with pytest.raises(ValueError, match='low_bits=4 is no lower tier than bits="mixed": 400 byt'):
        high.change(shape, bits="mixed")
    mixed = Settings(6400, MIXED, lru())
    assert mixed.change(shape, strategy="hobbit").low_bits == 3
    few = Shape((2, 2), 1, {16: 1600, MIXED: 400, 4: 400}, own=own)
    assert mixed.change(few, strategy="hobbit").low_bits is None
    fake = SimpleNamespace(_store=SimpleNamespace(tiers=tuple(shape.nbytes)), _shape=shape)
    with pytest.raises(ValueError, match="high=5, low=4: choose two"):
        hobbit.made_from(fake, high=MIXED, low=4, budget=6400)
    assert hobbit.made_from(fake, high=MIXED, low=3, budget=6400)["low"] == 3


def test_a_draft_loads_each_ones_bytes_and_a_replay_decides_the_same(lab):
    lab.update(strategy="lru", bits="mixed", budget="8%")
    how = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}
    plain, run = lab.generate(PROMPT, **how), lab.generate(PROMPT, **how, draft_bits=2)
    assert run.tokens == plain.tokens
    assert run_figures(run)["tokens_above_budget"] == 0
    again = replay(run.trace)
    decided = [r for r in run.log.records() if r["kind"] != STALL]
    assert [(r["kind"], r["layer"], r["expert"], r["bits"]) for r in decided] == [
        (row[0], row[1], row[2], row[4]) for row in again.rows
    ]


def test_its_forms_are_part_of_what_compiled_code_is_known_by():
    assert Path(tier.__file__) in vectors._FILES


def test_its_losses_are_not_asked_by_a_number(lab):
    with pytest.raises(ValueError, match=r"5 is no form; .*tiers \[16, 8, 4, 3, 2\] \(moelab.cal"):
        losses(lab, [MIXED])
