"""Files from strangers: whatever is in one, it is refused by its name or works as what it is.

Recordings (saved runs are the same files), boards, traces and profiles are changed at random, as a
damage or a hand would. None may crash, hang, fail raw in a view, or say what its events do not.
`MOELAB_MUTANTS` is how many are tried in all.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import gzip
import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import moelab
from moelab.calibration.profile import SHIPPED, Profile, find_profile, model_of, written
from moelab.course.challenge.board import as_board
from moelab.course.challenge.entries import read
from moelab.replays.replay import replay
from moelab.runs.compare import Comparison
from moelab.runs.saved import SavedRuns
from moelab.runs.schema import pack
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import Knobs
from moelab.scheduling.trace import Trace
from moelab.store.store import Store
from moelab.strategies import CALIBRATED, NAMES, NEEDS_CALIBRATION, make
from test_challenges import SIX, Entry, figures

MUTANTS = int(os.environ.get("MOELAB_MUTANTS", "1970"))
SECONDS = 20
NASTY = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    255,
    2**15,
    2**31,
    2**63,
    10**400,
    0.5,
    -0.5,
    1e308,
    -1e308,
]
NASTY += [
    float("nan"),
    float("inf"),
    "",
    "x",
    "0",
    "\ud800",
    "x" * 5000,
    "\x00",
    "</script>",
    "a\nb",
]
NASTY += ["__import__('os').system('x')", [], {}, [[]], [None], {"a": 1}, [0] * 300, "lru", "1e308"]


def places(node, found=None) -> list[tuple]:
    """Every (holder, key) of a document; of a long list only some."""
    found = [] if found is None else found
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in [*keys][:12] + [*keys][-3:]:
        found.append((node, key))
        if isinstance(node[key], (dict, list)):
            places(node[key], found)
    return found


def spoiled(text: str, rng: random.Random) -> str:
    """A column in base64 with other numbers in it."""
    raw = bytearray(base64.b64decode(text))
    if not raw or rng.random() < 0.2:
        return base64.b64encode(bytes(len(raw) + rng.choice((0, 4)))).decode()
    for _ in range(rng.choice((1, 4, len(raw)))):
        raw[rng.randrange(len(raw))] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
    return base64.b64encode(raw).decode()


def mutated(document, rng: random.Random):
    """A document with one to three things changed."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(places(document))
        value, way = holder[key], rng.randrange(7)
        if isinstance(value, str) and len(value) > 40 and rng.random() < 0.7:
            with contextlib.suppress(ValueError):
                holder[key] = spoiled(value, rng)
        elif way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(value))
        elif way == 2 and type(value) in (int, float):
            holder[key] = rng.choice((-value, value * 1000, value + 1, value // 3, value - 1))
        elif way == 3:
            other, at = rng.choice(places(document))
            holder[key] = copy.deepcopy(other[at])
        else:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
        if not document:
            return document
    return document


@contextlib.contextmanager
def limited(what):
    """Inside, what takes too long fails."""

    def late(*_):
        raise AssertionError(f"hangs: {what}")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of its own time: a machine may be busy
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def expect(refused: ValueError, words: str = "") -> None:
    """A refusal is short and names the file."""
    assert words in str(refused), refused
    assert 0 < len(str(refused)) < 2000, refused


def tried(kind: str, share: float, one) -> int:
    """Try mutants, each with a seed of its own; returns how many were taken for what they are."""
    taken, count = 0, max(1, int(MUTANTS * share))
    for seed in range(count):
        rng = random.Random(f"{kind} {seed}")
        with limited(f"{kind} {seed}"):
            try:
                taken += bool(one(rng))
            except Exception as error:
                raise AssertionError(f"{kind} {seed} fails raw: {error!r}") from error
    return taken


@pytest.fixture(scope="module")
def run(demo_store):
    with moelab.open("demo", budget="20%", strategy="hobbit", progress=False) as lab:
        changes = {2: {"bits": 8}, 3: {"evict": "lfu"}}
        yield lab.generate("Once", max_new_tokens=4, ignore_eos=True, changes=changes)


# -- recordings ---------------------------------------------------------------------------------


def code_is_settings(code: str) -> None:
    """Nothing is called but what opens a lab, sets it and runs it, and nothing is computed."""
    calls = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    assert names <= {"moelab.open", "lab.update", "lab.generate", "dict"}, names
    harmless = (ast.Constant, ast.Name, ast.Attribute, ast.Dict, ast.Tuple, ast.List, ast.UnaryOp)
    values = [v for call in calls for v in (*call.args, *(k.value for k in call.keywords))]
    assert all(isinstance(v, (*harmless, ast.Call)) for v in values)


def look_at(recording, rng) -> None:
    """Everything that a person can see of a recording."""
    tokens, layers = len(recording.document["pieces"]), recording.document["model"]["layers"]
    table, events = recording.per_token, recording.events
    decided = events[events["at"] >= 0]
    for token in range(tokens):
        recording.blame(token).to_html()
        recording.cache_map(token, rng.randrange(-1, layers))
        mine = decided[decided.token == token]
        said = table.loc[token, ["hits", "late", "loads", "prefetches"]].tolist()
        kinds = [(mine.kind == kind).sum() for kind in ("hit", "load", "prefetch")]
        assert [said[0] + said[1], *said[2:]] == kinds, "figures of other events"
    json.dumps(recording.summary(), allow_nan=False)
    assert all(isinstance(text, str) for text in (recording.sentence(), repr(recording)))
    beside = Comparison({"a": recording, "b": recording})
    beside.table(), beside.front(), beside.verdict(), beside._repr_html_()
    code_is_settings(beside.code("a"))
    json.dumps(recording.evictions)
    recording.packed().decode("latin-1")
    if rng.random() < 0.05:  # it is the same drawing for all, and slow
        moelab.report(recording).svg()


def test_a_recording_is_refused_by_name_or_every_view_of_it_works(run, tmp_path):
    document = json.loads(gzip.decompress(run.recording().packed()))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "one" / "bad.moelab.json.gz"

    def one(rng):
        if rng.random() < 0.1:
            raw = bytearray(gzip.compress(json.dumps(document).encode(), mtime=0))
            for _ in range(3):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            path.write_bytes(raw)
        else:
            path.write_bytes(gzip.compress(json.dumps(mutated(document, rng)).encode(), 1))
        saved = SavedRuns()
        try:
            saved.load(path.parent)
        except ValueError as refused:
            expect(refused, "bad.moelab.json.gz")
            return False
        look_at(saved["bad"], rng)
        return True

    assert 0 < tried("recording", 0.4, one) < 0.4 * MUTANTS


def test_code_out_of_a_file_is_never_passed_on(run, tmp_path):
    document = json.loads(gzip.decompress(run.recording().packed()))
    evil = [
        "import os\nlab = moelab.open('demo')",
        "lab = moelab.open('demo', budget=__import__('os').system('x'))",
        'lab = moelab.open("demo", budget=5)\nprint(open("/etc/passwd").read())',
        'lab = moelab.open("demo", evict=exit())',
        'lab = moelab.open("demo", **{})',
        "lab.update(bits=[x for x in ()])",
    ]
    for code in evil:
        document["settings"][0]["code"] = code
        (tmp_path / "x.moelab.json.gz").write_bytes(pack(document))
        with pytest.raises(ValueError, match=r"x\.moelab.*settings\[0\] is not the code of sett"):
            moelab.Recording.load(tmp_path / "x.moelab.json.gz")
    document["settings"][0]["code"] = "lab  =  moelab.open('demo',budget = 5) # x\n"
    (tmp_path / "x.moelab.json.gz").write_bytes(pack(document))
    code = moelab.compare(a=moelab.Recording.load(tmp_path / "x.moelab.json.gz")).code("a")
    assert 'lab = moelab.open("demo", budget=5)' in code.splitlines()


# -- traces -------------------------------------------------------------------------------------


def held_is_kept(trace: Trace, decisions) -> None:
    """What is loaded was not there, what leaves was, and what is served is."""
    held = {trace.shape.place(key): bits for key, bits in trace.resident}
    for d in decisions:
        place = (d.layer, d.expert)
        if d.kind in ("load", "prefetch"):
            assert place not in held
            held[place] = d.bits
        elif d.kind == "evict":
            assert held.pop(place) == d.bits
        elif d.kind in ("hit", "substitute"):
            assert held[place] == d.bits


def test_a_trace_is_refused_by_name_or_can_be_decided(run, tmp_path):
    document = json.loads(run.trace.save(tmp_path / "good.json").read_bytes())
    strategies = {name: make(name) for name in NAMES if name not in NEEDS_CALIBRATION}
    strategies |= {"hobbit*": make("hobbit").replace(evict=make("lfu").evict)}
    path = tmp_path / "bad.json"

    def one(rng):
        path.write_text(json.dumps(mutated(document, rng)))
        try:
            trace = Trace.load(path)
        except ValueError as refused:
            expect(refused, "bad.json is not a moelab trace")
            return False
        try:
            done = replay(trace, strategies=strategies)
        except ValueError as refused:  # a budget too small, a strategy unknown here
            expect(refused)
            return False
        full = sum(trace.shape.nbytes[b] for _, b in trace.resident)
        if full <= trace.changes[0].knobs.budget_bytes:
            held_is_kept(trace, done.decisions)
        return True

    assert 0 < tried("trace", 0.25, one) < 0.25 * MUTANTS


# -- boards -------------------------------------------------------------------------------------


def test_a_line_of_a_board_is_named_or_shown(tmp_path):
    source = "class Mine: pass"
    own = {"evict": {"class": "Mine", "source": source}}
    settings = {"strategy": "lru", "budget": "3.9MB", "bits": 4}
    machine = {"processor": "x", "cores": 2}
    entry = Entry(SIX.name, "Ada", settings, figures(), own, made="2026", machine=machine)
    document, path = json.loads(entry.line()), tmp_path / "board.jsonl"

    def one(rng):
        line = json.dumps(mutated(document, rng))
        path.write_text(f"{entry.line()}{line}\n")
        entries, faults = read(path)
        assert len(entries) + len(faults) == 2
        for found in entries:
            for text in (repr(found), found._repr_html_(), found.code, found.line()):
                text.encode()
            ast.parse(found.code)
        same = [found for found in entries if found.challenge == SIX.name]
        board = as_board(same, SIX, faults)
        board.to_string().encode()
        if rng.random() < 0.03:
            board._repr_html_().encode()
        return len(entries) == 2

    assert 0 < tried("board", 0.2, one) < 0.2 * MUTANTS


# -- profiles -----------------------------------------------------------------------------------


def test_a_profile_is_refused_by_name_or_its_strategies_decide(demo_store, tmp_path, monkeypatch):
    store = Store.open(demo_store)
    monkeypatch.setattr("moelab.calibration.profile._folders", lambda _: [tmp_path])
    monkeypatch.setattr("moelab.calibration.profile.SHIPPED", tmp_path)
    shape, least = store.shape, store.shape.all_bytes(16)
    documents = {
        name: json.loads((SHIPPED / f"{name}.json").read_text()) for name in CALIBRATED.values()
    }

    def decide(name, data, rng):
        strategy = make(name, data)
        scheduler = Scheduler(shape, strategy, Knobs(least, 16))
        scheduler.begin()
        for token in range(2):
            for layer in range(shape.layers):
                mask = scheduler.mask(layer)
                free = np.flatnonzero(np.ones(16, bool) if mask is None else mask).tolist()
                chosen = tuple(rng.sample(free, shape.top_k))
                scheduler.step(LayerInput(layer, (chosen,), ((0.7, 0.3),), token == 0))
            scheduler.end_of_token()

    def one(rng):
        calibration = rng.choice(sorted(documents))
        head = {key: documents[calibration][key] for key in ("name", "made_from")}
        data = mutated(documents[calibration]["data"], rng)
        doc = head | {"model": model_of(store), "data": data}
        (tmp_path / f"{calibration}.json").write_text(written(doc))
        try:
            profile = find_profile(store, calibration)
        except ValueError as refused:
            expect(refused, f"{calibration}.json is damaged")
            return False
        for name, uses in CALIBRATED.items():
            if uses == calibration:
                try:
                    decide(name, profile.data, rng)
                except moelab.scheduling.budget.BudgetError:
                    return False
        return True

    assert 0 < tried("profile", 0.15, one) < 0.15 * MUTANTS


# -- writing ------------------------------------------------------------------------------------


class Full:
    """A disk that takes half of the file that is written last."""

    def __init__(self, monkeypatch, room: int = 0):
        self.whole, self.room = Path.write_bytes, room

        def write(path, data):
            self.room -= 1
            if self.room >= 0:
                return self.whole(path, data)
            self.whole(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write)


def test_a_full_disk_leaves_no_half_file_and_the_error_names_it(run, tmp_path, monkeypatch):
    recording, disk = run.recording(), Full(monkeypatch)
    monkeypatch.setattr("moelab.calibration.profile._folders", lambda _: [tmp_path])
    writers = {
        "a.moelab.json.gz": recording.save,
        "b.json": run.trace.save,
        "c.json": run.log.to_perfetto,
        "hobbit.json": lambda _: Profile("hobbit", {}, {}, {}).save(SimpleNamespace(path=tmp_path)),
    }
    for name, writer in writers.items():
        with pytest.raises(OSError, match=rf"No space left on device: .*{name}"):
            writer(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    files = ["run.html", "run.png", "run.events.csv", "run.events.parquet", "run.tokens.csv"]
    for room, name in enumerate([*files, "run.tokens.parquet"]):
        disk.room = room
        with pytest.raises(OSError, match=rf"No space left on device: .*{name}"):
            recording.report(tmp_path / "run.html", parquet=True)
        assert {file.name for file in tmp_path.iterdir()} == set(files[:room])
