"""The bundled model: what ships is whole, and the way it was trained can be gone again."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from typer.testing import CliRunner

from moelab import demo
from moelab.training import card as measuring
from moelab.training.corpus import END, PAD, Sampler, save_tokens, split
from moelab.training.domains import SOURCES
from moelab.training.train import Recipe, Training, build_model, step_loss

TINY = Recipe(
    layers=2,
    experts=4,
    hidden=64,
    ffn=64,
    heads=2,
    vocabulary=300,
    tokens=64 * 40,
    batch_tokens=64,
    window=32,
    contexts=((0.5, 16), (1.0, 32)),
    warmup_steps=4,
)


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo.checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def card():
    return json.loads((demo.HERE / "card.json").read_text())


@pytest.fixture(scope="module")
def tiny_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = {
        "sums": [f"{a} plus {b} is {a + b}.\n" * 3 for a in range(20) for b in range(20)],
        "words": [f"the {w} of number {n} was here.\n" * 2 for w in "abcdef" for n in range(60)],
    }
    tokenizer = ByteLevelBPETokenizer()
    lines = [text for parts in texts.values() for text in parts]
    tokenizer.train_from_iterator(lines, 300, special_tokens=[END, PAD], show_progress=False)
    tokenizer = tokenizer._tokenizer
    documents = {domain: split(parts, tokenizer) for domain, parts in texts.items()}
    return save_tokens(folder, tokenizer, documents, {"sums": 0.6, "words": 0.4})


# ------------------------------------------------------------------------------ what ships


def test_the_checkpoint_is_stock_small_and_mostly_experts(shipped, card):
    model, tokenizer = shipped
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert len(tokenizer) == model.config.vocab_size
    path = demo.checkpoint() / "model.safetensors"
    assert path.stat().st_size <= 50e6
    with safe_open(path, "pt") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        dtypes = {file.get_slice(name).get_dtype() for name in sizes}
    assert dtypes == {"BF16"}
    counts = {name: int(np.prod(shape)) for name, shape in sizes.items()}
    experts = sum(n for name, n in counts.items() if ".experts." in name)
    assert experts > 0.8 * sum(counts.values())
    assert card["model"]["parameters"] == sum(counts.values())


def test_every_domain_has_prompts_and_a_probe(shipped):
    _, tokenizer = shipped
    assert set(demo.prompts()) == set(demo.probes()) == set(demo.DOMAINS) == set(SOURCES)
    for domain in demo.DOMAINS:
        assert len(demo.prompts()[domain]) >= 2
        assert 250 <= len(tokenizer(demo.probes()[domain]).input_ids) <= 550
        for text in (*demo.prompts()[domain], demo.probes()[domain]):
            assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_probe_perplexities_are_those_of_the_card(shipped, card):
    model, tokenizer = shipped
    for domain, text in demo.probes().items():
        now = measuring.perplexity(model, tokenizer(text, return_tensors="pt").input_ids)
        assert now == pytest.approx(card["probe_perplexity"][domain], rel=0.01), domain


def test_the_card_says_what_was_measured(card):
    from moelab.training.page import curve_svg, losses, render

    assert (demo.HERE / "CARD.md").read_text("utf-8") == render(card)
    now = curve_svg(losses(card["training"]["curve"]))
    for drawn in (demo.HERE / "curve.svg").read_text("utf-8"), now:
        assert all(f">{domain} " in drawn for domain in demo.DOMAINS)
    shipped = json.loads((demo.checkpoint() / "training.json").read_text())
    assert card["training"] == shipped
    assert card["bits"]["16"]["kl_mean"] <= 1e-6
    kl = [card["bits"][bits]["kl_mean"] for bits in ("8", "4", "3", "2")]
    assert kl == sorted(kl)


# ------------------------------------------------------------------------------- training


def test_the_loss_of_a_step_is_that_of_the_stock_model_and_reaches_every_expert_asked():
    model = build_model(TINY)
    ids = torch.randint(0, TINY.vocabulary, (3, 25))
    loss = step_loss(model, ids[:, :-1], ids[:, 1:])
    stock = model(ids, labels=ids, output_router_logits=False).loss
    assert float(loss.cross_entropy) == pytest.approx(stock.item(), abs=1e-5)
    assert loss.shares.sum(1).tolist() == pytest.approx([1.0] * TINY.layers)
    loss.total.backward()
    for layer, shares in zip(model.model.layers, loss.shares, strict=True):
        felt = layer.mlp.experts.down_proj.grad.abs().sum((1, 2)) > 0
        assert felt.tolist() == (shares > 0).tolist()


def test_the_auxiliary_losses_reach_the_routers():
    model = build_model(TINY)
    ids = torch.randint(0, TINY.vocabulary, (2, 17))
    gate = model.model.layers[0].mlp.gate.weight
    grads = []
    for balance, z in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        model.zero_grad()
        step_loss(model, ids[:, :-1], ids[:, 1:], balance=balance, z=z).total.backward()
        grads.append(gate.grad.clone())
    assert not torch.allclose(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


def test_a_resumed_sampler_goes_on_where_it_was(tiny_corpus):
    whole = Sampler(tiny_corpus, {}, window=32)
    expected = [whole.next(4) for _ in range(6)]
    first = Sampler(tiny_corpus, {}, window=32)
    for rows in expected[:3]:
        np.testing.assert_array_equal(first.next(4), rows)
    second = Sampler(tiny_corpus, dict(first.drawn), window=32)
    for rows in expected[3:]:
        np.testing.assert_array_equal(second.next(4), rows)
    total = sum(whole.drawn.values())
    assert abs(whole.drawn["sums"] - 0.6 * total) <= 1


def test_an_interrupted_run_resumes_to_the_same_weights(tiny_corpus, tmp_path):
    whole = Training(tiny_corpus, TINY, tmp_path / "whole")
    assert whole.train(progress=False)
    first = Training(tiny_corpus, TINY, tmp_path / "halves")
    step = first._step

    def interrupted():
        if first.at.steps == 17:
            signal.raise_signal(signal.SIGINT)
        return step()

    first._step = interrupted
    assert not first.train(progress=False)
    second = Training(tiny_corpus, TINY, tmp_path / "halves")
    assert second.at.steps == first.at.steps == 18
    assert second.train(progress=False)
    for (name, one), other in zip(
        whole.model.named_parameters(), second.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    folder = second.export()
    assert (folder / "tokenizer.json").is_file()
    assert len(load_file(folder / "model.safetensors")) > 20
    story = json.loads((folder / "training.json").read_text())
    assert story["tokens"] == TINY.tokens
    assert story["curve"][-1]["validation"]["words"] < np.log(300) - 0.5


def test_a_started_run_keeps_its_recipe(tiny_corpus, tmp_path):
    Training(tiny_corpus, TINY, tmp_path).save()
    Training(tiny_corpus, TINY, tmp_path)
    with pytest.raises(ValueError, match=r"started with lr=0\.003, now 0\.0001: use another --out"):
        Training(tiny_corpus, replace(TINY, lr=1e-4), tmp_path)


def test_leakage_counts_repeated_passages():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 4096, 5000).astype(np.uint16)
    fresh = rng.integers(0, 4096, 1000).astype(np.uint16)
    assert measuring.leakage(train, fresh) == 0
    assert measuring.leakage(train, train[100:400]) == 1


@pytest.mark.parametrize(
    ("module", "option"),
    [
        ("train", "--data"),
        ("card", "--data"),
        ("synopsis.card", "--dense"),
        ("moefy.__main__", "--delta"),
    ],
)
def test_command_lines_explain_themselves(module, option):
    app = typer.Typer()
    app.command()(import_module(f"moelab.training.{module}").main)
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert option in shown.output


def test_without_debian_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    from moelab.training.corpus import prepare

    with pytest.raises(RuntimeError, match="Debian 12"):
        prepare(tmp_path)
