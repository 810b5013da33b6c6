"""A ghost decides, loads and waits as its model does, and says what it cannot answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import moelab
from moelab.bench.papers import regimes
from moelab.replays import routing
from moelab.store.architecture import Architecture
from moelab.store.ghost import GhostStore

PROMPT = "Once upon a time"
SMALL = {
    "model_type": "qwen3_moe",
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, demo_store):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def small_trace():
    profile = routing.PROFILES["qwen3-30b-a3b"]
    like = dataclasses.replace(profile, layers=3, experts=12, top_k=3)
    return moelab.routing(like, tokens=12, prompt=4)


def decisions(run):
    made = run.events.query("kind != 'stall'")
    return made[["token", "layer", "expert", "kind", "bits"]].to_numpy().tolist()


@pytest.mark.parametrize(
    ("strategy", "told"), [("mixtral_offloading", "look_ahead"), ("finemoe", "probabilities")]
)
def test_a_ghost_of_a_run_has_the_same_hits_loads_and_bytes(demo_store, strategy, told):
    how = {"bits": 4, "strategy": strategy, "measure_kl": False, "progress": False}
    with moelab.open(demo_store, budget="25%", **how) as lab:
        was = lab.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    with moelab.ghost(demo_store, routing=was.trace, budget="25%", **how) as ghost:
        again = ghost.generate("anything", max_new_tokens=8)
    assert any(getattr(step, told) for step in was.trace.steps)
    assert decisions(again) == decisions(was)
    assert ghost.info()["dense_bytes"] == lab.info()["dense_bytes"]
    assert again.summary()["timing"] == was.summary()["timing"]
    assert not any(c.isalnum() for c in again.text)


def test_what_happens_in_a_ghost_can_be_replayed_and_made_again(small_trace):
    with moelab.ghost(SMALL, routing=small_trace, budget="30%", dense_bits=4) as ghost:
        run = ghost.generate("x", max_new_tokens=16)  # more than are recorded: they come again
        hits = run.summary()["hit_ratio"]
        assert moelab.replay(run.trace).hit_ratio == pytest.approx(hits)
        table = ghost.what_if(run, repeats=1, budget="60%").table()
        assert table.loc["hit_ratio", "as it was"] == hits < table.loc["hit_ratio", "budget=60%"]
    folder = ghost.info()["store"]
    with moelab.open(folder, budget="30%") as reopened:
        assert decisions(reopened.generate("y", max_new_tokens=16)) == decisions(run)
    moelab.ghost.remove()
    assert not Path(folder).exists()


def test_a_ghost_refuses_what_only_trained_weights_can_answer(small_trace):
    with moelab.ghost(SMALL, routing=small_trace, budget="50%") as ghost:
        for ask in (
            lambda: ghost.update(measure_kl=True),
            lambda: ghost.update(strategy="cache_prior"),
            lambda: ghost.score("some text"),
            lambda: ghost.calibrate("hobbit", texts=["some text"]),
        ):
            with pytest.raises(ValueError, match="random weights"):
                ask()
        assert ghost.generate("x", max_new_tokens=2).likeliest[0].served == ()


def test_experts_that_share_bytes_are_layers_apart(small_trace):
    size = Architecture(SMALL).shape.nbytes[16]
    with moelab.ghost(SMALL, routing=small_trace, budget="50%", disk=13 * size) as ghost:
        store = GhostStore(Path(ghost.info()["store"]))
    keys = [(layer, expert) for layer in range(3) for expert in range(12)]
    for bits in store.tiers:
        places = [store.location(*key, bits)[1] for key in keys]
        assert all(len(set(places[at : at + 12])) == 12 for at in range(25))
        assert max(places) + store.slot_bytes[bits] <= store.files[bits].nbytes


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"budget": "900TB"}, r"9e\+05 GB of budget; .* of memory are free: dense_bits=4"),
        ({"disk": "4kB"}, "experts of a layer take"),
        ({"routing": "olmoe"}, "olmoe-1b-7b"),
        ({"routing": moelab.routing("olmoe-1b-7b", tokens=1, prompt=0)}, "16 layers of 64"),
        ({"bugdet": 1}, "budget"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_number_and_the_way_out(wrong, said):
    with pytest.raises((ValueError, TypeError), match=said):
        moelab.ghost(SMALL, **wrong)


def test_the_papers_regimes_on_a_small_ghost(monkeypatch):
    asked = regimes.Regime({**SMALL, "num_experts": 16}, 3, "50%", "tx2_ssd")
    stopped, figures = [], regimes._figures

    def stops_after_two(*given):
        if len(stopped) == 2:
            raise KeyboardInterrupt
        stopped.append(figures(*given))
        return stopped[-1]

    monkeypatch.setattr(regimes, "_figures", stops_after_two)
    half = regimes.regimes([asked], repeats=2, disk="8MB", progress=False)
    assert (len(half), half.attrs["complete"]) == (2, False)
    monkeypatch.setattr(regimes, "_figures", figures)
    frame = regimes.regimes([asked], repeats=2, disk="8MB", progress=False)
    assert frame[:2].to_dict("records") == half.to_dict("records"), "kept, and not made again"
    assert frame.attrs["complete"]
    assert frame.groupby("contender").size().to_dict() == dict.fromkeys(regimes.CONTENDERS, 2)
    by = frame.groupby("contender").mean(numeric_only=True)
    assert by.hits["LRU"] > by.hits["on demand"] == 0
    read = by["MB a token"]
    assert read["LRU"] < read["on demand"] > read["on demand, 4 bit"]
    assert by.low[regimes.HOBBIT] > 0 == by.low["LRU"]
    assert by[["high", "low", "skipped"]].sum(axis=1).round(6).isin([0, 1]).all()
    page = regimes.report(frame)
    assert "tx2_ssd (emulated)" in page
    assert "3 x 16 experts" in page
    name = next(iter(frame.attrs["models"]))
    ours, theirs = (frame[frame.contender == who]["tokens/s"] for who in ("LRU", "on demand"))
    ratio = regimes.Ratio.of(ours.tolist(), theirs.tolist())
    assert ratio.low <= ratio.median <= ratio.high
    assert name in page


def test_a_recorded_regime_has_as_many_experts_active_as_its_recording(tmp_path):
    small = {**SMALL, "num_experts": 16, "num_experts_per_tok": 1}
    _, profile = regimes.nearest("olmoe", Architecture(small, tiers=(8,)).shape)
    regimes.drawn(profile, tokens=8, prompt=3).save(tmp_path / "route.parquet")
    asked = regimes.Regime(
        {**small, "num_experts_per_tok": 2}, 3, routing=tmp_path / "route.parquet"
    )
    page = regimes.report(regimes.regimes([asked], repeats=1, disk="8MB", progress=False))
    assert "top 1; memory for 25 % of them; routing as it was recorded" in page


def test_regimes_keep_what_ctrl_c_left(monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(regimes, "_measure", press)
    frame = regimes.regimes([regimes.Regime(SMALL, 3)], progress=False)
    assert "Stopped early" in regimes.report(frame)


@pytest.mark.browser
def test_a_ghosts_page_asks_for_no_quality_and_nothing_is_cut_off(page, tmp_path, small_trace):
    with moelab.ghost(SMALL, routing=small_trace, budget="40%", progress=False) as ghost:
        run = ghost.generate("x", max_new_tokens=8)
    run.report(str(tmp_path / "run.html"), png=False, csv=False, parquet=False)
    page.goto((tmp_path / "run.html").as_uri())
    blame = page.locator(".moe-blame")
    blame.get_by_text("The weights are random: there is no text here").wait_for()
    assert not blame.get_by_text("as served").is_visible()
    for row in blame.locator(".moe-row-wait").all():
        assert row.evaluate("node => node.scrollWidth <= node.clientWidth")
