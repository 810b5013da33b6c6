"""What version 0.3 saved is still read, and says what it said (see saved_by_0_3/README.md)."""

from __future__ import annotations

import gzip
import json
import shutil
import warnings
from pathlib import Path

import pandas as pd
import pytest

import moelab
from moelab.course.challenge import leaderboard
from moelab.replays.replay import replay
from moelab.scheduling.trace import Trace
from moelab.spelling import shown, shown_strategy
from moelab.store.store import Store
from moelab.strategies import make

SAVED = Path(__file__).parent / "saved_by_0_3"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A copy: what is beside a store is written to."""
    here = shutil.copytree(SAVED, tmp_path_factory.mktemp("old") / "saved")
    page = here / "recordings" / "run.html"
    page.write_bytes(gzip.decompress(page.with_name("run.html.gz").read_bytes()))
    return here


def read(path: Path):
    return json.loads(path.read_text("utf-8"))


def profile(saved: Path, name: str):
    return read(saved / "tiny.profiles" / f"{name}.json")["data"]


def test_a_store_is_whole_and_makes_the_same_tokens_at_every_tier(saved):
    assert Store.open(saved / "tiny", verify=True).tiers == (16, 8, 4, 2)
    want = read(saved / "tiny.expected.json")
    with moelab.open(saved / "tiny", budget="100%", progress=False) as lab:
        for bits, expected in want["by_bits"].items():
            lab.update(bits=int(bits))
            assert lab.generate(want["prompt"], **want["options"]).tokens == expected["tokens"]


def test_calibrations_are_used_as_they_are(saved, monkeypatch):
    files = sorted((saved / "tiny.profiles").iterdir())
    before = {file: file.read_bytes() for file in files}
    with moelab.open(saved / "tiny", budget="100%", progress=False) as lab:
        for name, options in read(saved / "tiny.expected.json")["calibrated"].items():
            monkeypatch.setattr(f"moelab.calibration.{name}.make", None)  # it would be measured
            if name == "hobbit":  # 0.3 took its thresholds over misses
                options |= {"over": "misses"}
            if name == "swapmoe":  # and added up the losses of one short layer at a time
                options.update({"nats_per_slowdown": 0.5, "tried": 0})
            lab.calibrate(name, **options)
    assert {file: file.read_bytes() for file in files} == before


@pytest.mark.parametrize("name", ["lru", "hobbit", "edgemoe", "swapmoe"])
def test_a_trace_is_decided_as_0_3_decided_it(saved, name):
    data = profile(saved, name) if name in ("edgemoe", "swapmoe") else None
    trace = Trace.load(saved / "traces" / f"{name}.trace.json")
    found = replay(trace, strategies={name: make(name, data)}).decisions
    want = [tuple(row) for row in read(saved / "traces" / f"{name}.decisions.json")]
    at_changes = ("bits", "budget")  # replays of 0.3 left out evictions at a change of settings
    if name == "edgemoe":  # its width counted guesses, not what they preloaded: others are there
        asked = [[(d[1], d[2]) for d in run if d[0] in ("hit", "load")] for run in (found, want)]
        assert asked[0] == asked[1]
    else:
        assert [tuple(d) for d in found if d.cause not in at_changes] == want
    again = Trace.load(trace.save(saved / "again.json"))
    assert replay(again, strategies={name: make(name, data)}).decisions == found


@pytest.mark.parametrize("file", read(SAVED / "recordings" / "expected.json"))
def test_a_recording_says_what_it_said(saved, file):
    want = read(saved / "recordings" / "expected.json")[file]
    recording = moelab.Recording.load(saved / "recordings" / file)
    assert recording.document["ids"] == want["ids"]
    assert recording.text == want["text"]
    assert len(recording.events) == want["events"]
    assert int((recording.events.kind == "evict").sum()) == want["evictions"]
    assert [s["short"] for s in recording.document["settings"]] == want["short"]
    assert int((recording.cache_map()["bits"] > 0).sum()) == want["resident_at_the_end"]
    blame = recording.blame(2)[["layer", "expert", "outcome", "served", "bits"]]
    assert blame.to_numpy().tolist() == want["blame_of_token_2"]
    assert (recording.per_token["deciding_ms"] == 0).all(), "0.3 did not measure it"
    again = recording.save(saved / "again")
    assert moelab.Recording.load(again).text == recording.text


def test_pins_of_0_3_are_saved_runs(saved, demo_lab):
    assert len(demo_lab.pins.load(saved / "recordings" / "pins")) == 2
    assert len(demo_lab.pins.compare().names) == 2


def test_the_code_of_settings_still_makes_them(saved):
    """Also where it sets what no part of the strategy has: 0.3 took no notice of that either."""
    entries = read(saved / "settings.json")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has no effect")
        with moelab.open("demo", progress=False) as lab:
            exec(entries["start"], names := {"moelab": moelab})
            names["lab"].close()
            first = names["lab"].settings
            fields = ("budget_bytes", "bits", "device", "seed", "measure_kl")
            lab.update(**{name: getattr(first, name) for name in fields})
            for entry in entries["entries"]:
                exec(f"lab.update({entry['update']})", {"lab": lab})
                now = {**shown(lab.settings), **shown_strategy(lab.settings.strategy)}
                for name, word in {**entry["shown"], **entry["strategy"]}.items():
                    here = {"keep": "pin"}.get(name, name)
                    if here in now and not (name == "prefetch" and word in ("off", "+1", "+2")):
                        if name == "strategy":  # a mix was marked by a star; now it says of what
                            assert now[here].partition(" + ")[0] == word.rstrip("*")
                        else:
                            assert now[here] == word, (entry["update"], name)


def test_a_board_is_read_with_its_ranks(saved):
    want = read(saved / "challenge" / "expected.json")["board"]
    board = leaderboard(saved / "challenge" / "board.jsonl")
    assert list(board["name"]) == [row["name"] for row in want]
    ranks = [None if pd.isna(rank) else rank for rank in board["rank"]]
    assert ranks == [row["rank"] for row in want]
