"""What a user may rely on of a run: stock sampling, numbers that are numbers, text to its end."""

from __future__ import annotations

import multiprocessing
import os
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import moelab
from moelab import calibration
from moelab.calibration import profile
from moelab.engine.engine import Engine
from moelab.engine.generation import Ids, NotFiniteError, Sampler, Sampling
from moelab.engine.memory import Arena

PROMPT = "Elizabeth was not at all surprised to hear that"
NEW = 24


@pytest.fixture(scope="module")
def lab(demo_store):
    with moelab.open("demo", budget="100%", measure_kl=False, progress=False) as lab:
        yield lab


@pytest.fixture(scope="module")
def stock():
    return AutoModelForCausalLM.from_pretrained(
        moelab.demo.checkpoint(), dtype=torch.float32, experts_implementation="eager"
    ).eval()


@pytest.fixture
def both(lab, stock, monkeypatch):
    """Ours and stock transformers' greedy tokens under a generation config."""

    def generate(**said):
        config = GenerationConfig(**({"eos_token_id": 0, "pad_token_id": 1} | said))
        for model in (lab._engine.model, stock):
            monkeypatch.setattr(model, "generation_config", config)
        ids = lab._encode(PROMPT)
        want = stock.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        run = lab.generate(PROMPT, max_new_tokens=NEW, temperature=0)
        return run.tokens, want[0, len(ids) :].tolist()

    return generate


# -- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        lambda _: {"repetition_penalty": 1.5},
        lambda _: {"no_repeat_ngram_size": 2},
        lambda plain: {"suppress_tokens": plain[:3]},
        lambda plain: {"begin_suppress_tokens": plain[:1]},
        lambda plain: {"bad_words_ids": [[token] for token in plain[2:5]]},
        lambda plain: {"sequence_bias": [[[plain[1]], -9.0]]},
        lambda plain: {"eos_token_id": plain[4], "min_new_tokens": 12},
        lambda _: {"do_sample": True, "top_k": -1, "top_p": 0.0, "repetition_penalty": 1.5},
    ],
    ids=["penalty", "ngrams", "suppress", "begin", "bad words", "bias", "eos", "sampling off"],
)
def test_greedy_text_is_stock_generates_whatever_the_models_own_config_asks(both, said):
    plain, stocks = both()
    assert plain == stocks
    ours, stocks = both(**said(plain))
    assert ours == stocks != plain


def test_top_k_and_top_p_narrow_a_draw_and_can_be_off(lab):
    def tokens(**own):
        return lab.generate(PROMPT, max_new_tokens=NEW, repetition_penalty=1, **own).tokens

    greedy = tokens(temperature=0)
    assert tokens(temperature=1.5, top_k=1) == tokens(temperature=1.5, top_p=0) == greedy
    assert tokens(temperature=1.5, top_p=1, top_k=-1) != greedy
    assert Sampling(top_k=-1) == Sampling(top_k=0)
    flat = Sampler(lab._engine.model, Sampling(temperature=1, top_k=3), Ids([0]))
    assert {flat.draw([0], torch.arange(9.0) / 100) for _ in range(60)} == {6, 7, 8}


@pytest.fixture
def opened(lab, monkeypatch):
    """Opens the model once more with something changed in it."""
    real = moelab.engine.engine.load_skeleton

    def open_with(change):
        def load(*args, **options):
            model = real(*args, **options)
            change(model)
            return model

        monkeypatch.setattr("moelab.engine.engine.load_skeleton", load)
        lab._beside(lab.settings).close()

    return open_with


def test_what_no_run_does_of_a_generation_config_is_named_at_opening(opened):
    with pytest.warns(UserWarning, match="asks for num_beams=4, which no run does"):
        opened(lambda model: setattr(model.generation_config, "num_beams", 4))


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.3.mlp.gate.weight", torch.nan, "layers.3.mlp.gate.weight has NaN or infinity"),
        ("norm.weight", torch.inf, "norm.weight has NaN or infinity"),
        ("embed_tokens.weight", torch.nan, "embed_tokens.weight has NaN or infinity"),
        ("layers.2.input_layernorm.weight", 3e38, "layers.2.* is the first whose output is not"),
    ],
)
def test_logits_that_are_no_numbers_end_everything_and_say_where_from(
    demo_lab, tmp_path, monkeypatch, name, value, message
):
    monkeypatch.setattr(profile, "_folders", lambda _: iter([tmp_path]))
    lab, weight = demo_lab, demo_lab._engine.model.get_parameter(f"model.{name}")
    whole = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(value)
    run = lab.start(PROMPT, max_new_tokens=4)
    with pytest.raises(NotFiniteError, match=rf"after token \d+ of the sequence.*{message}"):
        run.join()
    assert (run.tokens, repr(run)[:12]) == ([], "<Run failed,")
    assert "NaN" in moelab.Recording.load(run.save(tmp_path / "run")).document["error"]
    assert all(file.stat().st_size for file in run.report(tmp_path / "run.html"))
    with pytest.raises(NotFiniteError):
        lab.score(PROMPT, progress=False)
    for strategy in calibration.NAMES:
        with pytest.raises(NotFiniteError):
            lab.calibrate(strategy, again=True, progress=False)
        assert not (tmp_path / f"{strategy}.json").exists()
    with torch.no_grad():
        weight.copy_(whole)
    assert len(lab.generate(PROMPT, max_new_tokens=4, ignore_eos=True).tokens) == 4


def test_what_overflows_half_precision_says_what_does_not(demo_lab):
    greedy = {"max_new_tokens": 4, "temperature": 0}
    with moelab.open("demo", dtype=torch.float16, measure_kl=False, progress=False) as lab:
        assert lab.generate(PROMPT, **greedy).text == demo_lab.generate(PROMPT, **greedy).text
        weight = lab._engine.model.get_parameter("model.layers.2.input_layernorm.weight")
        with torch.no_grad():
            weight.fill_(60_000)
        says = r"layers\.2\..* overflows float16 first; open the model with dtype=torch\.float32"
        with pytest.raises(NotFiniteError, match=says):
            lab.generate(PROMPT, max_new_tokens=4)


def test_a_model_whose_dense_weights_are_no_numbers_is_refused_at_opening(opened):
    with pytest.raises(moelab.StoreError, match="model.norm.weight has NaN or infinity; repair"):
        opened(lambda model: model.model.norm.weight.data.fill_(torch.nan))


def test_memory_is_given_back_before_a_smaller_budget_is_told(demo_lab, monkeypatch):
    engine, seen = demo_lab._engine, []

    def setting(self, name, value):
        object.__setattr__(self, name, value)
        held, limit = engine.arena.held_bytes, engine.arena.limit_bytes
        seen.append(held <= limit and held <= engine.settings.budget_bytes)

    monkeypatch.setattr(Arena, "__setattr__", setting)
    monkeypatch.setattr(Engine, "__setattr__", setting)
    for budget in ("60%", "10%", "40%", "7%"):
        demo_lab.update(budget=budget)
        demo_lab.generate(PROMPT, max_new_tokens=4, ignore_eos=True)
    assert all(seen)


# -- prompts and text -----------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [["one", "two"], [5, 6], [], [{"role": "user"}], 7])
def test_what_is_no_text_and_no_conversation_is_refused(lab, prompt):
    with pytest.raises(ValueError, match="give one text or a conversation"):
        lab.start(prompt)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('No system role') }}", "used: No system role; .*system, user: leave"),
        ("{{ messages + 1 }}", "cannot be used: .*messages of system, user"),
        ("{% if false %}{% endif %}", "makes no text of messages of system, user"),
    ],
)
def test_a_template_that_refuses_or_says_nothing_is_an_answer(demo_lab, template, message):
    demo_lab._tokenizer.chat_template = template
    talk = [{"role": r, "content": "Be brief"} for r in ("system", "user")]
    with pytest.raises(ValueError, match=message):
        demo_lab.start(talk)


def test_a_token_that_the_model_does_not_know_is_refused_by_its_name(demo_lab):
    demo_lab._tokenizer.add_tokens([f"<extra {i}>" for i in range(9)])
    known = demo_lab._engine.model.get_input_embeddings().num_embeddings
    for ask in (demo_lab.start, demo_lab.score):
        with pytest.raises(ValueError, match=rf"<extra 8>.*the model knows 0 to {known - 1}"):
            ask("Once upon <extra 8>")


def test_a_prompt_longer_than_the_model_was_made_for_warns_with_the_numbers(lab):
    most = lab.info()["positions"]
    text = " ".join(["word"] * (most + 5))
    with pytest.warns(UserWarning, match=rf"prompt has 1\d+ tokens.* made for {most} positions"):
        assert len(lab.generate(text, max_new_tokens=1).tokens) == 1
    with pytest.warns(UserWarning, match=rf"has 1 tokens, {most} are to follow"):
        run = lab.start("word", max_new_tokens=most)
    run.stop()
    run.join()


@pytest.mark.parametrize("text", ["a caf\u00e9", "wait \ufffd", "\ufffd", "half of \U0001f642"])
def test_the_last_bytes_of_a_run_are_in_its_text(lab, monkeypatch, text):
    ids, half = lab._tokenizer(text)["input_ids"], text.startswith("half")
    drawn = iter(ids[: len(ids) - half])
    monkeypatch.setattr(Sampler, "draw", lambda *_: next(drawn))
    run = lab.generate(PROMPT, max_new_tokens=len(ids) - half, ignore_eos=True)
    assert "".join(run.recording().document["pieces"]) == run.text
    assert run.text.endswith("\ufffd") if half else run.text == text


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told_that_the_lab_is_its_parents_and_opens_its_own(demo_lab):
    demo_lab.update(device="hdd", strategy="on_demand")
    run = demo_lab.start(PROMPT, max_new_tokens=400, ignore_eos=True)
    calls = [lambda: demo_lab.generate(PROMPT), lambda: demo_lab.update(bits=4), run.join]
    calls += [demo_lab.score, demo_lab.close, lambda: demo_lab.why(0)]

    def child():
        for call in calls:
            with pytest.raises(RuntimeError, match="a fork of it"):
                call()
        loader.close()  # as at exit: whoever holds its lock does not exist here
        with moelab.open("demo", measure_kl=False, progress=False) as own:
            assert len(own.generate(PROMPT, max_new_tokens=2, ignore_eos=True).tokens) == 2
        os._exit(7)

    loader, held, over = demo_lab._engine.loader, threading.Event(), threading.Event()

    def hold():
        with loader._cond:
            held.set()
            over.wait()

    threading.Thread(target=hold).start()
    held.wait()
    forked = multiprocessing.get_context("fork").Process(target=child)
    forked.start()
    forked.join(60)
    over.set()
    forked.kill()
    run.stop()
    assert forked.exitcode == 7
