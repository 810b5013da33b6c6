"""Figures of quality that calibrations go by: what each is worth, and that EdgeMoE's and SwapMoE's
profiles hold what was measured by the one that was asked for."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import moelab
import tiny_models
import word_summaries
from moelab.calibration import edgemoe, profile, swapmoe
from moelab.calibration.checks import check
from moelab.calibration.figures import FIGURES, Evaluator
from moelab.calibration.probes import parted, read
from moelab.calibration.swapmoe_quality import ShortLayers
from moelab.engine.generation import Stream
from moelab.runs.quality import kl_divergence
from moelab.runs.rouge import rouge
from moelab.runs.summaries import Writer
from moelab.strategies.edgemoe import edgemoe as strategy
from moelab.strategies.swapmoe_planner import Estimates

SOURCES = [f"w{at} w{at + 1} w{7 * at} w{3 * at + 5}" for at in range(1, 9)]
NEW = 6


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = word_summaries.switch(
        tmp_path_factory.mktemp("words"),
        num_experts=3,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
    )
    with moelab.open(folder, budget="100%", tiers=(16, 4, 2), progress=False) as lab:
        yield lab


@pytest.fixture(scope="module")
def pairs(lab):
    """Each with the model's own summary, one word of it changed in every other pair."""
    found = []
    for at, source in enumerate(SOURCES):
        words = lab.generate(source, temperature=0, max_new_tokens=NEW).text.split()
        found.append((source, " ".join([*words[:-1], "w250"] if at % 2 else words)))
    return found


def written(lab, bits) -> list[str]:
    lab.update(bits=bits, strategy="lru", budget="100%")
    texts = [lab.generate(s, temperature=0, max_new_tokens=NEW).text for s in SOURCES]
    lab.update(bits=16)
    return texts


def test_rouge2_is_that_of_what_is_written_at_those_bits_and_a_loss_its_relative_fall(lab, pairs):
    references = [target for _, target in pairs]
    evaluator = Evaluator(lab, pairs, max_tokens=NEW, quality="rouge2")
    full, low = evaluator(), evaluator(lambda _: 2)
    assert full == pytest.approx([1, 0.8] * 4)
    assert np.mean(low) == pytest.approx(rouge(written(lab, 2), references).rouge2)
    assert low != full == evaluator(lambda _: 16)
    figure = evaluator.figure
    assert figure.loss(low, full) == pytest.approx(1 - np.mean(low) / 0.9)
    assert figure.loss(full, full) == 0
    assert figure.error(full, full) == 0
    assert figure.error([0, 1], [1, 1]) == pytest.approx(math.sqrt(0.5 / 2))
    with pytest.raises(ValueError, match="these 8 pairs have a Rouge-2 of 0"):
        figure.loss([0.0], [0.0, 0.0])


def test_kl_and_loss_are_those_of_the_logits(lab, pairs):
    engine = lab._engine
    ids = [read(lab, pair, NEW) for pair in pairs[:3]]

    def logits(bits):
        with engine.full_precision(lambda _: bits):
            return [Stream(engine, one.source).forward(one, keep=len(one)) for one in ids]

    full, low = logits(16), logits(2)
    kl, nll = (Evaluator(lab, pairs[:3], max_tokens=NEW, quality=q) for q in ("kl", "loss"))
    mean = torch.cat([kl_divergence(a, b) for a, b in zip(full, low, strict=True)]).mean()
    assert kl.figure.loss(kl(lambda _: 2), kl()) == pytest.approx(float(mean))
    assert kl()[0] == 0
    each = [
        torch.nn.functional.cross_entropy(a[:-1], torch.tensor(one[1:]), reduction="none")
        for a, one in zip(low, ids, strict=True)
    ]
    assert nll(lambda _: 2)[0] == pytest.approx(float(torch.cat(each).mean()))
    assert nll.figure.loss([math.log(1.5)], [0.0]) == pytest.approx(0.5)
    assert nll.figure.error([1.0], [1.0]) is None


def test_the_encoder_reads_again_only_where_its_experts_changed(lab, pairs, monkeypatch):
    from moelab.engine import generation

    read_by, encoded = [], generation.encoded
    monkeypatch.setattr(generation, "encoded", lambda *a: (read_by.append(1), encoded(*a))[1])
    evaluator = Evaluator(lab, pairs[:2], max_tokens=NEW, quality="rouge2")
    alone = {}
    for place in ((1, 0), (1, 1), (0, 0), (1, 0)):  # layer 0 is the encoder's
        found = evaluator(lambda at, place=place: 2 if at == place else 4)
        alone.setdefault(place, found)
        assert alone[place] == found
    assert len(read_by) == 2 * 3
    fresh = Evaluator(lab, pairs[:2], max_tokens=NEW, quality="rouge2")
    assert alone[1, 1] == fresh(lambda at: 2 if at == (1, 1) else 4)


def test_figures_take_texts_spread_evenly(lab, pairs):
    some = FIGURES["loss"](lab, pairs, NEW, 4)
    assert some.texts == pairs[::2]
    assert FIGURES["rouge2"](lab, pairs * 4, NEW).texts == [
        (pairs * 4)[at * 32 // 24] for at in range(24)
    ]
    assert FIGURES["kl"](lab, pairs, NEW).texts == pairs


@pytest.mark.parametrize("name", ["edgemoe", "swapmoe"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quality": "bleu"}, "quality='bleu': one of kl, loss, rouge2"),
        ({"quality": "kl", "pairs": 0}, "pairs=0: a whole number of texts"),
    ],
)
def test_what_is_no_figure_is_refused(lab, pairs, name, options, said):
    with pytest.raises(ValueError, match=said):
        lab.calibrate(name, texts=pairs, **options)


def test_a_model_that_writes_no_summaries_has_no_rouge2(tmp_path):
    with moelab.open(tiny_models.mixtral(tmp_path / "m"), budget="100%", progress=False) as plain:
        for name in ("edgemoe", "swapmoe"):
            with pytest.raises(ValueError, match="is of summaries, and this model goes on with"):
                plain.calibrate(name, texts=["A text of some words."], quality="rouge2")


def test_edgemoe_assigns_bits_by_rouge2_and_keeps_which_figure_it_was(lab, pairs, monkeypatch):
    monkeypatch.setattr(edgemoe, "CURVE_POINTS", 1)
    options = {"texts": pairs, "max_tokens": NEW, "progress": False}
    found = lab.calibrate("edgemoe", quality="rouge2", tolerated=0.1, pairs=6, **options)
    assert found.made_from["quality"] == found.data["quality"] == "rouge2"
    assert found.made_from["pairs"] == 6
    counted, held_out = parted(pairs, 0.25)
    assert (len(counted), len(held_out)) == (6, 2)
    evaluator = Evaluator(lab, counted, max_tokens=NEW, quality="rouge2", most=6)
    full, low = evaluator(), evaluator(lambda _: 2)
    assert found.data["full"] == pytest.approx(np.mean(full))
    assert found.data["levels"]["2"] == pytest.approx(evaluator.figure.loss(low, full))
    error = evaluator.figure.error(low, full)
    assert found.data["standard_errors"]["level 2"] == pytest.approx(error)
    one = evaluator(lambda at: 2 if at == (1, 2) else 4)
    assert found.data["importance"][1][2] == pytest.approx(evaluator.figure.loss(one, full))
    part = strategy(found.data).allocate
    low, high, k = part.sensitivity.choose(0.1)
    assert part.tolerated == 0.1
    assert dict(part.sensitivity.curves[low, high])[k] <= 0.1 or k == 0
    monkeypatch.setattr(edgemoe, "make", lambda *_, **__: pytest.fail("it is there"))
    assert lab.calibrate("edgemoe", quality="rouge2", tolerated=0.1, pairs=6, **options) == found
    with pytest.raises(pytest.fail.Exception):
        lab.calibrate("edgemoe", tolerated=0.1, **options)  # by another figure: measured again


def test_an_interrupted_one_goes_on_with_the_summaries_that_were_written(lab, pairs, monkeypatch):
    monkeypatch.setattr(edgemoe, "CURVE_POINTS", 1)
    options = {"texts": pairs, "quality": "rouge2", "max_tokens": NEW, "progress": False}
    calls, write = [], Writer.__call__

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return write(self, *given)

    monkeypatch.setattr(Writer, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.calibrate("edgemoe", again=True, **options)
    assert lab._engine.reference is None
    both = len(pairs)  # at full precision: 6 to count on, the others held out
    done = both + (39 - both) // 6 * 6
    lab.calibrate("edgemoe", again=True, **options)
    on = len(calls) - 40
    lab.calibrate("edgemoe", again=True, **options)
    assert done + on == len(calls) - 40 - on


def test_swapmoe_plans_by_rouge2(lab, pairs):
    options = {"every": (2, 4), "percent": (50, 75), "tried": 0, "max_tokens": NEW}
    made = swapmoe.made_from(lab, quality="rouge2", pairs=4, **options)
    with lab._session.claimed():
        data = swapmoe.make(lab, pairs, made, {}, progress=False)
    data = json.loads(json.dumps(data))
    check("swapmoe", data, lab._shape)
    assert data["quality"] == "rouge2"
    assert np.shape(data["loss"]) == (2, 2, 3)
    assert (np.array(data["loss"])[..., -1] == 0).all()
    assert data["standard_error"] > 0
    for plan in data["plans"].values():
        assert {"loss", "added_loss", "uniform_loss"} < set(plan)
        assert plan["loss"] <= plan["uniform_loss"] + 1e-9
    assert Estimates.of(data).base_ms > 0


def masked(lab, figure, at, masks, renew=lambda: None) -> str:
    with lab._engine.full_precision():
        for layer, chosen in masks.items():
            lab._engine.adapter.steer(layer, [e in chosen for e in range(3)])
        try:
            return Writer(lab._session, NEW)(figure.ids[at].source, renew)
        finally:
            lab._engine.adapter.release()


@pytest.mark.parametrize("short", [{1: 1}, {0: 2, 1: 1}])
def test_a_short_layer_begins_with_the_other_texts_most_important_and_is_renewed(lab, pairs, short):
    figure = FIGURES["rouge2"](lab, pairs[:2], NEW)
    scores = [np.zeros((2, NEW + 1, 3)) for _ in range(2)]
    scores[0][:, 0], scores[1][:, 0] = (3, 2, 1), (1, 2, 3)
    # Importance that the gates cannot outweigh: an update always chooses expert 1 if it was asked.
    layers = ShortLayers(lab._engine, figure, scores, [[1.0, 1e9, 1.0]] * 2)
    for at, order in enumerate([(2, 1, 0), (0, 1, 2)]):
        masks = {layer: order[:n] for layer, n in short.items()}
        assert layers._write(short, 10**6, at) == masked(lab, figure, at, masks)
    asked, chosen, steer = [], [], lab._engine.adapter.steer

    def told(layer, allowed=None, bias=None):
        if allowed is not None and layer == 1:
            chosen.append(int(np.flatnonzero(allowed)[0]))
            wish = lab._engine.adapter._taps[1].unmasked() if asked or len(chosen) > 1 else None
            asked.append(None if wish is None else int(wish[0][-1, 0]))
        steer(layer, allowed, bias)

    lab._engine.adapter.steer = told
    try:
        layers._write({1: 1}, 1, 0)
    finally:
        del lab._engine.adapter.steer
    assert chosen[0] == 2
    assert len(chosen) == NEW + 1
    assert chosen[1:] == asked[1:]  # top-1 and f = 1: what the router alone would have asked for
    loss, swaps, error = layers(short, 2)
    assert (swaps >= 0, error >= 0, loss > 0) == (True, True, True)
    assert layers({0: 3, 1: 3}, 2) == (0, 0, None)
    # The encoder's best expert is another one in each text: a swap a text, however short it is.
    assert layers({0: 1}, 10**6)[1] * sum(map(len, figure.ids)) == pytest.approx(2)


@pytest.mark.parametrize("name", ["edgemoe", "swapmoe"])
def test_a_profile_of_an_unknown_figure_is_damaged(name):
    file = json.loads((profile.SHIPPED / f"{name}.json").read_text())
    with moelab.open("demo", budget="100%", progress=False) as demo:
        check(name, file["data"] | {"quality": "rouge2"}, demo._shape)
        with pytest.raises(ValueError, match="quality"):
            check(name, file["data"] | {"quality": "bleu"}, demo._shape)
