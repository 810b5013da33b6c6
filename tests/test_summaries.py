"""Rouge, and summaries written under a lab's settings and at full precision."""

from __future__ import annotations

from dataclasses import replace

import pytest

import moelab
import tiny_models
import word_summaries
from moelab.bench import grid
from moelab.bench.cases import Case
from moelab.calibration.probes import to_score
from moelab.runs import summaries
from moelab.runs.plan import _lost
from moelab.runs.quality import score_ids
from moelab.runs.rouge import Rouge, f_measures, rouge
from moelab.runs.run import Run
from moelab.store.devices import DEVICES
from moelab.strategies import make

SOURCES = ["w1 w2 w3 w4", "w9 w8 w7 w100 w200 w5"]
NEW = 12


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = word_summaries.switch(tmp_path_factory.mktemp("words"))
    with moelab.open(folder, budget="100%", tiers=(16, 4, 2), progress=False) as lab:
        yield lab


@pytest.fixture(autouse=True)
def plain(request):
    if "lab" in request.fixturenames:
        lab = request.getfixturevalue("lab")
        lab.update(strategy="lru", bits=16, budget="100%", device="disk")


def written(lab, source, most=NEW) -> str:
    return lab.generate(source, temperature=0, max_new_tokens=most).text


def test_rouge_is_what_the_words_give():
    assert rouge(["the cat sat"], ["the cat sat"]) == (1, 1, 1)
    # Of 4 and 3 words 3 are the same, of 3 and 2 pairs 2.
    assert rouge(["the cat sat down"], ["the cat sat"]) == pytest.approx((6 / 7, 4 / 5, 6 / 7))
    assert rouge(["sat cat the"], ["the cat sat"]) == pytest.approx((1, 0, 1 / 3))
    assert rouge(["Packages, listed"], ["package list"]) == (1, 1, 1)
    assert rouge(["cat"], ["cat"]) == (1, 0, 1)
    assert rouge([""], ["cat"]) == (0, 0, 0)
    assert rouge(["the cat sat", ""], ["the cat sat", "cat"]) == (0.5, 0.5, 0.5)
    assert f_measures(["a b", "b"], ["a b", "a"], ["rouge2"]).tolist() == [[1], [0]]
    for texts in (([], []), (["a"], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match=rf"{len(texts[0])} texts and {len(texts[1])} refer"):
            rouge(*texts)


def test_with_everything_in_memory_summaries_are_those_of_full_precision(lab):
    references = [written(lab, source) for source in SOURCES]
    references[1] = "w48 w236 " + references[1]
    score = lab.score(list(zip(SOURCES, references, strict=True)), max_tokens=NEW)
    assert score.rouge == score.rouge_full == rouge([written(lab, s) for s in SOURCES], references)
    assert (score.rouge.rouge2, score.rouge_full.rouge1) == pytest.approx(
        (0.9583, 0.9615), abs=1e-4
    )
    assert (score.kl_mean < 1e-6, score.same_top1) == (True, 1)
    assert score.tokens == NEW * 2  # the target's first tokens, each after what comes before it


@pytest.mark.parametrize("change", [{"bits": 2}, {"budget": "60%", "strategy": "static_pruning"}])
def test_a_summary_is_what_generate_writes_under_these_settings(lab, change):
    full = written(lab, SOURCES[0])
    lab.update(**change)
    lab._engine.recover()
    reference = written(lab, SOURCES[0])
    assert reference != full
    lab._engine.recover()
    score = lab.score((SOURCES[0], reference), max_tokens=NEW)
    assert score.rouge == (1, 1, 1)
    assert score.rouge_full == rouge([full], [reference])
    assert lab._engine.arena.peak_bytes <= lab.settings.budget_bytes


def test_a_score_leaves_the_teacher_forced_figures_as_they_are_without_summaries(lab, monkeypatch):
    lab.update(bits=4, budget="50%")
    pairs = [(SOURCES[0], "w1 w2 w3")] * 2
    lab._engine.recover()
    score = lab.score(pairs, max_tokens=3)
    assert score.rouge is not None
    monkeypatch.delattr(summaries, "Writer")  # nothing is written from here on
    lab._engine.recover()
    with lab._session.claimed() as engine:
        alone = score_ids(engine, to_score(lab, pairs, 3)[0], progress=False)
    assert replace(score, rouge=None, rouge_full=None) == alone
    lab._engine.recover()
    assert lab._scored(pairs, 3, progress=False, summaries=False) == alone


def test_what_needs_no_summary_writes_none_and_a_blank_text_is_scored_on_its_source(
    lab, monkeypatch
):
    monkeypatch.delattr(summaries, "Writer")
    lab.update(bits=4)
    run = lab.generate(SOURCES[0], max_new_tokens=3)
    assert _lost(lab, run) > 0
    monkeypatch.setattr(Run, "text", property(lambda _: " ", lambda *_: None), raising=False)
    assert _lost(lab, run) > 0
    case = Case("lru", "100%", "disk")
    pair = grid._check(lab._store.path, [case], SOURCES[0], 2)[2]
    assert pair == (SOURCES[0], SOURCES[0])
    how = {"strategies": ["lru"], "budgets": ["100%"], "devices": ["disk"], "tokens": 2}
    found = grid.bench(lab._store.path, **how, repeats=1, prompt=SOURCES[0], progress=False)
    assert found["kl_mean"].item() < 1e-6


def test_an_encoder_without_experts_is_still_read_with_a_source(tmp_path):
    folder = tiny_models.nllb(tmp_path / "m", encoder_sparse_step=0)
    with moelab.open(folder, budget="100%", tiers=(16,), progress=False) as lab:
        assert lab.info()["encoder_layers"] == 0
        run = lab.generate(SOURCES[0], max_new_tokens=3)
        assert _lost(lab, run) < 1e-6
        assert isinstance(grid._check(lab._store.path, [], SOURCES[0], 2)[2], tuple)


def test_a_summary_ends_with_the_text(lab, monkeypatch):
    first = written(lab, SOURCES[0]).split()
    ends = {int(first[3][1:])}
    monkeypatch.setattr(lab._session, "eos", lambda *, chat: ends)
    reference = " ".join(first[:4])
    assert lab.score((SOURCES[0], reference), max_tokens=NEW).rouge == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w1 w2", r"'w1 w2': this model is measured on \(source, target\) pairs"),
        (["w1", "w2"], r"'w1': this model is measured on \(source, target\) pairs"),
        ([("w1", "w2", "w3")], r"is measured on \(source, target\) pairs"),
        ([("w1", "w2"), ("w1", " ")], r"\('w1', ' '\): source and target need at least one word"),
        (("", "w2"), "source and target need at least one word"),
        ([], "an empty list of texts: give one or more"),
        (None, "brings no probe texts"),
    ],
)
def test_what_is_no_pair_of_texts_is_refused(lab, text, said):
    with pytest.raises(ValueError, match=said):
        lab.score(text)


def test_other_models_take_texts_and_have_no_rouge(tmp_path):
    with moelab.open(tiny_models.mixtral(tmp_path / "m"), budget="100%", progress=False) as lab:
        one, two = (lab.score(text) for text in ("A text.", "Another one."))
        both = lab.score(["A text.", "Another one."])
        assert (one.rouge, both.rouge_full) == (None, None)
        assert both.tokens == one.tokens + two.tokens
        with pytest.raises(ValueError, match="is measured on texts"):
            lab.score(("A text.", "Another one."))


def test_bars_are_shown_on_request(lab, capsys):
    lab.score((SOURCES[0], "w1 w2"), max_tokens=2, progress=True)
    shown = capsys.readouterr().err
    assert "score: 100%" in shown
    assert "summaries: 100%" in shown
    lab.score((SOURCES[0], "w1 w2"), max_tokens=2, progress=False)
    assert capsys.readouterr().err == ""


def test_an_interrupt_leaves_a_lab_that_goes_on(lab, monkeypatch):
    lab.update(device="nvme", bits=4, budget="50%", strategy=make("hobbit"))
    pair, write, calls = (SOURCES[0], "w1 w2 w3"), summaries.Writer.__call__, []

    def interrupted(self, *given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(summaries.Writer, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lab.score([pair, pair], max_tokens=3)
    assert lab._engine.loader._profile == DEVICES["nvme"]
    assert lab._engine.reference is None
    assert not lab.cache_map()["bits"].any()
    assert lab.score(pair, max_tokens=3).rouge == Rouge(0, 0, 0)
    assert len(lab.generate(SOURCES[0], max_new_tokens=3, temperature=0).tokens) == 3
