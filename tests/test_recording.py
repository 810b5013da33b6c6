"""A recording is the run: its state, its reasons and its costs, in one file that can be trusted."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import threading
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

import moelab
from fake_lab import FakeLab
from moelab.replays.replay import replay
from moelab.replays.why import reasons
from moelab.runs.recording import Recording
from moelab.runs.schema import EVENTS, embedded, encoded, pack
from moelab.runs.snapshot import RunReader
from moelab.runs.tokens import COLUMNS
from moelab.scheduling.events import CODES
from moelab.scheduling.strategy import Knobs
from moelab.strategies import NAMES, Evict, lru, make
from moelab.views import report as reports
from moelab.views.report import Report
from moelab.widgets.queries import RunQueries, with_buffers
from toy_engine import Toy

PROMPT = "</script><img src=x onerror=alert(1)>"
TOKENS = 8
CHANGES = {3: {"bits": 8, "budget": "15%"}, 5: {"bits": 16, "budget": "30%", "measure_kl": True}}


@pytest.fixture(scope="module")
def runs(demo_store):
    """Each strategy once over a cache that the one before has filled, with changes on the way."""
    made = {}
    with moelab.open("demo", budget="30%", measure_kl=False, progress=False) as lab:
        engine, maps = lab._engine, []
        end = engine.end_of_token

        def and_look(*count):
            maps.append(lab.cache_map())
            end(*count)

        engine.end_of_token = and_look
        for name in NAMES:
            lab.update(
                strategy=name, measure_kl=False, budget="30%" if name != "in_ram" else "100%"
            )
            changes = CHANGES if name != "in_ram" else {3: {"budget": 23_400_000}}
            options = {"max_new_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
            run = lab.generate(PROMPT, changes=changes, **options)
            made[name] = run, run.recording(), list(maps)
            maps.clear()
        yield made


@pytest.fixture(scope="module")
def recording(runs):
    return runs["hobbit"][1]


# -- the state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_give_the_cache_at_the_end_of_every_token(runs, name):
    run, recording, maps = runs[name]
    assert len(maps) == TOKENS
    for token, lived in enumerate(maps):
        told = recording.cache_map(token)
        for field in ("bits", "loaded", "used", "uses"):
            assert (told[field] == lived[field]).all(), (token, field)
    assert len(recording.document["settings"]) == 1 + len(run.changes)


def test_rows_are_in_the_order_of_decisions_and_know_who_decided(runs):
    for name, (_run, recording, _) in runs.items():
        e = recording.records
        assert (np.diff(e["token"].astype(int) * 100 + e["at"]) >= 0).all(), name
        assert (e["at"][e["kind"] == CODES["hit"]] == e["layer"][e["kind"] == CODES["hit"]]).all()
    ahead = runs["hobbit"][1].records
    ahead = ahead[(ahead["kind"] == CODES["prefetch"]) & (ahead["at"] >= 0)]
    assert len(ahead)
    assert (ahead["at"] < ahead["layer"]).all()


def test_within_a_token_the_map_goes_from_the_one_before_to_its_own(recording):
    layers = recording.document["model"]["layers"]
    before = recording.cache_map(2)["bits"]
    assert (recording.cache_map(3, layers - 1)["bits"] == recording.cache_map(3)["bits"]).all()
    after_change = recording.cache_map(3, -1)["bits"]
    assert (after_change > 8).sum() == 0 < (before > 8).sum()  # asked for at 8 bit from here on


def test_a_recorded_run_has_its_events_text_and_figures(runs, recording):
    run = runs["hobbit"][0]
    assert recording.text == run.text
    assert recording.summary() == run.summary()
    mine, its = recording.events, run.events
    assert list(mine.columns) == list(its.columns)
    for column in EVENTS.keys() - {"start_ms", "dur_ms"}:
        assert (mine[column] == its[column]).all(), column
    assert recording.per_token.hits.tolist() == run.per_token.hits.tolist()
    assert recording.document["ids"] == run.tokens


def test_gates_are_those_of_the_last_position(runs, recording):
    run, layers = runs["hobbit"][0], recording.document["model"]["layers"]
    for t in range(TOKENS):
        for layer, step in enumerate(run.trace.steps[t * layers : (t + 1) * layers]):
            assert tuple(recording.gates["expert"][t, layer]) == step.experts[-1]
            assert recording.gates["weight"][t, layer] == pytest.approx(step.weights[-1])
    assert "wanted" not in recording.gates
    steered = runs["swapmoe"][1].gates
    assert (steered["wanted"] != steered["expert"]).any()


def test_the_likeliest_tokens_are_told_and_full_precision_where_it_was_measured(runs, recording):
    top, run = recording.document["top"], runs["hobbit"][0]
    for served, full, token in zip(top["served"], top["full"], run.token_reports, strict=True):
        shares = [p for _, p in served]
        assert len(shares) == 5
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 1.001
        assert (full is None) == (token.kl is None)
    greedy = [served[0][0] for served in top["served"]]
    assert "".join(greedy) == run.text  # temperature 0, and each token's text with its space


# -- what a token cost --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lru", "hobbit", "swapmoe", "cache_prior", "drop_if_cold"])
def test_the_blame_of_a_token_adds_up_to_its_figures(runs, name):
    run, recording, _ = runs[name]
    for token in range(1, TOKENS):
        report, table = run.token_reports[token], recording.blame(token)
        assert table.bytes.sum() == report.load_bytes
        assert (table.outcome == "skip").sum() == report.skips
        waited = report.stall_ms.get("on demand", 0) + report.stall_ms.get("prefetch late", 0)
        served = table.drop_duplicates(["layer", "served"])  # one wait may serve several
        assert served.wait_ms.sum() == pytest.approx(waited, abs=1e-3)
        chosen = recording.gates["wanted" if "wanted" in recording.gates else "expert"][token]
        for layer, rows in table.groupby("layer"):
            assert set(rows.expert) == set(chosen[layer].tolist()) - {-1}
    kl = recording.blame(TOKENS - 1).attrs["kl"]
    assert kl == pytest.approx(run.token_reports[-1].kl, rel=1e-6)
    assert len(run.blame(1)) == len(recording.blame(1))


def test_blame_tells_prefetched_downgraded_and_substituted_apart(runs):
    found = {n: set() for n in ("hobbit", "swapmoe")}
    for name, words in found.items():
        for token in range(TOKENS):
            table = runs[name][1].blame(token)
            words |= set(table.outcome)
            lower = table[table.outcome == "downgrade"]
            assert (lower.bits < lower.bits_asked).all()
    assert {"hit", "load"} <= found["hobbit"]
    assert {"prefetched", "downgrade", "skip"} & found["hobbit"]
    assert "substitute" in found["swapmoe"]


def test_a_token_that_is_not_there_is_refused(recording):
    with pytest.raises(ValueError, match=f"there is no token 99; there are 0 to {TOKENS - 1}"):
        recording.blame(99)


# -- why an expert was evicted ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_eviction_is_explained_and_its_victim_is_the_logged_one(runs, name):
    recording = runs[name][1]
    rows = np.flatnonzero(recording.records["kind"] == CODES["evict"])
    assert list(map(int, recording.evictions)) == rows.tolist()
    for row in rows:
        e, told = recording.records[row], recording.evictions[str(row)]
        assert told["victim"][:3] == [e["layer"], e["expert"], e["bits"]]
        assert told["error"] == ""
        assert told["terms"]
        for layer, expert, *_ in told["survivors"]:
            assert (layer, expert) != (e["layer"], e["expert"])


def test_of_lru_the_survivors_are_told_in_the_order_they_would_go(runs):
    told = [e for e in runs["lru"][1].evictions.values() if e["survivors"]]
    assert told
    for entry in told:
        since = [who[3] for who in (entry["victim"], *entry["survivors"])]
        assert since == sorted(since, reverse=True)
        assert entry["tie"] == since[1:].count(since[0])


class BooksOfQuestions(Evict):
    """Chooses another victim for each time it was asked anything: must not be disturbed."""

    def __init__(self):
        self.asked = 0

    def score(self, view):
        self.asked += 1
        return (np.arange(len(view.last_use)) + 7.0 * self.asked) % len(view.last_use)

    def terms(self, view):
        self.asked += 1
        every = np.ones(len(view.last_use))
        return {"asked": self.asked * every, "infinite": np.inf * every}


@pytest.mark.parametrize("evict", [BooksOfQuestions(), make("hobbit").evict])
def test_asking_disturbs_no_policy_and_costs_the_run_nothing(evict):
    strategy = lru().replace(evict=evict)
    toy = Toy(strategy, Knobs(8 * 1600), seed=3)
    trace = toy.sequence(12, changes={6: {"knobs": Knobs(5 * 1600)}})
    gone = [d for d in replay(trace).decisions if d.kind == "evict"]
    every = reasons(trace, range(1000))
    chosen = [e for e in every.values() if e["survivors"]]
    assert len(every) >= len(gone) > 10
    assert chosen
    one = reasons(trace, {7})
    assert one == {7: every[7]}  # alone as among all others
    assert replay(trace).decisions == toy.decided


def test_what_a_policy_raises_when_it_is_asked_is_told():
    class Broken(BooksOfQuestions):
        def terms(self, view):
            raise KeyError(view.token)

    toy = Toy(lru().replace(evict=Broken()), Knobs(8 * 1600), seed=3)
    told = reasons(toy.sequence(8), {0})[0]
    assert told["error"].startswith("KeyError")
    assert (told["terms"], len(told["victim"])) == ([], 3)


# -- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    recording.save(folder / "run")
    recording.report(folder / "run.html", parquet=True)
    return folder


def about(said):
    """As a file has it, where times are of single precision."""
    return {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in said.items()}


def test_a_file_and_a_page_hold_the_whole_recording(files, recording):
    saved, page = (Recording.load(files / n) for n in ("run.moelab.json.gz", "run.html"))
    assert saved.document == page.document
    assert np.allclose(saved.figures, recording.figures, atol=1e-3, equal_nan=True)
    assert saved.summary() == about(recording.summary())
    folded = {"values": "", "summary": {}, "sentence": recording.sentence()}
    own = json.loads(json.dumps(recording.document))
    assert saved.document | folded == own | folded
    assert (saved.cache_map(4, 2)["bits"] == recording.cache_map(4, 2)["bits"]).all()
    assert saved.blame(4).equals(recording.blame(4))
    assert saved.evictions == recording.evictions


def test_the_page_loads_nothing_and_shows_no_text_as_markup(files):
    page = (files / "run.html").read_text("utf-8")
    outside = re.sub(r">[A-Za-z0-9+/=]{1000,}<", "><", page)
    assert not re.findall(
        r"""(?:src|href|url\(|import|@import|fetch\()\s*["'=(]*\s*(?:https?:)?//""", page
    )
    assert "default-src 'none'" in page
    assert "onerror=alert" not in outside
    assert page.count("</script>") == page.count("<script")
    picture = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert b"&lt;/script&gt;" in base64.b64decode(picture[1])


def test_tables_and_picture_lie_beside_the_page(files, recording):
    import pandas as pd

    events = pd.read_csv(files / "run.events.csv", keep_default_na=False)
    assert len(events) == len(recording.events)
    assert events.cause.tolist() == recording.events.cause.tolist()
    assert len(pd.read_csv(files / "run.tokens.csv")) == TOKENS
    assert pd.read_parquet(files / "run.events.parquet").bits.sum() == events.bits.sum()
    assert (files / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_missing_library_is_named_with_its_command(recording, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "LIBRARIES", {"png": "os", "parquet": "no_such"})
    with pytest.raises(ImportError, match="parquet=True needs no_such: pip install no_such"):
        recording.report(tmp_path / "a.html", parquet=True)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_a_page_shows_the_figures_as_a_table(recording, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = Report.of(recording)._repr_mimebundle_()
    assert set(told) == {"text/html", "text/plain"}
    assert "<th>settings</th><td>at the end: budget" in told["text/html"]
    recording.report(tmp_path / "run.html", png=False, csv=False, parquet=False)
    assert told["text/html"] in (tmp_path / "run.html").read_text("utf-8")


def altered(recording, change) -> bytes:
    document = json.loads(gzip.decompress(recording.packed()))
    change(document)
    return pack(document)


def short_column(d):
    d["events"]["bits"] = base64.b64encode(b"\x10").decode()


BROKEN = {
    "model.layers": lambda d: d["model"].update(layers="many"),
    "events.bits": short_column,
    "events.kind": lambda d: d["events"].update(
        kind=base64.b64encode(b"\xff" * d["events"]["count"]).decode()
    ),
    "events.token": lambda d: d["events"].update(
        token=base64.b64encode(np.arange(d["events"]["count"])[::-1].astype("<i4")).decode()
    ),
    "format": lambda d: d.update(format=2),
    "gates.expert": lambda d: d["gates"].update(expert="not base64"),
    "model.causes": lambda d: d["model"].update(causes=["on demand", "prefetch late", ""]),
    "pieces": lambda d: d.update(pieces=[1] * TOKENS),
    "evictions": lambda d: d["evictions"].update({"9" * 9: next(iter(d["evictions"].values()))}),
    "start.bits": lambda d: d["start"].update(bits=[7] * len(d["start"]["bits"])),
    "summary": lambda d: d.pop("summary"),
}


def test_figures_of_a_file_are_those_of_its_events_whatever_it_says(recording, tmp_path):
    kept = ["total_ms", "measuring_ms", "setup_ms", "kl", "budget_bytes"]  # what events cannot say

    def older(d):
        rows = recording.figures[[COLUMNS.index(name) for name in kept]]
        d.update(columns=[*kept, "hits"], values=encoded(np.append(rows, rows[:1] + 7), "<f4"))
        d["summary"].update(hit_ratio=2.0, tokens_per_s=1e9)

    (tmp_path / "old.moelab.json.gz").write_bytes(altered(recording, older))
    old = Recording.load(tmp_path / "old.moelab.json.gz")
    assert not old.per_token.deciding_ms.any(), "version 0.3 did not measure it"
    for name in set(COLUMNS) - {"deciding_ms", "compute_ms"}:
        assert np.allclose(old.per_token[name], recording.per_token[name], equal_nan=True), name
    assert old.summary() == about(recording.summary())


@pytest.mark.parametrize("field", BROKEN)
def test_a_broken_file_is_refused_by_name_and_field(recording, tmp_path, field):
    path = tmp_path / "bad.moelab.json.gz"
    path.write_bytes(altered(recording, BROKEN[field]))
    with pytest.raises(ValueError, match=rf"bad\.moelab\.json\.gz: .*{re.escape(field)}"):
        Recording.load(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is cut off or no moelab recording"),
        (b"PK\x03\x04", "is cut off or no moelab recording"),
        (gzip.compress(b'{"format": 1}', mtime=0)[:-4], "is cut off"),
        (gzip.compress(b"[" * 100_000, mtime=0), "no moelab recording"),
        (b"<!doctype html><p>hello", "a page without a recording"),
    ],
)
def test_a_file_that_is_no_recording_says_so(tmp_path, data, message):
    path = tmp_path / "x.html"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.html.*{message}"):
        Recording.load(path)


def test_a_file_that_unpacks_too_large_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("moelab.runs.schema.MOST_BYTES", 1000)
    path = tmp_path / "bomb.moelab.json.gz"
    path.write_bytes(gzip.compress(b" " * 10_000))
    with pytest.raises(ValueError, match="larger than"):
        Recording.load(path)


# -- the picture --------------------------------------------------------------------------------


def test_the_picture_shows_the_runs_own_settings_and_map(demo_lab):
    run = demo_lab.generate("Once upon a time", max_new_tokens=6, ignore_eos=True)
    dashboard = demo_lab.dashboard()
    before = dashboard.report().svg()
    demo_lab.update(bits=4, budget="10%", strategy="lfu")  # after the run
    after = dashboard.report().svg()
    dashboard.close()
    assert after == before == Report.of(run.recording()).svg()
    assert "16 bit, LRU" in after


# -- what the dashboard is told -----------------------------------------------------------------


class Told:
    """A dashboard's ear."""

    def __init__(self, run):
        self.answers, self.came = [], threading.Semaphore(0)
        reader = run and RunReader(run)
        self.queries = RunQueries(lambda: (1, reader), self.hear)

    def hear(self, content, buffers):
        self.answers.append((content, buffers, threading.current_thread().name))
        self.came.release()

    def ask(self, what, **content):
        self.queries.hear({"do": what, **content})
        assert self.came.acquire(timeout=60)
        return self.answers[-1]


def columns(content, buffers) -> dict:
    return {
        path[-1]: b
        for path, b in zip(content["buffers"], buffers, strict=True)
        if path[0] == "events"
    }


def test_the_dashboard_gets_the_recording_in_pieces_from_a_thread_of_its_own():
    run = FakeLab(token_ms=0.2).start("Once", max_new_tokens=100_000)
    told, held, rows, going_on = Told(run), dict.fromkeys(EVENTS, b""), 0, True
    while going_on:
        going_on = rows < 2000  # far enough: stop it, and ask once more for the rest
        if not going_on:
            run.stop()
            run.join()
        answer, buffers, thread = told.ask("recording", have={"run": 1, "events": rows})
        content = answer["recording"]
        for name, raw in columns(content, buffers).items():
            each = np.dtype(EVENTS[name]).itemsize
            held[name] = held[name][: content["from"] * each] + raw
        assert content["from"] <= rows
        assert content["running"] == going_on
        rows = content["events"]["count"]
        assert len(held["kind"]) == rows
        assert thread.startswith("moelab-queries")
    told.queries.close()
    assert columns(*with_buffers(RunReader(run).read())) == held


def test_an_eviction_is_explained_on_request_and_what_is_none_says_so(runs):
    run, recording, _ = runs["hobbit"]
    told = Told(run)
    row = int(next(iter(recording.evictions)))
    answer, _, thread = told.ask("eviction", run=1, row=row)
    assert answer["eviction"] == recording.evictions[str(row)] | {"run": 1, "row": row}
    assert thread.startswith("moelab-queries")
    assert "no eviction" in told.ask("eviction", run=1, row=10**6)[0]["eviction"]["error"]
    assert "another run" in told.ask("eviction", run=2, row=row)[0]["eviction"]["error"]
    told.queries.close()


def test_the_newest_run_is_exported_as_a_page_or_the_view_hears_why_not(runs, monkeypatch):
    run, recording, _ = runs["hobbit"]
    told = Told(run)
    answer, [page], thread = told.ask("page")
    assert answer == {"page": {"tokens": len(run.token_reports)}}
    assert thread.startswith("moelab-queries")
    assert embedded(page.decode(), "page") == recording.packed()
    monkeypatch.setattr("moelab.widgets.queries.LARGEST_PAGE", 1000)
    assert 'lab.run.report("run.html")' in told.ask("page")[0]["page"]["error"]
    told.queries.close()
    told = Told(None)
    for what in ("page", "recording"):
        assert told.ask(what)[0][what]["error"] == "nothing has run yet"
    told.queries.close()


def test_a_run_opens_in_perfetto_with_every_event_once(recording, tmp_path):
    path = moelab.perfetto(recording, tmp_path / "run.perfetto.json")
    found = json.loads(path.read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in found if e["ph"] == "M"}
    events, told = recording.events, [e for e in found if e["ph"] != "M"]
    assert {e["tid"] for e in told} <= tracks.keys()
    by_kind = Counter(e["cat"] for e in told)
    assert by_kind.pop("token") == events.token.nunique()
    assert by_kind == {k: n for k, n in events.kind.value_counts().to_dict().items() if n}
    reads = [e for e in told if tracks[e["tid"]].startswith("reads")]
    assert (
        sum(e["args"]["bytes"] for e in reads)
        == events.bytes[events.kind.isin(["load", "prefetch"])].sum()
    )
    for track in tracks:  # slices of one track follow each other
        own = sorted(
            (e["ts"], e["ts"] + e["dur"]) for e in told if e["tid"] == track and e["ph"] == "X"
        )
        assert all(end <= begun + 1e-6 for (_, end), (begun, _) in pairwise(own))
    waits = sum(e["dur"] for e in told if tracks[e["tid"]] == "waits")
    assert waits == pytest.approx(1e3 * events.dur_ms[events.kind == "stall"].sum())
