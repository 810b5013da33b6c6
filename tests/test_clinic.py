"""The trace clinic: its sheet says what its parts say, and advice is counted on the stream."""

from __future__ import annotations

import re

import pytest

import moelab
from browser import read_sheet
from moelab.replays.routing import Profile
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import Knobs, Shape
from moelab.scheduling.trace import Trace
from moelab.strategies import make
from moelab.views.elsewhere import elsewhere, placed

TINY = Profile(4, 16, 2, 0.6, 0.9, 0.1, 0.8, 40.0, 0.8, 0.9, 0.5, 40, 0.3, 0.3, 0.9, 3 * 256 * 64)


@pytest.fixture(scope="module")
def trace():
    return moelab.routing(TINY, tokens=24, prompt=4)


@pytest.fixture(scope="module")
def found(trace):
    return moelab.clinic(trace, memory="25%", bits=16, progress=False)


def test_a_clinic_says_what_its_parts_say(trace, found):
    knobs = Knobs(16 * trace.shape.nbytes[16], 16)
    judged = moelab.policy_or_memory(trace, experts=16)
    assert (found.verdict, found.judged.experts) == (judged.verdict, 16)
    rows = found.strategies.set_index("strategy")
    assert set(rows.index) == set(moelab.strategies.NAMES)
    for name in ("lru", "lfu", "layer_lru"):
        assert rows.hit_ratio[name] == moelab.replay(trace, make(name), knobs).hit_ratio
    assert not rows.approximate["lru"]
    assert rows.approximate["adapmoe"]
    exact = rows[~rows.approximate.astype(bool)]
    assert rows.hit_ratio[found.best] == exact.hit_ratio.max()
    assert found.predictors.equals(moelab.predictors(trace))


def test_the_sheet_begins_with_the_verdict_and_its_page_needs_nothing_else(found, tmp_path):
    sentence = found.judged.sentence()
    assert " ".join(repr(found).split()).startswith(sentence)
    page = found.save(tmp_path / "clinic").read_text("utf-8")
    assert page.index(sentence) < page.index("<img") < page.index("<table")
    assert "<script" not in page
    assert not re.search(r'(?:src|srcset)="(?!data:)', page)
    assert "default-src 'none'" in page
    for tool in ("llama.cpp", "MoE-Infinity", "ktransformers"):
        assert tool in page
    assert found._repr_html_() in page


@pytest.mark.browser
def test_its_page_opens_light_and_dark(found, tmp_path, page):
    read_sheet(page, found.save(tmp_path / "clinic.html"), "clinic")
    for tool in ("llama.cpp", "MoE-Infinity", "ktransformers"):
        assert page.get_by_text(tool).first.is_visible()


def test_hits_elsewhere_are_counted_on_the_stream():
    """Layers as a whole are worth their share; an expert is placed by what came before."""
    shape = Shape((4, 4), 1, {16: 1000})
    steps = []
    for token in range(8):  # experts 0 and 1 in turn, from the fifth token on 0 and 2
        expert = token % 2 * (1 if token < 4 else 2)
        steps += [LayerInput(layer, ((expert,),), ((1.0,),)) for layer in (0, 1)]
    trace = Trace(shape, steps)
    assert [placed(trace, each) for each in (0, 1, 2, 4)] == [0.0, 0.5, 0.5, 0.5]
    rows = elsewhere(trace, 5500, 1000, {"moe_infinity": 0.4})
    assert rows["set"][0].endswith("--n-cpu-moe 1")
    assert rows["set"][3].startswith("--kt-num-gpu-experts 2 ")
    assert rows["hits"].fillna(-1).tolist() == [0.5, -1, 0.4, 0.5]
    assert all(source.startswith("https://github.com/") for source in rows["source"])


def test_a_foreign_trace_is_examined_with_the_sizes_of_its_model(tmp_path):
    lines = [f"{layer},{(3 * t + layer) % 5}" for t in range(8) for layer in (0, 1)]
    path = tmp_path / "moe.csv"
    path.write_text("\n".join(["layer,expert", *lines]))
    sizes = {16: 4000, 4: 1000}
    found = moelab.clinic(
        path, model=sizes, memory="4kB", bits=4, strategies=["lru"], progress=False
    )
    assert (found.judged.experts, found.judged.expert_bytes) == (4, 1000)
    assert "gate weights" in repr(found)


def test_what_a_clinic_refuses(trace):
    for wanted, words in (
        ({}, "records 0 settings; say how much memory"),
        ({"memory": "1kB"}, "holds no expert of 98.3 kB"),
        ({"memory": "50%", "bits": 3}, "sizes are known at 16, 8, 4"),
        ({"memory": "50%", "model": moelab.routing("olmoe-1b-7b", tokens=1)}, "16 layers x 64"),
    ):
        with pytest.raises(ValueError, match=words):
            moelab.clinic(trace, **wanted)
    with pytest.raises(TypeError, match="model is a list"):
        moelab.clinic(trace, memory="50%", model=[1])


def test_a_run_is_examined_as_it_was_recorded(demo_lab):
    run = demo_lab.generate("Once upon a time", max_new_tokens=8, temperature=0)
    found = moelab.clinic(run, strategies=["lru"], progress=False)
    assert found.judged.now == pytest.approx(run.summary()["hit_ratio"])
