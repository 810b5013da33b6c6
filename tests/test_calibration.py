"""What a user may rely on of calibrations: kept, found again, gone on with, made anew."""

from __future__ import annotations

import errno
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

import moelab
from moelab import calibration
from moelab.calibration import profile as profiles
from moelab.calibration.figures import Evaluator
from moelab.calibration.probes import digest_of, expert_norms, parted, record, texts_of
from moelab.calibration.profile import once
from moelab.replays.replay import replay
from moelab.scheduling.stream import Knobs
from moelab.strategies import NAMES, lru


@pytest.fixture
def lab(demo_store, tmp_path, monkeypatch):
    """A lab whose profiles lie in a folder of this test, and no shipped ones."""
    monkeypatch.setattr(profiles, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(profiles, "_folders", lambda store: iter([tmp_path / "profiles"]))
    with moelab.open("demo", budget="50%", measure_kl=False, progress=False) as lab:
        yield lab


@pytest.fixture
def maker(monkeypatch):
    """A calibration of ten measurements that can be told to fail; counts what it does."""
    module = types.ModuleType("moelab.calibration.hobbit")
    module.measured, module.fail_at = [], None
    module.made_from = lambda lab, *, size=3: {"size": size}

    def measure(i, size):
        if i == module.fail_at:
            raise KeyboardInterrupt
        module.measured.append(i)
        return i * size

    def make(lab, texts, made, kept, *, progress):
        module.progress = progress
        size = made["size"]
        return {"sum": sum(once(kept, str(i), lambda i=i: measure(i, size)) for i in range(10))}

    module.make = make
    monkeypatch.setitem(sys.modules, "moelab.calibration.hobbit", module)
    return module


def test_a_lab_opened_without_progress_calibrates_without_unless_asked(lab, maker):
    lab.calibrate("hobbit")
    assert maker.progress is False
    lab.calibrate("hobbit", again=True, progress=True)
    assert maker.progress is True


def test_it_is_measured_once_unless_asked_or_what_it_was_made_from_has_changed(lab, maker):
    assert lab.calibrate("hobbit").data == lab.calibrate("hobbit").data == {"sum": 135}
    assert len(maker.measured) == 10
    assert lab.calibrate("hobbit", size=5).data == {"sum": 225}
    assert lab.calibrate("hobbit").data == {"sum": 135}
    lab.calibrate("hobbit", again=True)
    assert len(maker.measured) == 40


def test_the_strategy_uses_what_was_returned_last(lab, monkeypatch):
    from moelab.calibration import hobbit as maker

    def made(t1):
        return {"t1": t1, "t2": 0.95, "weights": [1.0, 0.0, 0.0, 0.0]}

    monkeypatch.setattr(maker, "made_from", lambda lab, t1=0.5: {"t1": t1})
    monkeypatch.setattr(maker, "make", lambda lab, texts, own, *_, **__: made(own["t1"]))
    lab.update(strategy="hobbit")
    lab.calibrate("hobbit")
    assert lab.settings.t1 == 0.6  # nothing changes by itself
    lab.update(strategy="hobbit")
    assert lab.settings.t1 == 0.5
    evict = lab.settings.strategy.evict
    lab.update(strategy="hobbit")
    assert lab.settings.strategy.evict is evict  # goes on
    lab.calibrate("hobbit", t1=0.7)
    lab.update(precision="hobbit")
    assert lab.settings.t1 == 0.7
    lab.calibrate("hobbit")
    lab.update(strategy="hobbit")
    assert lab.settings.t1 == 0.5


@pytest.mark.parametrize("begun", [{}, {"size": 4}], ids=["same", "else"])
def test_an_interrupted_one_goes_on_where_it_stopped_if_it_is_the_same(lab, maker, begun):
    maker.fail_at = 6
    with pytest.raises(KeyboardInterrupt):
        lab.calibrate("hobbit", **begun)
    assert profiles.find_profile(lab._store, "hobbit") is None
    maker.fail_at = None
    assert lab.calibrate("hobbit").data == {"sum": 135}
    assert maker.measured == [*range(6 if begun else 0), *range(10)]
    assert lab.generate("The", max_new_tokens=2, ignore_eos=True).error is None


def test_a_profile_of_another_model_or_a_broken_one_is_not_used(lab, maker, tmp_path):
    lab.calibrate("hobbit")
    file = tmp_path / "profiles" / "hobbit.json"
    whole = file.read_text()
    doc = json.loads(whole)
    lacking = json.dumps({name: value for name, value in doc.items() if name != "made_from"})
    doc["model"]["checkpoint"] = "0" * 32
    for text in (json.dumps(doc), lacking, whole[:50], "[]", '{"format": 99}'):
        file.write_text(text)
        assert profiles.find_profile(lab._store, "hobbit") is None


def test_a_folder_that_cannot_be_written_is_said(lab, maker, monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(profiles, "_folders", lambda store: iter([tmp_path / "taken" / "x"]))
    with pytest.raises(OSError, match=r"cannot write hobbit"):
        lab.calibrate("hobbit")


def test_on_a_full_disk_the_file_is_named_and_the_profile_there_was_stays(
    lab, maker, monkeypatch, tmp_path
):
    def half_written(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def kept():
        return {file.name: file.read_bytes() for file in (tmp_path / "profiles").iterdir()}

    lab.calibrate("hobbit")
    before = kept()
    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(OSError, match=r"No space left on device.*hobbit\.json"):
        lab.calibrate("hobbit", size=5)
    assert kept() == before
    assert set(before) == {"hobbit.json"}


def test_a_strategy_that_cannot_do_without_says_which_call_makes_it(lab):
    with pytest.raises(ValueError, match=r"lab.calibrate\('edgemoe'\)"):
        lab.update(strategy="edgemoe")
    for decision in ("strategy", "evict"):
        with pytest.raises(ValueError, match=r"lab.calibrate\('flashmoe'\)"):
            lab.update(**{decision: "flashmoe"})
    lab.update(allocate="flashmoe")  # equal shares need nothing
    with pytest.raises(ValueError, match="'lru' has no calibration; these have: edgemoe"):
        lab.calibrate("lru")


def test_no_calibration_while_a_run_is_going_on(lab, maker):
    lab.update(device="hdd", strategy="on_demand")
    run = lab.start("Once", max_new_tokens=200, ignore_eos=True)
    try:
        with pytest.raises(RuntimeError, match="a run is going on"):
            lab.calibrate("hobbit")
    finally:
        run.stop()


@pytest.mark.parametrize("name", calibration.NAMES)
def test_the_demo_brings_its_own_and_they_fit(demo_store, name):
    with moelab.open("demo", budget="50%", measure_kl=False, progress=False) as lab:
        found = profiles.find_profile(lab._store, name)
        assert found is not None, "run python -m moelab.calibration"
        module = __import__(f"moelab.calibration.{name}", fromlist=[name])
        made_from = {"texts": digest_of(texts_of(lab, None)), **module.made_from(lab)}
        assert found.made_from == json.loads(json.dumps(made_from))
        if name in NAMES:
            lab.update(strategy=name)
    assert (profiles.SHIPPED / f"{name}.json").stat().st_size < 300_000


def test_every_strategy_can_be_chosen_by_name_on_the_demo(demo_store):
    with moelab.open("demo", budget="60%", measure_kl=False, progress=False) as lab:
        for name in NAMES:
            lab.update(strategy=name)
            assert lab.generate("The", max_new_tokens=2, ignore_eos=True).error is None


# -- what they measure with ---------------------------------------------------------------------


def test_loss_is_that_of_the_full_model_and_bits_move_it_in_order(lab):
    evaluator = Evaluator(lab, max_tokens=24)
    loss = {bits: evaluator(lambda _, b=bits: b)[0] for bits in (16, 8, 4, 2)}
    assert evaluator()[0] == loss[16]
    assert abs(loss[8] - loss[16]) < 0.01 < loss[2] - loss[16]
    one_gone = evaluator(lambda key: 0 if key == (0, 0) else 16)[0]
    assert loss[16] != one_gone < evaluator(lambda _: 0)[0]


def test_whole_pairs_are_held_out_and_texts_cut():
    pairs = [(str(at), f"{at} words of it") for at in range(8)]
    counted, held_out = parted(pairs, 0.25)
    assert held_out == [pairs[0], pairs[4]]
    assert counted == [pair for pair in pairs if pair not in held_out]
    assert [len(part) for part in parted(pairs, 0.5)] == [4, 4]
    assert parted(pairs[:2], 0.25) == ([pairs[1]], [pairs[0]])
    (first,), (second,) = parted(pairs[:1], 0.5)
    assert first[0] == second[0] == "0"
    assert first[1] + second[1] == pairs[0][1]
    assert parted(["one two", "three four"], 0.5) == (["one", "three"], [" two", " four"])


def test_the_recorded_routing_is_that_of_decoding(lab):
    text = "Elizabeth was not at all surprised to hear that"
    ids = lab._encode(text)
    trace = record(lab, [text], tokens=len(ids), look_ahead=2)
    assert trace.tokens == len(ids)
    assert [s.prefill for s in trace.steps[:12]] == [True] * 6 + [False] * 6
    later = [s for s in trace.steps if not s.prefill]
    assert {len(s.look_ahead) for s in later} == {0, 1, 2}
    run = lab.generate(text, max_new_tokens=1, ignore_eos=True)
    whole = {s.layer: s.experts for s in run.trace.steps}
    for i, given in enumerate(trace.steps):
        assert set(given.experts[0]) == set(whole[given.layer][i // 6])
    right = [
        a.experts[0] in trace.steps[i + a.layer - s.layer].experts[0]
        for i, s in enumerate(trace.steps)
        for a in s.look_ahead
    ]
    assert sum(right) / len(right) > 0.5  # a stale gate is mostly right, and never by chance
    out = replay(trace, lru(), Knobs(budget_bytes=40 * 147456))
    assert out.counts["hit"] + out.counts["load"] == 2 * 6 * (len(ids) - 1)


def test_norms_are_those_of_the_weights(lab):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(moelab.demo.checkpoint(), dtype=torch.float32)
    weights = {n: p for n, p in model.named_parameters() if "experts" in n and "layers.2." in n}
    squares = sum(p[5].square().sum() for p in weights.values() if p.ndim == 3)
    norms = expert_norms(lab)
    assert len(norms) == 6
    assert norms[2][5] == pytest.approx(float(squares.detach()) ** 0.5, rel=1e-4)
