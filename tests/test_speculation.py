"""What a user may rely on of a draft: greedy text to the last bit, and an account that adds up."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
from transformers import GenerationConfig

import moelab
import tiny_models
from moelab.engine.spare import Machine
from moelab.models.recorded import Recorded
from moelab.replays.replay import replay
from moelab.runs.compare import code_of
from moelab.runs.shadows import Shadows
from moelab.runs.tokens import table
from moelab.runs.what_if import WhatIf
from moelab.scheduling.trace import Trace
from moelab.strategies import make

NEW = 24
PROMPTS = [
    prompts[0]
    for prompts in json.loads((files("moelab") / "demo/prompts.json").read_text())[
        "prompts"
    ].values()
]
FIXED = [
    *("lru", "lfu", "layer_lru", "in_ram", "on_demand"),
    *("edgemoe", "mixtral_offloading", "moe_infinity"),
]
"""Strategies that leave the routing and the bits as they are."""

COLUMNS = ["kind", "layer", "expert", "bits_asked", "bits"]


def greedy(lab, prompt=PROMPTS[0], **options):
    return lab.generate(prompt, **{"max_new_tokens": NEW, "temperature": 0} | options)


def decided(run):
    """The log's decisions, without what a clock wrote."""
    rows = run.events[run.events["kind"] != "stall"]
    return list(rows[COLUMNS].itertuples(index=False, name=None))


def words(decisions):
    """The same of a replay."""
    return [tuple(getattr(one, name) for name in COLUMNS) for one in decisions]


# -- the same text --------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", FIXED)
def test_text_and_probabilities_are_greedy_decodings_to_the_last_bit(demo_lab, strategy):
    demo_lab.update(strategy=strategy)
    rejected = 0
    for prompt, bits, length in zip(PROMPTS, (2, 4, 2, 4), (2, 4, 7, 7), strict=False):
        plain = greedy(demo_lab, prompt)
        run = greedy(demo_lab, prompt, draft_bits=bits, draft_length=length)
        assert run.tokens == plain.tokens
        assert (run.text, run.ended) == (plain.text, plain.ended)
        assert run.likeliest == plain.likeliest
        assert len(run.trace) < len(plain.trace)
        rejected += run.speculation.drafted - run.speculation.accepted
    assert rejected, "some of it had to be taken back"


def test_a_draft_at_the_bits_asked_for_is_always_right(demo_lab):
    found = greedy(demo_lab, draft_bits=16, draft_length=7, ignore_eos=True).speculation
    assert found.acceptance == 1
    assert found.passes["kept"].tolist() == [8, 8, 7]
    assert found.rejected_bytes == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_other_models_too(tmp_path, family):
    folder = tiny_models.FAMILIES[family](tmp_path)
    options = {"tiers": (16, 4, 2), "measure_kl": False, "progress": False}
    with moelab.open(folder, budget="50%", **options) as lab:
        plain = greedy(lab, ignore_eos=True)
        run = greedy(lab, ignore_eos=True, draft_bits=4, draft_length=7)
    assert run.likeliest == plain.likeliest
    assert 0 < run.speculation.acceptance < 1


def test_changes_act_at_their_token(demo_lab):
    changes = {5: {"bits": 4}, 6: {"budget": "50%", "strategy": "lfu"}, 15: {"bits": 16}}
    plain = greedy(demo_lab, changes=changes)
    demo_lab.update(bits=16, budget="25%", strategy="lru")
    run = greedy(demo_lab, changes=changes, draft_bits=4)
    assert [at for at, _ in run.history] == [0, 5, 6, 15]
    assert run.likeliest == plain.likeliest
    assert words(replay(run.trace).decisions) == decided(run)


def test_it_ends_with_the_text(demo_lab, monkeypatch):
    plain = greedy(demo_lab)
    config = GenerationConfig(eos_token_id=plain.tokens[9], pad_token_id=1)
    monkeypatch.setattr(demo_lab._engine.model, "generation_config", config)
    plain, run = greedy(demo_lab), greedy(demo_lab, draft_bits=4, draft_length=7)
    assert (run.ended, run.tokens) == ("end of text", plain.tokens)
    assert demo_lab.generate("The", max_new_tokens=2, temperature=0).tokens, "and it goes on"


# -- the account ----------------------------------------------------------------------------------


@pytest.fixture
def run(demo_lab):
    return greedy(demo_lab, draft_bits=2, ignore_eos=True)


def test_what_is_replayed_is_what_was_decided(run, tmp_path):
    assert words(replay(run.trace).decisions) == decided(run)
    for path in ("trace.json", "trace.parquet"):
        loaded = Trace.load(run.trace.save(tmp_path / path))
        assert loaded.steps == run.trace.steps
        again = replay(loaded, strategies={"lru": make("lru")})
        assert words(again.decisions) == decided(run)


def test_every_event_is_one_passs(run):
    found, table = run.speculation, run.per_token
    passes, events = found.passes, run.events[run.events["at"] >= 0]
    assert passes["kept"].sum() + 1 == len(run.tokens) == len(table) == NEW
    assert (passes["token"] + passes["kept"]).tolist() == [*passes["token"][1:], NEW]
    assert (passes["accepted"] <= passes["drafted"]).all()
    assert set(events["token"]) == {0, *passes["token"]}
    assert passes["bytes"].sum() == table["bytes"][1:].sum() > 0
    assert run.summary()["bytes_per_token"] == found.bytes_per_token
    assert run.passes(NEW) == len(passes) + 1 == run.trace.tokens


def test_rejected_loads_are_those_no_token_chose(run):
    gates, lost = run.recording().gates["expert"], {}
    loads = run.events[(run.events["kind"] == "load") & (run.events["token"] > 0)]
    for one in run.speculation.passes.itertuples():
        here = loads[loads["token"] == one.token]
        chosen = gates[one.token : one.token + one.kept]
        only = [x not in chosen[:, layer] for layer, x in zip(here.layer, here.expert, strict=True)]
        lost[one.token] = int(here["bytes"][only].sum())
    assert run.speculation.passes["rejected_bytes"].tolist() == list(lost.values())
    assert 0 < sum(lost.values()) < loads["bytes"].sum()


def test_shadows_are_of_the_same_tokens(demo_lab, run):
    shadows = Shadows(run, demo_lab._strategies)
    while shadows.advance(1):
        pass
    told = {one["name"]: one for one in shadows.told(table(run.token_reports))}
    assert {one["tokens"] for one in told.values()} == {NEW - 1}
    assert told["run"]["hit_ratio"] == pytest.approx(told["lru"]["hit_ratio"], abs=1e-6)


def test_break_even(run):
    found = run.speculation
    assert found.break_even(found.ms_per_pass / found.tokens_per_pass) == pytest.approx(
        found.tokens_per_pass
    )
    with pytest.raises(ValueError, match="above 0"):
        found.break_even(0)
    assert found.summary()["draft_bytes"] == run.trace.shape.all_bytes(2)


def test_it_is_made_again_and_saved(demo_lab, run, tmp_path):
    again = WhatIf(demo_lab, run, {}, repeats=1).go()
    assert (again.tokens, decided(again)) == (run.tokens, decided(run))
    loaded = moelab.Recording.load(run.save(tmp_path / "run"))
    assert loaded.per_token["bytes"].tolist() == run.per_token["bytes"].tolist()
    assert "draft_bits=2, draft_length=4" in code_of(loaded.document)
    with pytest.raises(ValueError, match="without a draft"):
        moelab.predict(run, demo_lab, device="sd_card")
    with pytest.raises(ValueError, match="drafted passes of several tokens"):
        Recorded(run.trace)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "options", "said"),
    [
        ({}, {"temperature": None}, "temperature=0"),
        ({}, {"draft_bits": 5}, "one of the store's tiers"),
        ({}, {"draft_length": 8}, "from 1 to 7"),
        ({}, {"draft_length": True}, "from 1 to 7"),
        ({"strategy": "cache_prior"}, {}, "routing is the router's own"),
        ({"strategy": "swapmoe"}, {}, "routing is the router's own"),
        ({"strategy": "hobbit"}, {}, "goes by gate weights"),
    ],
)
def test_a_draft_whose_text_might_differ_is_refused(demo_lab, update, options, said):
    demo_lab.update(**update)
    with pytest.raises(ValueError, match=said):
        greedy(demo_lab, **{"draft_bits": 2} | options)


def test_so_is_a_change_to_such_a_strategy(demo_lab):
    with pytest.raises(ValueError, match="goes by gate weights"):
        greedy(demo_lab, draft_bits=2, changes={4: {"strategy": "hobbit"}})
    assert demo_lab.run.ended == "failed"
    assert greedy(demo_lab, max_new_tokens=2).ended == "length"


def test_a_change_by_hand_is_refused_at_once_and_the_run_goes_on(demo_lab):
    run = demo_lab.start(
        PROMPTS[0], max_new_tokens=200, temperature=0, draft_bits=2, ignore_eos=True
    )
    while len(run.tokens) < 4:
        assert run.speculation is not None  # at any moment
    with pytest.raises(ValueError, match="routing is the router's own"):
        demo_lab.update(strategy="swapmoe")
    assert demo_lab.settings.strategy.name == "lru"
    run.stop()
    assert run.join().error is None


def test_so_is_one_that_memory_does_not_hold(demo_lab, monkeypatch):
    monkeypatch.setattr(Machine, "spare_bytes", lambda _: 10_000)
    with pytest.raises(MemoryError, match=r"takes \d+ MB beside the budget"):
        greedy(demo_lab, draft_bits=2)


def test_and_models_with_no_way_back(tmp_path):
    folder = tiny_models.FAMILIES["gpt_oss"](tmp_path)
    with (
        moelab.open(folder, tiers=(16, 2), measure_kl=False, progress=False) as lab,
        pytest.raises(ValueError, match="cannot verify a draft"),
    ):
        greedy(lab, draft_bits=2)
