"""Encoder-decoders, from `moelab.open` to the last token: the text is stock transformers' own.

Two things are put right in the reference. transformers drops a prompt's tokens above an expert's
capacity in Switch Transformers, and runs experts 0 and 1 only of NLLB-MoE.
"""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

import moelab
import tiny_models
from moelab.bench import bench
from moelab.engine import generation
from moelab.replays.replay import replay
from moelab.runs.shadows import Shadows
from moelab.runs.tokens import table
from moelab.scheduling.budget import minimum_budget
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import Knobs, Shape
from moelab.scheduling.trace import Trace
from moelab.strategies import NAMES, make
from moelab.strategies.edgemoe import _distances
from test_families import nllb_forward
from test_speculation import inside
from test_strategies import check_run, decided, live

SOURCE = (
    "A text of more than one hundred tokens, where one byte is one token, to be put short. " * 2
)
NEW = 12
PENALTY = {"repetition_penalty": 2.0}  # else a random model with tied weights repeats a token


@pytest.fixture(scope="module", params=tiny_models.ENCODER_DECODERS)
def folder(request, tmp_path_factory):
    return tiny_models.ENCODER_DECODERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def lab(folder):
    with moelab.open(folder, budget="100%", tiers=(16, 4, 2), progress=False) as lab:
        yield lab


@pytest.fixture(scope="module")
def stock(folder):
    return stock_model(folder)


def stock_model(folder):
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = sys.maxsize
        if type(module).__name__ == "NllbMoeExperts":
            module.forward = nllb_forward.__get__(module)
    return model


def generate(lab, **own):
    how = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True} | PENALTY | own
    return lab.generate(SOURCE, **how)


@torch.inference_mode()
def stocks(stock, lab, **own) -> list[int]:
    ids = torch.tensor([lab._encode(SOURCE)])
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
    how |= PENALTY
    # By itself it counts the encoder's layers, and fails where the decoder has more.
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return stock.generate(ids, past_key_values=cache, **how | own)[0, 1:].tolist()


@pytest.mark.parametrize("budget", ["100%", "tight"])
def test_greedy_text_is_stock_transformers_also_with_little_memory(lab, stock, budget):
    info = lab.info()
    least = info["minimum_budget_bytes"] + info["expert_bytes"][16]
    lab.update(budget=least if budget == "tight" else budget)
    run = generate(lab)
    assert len(lab._encode(SOURCE)) > 100
    assert run.tokens == stocks(stock, lab)
    assert len(set(run.tokens)) > 3
    assert run.summary()["peak_resident_bytes"] <= lab.settings.budget_bytes
    assert any("expert" in note for note in info["notes"])


@pytest.mark.parametrize("seed", [0, 5])
def test_a_seed_draws_what_it_draws_of_stock_transformers(lab, stock, seed):
    lab.update(budget="50%")
    torch.manual_seed(seed)
    expected = stocks(stock, lab, do_sample=True, temperature=1.5, top_k=20, top_p=0.95)
    how = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "seed": seed}
    tokens = generate(lab, **how).tokens
    assert tokens == expected == generate(lab, **how).tokens
    assert tokens != stocks(stock, lab)


def test_a_token_runs_through_the_decoder_alone_and_only_a_prompt_through_the_encoder(lab):
    lab.update(budget="50%", strategy="lru")
    run, shape, ids = generate(lab), lab._shape, lab._encode(SOURCE)
    own, layers = shape.encoder_layers, list(range(shape.layers))
    assert lab.info()["encoder_layers"] == own == 2
    cycle = (shape.layers - own) * shape.top_k * shape.nbytes[16]
    assert lab.info()["token_cycle_bytes"] == cycle
    steps = run.trace.steps
    assert [s.layer for s in steps] == [*layers, *(layers[own:] * (NEW - 1))]
    assert [s.prefill for s in steps] == [True] * len(layers) + [False] * (len(steps) - len(layers))
    assert {len(s.experts) for s in steps[:own]} == {len(ids)}
    assert {len(s.experts) for s in steps[own:]} == {1}
    assert (run.trace.tokens, run.trace.decoded) == (NEW, NEW - 1)
    recording = run.recording()
    assert recording.document["model"]["encoder_layers"] == own
    assert recording.gates["expert"].shape == (NEW, shape.layers, shape.top_k)
    assert (recording.gates["expert"][1:, :own] == -1).all()
    assert (recording.gates["expert"][1:, own:] >= 0).all()
    assert set(recording.blame(3).layer) == set(layers[own:])
    assert set(recording.blame(0).layer) == set(layers)


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_keeps_its_contract(lab, name, tmp_path):
    lab.update(strategy="lru", budget="100%")
    lab._engine.recover()
    lab.update(strategy=make(name), bits=16, budget="100%")
    need = minimum_budget(lab._shape, lab.settings.strategy, lab.settings.knobs())
    lab.update(budget=max(need, int(0.4 * lab._shape.all_bytes(16))))
    template = lab.settings.strategy
    run = generate(lab, temperature=0.7, seed=3)
    loaded = Trace.load(run.trace.save(tmp_path / "trace"))
    assert loaded.shape == lab._shape
    assert decided(replay(loaded, strategies={name: template})) == live(run)
    for _ in range(2):  # the second knows the first
        check_run(lab, run)
        assert decided(replay(run.trace)) == live(run)
        run = generate(lab, temperature=0.7, seed=3)
    recording = moelab.Recording.load(run.save(tmp_path / "run"))
    assert (recording.cache_map()["bits"] == lab.cache_map()["bits"]).all()
    assert all(entry["error"] == "" for entry in recording.evictions.values())


def test_swapmoe_brings_in_what_the_source_called_for_while_its_text_is_decoded(lab):
    lab.update(strategy="lru", bits=16, budget="100%")
    lab._engine.recover()
    lab.update(strategy=moelab.strategies.swapmoe(f=1, swaps=0), budget="60%")
    run, shape, own = generate(lab), lab._shape, lab._shape.encoder_layers
    check_run(lab, run)
    assert decided(replay(run.trace)) == live(run)
    came = run.events[(run.events.kind == "prefetch") & (run.events.layer < own)]
    assert len(came) > 0 == len(came[came.token == 0])
    part, view = lab._engine.scheduler.strategy.route, lab._engine.scheduler.view
    for layer in range(own):
        expected = set(part.order(layer, view)[: part.plan(view).experts[layer]].tolist())
        before = {key - shape.offset[layer] for key, _ in run.trace.resident}
        assert set(came[came.layer == layer].expert) <= expected - before
    stalls = run.events[(run.events.kind == "stall") & (run.events.token > 0)]
    assert len(stalls) == 0


def test_an_oracle_of_the_same_text_loads_least(lab):
    lab.update(strategy="lru", bits=16, budget="100%")
    lab._engine.recover()
    lab.update(budget="40%")
    plain = generate(lab)
    for depth in (0, 2):
        lab._engine.recover()
        lab.update(strategy=moelab.strategies.oracle(plain, depth=depth))
        best = generate(lab)
        check_run(lab, best)
        assert best.tokens == plain.tokens
        assert decided(replay(best.trace)) == live(best)
        loads, most = (sum(r.loads for r in run.token_reports[1:]) for run in (best, plain))
        assert loads <= most


def test_a_head_of_its_own_and_weights_saved_under_every_name_are_read(tmp_path):
    untied = tiny_models.switch(tmp_path / "untied", tie_word_embeddings=False)

    def repeat(tensors):
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            tensors[name] = tensors["shared.weight"].clone()

    doubled = tiny_models.edit(tiny_models.switch(tmp_path / "tied"), tmp_path / "twice", repeat)
    for folder in (untied, doubled):
        with moelab.open(folder, budget="50%", tiers=(16, 4), progress=False) as lab:
            assert generate(lab).tokens == stocks(stock_model(folder), lab)


def test_a_target_is_scored_given_its_source_and_a_prompt_alone_is_refused(lab):
    lab.update(strategy="lru", bits=16, budget="60%")
    pair = (SOURCE, "A text, put short in one sentence.")
    score = lab.score(pair, progress=False)
    assert score.tokens == len(lab._encode(pair[1]))
    assert (score.kl_mean < 1e-6, score.same_top1) == (True, 1)
    lab.update(bits=4)
    assert lab.score(pair, progress=False).kl_mean > score.kl_mean
    with pytest.raises(ValueError, match=r"measured on \(source, target\) pairs"):
        lab.score(SOURCE, progress=False)
    lab.update(bits=16)


def test_a_strategy_is_calibrated_on_pairs(lab):
    pairs = [(SOURCE, "A text, put short in one sentence, or in two of them if need be.")] * 2
    lab.calibrate("edgemoe", texts=pairs, progress=False)
    lab.update(strategy="edgemoe", budget="60%")
    run = generate(lab)
    assert decided(replay(run.trace)) == live(run)
    lab.update(strategy="lru")


def test_what_it_cannot_do_is_said_and_all_else_looks_at_it_as_at_others(
    lab, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="cannot verify a draft: it is an encoder-decoder"):
        lab.generate(SOURCE, max_new_tokens=4, temperature=0, draft_bits=4)
    with pytest.raises(ValueError, match="no chat template"):
        lab.generate([{"role": "user", "content": "Hello"}])
    with pytest.raises(ValueError, match="is an encoder-decoder, and nobody's routing is known"):
        moelab.fit(lab._store.path)
    with monkeypatch.context() as little:
        little.setattr(generation.Machine, "spare_bytes", lambda _: 10**6)
        little.setattr(generation, "WHOLE", 1 << 20)
        with pytest.raises(MemoryError, match=r"reads a text whole: \d+ tokens take \d+ MB"):
            generate(lab)
    lab.update(strategy="lru", bits=16, budget="60%")
    run = generate(lab)
    assert run.report(tmp_path / "run.html", png=False)
    assert moelab.predict(run, lab, budget="30%").replay.tokens
    assert lab.what_if(run, repeats=1, budget="30%")
    assert (moelab.predictors(run).recall <= 1).all()
    board = lab.dashboard()
    assert board._repr_mimebundle_()
    board.close()
    shadows = Shadows(run, lab._strategies)
    while shadows.advance(1):
        pass
    told = {one["name"]: one for one in shadows.told(table(run.token_reports))}
    assert {one["tokens"] for one in told.values()} == {NEW - 1}
    assert told["run"]["hit_ratio"] == pytest.approx(told["lru"]["hit_ratio"], abs=1e-6)


def test_a_plan_and_a_bench_measure_loss_on_what_it_makes_of_a_source(lab, folder):
    lab.update(strategy="lru", bits=16, budget="60%")
    chosen = moelab.plan(lab, budget="60%", max_kl=50, strategies=["lru"], progress=False)
    assert chosen["strategy"] == "lru"
    how = {"strategies": ["lru + 4 bit"], "budgets": ["60%"], "devices": ["disk"], "tokens": 4}
    found = bench(lab._store.path, **how, repeats=1, prompt=SOURCE, progress=False)
    assert found["kl_mean"].item() > 0


@pytest.mark.browser
@pytest.mark.slow
def test_a_page_has_an_encoders_layers_with_the_prompt_alone(lab, chromium, tmp_path):
    run, own = generate(lab), lab.info()["encoder_layers"]
    page = chromium.new_page(viewport={"width": 1250, "height": 900})
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    run.report(tmp_path / "run.html", png=False)
    page.goto((tmp_path / "run.html").as_uri())
    layers = lab.info()["layers"]
    rows = page.locator(".moe-chips > [role=row]:visible")
    layer = page.get_by_label("Layer shown")
    page.get_by_label("Token shown").fill("0")
    page.locator(".moe-dash[data-past='0']").wait_for()
    assert (rows.count(), layer.get_attribute("min")) == (layers, "0")
    page.get_by_label("Token shown").fill("3")
    page.locator(".moe-dash[data-past='3']").wait_for()
    assert (rows.count(), layer.get_attribute("min")) == (layers - own, str(own))
    layer.fill(str(own))
    page.locator(f".moe-dash[data-layer='{own - 1}']").wait_for()
    assert layer.get_attribute("aria-valuetext") == f"before layer {own}"
    for width in (1250, 400):
        page.set_viewport_size({"width": width, "height": 900})
        panel = page.locator(".moe-text.beside")
        source, text = (panel.locator("> div").nth(i).bounding_box() for i in (0, 1))
        assert source["x"] + source["width"] <= text["x"], "side by side"
        box = panel.bounding_box()
        assert box["y"] <= text["y"] < box["y"] + box["height"], "in sight"
    page.close()
    assert not faults


def test_layers_come_in_the_order_in_which_tokens_run_through_them():
    shape = Shape((4,) * 5, 1, {16: 100}, encoder_layers=2)
    assert [shape.following(layer) for layer in range(5)] == [1, 2, 3, 4, 2]
    assert [shape.stack_end(layer) for layer in range(5)] == [2, 2, 5, 5, 5]
    assert shape.away(0).tolist() == [0, 1, 2, 3, 4]
    assert shape.away(1).tolist() == [5, 0, 1, 2, 3]
    assert shape.away(3).tolist() == [5, 5, 2, 0, 1]
    assert shape.next_turn(3).tolist() == [5, 5, 2, 3, 1]
    assert shape.next_turn(1).tolist() == [5, 5, 1, 2, 3]
    assert [shape.steps_of(passes) for passes in range(4)] == [0, 5, 8, 11]
    assert [shape.passes_of(steps) for steps in (0, 4, 5, 7, 8, 10, 11)] == [0, 0, 1, 1, 2, 2, 3]
    assert _distances(5, 2, "described")[3].tolist() == [5, 5, 2, 3, 1]
    assert _distances(5, 2, "printed")[3].tolist() == [5, 5, 1, 3, 2]
    assert _distances(5, 2, "described")[1].tolist() == [5, 5, 1, 2, 3]


def drafted() -> Trace:
    """Two texts of a prompt and three passes of two rows each, of all but the first one is kept."""
    trace = Trace(Shape((4,) * 3, 1, {16: 100}, encoder_layers=1))
    for text in range(2):
        for at in range(4):
            for layer in trace.shape.path(prefill=at == 0):
                rows = tuple(((text + at * row + layer) % 4,) for row in range(2))
                trace.steps.append(LayerInput(layer, rows, ((1.0,),) * 2, prefill=at == 0))
    trace.kept = {2: 1, 3: 1, 6: 1, 7: 1}
    return trace


@pytest.mark.parametrize("name", ["trace.json", "trace.parquet"])
def test_what_stands_goes_by_the_pass_also_after_another_prompt(name, tmp_path):
    trace = drafted()
    rows = [len(given.experts) for given in trace.learnt()]
    assert rows == [2, 2, 2, 2, 2, 1, 1, 1, 1] * 2
    assert trace.decoded == 8
    loaded = Trace.load(trace.save(tmp_path / name))
    assert loaded.kept == trace.kept
    assert [len(given.experts) for given in loaded.learnt()] == rows
    settled = []

    def make_it(*given):
        scheduler = Scheduler(*given)
        end = scheduler.end_of_token
        scheduler.end_of_token = lambda kept=None: (settled.append(kept), end(kept))
        return scheduler

    replay(loaded, make("lru"), Knobs(600), make=make_it)
    assert settled == [None, None, 1, 1] * 2


@pytest.mark.parametrize("strategy", ["lfu", "moe_infinity", "s3fifo"])
def test_a_pass_that_begins_behind_the_encoder_is_rolled_back_alone(strategy):
    trace = drafted()
    learnt, kept = (Scheduler(trace.shape, one, Knobs(600)) for one in [make(strategy)] * 2)
    for scheduler, steps in ((learnt, trace.steps), (kept, trace.learnt())):
        stand = iter([None, None, 1, 1] * 2)
        for given in steps:
            if given.prefill and given.layer == 0:
                scheduler.new_sequence()
            scheduler.step(given)
            if given.layer == trace.shape.layers - 1:
                now = next(stand)
                scheduler.end_of_token(now if scheduler is learnt else None)
    assert learnt.cache.uses.tolist() == kept.cache.uses.tolist()
    known, same = (repr([inside(p) for p in one.strategy.objects]) for one in (learnt, kept))
    assert known == same
