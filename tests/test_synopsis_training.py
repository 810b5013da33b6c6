"""The training of the model that writes synopses: its pairs, its first weights, its resumption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import SwitchTransformersForConditionalGeneration

from moelab.training.synopsis import corpus
from moelab.training.synopsis.corpus import Corpus, Pair
from moelab.training.synopsis.reward import rewarded, worth
from moelab.training.synopsis.train import (
    COMMON,
    IGNORED,
    PADDING,
    Batch,
    Recipe,
    Training,
    batches,
    build_model,
    renamed,
    step_loss,
)

TINY = replace(
    Recipe(layers=2, experts=2, hidden=128, ffn=16, heads=5, vocabulary=64, epochs=2, pairs=4),
    reward_steps=2,
)


def pair(package: str, text: str = "", source: str = "") -> Pair:
    return Pair(package, source or package, "utils", text or f"about {package}", "a synopsis")


def test_a_description_is_read_as_text():
    control = " One line that\n is wrapped.\n .\n Features:\n  * a list\n  * of two\n After."
    assert (
        corpus.flowing(control) == "One line that is wrapped.\nFeatures:\n* a list\n* of two After."
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [("gcc-12-cross", "gcc"), ("python3.11", "python"), ("zlib", "zlib"), ("0ad", "0ad")],
)
def test_sources_of_other_versions_are_one_group(source, name):
    assert corpus.group(source) == name


def test_groups_stay_together_and_give_few_pairs():
    rows = [
        pair(f"p{i}-{j}", f"text {'abc'[j % 3]} of {i}", f"s-{i}x")
        for i in range(400)
        for j in range(3)
    ]
    rows += [
        pair(f"gcc-{v}-{j}", f"word {chr(97 + j)} here", f"gcc-{v}")
        for v in (11, 12)
        for j in range(9)
    ]
    parts = corpus.split(rows)
    found = {name: {corpus.group(p.source) for p in part} for name, part in parts.items()}
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    every = [p for part in parts.values() for p in part]
    assert sum(corpus.group(p.source) == "gcc" for p in every) == corpus.PER_GROUP
    assert parts == corpus.split(rows[::-1])  # by the texts, not by their order


def test_texts_that_differ_in_names_only_are_few():
    rows = [
        pair(f"lib{chr(97 + i)}", f"the source of crate-{i}", f"rust{'xyz'[i % 3]}{chr(97 + i)}")
        for i in range(26)
    ]
    assert sum(map(len, corpus.split(rows).values())) == corpus.PER_GROUP


def test_the_tokenizer_gives_back_what_it_was_given():
    tokenizer = corpus.train_tokenizer(["Python 3.11 library", "another library 2023"] * 3)
    for text in ("Python 3.11 library, 2023", "zlib1g: a-b (x86)"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids[-1:], skip_special_tokens=False) == corpus.END
    first, later = tokenizer.encode("library").ids[0], tokenizer.encode("a library").ids
    assert first in later  # the same word is the same token at the beginning of a text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Foo is a tool that counts. It is quick.", "tool"),
        ("libfoo provides the codecs of X, and more.", "codecs of X"),
        ("Small and quick: a shell.", "Small and quick"),
        ("zsh-5: Zsh is a shell.", "shell"),
    ],
)
def test_a_lead_is_what_the_first_sentence_says(text, what):
    assert corpus.lead(text) == what


def test_what_a_target_repeats_is_renamed_as_its_source():
    torch.manual_seed(0)
    source, target = torch.randint(700, 3000, (4, 30)), torch.randint(3001, 4000, (4, 8))
    target[:, 2:5], target[0, 6:] = source[:, 9:12], IGNORED
    target[1, 0] = source[1, 0] = COMMON - 1
    new = renamed(Batch(source, target), 0.5, 4096)
    assert 0.4 < float((new.source != source).float().mean()) < 0.6
    assert (new.target[:, 2:5] == new.source[:, 9:12]).all()
    assert (new.target[:, 5:] == target[:, 5:]).all()
    assert new.target[1, 0] == new.source[1, 0] == COMMON - 1
    assert (new.source >= COMMON - 1).all()


def test_the_model_begins_able_to_copy():
    torch.manual_seed(3)
    source = torch.randint(2, 500, (16, 24))
    recipe = replace(Recipe(), layers=2, experts=4, vocabulary=512)
    begun, plain = (
        step_loss(build_model(first).eval(), Batch(source, source[:, :12].clone())).cross_entropy
        for first in (recipe, replace(recipe, spike=0.0, match=0.0, loud=1.0, quiet=1.0))
    )
    assert begun < 0.6 * plain


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"draws": 1}, "draws=1: 2 or more"), ({"epochs": 0}, "epochs=0"), ({"lr": -1}, "above 0")],
)
def test_a_recipe_that_cannot_train_is_refused_before_it_does(setting, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **setting)


def test_too_few_heads_are_refused():
    with pytest.raises(ValueError, match=r"heads=4: 5 or more"):
        build_model(replace(TINY, heads=4))


def test_the_losses_leave_padding_out():
    model = build_model(TINY).eval()
    source, target = torch.tensor([[5, 6, 7, 1]]), torch.tensor([[8, 9, 1]])
    wider = Batch(
        torch.nn.functional.pad(source, (0, 3), value=PADDING),
        torch.nn.functional.pad(target, (0, 2), value=IGNORED),
    )
    for mine, padded in zip(
        step_loss(model, Batch(source, target)), step_loss(model, wider), strict=True
    ):
        torch.testing.assert_close(mine, padded)


def test_an_epoch_has_every_pair_once_and_like_lengths_together():
    rows = [([2] * (3 + i % 40), [3, 1]) for i in range(203)]
    found = batches(rows, epoch=1, pairs=16, seed=0)
    assert sorted(i for batch in found for i in batch) == list(range(203))
    assert (
        max(max(len(rows[i][0]) for i in b) - min(len(rows[i][0]) for i in b) for b in found) < 15
    )
    assert (
        found
        == batches(rows, epoch=1, pairs=16, seed=0)
        != batches(rows, epoch=2, pairs=16, seed=0)
    )


@pytest.fixture
def pairs(tmp_path: Path) -> Corpus:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 9, 6, 8, 7, 9, 5, 6):
        ids = torch.randint(2, 64, (length,), generator=generator).tolist()
        rows.append(([*ids, 1], [*ids[:2], 1]))
    parts = {name: [pair("p")] * len(rows) for name in ("train", "validation")}
    leads = [[*source[1:3], 1] for source, _ in rows]
    (tmp_path / "tokenizer").mkdir()
    corpus.train_tokenizer(["a text"]).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return Corpus(parts, {"train": rows, "validation": rows[:4]}, leads, tmp_path)


def test_a_resumed_training_is_the_uninterrupted_one(pairs, tmp_path, monkeypatch):
    def decode(rows: list[list[int]]) -> list[str]:  # some are right
        return ["a synopsis" if sum(row) % 2 else "b c" for row in rows]

    monkeypatch.setattr(Training, "decode", lambda self, rows: decode(rows))
    whole = Training(pairs, TINY, tmp_path / "whole")
    assert whole.train(progress=False)
    parted = Training(pairs, TINY, tmp_path / "parted")
    for _ in range(5):
        parted._step()
    parted.tokens = parted.at.seen  # it is over, for now: the state is saved
    assert parted.train(progress=False)
    resumed = Training(pairs, TINY, tmp_path / "parted")
    assert resumed.at.steps == 5
    assert resumed.train(progress=False)
    assert resumed.at.steps == whole.at.steps == 6
    assert ["worth" in entry for entry in whole.at.losses] == [False, True]
    assert whole.at.losses[1]["gradient_norm"] > 0
    assert 0 < whole.at.losses[0]["least_share"] <= 1
    made = resumed.export()
    again = SwitchTransformersForConditionalGeneration.from_pretrained(made)
    assert again.generation_config.max_new_tokens == 48
    assert json.loads((made / "training.json").read_text())["pairs"] == {
        "train": 8,
        "validation": 8,
    }
    with safe_open(made / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(
            resumed.model.state_dict()[name], value, rtol=0, atol=0, msg=name
        )


def test_what_is_worth_more_becomes_likelier():
    """A model whose summaries are right when they are short learns to end them."""
    tokenizer = corpus.train_tokenizer(["one two three"] * 3)
    torch.manual_seed(0)
    model = build_model(replace(TINY, vocabulary=300))
    source = torch.tensor([tokenizer.encode("one two").ids] * 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def decode(rows: list[list[int]]) -> list[str]:
        return ["one two" if 1 in row[:4] else "three four" for row in rows]

    found = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):  # as in training
            made = rewarded(model, source, ["one two"] * 8, decode, 4)
        made.total.backward()
        assert model.decoder.block[0].layer[0].SelfAttention.q.weight.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(made.worth.mean()))
    assert made.worth.shape == (8, 4)
    assert found[0] < 0.5
    assert sum(found[-3:]) / 3 > 0.9


def test_the_worth_is_of_pairs_and_order():
    assert worth(["a cat sat", "a dog", ""], ["a cat sat"] * 3).tolist() == pytest.approx(
        [1.5, 0.2, 0.0]
    )


def test_another_recipe_does_not_go_on_with_a_training(pairs, tmp_path):
    first = Training(pairs, TINY, tmp_path)
    first.tokens = 0
    first.train(progress=False)
    with pytest.raises(ValueError, match="use another --out"):
        Training(pairs, replace(TINY, lr=1e-3), tmp_path)
