"""`moelab.open("synopsis")`: what the bundled encoder-decoder brings, and where it may lack.

Its weights are stood in for by a tiny encoder-decoder's, which reads bytes.
"""

from __future__ import annotations

import json

import pytest

import moelab
import tiny_models
from moelab import catalogue
from moelab.demo import synopsis
from moelab.runs.compare import Comparison
from moelab.runs.rouge import rouge
from moelab.views.report import Report
from moelab.widgets import Dashboard
from moelab.widgets.frame import Framer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synopsis")
    return tiny_models.edit(tiny_models.switch(folder / "shards"), folder / "model")


@pytest.fixture(scope="module")
def lab(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MOELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patched.setattr(synopsis, "MODEL", tiny)
        with moelab.open("synopsis", tiers=(16, 4), progress=False) as lab:
            yield lab


def test_descriptions_to_choose_from_are_short_held_out_ones_with_a_known_synopsis(lab):
    assert lab.name == lab.info()["name"] == "synopsis"
    offered = lab.prompts()
    assert len(offered) > 30
    held_out = {p.text: p.synopsis for these in synopsis.pairs("test").values() for p in these}
    for texts in offered.values():
        assert 1 <= len(texts) <= synopsis.OFFERED
        for text in texts:
            assert len(text) in synopsis.READABLE
            assert catalogue.reference("synopsis", f" {text}\n") == held_out[text] != ""


def test_a_text_that_was_edited_and_another_model_have_no_reference(lab):
    text = next(iter(lab.prompts().values()))[0]
    assert catalogue.reference("synopsis", text + " And more.") == ""
    assert catalogue.reference("demo", text) == ""


def test_it_is_measured_on_validation_pairs_never_on_those_to_choose_from(lab):
    probes = lab.probes()
    held_out = synopsis.pairs("validation")
    assert probes.keys() == held_out.keys()
    assert all(probe in held_out[section] for section, probe in probes.items())
    assert not {p.text for p in probes.values()} & {t for of in lab.prompts().values() for t in of}
    lab.update(bits=4)
    score = lab.score(max_tokens=4, progress=False)
    assert score.tokens > 3 * len(probes)
    assert score.kl_mean > 0
    lab.update(bits=16)


def test_without_its_weights_opening_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(synopsis, "MODEL", tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"\.json is missing: reinstall moelab"):
        moelab.open("synopsis")


# -- on the screen ------------------------------------------------------------------------------


def test_beside_a_held_out_text_s_summary_its_reference_is_shown_and_rouge_when_it_has_ended(lab):
    text = next(iter(lab.prompts().values()))[0]
    known, framer = catalogue.reference("synopsis", text), Framer(lab, lab.info())
    assert framer.build()["reference"] == ""
    lab.update(device="hdd")
    run = lab.start(text, max_new_tokens=400, ignore_eos=True)
    going = framer.build()
    run.stop()
    run.join()
    lab.update(device="disk")
    assert (going["running"], going["reference"]) == (True, f"Reference: {known}")
    found = "{:.2f}, {:.2f}, {:.2f}".format(*rouge([run.text], [known]))
    assert framer.build()["reference"] == f"Reference: {known} (Rouge-1, 2, L: {found})"
    json.dumps(framer.build()["reference"])


def test_of_a_text_that_was_edited_nothing_is_said_to_be_the_reference(lab):
    text, framer = next(iter(lab.prompts().values()))[0], Framer(lab, lab.info())
    for asked, known in ((text + " more", False), (text + "\n", True), (text, True)):
        lab.generate(asked, max_new_tokens=2)
        assert bool(framer.build()["reference"]) == known


def test_its_dashboard_begins_with_a_held_out_text_and_a_summary_s_length(lab):
    board = Dashboard(lab)
    texts = [text for of in lab.prompts().values() for text in of]
    assert (board.form["prompt"], board.form["max_new_tokens"]) == (texts[0], 48)
    assert board.options["encoder_layers"] == 2
    board.close()


def test_wherever_a_run_is_read_its_text_begins_on_a_line_of_its_own(lab):
    run = lab.generate("A source.", max_new_tokens=3, ignore_eos=True)
    recording = run.recording()
    assert Report.of(recording).frame["prompt"] == Framer(lab, lab.info()).build()["prompt"]
    assert Report.of(recording).frame["prompt"] == "A source.\n"
    beside = Comparison({"a": recording, "b": recording})
    assert "A source.\n</span>" in beside._repr_html_()
