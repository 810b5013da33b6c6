"""What `moelab.fit` says of a model that is not there: sizes, order, and where it comes from."""

from __future__ import annotations

import pytest

import moelab
from browser import read_sheet
from moelab.engine import sizes
from moelab.store.architecture import Architecture

TINY = {
    "model_type": "olmoe",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module", autouse=True)
def small_scratch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "SCRATCH_BYTES", 1 << 22)
        patch.setattr(sizes, "SETTLE_S", 0)
        yield


@pytest.fixture(scope="module")
def found(demo_store):
    return moelab.fit(TINY, memory="1GB", progress=False)


def test_sizes_are_those_of_a_store_and_budgets_rise(found):
    rows, shape = found.sizes(), found.architecture.shape
    assert rows["bits"].tolist() == [16, 8, 4]
    assert rows["store_bytes"].tolist() == [shape.all_bytes(bits) for bits in (16, 8, 4)]
    assert (rows["dense_bytes"].diff().dropna() < 0).all()
    for low, high in (("smallest", "cliff"), ("cliff", "sensible")):
        assert (rows[f"{low}_budget"] <= rows[f"{high}_budget"]).all()
    assert (rows["sensible_budget"] <= rows["store_bytes"]).all()
    assert rows["demo_kl"].is_monotonic_increasing


def test_more_memory_hits_more_and_below_the_cliff_nothing_is_hit(found):
    for bits, rows in found.grid.groupby("bits"):
        assert rows["budget_bytes"].is_monotonic_increasing
        assert rows["hit_ratio"].is_monotonic_increasing
        assert rows["tokens_per_s"].iloc[-1] > rows["tokens_per_s"].iloc[0]
        below = rows["budget_bytes"] < found.cliff * found.architecture.shape.nbytes[bits]
        assert (rows["hit_ratio"][below] == 0).all()
        assert below.any()


def test_what_is_chosen_fits_and_the_sheet_says_what_is_modelled(found, tmp_path):
    used = found.chosen["budget"] + found.architecture.dense_bytes(found.chosen["dense_bits"])
    assert used < found.memory_bytes
    assert found.chosen["strategy"] == found.strategies["strategy"][0]
    text = " ".join(repr(found).split())
    assert text.startswith(found.sentence())
    assert "(modelled); below" in found.sentence()
    assert "the nearest whose routing is known" in text
    assert "Measured here: loads of" in text
    page = found.save(tmp_path / "fit.html").read_text("utf-8")
    assert page.index("<img") < page.index("<table")


@pytest.mark.browser
def test_its_page_opens_light_and_dark(found, tmp_path, page):
    read_sheet(page, found.save(tmp_path / "fit.html"), "fit")
    assert page.get_by_text(found.sentence()).first.is_visible()


def test_a_ghost_makes_what_was_modelled_and_is_gone_then(found, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path))
    checked = found.check(tokens=4, disk="64MB", progress=False)
    assert checked.modelled == max(found.strategies["tokens_per_s"])
    assert checked.measured > 0
    assert "measured on a ghost" in str(checked)
    assert not list(tmp_path.glob("ghosts/*"))


def test_a_slow_device_is_slower_and_too_little_memory_is_said_to_be(found):
    slow = moelab.fit(TINY, memory="200MB", device="sd_card", progress=False)
    assert (slow.chosen, slow.strategies.empty) == ({}, True)
    assert "200 MB are too few for olmoe: it needs 31" in slow.sentence()
    with pytest.raises(ValueError, match="too few for olmoe"):
        slow.check()
    ratio = found.grid["tokens_per_s"] / slow.grid["tokens_per_s"]
    assert ratio[found.grid["hit_ratio"] == 0].min() > 1


def test_experts_that_kernels_do_not_know_are_timed_as_torch_computes_them():
    of = Architecture("gpt-oss-20b", tiers=(4,))
    held, work = sizes._made_up(of, sizes.SimpleNamespace(**of.described), 4)
    assert held >= of.shape.top_k
    work([0])


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"model": "no-such-model"}, "no architecture is known of 'no-such-model'; give one of"),
        ({"model": TINY, "memory": "much"}, "'much' is not a size"),
        ({"model": TINY, "device": "tape"}, "unknown device 'tape'; choose one of"),
    ],
)
def test_what_fit_refuses(wanted, words):
    with pytest.raises(ValueError, match=words):
        moelab.fit(**wanted)


def test_a_hub_id_that_is_known_is_not_asked_of_the_hub(monkeypatch):
    monkeypatch.setattr("moelab.store.architecture._fetched", None)
    assert Architecture("Qwen/Qwen3-30B-A3B").name == "qwen3-30b-a3b"
