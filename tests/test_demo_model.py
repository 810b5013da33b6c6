"""The bundled model: what ships is whole, and the way it was trained can be gone again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import import_module

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from moelab import demo
from moelab.demo.held_out import PROMPTS
from moelab.training import measure
from moelab.training.corpus import SOURCES, save_tokens, split, train_tokenizer
from moelab.training.fast_step import step_loss
from moelab.training.sampler import Sampler
from moelab.training.shared_adamw import SharedAdamW
from moelab.training.train import Recipe, Run, build_model

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
    tokenizer = train_tokenizer(texts, 300)
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
        assert demo.prompts()[domain] == list(PROMPTS[domain])
        assert 250 <= len(tokenizer(demo.probes()[domain]).input_ids) <= 550
        for text in (*demo.prompts()[domain], demo.probes()[domain]):
            assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_probe_perplexities_are_those_of_the_card(shipped, card):
    model, tokenizer = shipped
    for domain, text in demo.probes().items():
        now = measure.text_perplexity(model, tokenizer, text)
        assert now == pytest.approx(card["probe_perplexity"][domain], rel=0.01), domain


def test_the_card_says_what_was_measured(card):
    from moelab.training.card import curve_svg, render

    assert (demo.HERE / "CARD.md").read_text("utf-8") == render(card)
    assert (demo.HERE / "curve.svg").read_text("utf-8") == curve_svg(card["training"]["curve"])
    shipped = json.loads((demo.checkpoint() / "training.json").read_text())
    assert card["training"] == shipped
    assert card["bits"]["16"]["kl_mean"] <= 1e-6
    kl = [card["bits"][bits]["kl_mean"] for bits in ("8", "4", "3", "2")]
    assert kl == sorted(kl)


def test_the_full_model_comes_back_after_a_measurement_at_low_bits(shipped):
    model, _ = shipped
    bank = model.model.layers[0].mlp.experts
    before = bank.down_proj.detach().clone()
    with measure.all_experts_at(model, 2):
        assert not torch.equal(bank.down_proj, before)
    assert torch.equal(bank.down_proj, before)


# ------------------------------------------------------------------------------- training


def test_the_fast_step_has_the_stock_models_loss_and_gradients():
    model = build_model(TINY)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(0, TINY.vocabulary, (3, 25))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    step_loss(model, inputs, targets).total.backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(inputs).logits.flatten(0, 1)
    stock = torch.nn.functional.cross_entropy(logits, targets.flatten())
    stock.backward()
    with torch.no_grad():
        again = step_loss(model, inputs, targets).cross_entropy
    assert float(again) == pytest.approx(stock.item(), abs=1e-5)
    for name, p in model.named_parameters():
        assert (p.grad - fast[name]).abs().max() <= 1e-5, name


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


def test_shared_adamw_is_adamw():
    torch.manual_seed(0)
    ours, theirs = build_model(TINY), build_model(TINY)
    shared = SharedAdamW(ours, 1)
    shared.join(0, 0)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    stock = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(3):
        ids = torch.randint(0, TINY.vocabulary, (2, 17))
        for model in (ours, theirs):
            step_loss(model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).total.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        stock.step()
        stock.zero_grad()
        shared.step(1e-3)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


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
    whole = Run(tiny_corpus, TINY, tmp_path / "whole", 1)
    assert whole.train(progress=False)
    first = Run(tiny_corpus, TINY, tmp_path / "halves", 1)
    step = first._step

    def interrupted(sampler, rank):
        if first.at.steps == 17:
            signal.raise_signal(signal.SIGINT)
        return step(sampler, rank)

    first._step = interrupted
    assert not first.train(progress=False)
    second = Run(tiny_corpus, TINY, tmp_path / "halves", 1)
    assert second.at.steps == first.at.steps == 18
    assert second.train(progress=False)
    assert torch.equal(whole.shared.parameters, second.shared.parameters)
    folder = second.export()
    assert (folder / "tokenizer.json").is_file()
    assert len(load_file(folder / "model.safetensors")) > 20
    story = json.loads((folder / "training.json").read_text())
    assert story["tokens"] == TINY.tokens
    assert story["curve"][-1]["validation"]["words"] < np.log(300) - 0.5


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one(tiny_corpus, tmp_path):
    """In a fresh interpreter, because training forks."""
    recipe = replace(TINY, tokens=64 * 5, balance=(0.0, 0.0), z=0.0)
    start = Run(tiny_corpus, recipe, tmp_path / "one", 1)
    before = start.shared.parameters.clone()
    start.train(progress=False)
    script = f"""
from pathlib import Path
from moelab.training.corpus import Corpus
from moelab.training.train import Recipe, Run
recipe = Recipe(**{asdict(recipe)!r})
run = Run(Corpus.load(Path({str(tiny_corpus.folder)!r})), recipe, Path({str(tmp_path)!r}), 2)
assert run.train(progress=False)
"""
    top = str(demo.HERE.parent.parent)
    env = {**os.environ, "PYTHONPATH": top}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    two = load_file(tmp_path / "state.safetensors")["parameters"]
    moved = (start.shared.parameters - before).abs().mean()
    assert (two - start.shared.parameters).abs().mean() < 0.01 * moved


def test_a_new_target_bends_the_learning_rate_from_where_it_is(tiny_corpus, tmp_path):
    run = Run(tiny_corpus, TINY, tmp_path, 1)
    run.at.tokens, run.at.steps = TINY.tokens // 2, 20
    run.save()
    after = Run(tiny_corpus, replace(TINY, tokens=2 * TINY.tokens), tmp_path, 1).at
    assert after.target == 2 * TINY.tokens
    assert after.lr(TINY) == pytest.approx(TINY.lr / 2)
    after.tokens = after.target
    assert after.lr(TINY) == 0
    with pytest.raises(ValueError, match="only `tokens` may change"):
        Run(tiny_corpus, replace(TINY, lr=1e-4), tmp_path, 1)


def test_leakage_counts_repeated_passages():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 4096, 5000).astype(np.uint16)
    fresh = rng.integers(0, 4096, 1000).astype(np.uint16)
    assert measure.leakage(train, fresh) == 0
    assert measure.leakage(train, train[100:400]) == 1


@pytest.mark.parametrize("module", ["training.train", "training.card", "demo.held_out"])
def test_command_lines_explain_themselves(module):
    app = import_module(f"moelab.{module}").app
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert "--data" in shown.output


def test_without_debian_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    from moelab.training.corpus import prepare

    with pytest.raises(RuntimeError, match="Debian 12"):
        prepare(tmp_path)
