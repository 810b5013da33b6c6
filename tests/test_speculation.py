"""What a user may rely on of a draft: greedy text to the last bit, and an account that adds up."""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files

import pytest
import torch
from transformers import GenerationConfig

import moelab
import tiny_models
from moelab.bench.drafts import Drafts, picture
from moelab.engine.spare import Machine
from moelab.engine.speculation import Pacing
from moelab.models.recorded import Recorded
from moelab.replays.replay import replay
from moelab.runs.compare import code_of
from moelab.runs.hot_set import HotSet
from moelab.runs.passes import told
from moelab.runs.shadows import Shadows
from moelab.runs.tokens import table
from moelab.runs.what_if import WhatIf
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.trace import Trace
from moelab.strategies import make

NEW = 24
BUNDLED = json.loads((files("moelab") / "demo/prompts.json").read_text())["prompts"]
PROMPTS = [prompts[0] for prompts in BUNDLED.values()]
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


FIFTY = [p + word for word in ("", " and", " The") for of in BUNDLED.values() for p in of][:50]
LENGTHS = (4, "auto", {0: 7, 5: 0, 8: "auto", 12: 3})


@pytest.mark.slow
def test_fifty_prompts_are_written_as_without_a_draft(demo_lab):
    """Under each strategy in turn, at a fixed length, paced, and where the length changes."""
    for i, prompt in enumerate(FIFTY):
        if i % 7 == 0:
            demo_lab.update(strategy=FIXED[i // 7], budget=("25%", "50%")[i % 2])
        plain = greedy(demo_lab, prompt, max_new_tokens=16)
        length, bits = LENGTHS[i % 3], (2, 4)[i % 2]
        run = greedy(demo_lab, prompt, max_new_tokens=16, draft_bits=bits, draft_length=length)
        assert (run.tokens, run.likeliest) == (plain.tokens, plain.likeliest), prompt


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
    assert run.trace.kept
    assert run.trace.document()["format"] == 6, "a reader that knows no rolled-back rows refuses it"
    assert words(replay(run.trace).decisions) == decided(run)
    for path in ("trace.json", "trace.parquet"):
        loaded = Trace.load(run.trace.save(tmp_path / path))
        assert (loaded.steps, loaded.kept) == (run.trace.steps, run.trace.kept)
        assert loaded.document()["format"] == 6
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


def inside(thing):
    """All that an object knows, in plain values."""
    held = getattr(thing, "__dict__", None)
    return thing if held is None else {name: inside(value) for name, value in held.items()}


LEARNERS = ("lfu", "edgemoe", "moe_infinity", "flashmoe", "finemoe", "arc", "s3fifo")


@pytest.mark.parametrize("strategy", LEARNERS)
def test_what_was_rolled_back_is_not_learnt_from(demo_lab, strategy):
    demo_lab.update(strategy=strategy)
    run = greedy(demo_lab, draft_bits=2, draft_length=7, ignore_eos=True)
    trace, first = run.trace, run.history[0][1]
    assert trace.kept, "something was"
    assert trace.decoded == NEW - 1
    learnt, kept, whole = (
        Scheduler(trace.shape, first.strategy, first.knobs()) for first in [first] * 3
    )
    for scheduler, steps in ((learnt, trace.steps), (kept, trace.learnt()), (whole, trace.steps)):
        scheduler.new_sequence()
        for i, given in enumerate(steps):
            scheduler.step(given)
            if given.layer == trace.shape.layers - 1:
                stand = trace.kept.get(i // trace.shape.layers)
                scheduler.end_of_token(stand if scheduler is learnt else None)
    known, same, more = (
        repr([inside(part) for part in one.strategy.objects]) for one in (learnt, kept, whole)
    )
    assert known == same
    assert strategy == "lfu" or known != more
    for name in ("uses", "high_uses", "last_token"):
        assert getattr(learnt.cache, name).tolist() == getattr(kept.cache, name).tolist()
    assert learnt.cache.uses.sum() < whole.cache.uses.sum()


def test_nor_by_a_hot_set(run, tmp_path):
    hot = HotSet(run.trace.shape, tmp_path / "hot.json")
    hot.learn(run.trace)
    prompt = sum(len(given.experts) for given in run.trace.steps if given.prefill)
    chosen = run.trace.shape.layers * (NEW - 1) + prompt
    assert hot.uses.sum() == run.trace.shape.top_k * chosen


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
    with pytest.raises(ValueError, match="drafted passes of several tokens"):
        Recorded(run.trace)


def test_a_length_set_on_the_way_acts_on_the_next_draft(demo_lab, tmp_path):
    plain = greedy(demo_lab, max_new_tokens=60, ignore_eos=True)
    run = demo_lab.start(
        PROMPTS[0],
        max_new_tokens=60,
        temperature=0,
        ignore_eos=True,
        draft_bits=4,
        draft_length={0: 6, 12: "auto", 30: 0},
    )
    while len(run.tokens) < 31:
        assert run.running or len(run.tokens) > 30
    run.draft_length = 2
    with pytest.raises(ValueError, match="from 0 to 7"):
        run.draft_length = 9
    run.join()
    assert run.tokens == plain.tokens
    at, lengths = zip(*run.draft_lengths, strict=True)
    assert (at[:3], lengths) == ((0, 12, 30), (6, "auto", 0, 2))
    passes = run.speculation.passes
    for begin, length, end in zip(at, lengths, (*at[1:], 60), strict=True):
        drafted = passes["drafted"][(passes["token"] >= max(begin, 1)) & (passes["token"] < end)]
        assert drafted.max() <= (7 if length == "auto" else length)
    assert run.changes[0][1] == {"draft_length": "auto"}
    again = WhatIf(demo_lab, run, {}, repeats=1).go()
    assert again.draft_lengths == run.draft_lengths
    assert again.speculation.passes["accepted"].tolist() == passes["accepted"].tolist()
    loaded = moelab.Recording.load(run.save(tmp_path / "run"))
    assert f"draft_length={dict(run.draft_lengths)!r}" in code_of(loaded.document)
    with pytest.raises(ValueError, match="begin the run with draft_bits="):
        plain.draft_length = 2


def test_a_draft_that_is_sure_of_itself_goes_on_longer():
    pacing, logits = Pacing(), torch.zeros(9)  # each token has a ninth

    def drafted():
        pacing.begin()
        return next(n for n in range(1, 99) if not pacing.goes_on(0, logits))

    assert drafted() == 3, "1 in 729 is below a hundredth"
    pacing.verified(3, 3)
    assert pacing.alpha == 0.005
    pacing.verified(4, 1)
    assert (pacing.alpha, drafted()) == (0.75, 1)
    pacing.verified(0, 0)
    assert pacing.alpha == 0.75


def test_a_recording_tells_drafted_tokens_apart(run, tmp_path):
    recording = run.recording()
    passes, found = recording.document["passes"], run.speculation.passes
    for name in ("token", "drafted", "accepted", "kept", "rejected_loads", "rejected_bytes"):
        assert [one[name] for one in passes] == found[name].tolist()
    assert sum(len(one["rejected"]) for one in passes) == run.speculation.drafted - (
        run.speculation.accepted
    )
    whole = told(passes, 0, NEW)
    assert whole["acceptance"] == run.speculation.acceptance
    assert whole["rejected_bytes"] == run.speculation.rejected_bytes / (NEW - 1)
    one = next(p for p in passes if p["rejected_loads"] and p["kept"] > 1)
    assert recording.blame(one["token"]).attrs["draft"] == one
    after = recording.blame(one["token"] + 1)
    assert after.attrs["draft"] == one
    experts = recording.gates["expert"][one["token"] + 1]
    assert sorted(zip(after.layer, after.expert, strict=True)) == sorted(
        (layer, x) for layer, row in enumerate(experts.tolist()) for x in row
    )
    assert after["wait_ms"].sum() == 0
    assert f"{run.speculation.acceptance:.0%} of the drafted" in moelab.report(run).figures()
    loaded = moelab.Recording.load(recording.save(tmp_path / "run"))
    assert loaded.document["passes"] == passes


@pytest.mark.parametrize(
    "wrong", [{"token": 0}, {"kept": 0}, {"kept": 9}, {"accepted": 9}, {"rejected": ["a"] * 9}]
)
def test_passes_of_a_file_are_checked_and_counted_anew(run, tmp_path, wrong):
    recording = run.recording()
    (one := recording.document["passes"][-1]).update({"rejected_bytes": 5, "rejected_loads": 5})
    assert moelab.Recording.load(recording.save(tmp_path / "lies")).document["passes"][-1] != one
    one |= wrong
    with pytest.raises(ValueError, match="passes"):
        moelab.Recording.load(recording.save(tmp_path / "wrong"))


# -- under other settings -------------------------------------------------------------------------


def test_a_drafted_run_is_predicted_to_the_byte_and_held_against_one_made(demo_lab, run):
    found = moelab.predict(run, demo_lab, budget="15%", device="sd_card")
    made = WhatIf(demo_lab, run, {"budget": "15%"}, repeats=1).go()
    assert found.bytes_per_token == made.speculation.bytes_per_token
    assert found.bytes_per_token > run.speculation.bytes_per_token
    assert len(found.replay.tokens) == len(run.speculation.passes) == len(found.per_token)
    assert found.bounds()["io_ms"] == pytest.approx(1e3 * found.bytes_per_token / 40e6)
    spent = found.per_token.to_numpy().sum() / (NEW - 1) + found.draft_ms
    assert found.token_ms == pytest.approx(spent)
    assert found.token_ms > found.bounds()["io_ms"]
    assert "modelled" in repr(found)


def test_one_that_was_stopped_within_its_first_pass_cannot_be_predicted(demo_lab, run, monkeypatch):
    monkeypatch.setattr(run, "_verified", [])
    with pytest.raises(ValueError, match="stopped within its first pass: there is nothing to"):
        moelab.predict(run, demo_lab)
    prompt = dataclasses.replace(run.trace, steps=[s for s in run.trace.steps if s.prefill])
    with pytest.raises(ValueError, match="no token was decoded"):
        moelab.predict(prompt, demo_lab)


def test_where_a_draft_pays_is_a_table_over_devices_and_budgets(demo_lab, run):
    with pytest.raises(ValueError, match="nothing was drafted"):
        Drafts(demo_lab, greedy(demo_lab), greedy(demo_lab))
    plain = greedy(demo_lab, ignore_eos=True)
    with pytest.raises(ValueError, match="two texts differ"):
        Drafts(demo_lab, run, greedy(demo_lab, PROMPTS[1], ignore_eos=True))
    drafts = Drafts(demo_lab, run, plain)
    table = drafts.table(("sd_card", "nvme"), ("25%", "50%"))
    own = table[table["budget"] == "25%"]
    assert set(own["drafted_bytes"]) == {run.speculation.bytes_per_token}
    assert set(own["plain_bytes"]) == {plain.summary()["bytes_per_token"]}
    assert (table["rival_bytes"] < table["plain_bytes"]).all()
    faster = table["drafted_tokens_per_s"] > table["rival_tokens_per_s"]
    assert (faster == table["pays"]).all()
    assert (faster == (table["needed"] < run.speculation.tokens_per_pass)).all()
    figure = picture(table)
    assert "modelled" in figure.layout.title.text
    assert figure.data[0].z.shape == (2, 2)
    made = drafts.check(device="sd_card")
    assert made["shared"] == 1
    assert made["measured_ms"] > 1e3 * run.speculation.bytes_per_token / 40e6 / 2


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "options", "said"),
    [
        ({}, {"temperature": None}, "temperature=0"),
        ({}, {"draft_bits": 5}, "one of the store's tiers"),
        ({}, {"draft_length": 8}, "from 0 to 7"),
        ({}, {"draft_length": True}, "from 0 to 7"),
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
