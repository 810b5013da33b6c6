"""Every figure adds up: whatever a run does, its account is that of its events alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelab
import tiny_models
from moelab.runs.account import Account, Limits, ending
from moelab.runs.tokens import COLUMNS, REQUESTS, STALLS
from moelab.scheduling import events as e
from moelab.spelling import brief
from moelab.strategies import NAMES, NEEDS_CALIBRATION

TOKENS = 7
READ = ["load", "prefetch"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("account")
    store = moelab.pack(tiny_models.qwen3_moe(folder / "tiny"), folder / "store", progress=False)
    with moelab.open(store, budget="100%", progress=False) as lab:
        yield lab


CHOICES = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from([n for n in NAMES if n not in NEEDS_CALIBRATION]),
        "budget": st.sampled_from(["45%", "60%", "100%"]),
        "device": st.sampled_from(["disk", "hdd", "sd_card"]),
        "bits": st.sampled_from([16, 8, 4]),
    }
)


def put(lab, choice):
    """Any choice that fits; a budget that is too small is raised."""
    try:
        lab.update(**choice)
    except ValueError:
        lab.update(**choice | {"budget": "100%"})


@settings(max_examples=12, deadline=None)
@given(first=CHOICES, then=CHOICES, ahead=st.integers(0, 2), at=st.integers(1, TOKENS - 1))
def test_requests_times_and_bytes_of_any_run_add_up_from_its_events_alone(
    lab, first, then, ahead, at
):
    put(lab, first)
    if "depth" in lab.settings.strategy.parameters:
        lab.update(prefetch=ahead)
    options = {"max_new_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    run = lab.generate("Once upon a time", changes={at: then | {"budget": "100%"}}, **options)
    events, shape, recording = run.events, run.trace.shape, run.recording()
    decided = events[events["at"] >= 0]
    counts = decided.groupby(["token", "kind"], observed=True).size().unstack(fill_value=0)
    held = sum(shape.nbytes[bits] for _, bits in run.trace.resident)
    for token, report in enumerate(run.token_reports):
        steps = run.trace.steps[token * shape.layers : (token + 1) * shape.layers]
        parts = {name: getattr(report, name) for name in REQUESTS}
        assert sum(parts.values()) == sum(len(step.requests()) for step in steps), parts
        kinds = [counts.loc[token].get(k, 0) for k in ("hit", "load", "skip", "substitute")]
        assert [report.hits + report.late, report.loads, report.skips, report.substitutes] == kinds

        mine = decided[decided.token == token]
        waits = mine[mine.kind == "stall"].groupby("cause").dur_ms.sum().to_dict()
        assert report.stall_ms == pytest.approx(waits)
        told = report.compute_ms + report.deciding_ms + sum(report.stall_ms.values())
        assert report.total_ms == pytest.approx(told)
        assert min(report.compute_ms, report.deciding_ms) >= 0
        blame = recording.blame(token).attrs
        assert sum(blame["layer_wait_ms"]) == pytest.approx(sum(waits.values()), abs=1e-3)

        every = events[events.token == token]
        reads = every[every.kind.isin(READ)]
        assert report.bytes + report.setup_bytes == reads.bytes.sum()
        sizes = every["bits"].map(lambda bits: shape.nbytes.get(bits, 0))
        held += sizes[every.kind.isin(READ)].sum() - sizes[every.kind == "evict"].sum()
        resident = recording.cache_map(token)["bits"]
        assert report.resident_bytes == held == sum(shape.nbytes[b] for b in resident.flat if b)
        assert held <= report.budget_bytes

    account = run.account(0)
    guessed = decided[decided.kind == "prefetch"].bytes.sum()
    assert sum(account.guesses.values()) * TOKENS == pytest.approx(guessed)
    assert account.total_ms == pytest.approx(np.mean([r.total_ms for r in run.token_reports]))
    again = recording.account(0)
    assert again.requests == account.requests
    assert again.guesses == account.guesses
    figures = run.summary()
    assert figures["setup_bytes"] + sum(r.bytes for r in run.token_reports) == (
        events[events.kind.isin(READ)].bytes.sum()
    )
    assert run.ended == recording.document["ended"] == "length"


def test_a_late_guess_is_no_hit_and_what_a_switch_reads_is_counted(demo_lab):
    demo_lab.update(budget="40%", device="hdd", prefetch=1)
    change = {8: {"strategy": "in_ram", "bits": 2, "budget": "100%"}}
    run = demo_lab.generate("Once", max_new_tokens=10, ignore_eos=True, changes=change)
    waited = run.events.query("kind == 'stall' and cause == 'prefetch late' and token > 0")
    late = run.events.query("kind == 'hit' and cause == 'prefetch late' and token > 0")
    assert run.summary()["late"] == len(late) >= len(waited) > 0
    assert "late" in set(run.blame(int(late.token.iloc[0])).outcome)
    switch = run.events.query("token == 8 and `at` < 0 and kind == 'prefetch'")
    assert run.token_reports[8].setup_bytes == switch.bytes.sum() > 0
    assert run.token_reports[8].bytes == 0


# -- the sentence -------------------------------------------------------------------------------


def account(rows=(), **means) -> Account:
    """Of two tokens that are alike."""
    values = np.array([[means.get(name, 0.0) for name in COLUMNS]] * 2)
    records = np.zeros(len(rows), e.DTYPE)
    for record, row in zip(records, rows, strict=True):
        for name, value in row.items():
            record[name] = value
    return Account.of(values, records)


def read(kind, expert, at, start, dur=10.0, nbytes=3_400_000, **more):
    row = {"kind": kind, "expert": expert, "at": at, "start_ms": start, "dur_ms": dur}
    return row | {"bytes": nbytes} | more


SMALL, LARGE = Limits(4_000_000, 12_000_000, "least recently used"), Limits(10**9, 10**6, "")


@pytest.mark.parametrize(
    ("made", "limits", "said"),
    [
        (
            account([read(e.LOAD, 0, 0, 0), read(e.LOAD, 1, 0, 20)], compute_ms=6, bytes=12e6,
                    loads=4, **{"on demand": 34}),
            SMALL,
            ("disk-bound: 34 of 40 ms wait for loads on demand; 12 MB a token at 340 MB/s; the "
             "budget is below one token's cycle (12 MB), LRU cannot hit"),
        ),
        (
            account(compute_ms=30, hits=3, loads=1, **{"prefetch late": 4}),
            LARGE,
            ("compute-bound: 30 of 34 ms are compute, 4 wait for late prefetches; "
             "75% of the requests hit"),
        ),
        (
            account(compute_ms=62, hits=1, evict=0.4, **{"on demand": 38, "prefetch late": 14.8}),
            LARGE,
            ("compute-bound: 62 of 115 ms are compute, 53.2 wait: 38 for loads on demand, 14.8 for "
             "late prefetches, 0.4 to evict what is still on its way; 100% of the requests hit"),
        ),
        (
            account(compute_ms=20, hits=1, evict=2, **{"on demand": 9, "prefetch late": 12}),
            LARGE,
            ("disk-bound: 23 of 43 ms wait: 12 for late prefetches, 9 for loads on demand, 2 to "
             "evict what is still on its way; 100% of the requests hit"),
        ),
        (
            account(compute_ms=3, deciding_ms=9, hits=1, late=1, evict=0),
            LARGE,
            ("bound by deciding: 9 of 12 ms are the strategy's own time; 50% of the requests "
             "hit, 50% come late"),
        ),
        (Account.of(np.empty((0, len(COLUMNS))), np.empty(0, e.DTYPE)), LARGE,
         "no token has been decoded yet"),
    ],
)  # fmt: skip
def test_one_sentence_says_why_the_speed_is_what_it_is(made, limits, said):
    assert made.sentence(limits) == said
    assert made.total_ms == pytest.approx(sum(made.ms[n] for n in ("compute", "deciding", *STALLS)))


def test_a_change_is_told_part_by_part_with_what_was_read_for_nothing():
    before = account([read(e.LOAD, 0, 0, 0)], compute_ms=6, **{"on demand": 34})
    guess, gone = read(e.PREFETCH, 1, 0, 0, cause=e.AHEAD + 1), {"kind": e.EVICT, "expert": 1}
    after = account([guess, gone], compute_ms=6.2, **{"on demand": 31})
    assert after.guesses["wasted"] == 1_700_000
    assert before.change_to(after, "prefetch 0 -> 1") == (
        "prefetch 0 -> 1: wait \N{MINUS SIGN}3 ms, wasted reads +1.7 MB"
    )
    assert before.change_to(before, "bits 4").endswith("no part of a token moved by 0.5 ms")


def test_a_figure_on_the_screen_never_has_an_exponent():
    told = [brief(value) for value in (0.0, 0.1234, 12.345, 999.4, 999.7, 1236.0, -20_000.0)]
    assert told == ["0", "0.123", "12.3", "999", "1000", "1236", "-20000"]
    assert [brief(value, 2) for value in (9.96, 99.6, 382.0)] == ["10", "100", "382"]


def test_reads_beside_each_other_share_the_time_of_the_device():
    both = account([read(e.LOAD, 0, 0, 0), read(e.LOAD, 1, 0, 5)])
    assert both.bandwidth == pytest.approx(6.8e6 / 0.015)
    assert account().bandwidth is None


def test_a_guess_is_right_late_wasted_or_still_waiting():
    guesses = [read(e.PREFETCH, i, 0, 0, nbytes=10**i, cause=e.AHEAD) for i in range(4)]
    hits = [{"kind": e.HIT, "expert": i, "cause": c} for i, c in ((0, e.PREFETCHED), (1, e.LATE))]
    found = account([*guesses, *hits, {"kind": e.EVICT, "expert": 2}]).guesses
    assert found == {"right": 0.5, "late": 5, "wasted": 50, "waiting": 500}


# -- why it ended -------------------------------------------------------------------------------


def test_a_run_says_why_it_ended(demo_lab):
    assert demo_lab.generate("Once", max_new_tokens=2, ignore_eos=True).ended == "length"
    run = demo_lab.start("Once", max_new_tokens=5000, ignore_eos=True)
    while not run.tokens:
        pass
    run.stop()
    assert run.join().ended == "stopped"
    demo_lab._session.eos = lambda *, chat: set(range(10**6))  # whatever comes ends the text
    assert demo_lab.generate("Once", max_new_tokens=9).ended == "end of text"
    with pytest.raises(ValueError, match="raise it to"):
        demo_lab.generate("Once", max_new_tokens=9, changes={0: {"budget": 10}})
    assert demo_lab.run.ended == "failed"
    assert ending("end of text", 72, 200) == "end of text at 72 of 200 tokens"
    assert ending("length", 200, 200) == "all 200 tokens asked for"


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_run_of_no_or_one_token_has_no_speed_rather_than_zero(demo_lab, tokens, tmp_path):
    run = demo_lab.start("Once", max_new_tokens=1, changes=None if tokens else {0: {"bits": 5}})
    run._done.wait(60)
    assert len(run.tokens) == tokens
    short, other = run.recording(), demo_lab.generate("Once", max_new_tokens=3).recording()
    assert short.summary()["tokens_per_s"] is short.summary()["hit_ratio"] is None
    beside = moelab.compare(short=short, other=other)
    assert beside.front() == ["other"], "it is beaten by nobody, and beats nobody"
    assert "'short' wrote fewer than two tokens: it has no speed" in beside.verdict()
    assert moelab.Recording.load(short.save(tmp_path / "short")).summary()["tpot_ms_p99"] is None
