"""The synopsis model's card: what it measures, and that it says nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import typer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from moelab.training import loop
from moelab.training.page import curve_svg
from moelab.training.synopsis import card as measuring
from moelab.training.synopsis.baselines import Nearest, baselines, first_sentence, first_words
from moelab.training.synopsis.corpus import END, PAD, Corpus, Pair, train_tokenizer
from moelab.training.synopsis.page import MODELS, OTHERS, curves, render
from moelab.training.synopsis.train import PADDING, Recipe, build_model

TINY = Recipe(layers=2, experts=4, hidden=128, ffn=16, heads=5, vocabulary=300)
THINGS = ("parser", "server", "font", "driver", "puzzle")
CURVE = [
    {"tokens": n * 10**6, "seconds": 60 * n, "train_loss": 5 / n, "validation": 6 / n}
    for n in (1, 2)
]
CURVE += [{"tokens": 3 * 10**6, "seconds": 180, "worth": 0.4, "validation": 4.0}]


def pair(at: int, section: str = "perl") -> Pair:
    thing = THINGS[at % len(THINGS)]
    text = f"This package has a {thing} of kind {at}. It is {'very ' * (at % 7)}small."
    return Pair(f"p{at}", f"s{at // 2}", section, text, f"small {thing} ({at})")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    test = [pair(at) for at in range(measuring.LEAST)]
    test += [pair(at, "net") for at in range(90, 94)]
    parts = {"train": [pair(at) for at in range(200, 240)], "validation": [], "test": test}
    return Corpus(parts, {}, [], tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checkpoints(corpus, tmp_path_factory):
    """A tiny checkpoint of each kind, as an export of a training is."""
    texts = [text for p in corpus.parts["train"] for text in (p.text, p.synopsis)]
    kept, made = tmp_path_factory.mktemp("tokenizer"), []
    PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts), eos_token=END, pad_token=PAD
    ).save_pretrained(kept)
    for experts in (TINY.experts, 1):
        recipe = replace(
            TINY, experts=experts, vocabulary=len(PreTrainedTokenizerFast.from_pretrained(kept))
        )
        state = loop.State(
            seen=2 * 10**6, steps=9, losses=CURVE, recipe={"experts": experts, "lr": 0.1}
        )
        folder, settings = tmp_path_factory.mktemp("made"), {"max_new_tokens": 8}
        made.append(loop.export(folder, build_model(recipe), kept, settings, state, pairs={}))
    return made


@pytest.fixture(scope="module")
def card(checkpoints, corpus):
    return measuring.take(*checkpoints, corpus)


# ----------------------------------------------------------------------------- what it measures


def test_a_batch_writes_what_each_description_alone_makes_it_write(checkpoints, corpus):
    opened = measuring.Opened.of(checkpoints[0])
    texts = [p.text for p in corpus.parts["test"]]
    written = measuring.write(opened, texts, batch=5)
    assert written == measuring.write(opened, texts, batch=100)
    for text, ids, said in zip(texts[::6], written.targets[::6], written.texts[::6], strict=True):
        source = torch.tensor([opened.tokenizer(text).input_ids])
        alone = opened.model.generate(source, do_sample=False)[0, 1:].tolist()
        assert ids == alone
        assert 0 < len(ids) <= 8
        assert said == opened.tokenizer.decode(alone, skip_special_tokens=True).strip()


def test_what_follows_the_end_of_a_text_is_not_written(checkpoints, corpus):
    opened = measuring.Opened.of(checkpoints[0])
    end = opened.model.config.eos_token_id
    made = torch.tensor([[PADDING, 9, 8, end, PADDING], [PADDING, 9, 8, 7, 6]])
    model = type("Says", (), {"config": opened.model.config, "generate": lambda *_, **__: made})()
    written = measuring.write(opened._replace(model=model), ["a", "a longer text"])
    assert written.targets == [[9, 8, end], [9, 8, 7, 6]]


def test_each_token_is_routed_as_without_padding(checkpoints, corpus):
    opened = measuring.Opened.of(checkpoints[0])
    written = measuring.write(opened, [p.text for p in corpus.parts["test"][:7]])
    together = measuring.routing_of(opened.model, written, batch=7)
    alone = measuring.routing_of(opened.model, written, batch=1)
    rows = zip(together, alone, written.sources, written.targets, strict=True)
    for one, other, source, target in rows:
        assert one.encoder.shape == (1, len(source), 1)
        assert one.decoder.shape == (1, len(target), 1)
        assert torch.equal(one.encoder, other.encoder)
        assert torch.equal(one.decoder, other.decoder)


def test_routing_tells_sections_apart_only_where_they_differ():
    def routed(encoder: int, decoder: int) -> measuring.Routed:
        return measuring.Routed(*(torch.full((1, 4, 1), chosen) for chosen in (encoder, decoder)))

    class Model:
        config = type("config", (), {"num_experts": 4})

        def named_modules(self):
            return [(f"{side}.block.1.layer.1.mlp.router", None) for side in ("encoder", "decoder")]

    labels = [OTHERS, "net"] * 40
    choices = [routed(0 if label == "net" else 3, at // 2 % 2) for at, label in enumerate(labels)]
    found = measuring.routing(Model(), choices, labels)
    assert found["layers"] == ["encoder 1", "decoder 1"]
    assert list(found["top_quarter_share"]) == ["net", OTHERS]
    assert found["between_domains_bits"] == [1.0, 0.0]
    assert all(0 <= bits < 0.2 for bits in found["between_domains_bits_by_chance"])
    assert found["load"] == [[0.5, 0, 0, 0.5], [0.5, 0.5, 0, 0]]
    assert found["entropy_bits"] == [1.0, 1.0]
    assert found["reuse"] == [1.0, 1.0]  # within a text the expert stays
    assert found["reuse_by_chance"] == [0.5, 0.5]


def test_the_interval_holds_the_mean_and_widens_where_few_groups_vary():
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(0.1, 1, 60), 10)  # of a group all alike
    wide = measuring.interval(values, [f"g{at // 10}" for at in range(600)])
    narrow = measuring.interval(values, [f"g{at}" for at in range(600)])
    for found in (wide, narrow):
        assert found["low"] < found["difference"] < found["high"]
        assert found["difference"] == pytest.approx(values.mean(), abs=1e-4)
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])


def test_small_sections_are_told_together():
    pairs = [pair(at, "perl" if at % 3 else "net") for at in range(9)]
    assert measuring.sections(pairs, 4) == [OTHERS, "perl", "perl"] * 3


def test_baselines_copy_the_beginning_or_a_neighbour():
    text = "A parser. It reads v1.2 of all. Fast."
    assert first_words(text, 3) == "A parser. It"
    assert first_sentence(text) == "A parser."
    train = [pair(at) for at in range(5)]
    near = Nearest(train)
    assert [near(p.text) for p in train] == [p.synopsis for p in train]
    assert near("a PUZZLE, please") == train[4].synopsis
    assert set(baselines(train)) == {
        "first 8 words", "first 12 words", "first sentence", "lead", "nearest neighbour",
    }  # fmt: skip


# ------------------------------------------------------------------------------- what it says


def test_the_card_tells_every_figure(card, corpus):
    text = render(card)
    assert card["by_section"].keys() == {"perl", OTHERS}
    assert sum(f["pairs"] for f in card["by_section"].values()) == len(corpus.parts["test"])
    for name, figures in card["rouge"].items():
        assert f"| {name} | {figures['rouge1']:.3f} | {figures['rouge2']:.3f} |" in text
    assert [sum(layer) for layer in card["routing"]["load"]] == pytest.approx([1, 1], abs=1e-3)
    dense, ours = card["models"]["dense"], card["models"]["this model"]
    routers = 2 * TINY.hidden * (TINY.experts - 1)
    assert ours["active_parameters"] == dense["parameters"] + routers
    assert [s["section"] for s in card["samples"]] == ["perl", "net"]
    assert all(s["synopsis"] in text for s in card["samples"])
    assert "Otherwise than this model: `experts=1`" in text
    drawn = curve_svg(curves(card))
    assert all(f">{name} 4.00<" in drawn for name in MODELS)
    assert json.loads(json.dumps(card)) == card


@pytest.mark.parametrize(
    ("low", "high", "says", "all_of_them"),
    [(0.01, 0.03, "above", True), (-0.01, 0.03, "not shown to differ from", False),
     (-0.03, -0.01, "below", False)],
)  # fmt: skip
def test_it_claims_what_the_intervals_allow(card, low, high, says, all_of_them):
    changed = {"difference": 0.02, "low": low, "high": high}
    text = render(card | {"against": dict.fromkeys(card["against"], changed)})
    assert f"this model is {says} the best baseline" in text
    assert f"{says} the dense model: +0.020 [{low:+.3f}, {high:+.3f}]" in text
    assert ("and so all of them" in text) == all_of_them


def test_the_command_writes_three_files_and_needs_a_dense_model(
    checkpoints, corpus, card, tmp_path, monkeypatch
):
    monkeypatch.setattr(measuring, "prepare", lambda data: corpus)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    app, (model, dense) = typer.Typer(), map(str, checkpoints)
    app.command()(measuring.main)
    words = ["--model", model, "--out", str(tmp_path), "--dense"]
    refused = CliRunner().invoke(app, [*words, str(tmp_path)])
    assert "train it with" in str(refused.exception)
    assert not list(tmp_path.iterdir())
    done = CliRunner().invoke(app, [*words, dense])
    assert done.exit_code == 0, done.exception
    assert json.loads((tmp_path / "synopsis.json").read_text("utf-8")) == card  # again, the same
    assert (tmp_path / "SYNOPSIS.md").read_text("utf-8") == render(card)
    assert (tmp_path / "synopsis_curve.svg").is_file()
