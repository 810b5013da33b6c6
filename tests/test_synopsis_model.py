"""The bundled synopsis model: its card is of these weights, and it is worth more than a rule."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open

import moelab
from moelab.bench.grid import bench
from moelab.demo import HERE, synopsis
from moelab.training.page import curve_svg
from moelab.training.synopsis.card import Opened, write
from moelab.training.synopsis.page import MODELS, curves, render

OURS, DENSE = MODELS


@pytest.fixture(scope="module")
def card():
    return json.loads((HERE / "synopsis.json").read_text("utf-8"))


def test_the_card_says_what_was_measured(card):
    assert (HERE / "SYNOPSIS.md").read_text("utf-8") == render(card)
    for drawn in (HERE / "synopsis_curve.svg").read_text("utf-8"), curve_svg(curves(card)):
        assert all(f">{name} " in drawn for name in MODELS)


def test_the_card_is_of_these_weights(card):
    shipped = synopsis.checkpoint()
    assert card["training"][OURS] == json.loads((shipped / "training.json").read_text())
    with safe_open(shipped / "model.safetensors", "pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert sum(map(np.prod, sizes)) == card["models"][OURS]["parameters"]
    texts = [sample["text"] for sample in card["samples"]]
    now = write(Opened.of(shipped), texts).texts
    same = [a == sample["written"] for a, sample in zip(now, card["samples"], strict=True)]
    assert sum(same) >= len(same) - 1  # elsewhere, a tie may fall otherwise


def test_the_lab_writes_what_stock_transformers_writes_whatever_the_budget():
    texts = [pairs[0].text for pairs in synopsis.pairs().values()][:6]
    wanted = write(Opened.of(synopsis.checkpoint()), texts).texts
    with moelab.open("synopsis", budget="100%", measure_kl=False, progress=False) as lab:
        for budget in ("100%", "10%"):
            lab.update(budget=budget)
            found = [lab.generate(text, temperature=0).text for text in texts]
            assert [text.strip() for text in found] == wanted


def test_a_bench_of_it_ends_where_its_summaries_end():
    how = {"strategies": ["lru"], "budgets": ["25%"], "devices": ["disk"], "quality": False}
    frame = bench("synopsis", tokens=48, repeats=1, **how)
    assert 2 <= frame["tokens"][0] < 30


def test_it_is_clearly_above_every_baseline_and_not_below_a_dense_model_trained_alike(card):
    figures = {name: found["rouge2"] for name, found in card["rouge"].items()}
    ours = figures.pop(OURS)
    assert len(figures) == 6
    assert all(ours > other for other in figures.values())
    best = max(figures.keys() - {DENSE}, key=figures.__getitem__)
    assert card["against"].keys() == {DENSE, best}
    assert card["against"][best]["low"] > 0.04
    assert card["against"][DENSE]["difference"] > 0  # 0 is in its interval too
    # before the reward steps
    loss = [min(p["validation"] for p in card["training"][name]["curve"]) for name in MODELS]
    assert loss[0] < loss[1] - 0.05
    active = [card["models"][name]["active_parameters"] for name in MODELS]
    assert active[0] == pytest.approx(active[1], rel=0.01)  # the routers
    recipes = [card["training"][name]["recipe"] for name in MODELS]
    assert {k for k in recipes[0] if recipes[0][k] != recipes[1].get(k)} == {"experts"}
