"""Challenges: what an entry is scored by, and that nothing but better settings wins."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import moelab
from moelab.course.challenge import Entry, leaderboard, own_code, scoring, verify
from moelab.course.challenge.board import differences, ranked
from moelab.course.challenge.entries import append, read
from moelab.course.challenge.tasks import TASKS
from moelab.strategies import Evict

SIX, CARD = TASKS["six megabytes"], TASKS["spare the card"]
FACTOR = 2


def doubled(number: int) -> int:
    return FACTOR * number


class Hoarder(Evict):
    """Evicts the expert with the highest index."""

    def score(self, view):
        return -doubled(np.arange(len(view.last_use)))


def figures(**changes) -> dict:
    speeds = {"tokens_per_s": 50.0, "tokens_per_s_min": 49.0, "tokens_per_s_max": 51.0}
    kls = {"kl": 0.01, "kl_held_out": 0.01, "kl_written": 0.004}
    rest = {"bytes_per_token": 1e5, "peak_resident_bytes": 3_500_000, "hit_ratio": 0.8}
    return speeds | kls | rest | changes


def entry(name: str, challenge: str = SIX.name, **changes) -> Entry:
    settings = {"strategy": "lru", "budget": "3.9MB", "bits": 4}
    own = {k: changes.pop(k) for k in ("made", "quick", "own", "machine") if k in changes}
    return Entry(challenge, name, settings, figures(**changes), **own)


@pytest.fixture
def kept(tmp_path):
    """A board's file, which gets entries and whole lines."""
    path = tmp_path / "board.jsonl"

    def keep(*lines: Entry | str):
        for line in lines:
            if isinstance(line, Entry):
                append(path, line)
            else:
                with path.open("a") as file:
                    file.write(line)
        return path

    return keep


# -- the rules ----------------------------------------------------------------------------------


def test_limits_are_judged_by_measured_figures_and_the_answer_has_the_numbers():
    assert SIX.failures(figures()) == []
    over = SIX.failures(figures(peak_resident_bytes=6_100_000, kl=0.0625))
    assert over == [
        "peak memory 6.10 MB is 0.10 MB above the limit of 6.00 MB",
        "KL 0.0625 is 0.0125 above the limit of 0.05",
    ]
    assert len(SIX.failures(figures(kl=float("nan")))) == 1


def test_the_goal_ranks_equal_ones_by_kl_each_name_once_and_a_quick_trial_never():
    fast, same, worse = entry("A", tokens_per_s=92.4), entry("B", tokens_per_s=91.9), entry("B")
    kinder = replace(same, figures=same.figures | {"kl": 0.002})
    places = ranked([worse, fast, kinder, entry("C", tokens_per_s=500.0, kl=0.2)])
    assert [(e.name, rank) for e, rank in places] == [("B", 1), ("A", 2), ("B", None), ("C", None)]
    thrifty = ranked([entry("A", CARD.name), entry("B", CARD.name, bytes_per_token=78_000.0)])
    assert [e.name for e, _ in thrifty] == ["B", "A"]
    assert ranked([entry("A", quick=True)])[0][1] is None


# -- scoring ------------------------------------------------------------------------------------


def request(settings: dict, **more) -> dict:
    return {"challenge": SIX.name, "settings": settings, "quick": True, **more}


def test_an_entry_beyond_its_limits_is_refused_with_the_numbers(demo_store):
    wanted = request({"strategy": "static_pruning", "budget": "9MB"})
    too_much = Entry(name="greedy", figures=scoring.measure(wanted), **wanted)
    peak, kl = too_much.figures["peak_resident_bytes"], too_much.figures["kl"]
    assert not too_much.accepted
    assert SIX.peak_bytes < peak <= 9_000_000
    assert kl > SIX.kl
    shown = repr(too_much)
    assert "disqualified" in shown
    assert f"{(peak - 6e6) / 1e6:.2f} MB above the limit of 6.00 MB" in shown
    assert f"KL {kl:.4f} is {kl - 0.05:.4f} above the limit of 0.05" in shown


SLY = """
from moelab.strategies import Precision
seen = []
class Sly(Precision):
    def new_sequence(self):
        seen.append(1)
    def tier(self, request, asked, view):
        return 0 if len(seen) > HONEST else asked
"""


def test_a_policy_that_behaves_only_while_it_is_examined_gains_nothing(demo_store, monkeypatch):
    def sly(honest: int) -> dict:
        own = {"precision": {"class": "Sly", "source": SLY.replace("HONEST", str(honest))}}
        return scoring.measure(request({"strategy": "lru", "budget": "5.9MB"}, own=own))

    parts, make = [], own_code.make

    def kept(name, source):
        parts.append(make(name, source))
        return parts[-1]

    monkeypatch.setattr(scoring, "make", kept)
    plain, counts = sly(10**6), len(parts)
    assert counts == 2  # one for the held-out texts, one for the run
    for honest in range(1, 3):  # what it counted in one lab is not there in the next
        assert sly(honest)["bytes_per_token"] == plain["bytes_per_token"]
    skipping = sly(0)
    assert skipping["bytes_per_token"] == 0
    assert skipping["kl_written"] > SIX.kl
    one = make("Sly", SLY.replace("HONEST", "2"))  # one object for all labs: it remembers
    monkeypatch.setattr(scoring, "make", lambda *_: one)
    caught = sly(2)
    assert caught["kl_held_out"] == plain["kl_held_out"] < SIX.kl
    assert caught["bytes_per_token"] == 0
    assert caught["kl"] == caught["kl_written"] > SIX.kl


def test_the_kl_of_a_timed_run_is_the_one_a_run_measures_token_by_token(demo_store):
    wanted, task = request({"strategy": "static_pruning", "budget": "5MB"}), SIX.quick()
    prompt = scoring._prompts(task)[0]
    with scoring._opened(task, wanted) as lab:
        run = lab.generate(prompt, max_new_tokens=task.tokens, ignore_eos=True, measure_kl=True)
    timed = scoring._run(task, wanted, prompt)
    assert timed["written"] == list(run.tokens)
    assert timed["kl"] == pytest.approx(run.summary()["kl_mean"], rel=1e-3)
    assert timed["kl"] > 0.001


@pytest.mark.parametrize("name", ["seed", "measure_kl", "device"])
def test_a_line_of_a_file_cannot_set_what_is_fixed(name):
    with pytest.raises(ValueError, match=f"{name} is fixed"):
        scoring.measure(request({"budget": "5MB", name: 1}))


@pytest.fixture(scope="module")
def board(tmp_path_factory, demo_store):
    """A board with one entry that was really scored, by a process of its own."""
    path = tmp_path_factory.mktemp("challenge") / "board.jsonl"
    patch = pytest.MonkeyPatch()
    lie = {"kl_mean": 0.0, "bytes_per_token": 0.0, "peak_resident_bytes": 1, "tokens_per_s": 1e9}
    patch.setattr(moelab.Run, "summary", lambda self: lie)
    perfect = {"kl_mean": 0.0, "same_top1": 1.0}
    patch.setattr("moelab.bench.papers.results.score", lambda *_: perfect)
    patch.setattr("moelab.runs.quality.kl_divergence", lambda *_: 0.0)
    patch.setattr(scoring, "measure", lambda *_: figures(bytes_per_token=0.0))
    patch.setitem(TASKS, CARD.name, replace(CARD, device="disk", seed=5))
    patch.setenv("PYTHONPATH", str(path.parent))
    (path.parent / "sitecustomize.py").write_text("raise SystemExit('patched')")
    try:
        challenge = moelab.challenge(CARD.name, board=path)
        made = challenge.enter("Ada", strategy="lru + 4 bit", budget="3.9MB", evict=Hoarder,
                               quick=True, progress=False)  # fmt: skip
    finally:
        patch.undo()
    return path, made


def test_what_is_patched_in_the_notebook_has_no_effect_on_the_score(board):
    _, made = board
    here = scoring.measure(made.request)  # unpatched, in this process
    for name in ("bytes_per_token", "peak_resident_bytes", "hit_ratio", "text"):
        assert made.figures[name] == here[name], name
    assert made.figures["kl"] == pytest.approx(here["kl"], rel=1e-3)
    assert 0 < made.figures["tokens_per_s"] < 1e4


def test_a_class_of_ones_own_is_sent_as_text_with_what_it_uses(board):
    _, made = board
    assert made.own["evict"]["class"] == "Hoarder"
    source = made.own["evict"]["source"]
    assert "FACTOR = 2" in source
    assert "def doubled" in source
    assert "evict=Hoarder" in made.code
    policy = own_code.make("Hoarder", source)
    assert list(policy.score(SimpleNamespace(last_use=[0, 0]))) == [0, -2]


def test_a_forged_entry_is_exposed_by_measuring_it_again(board, kept):
    _, made = board
    lie = made.figures | {"bytes_per_token": 10.0, "kl": 1e-6}
    forged = kept(made, replace(made, name="Mallory", figures=lie))
    claimed = leaderboard(forged)
    assert claimed["KL"].min() == 1e-6  # the file says so
    assert claimed["rank"].isna().all()  # quick ones
    found = verify(forged, own_code=True, progress=False).set_index("name")
    assert found.loc["Ada", "verified"] == "yes"
    told = found.loc["Mallory", "verified"]
    assert "0.01 kB/token claimed" in told
    assert f"{made.figures['bytes_per_token'] / 1000:.4g} measured" in told
    assert "KL claimed" in told
    assert found.loc["Mallory", "kB/token"] == pytest.approx(found.loc["Ada", "kB/token"])
    assert pd.isna(found.loc["Mallory", "rank"])


def test_own_code_of_a_file_runs_only_when_asked_to(board, monkeypatch):
    path, _ = board
    monkeypatch.setattr("moelab.course.challenge.board.scored", None)  # nothing may be started
    found = verify(path, progress=False)
    assert list(found["verified"]) == ["not run: own code"]
    assert found["rank"].isna().all()


def test_only_what_was_claimed_better_than_it_is_counts_as_wrong_and_speeds_are_replaced():
    assert differences(figures(kl=0.02), figures()) == []
    assert differences(figures(tokens_per_s=500.0), figures()) == []
    assert differences(figures(), figures(kl=0.02)) == ["0.01 KL claimed, 0.02 measured"]
    assert len(differences(figures(), figures(bytes_per_token=np.nan))) == 1


# -- code of one's own --------------------------------------------------------------------------


def test_own_code_is_run_as_a_file_and_anew_for_every_object():
    text = "import numpy as np\nfrom moelab.strategies import Evict\nmade = []\n"
    text += "class Mine(Evict):\n    def __init__(self):\n        made.append(1)\n"
    text += "        self.count, self.file = len(made), __file__\n"
    first, second = own_code.make("Mine", text), own_code.make("Mine", text)
    assert first.count == second.count == 1
    assert first.file.endswith(".py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class A:\n  def (", "SyntaxError"),
        ("import nosuchthing", "No module named 'nosuchthing'"),
        ("class B: pass", "no A can be made of it: KeyError"),
        ("class A:\n    def __init__(self): 1 / 0", "ZeroDivisionError"),
    ],
)
def test_own_code_that_fails_is_told_in_one_line(text, message):
    with pytest.raises(ValueError, match=message):
        own_code.make("A", text)


def test_own_code_the_engine_has_no_use_for_is_told_with_its_kind(demo_store):
    own = {"evict": {"class": "A", "source": "class A: pass"}}
    with pytest.raises(TypeError, match="Evict"):
        scoring.measure(request({"budget": "5MB"}, own=own))


@pytest.mark.parametrize("part", [moelab.strategies.lru().evict, moelab.strategies.lfu().evict])
def test_the_policies_of_the_package_are_sent_by_name(part):
    text = own_code.source_of(type(part))
    assert text.splitlines()[-1].startswith("from moelab.strategies")
    assert type(own_code.make(type(part).__name__, text)) is type(part)


def test_a_policy_may_come_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from moelab.strategies import Evict\nclass Mine(Evict):\n"
        "    def score(self, view):\n        return view.last_use\n"
    )
    from moelab.course.challenge import _as_text

    plain, own = _as_text({"strategy": "lru", "evict": f"{file}:Mine"})
    assert plain == {"strategy": "lru"}
    assert own_code.make("Mine", own["evict"]["source"]).score(SimpleNamespace(last_use=[4])) == [4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"device": "disk"}, "device is fixed"),
        ({"strategy": "magic"}, "unknown strategy 'magic'"),
        ({"evict": Hoarder()}, r"evict=Hoarder, not an object"),
        ({"evict": "no/such.py:Mine"}, "cannot read the policy"),
    ],
)
def test_what_a_challenge_cannot_take_is_refused_before_anything_is_started(words, message):
    with pytest.raises(ValueError, match=message):
        moelab.challenge(SIX.name).enter("Ada", **({"budget": "5MB"} | words))
    with pytest.raises(ValueError, match="name ''"):
        moelab.challenge(SIX.name).enter("", budget="5MB")
    with pytest.raises(ValueError, match="choose one of six megabytes"):
        moelab.challenge("seven megabytes")


# -- the board ----------------------------------------------------------------------------------


def _append_many(path, name) -> None:
    for i in range(25):
        append(path, entry(f"{name} {i}", made=str(i)))


def test_several_people_append_to_one_board_at_once(tmp_path):
    path = tmp_path / "board.jsonl"
    context = multiprocessing.get_context("fork")
    people = [context.Process(target=_append_many, args=(path, name)) for name in "ABCD"]
    for person in people:
        person.start()
    for person in people:
        person.join(60)
    entries, faults = read(path)
    assert faults == []
    assert len({e.name for e in entries}) == len(entries) == 100


def test_a_torn_or_foreign_line_is_named_and_costs_nobody_else_their_entry(kept):
    torn = '{"format": 1, "challenge": "nine lives"}\n{"format": 1, "na'
    board = leaderboard(kept(entry("A"), torn, entry("B", tokens_per_s=60.0)))
    assert list(board["name"]) == ["B", "A"]
    assert [fault.split(":")[0] for fault in board.faults] == ["line 2", "line 3"]
    assert "line 3" in board._repr_html_()


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 5},
        {"machine": [1]},
        {"machine": {"processor": {}}},
        {"versions": None},
        {"made": 7},
        {"quick": "no"},
        {"settings": {"strategy": [1]}},
        {"own": {"evict": "x"}},
        {"own": {"evict": {"class": "A"}}},
        {"own": {"nothing": {"class": "A", "source": ""}}},
        {"figures": figures(tokens_per_s=1e999)},
        {"figures": figures(kl="0.01")},
        {"figures": {}},
        {"challenge": [1]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_wrong_field_costs_only_its_own_line(kept, wrong):
    lines = json.dumps(json.loads(entry("B").line()) | wrong) + "\n" + "[" * 100_000 + "\n"
    board = leaderboard(kept(entry("A"), lines, entry("C", tokens_per_s=60.0)))
    assert list(board["name"]) == ["C", "A"]
    assert [fault.split(":")[0] for fault in board.faults] == ["line 2", "line 3"]


def test_a_board_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("moelab.course.challenge.scored", None)  # nothing may be started
    for board, error in ("no/b.jsonl", FileNotFoundError), (".", IsADirectoryError):
        with pytest.raises(error):
            moelab.challenge(SIX.name, board=tmp_path / board).enter("A", budget="5MB")


def test_the_file_cannot_declare_a_verdict_or_a_rank(kept):
    facts = json.loads(entry("A", kl=0.9).line()) | {"rank": 1, "board": 1}
    board = leaderboard(kept(json.dumps(facts) + "\n"))
    assert board["rank"].isna().all()
    assert "KL 0.9000 is 0.8500 above" in board.loc[0, "limits"]


def test_a_board_shows_itself_as_table_and_picture_without_script(kept):
    board = leaderboard(kept(entry("<b>Ada</b>"), entry("Bob", kl=0.9)))
    html = board._repr_html_()
    assert not any(words in html for words in ("<script", "<b>Ada", "NA&gt;"))
    assert "data:image/svg+xml;base64," in html
    assert "1. &lt;b&gt;Ada" in board.svg()
    assert "url(#h" in board.svg()  # hatched: a second cue for what does not rank
    assert type(board.head(1)) is pd.DataFrame
    assert "1" in board.to_csv()


def test_boards_of_several_challenges_are_asked_for_by_name(kept):
    path = kept(entry("A"), entry("B", CARD.name))
    with pytest.raises(ValueError, match="several challenges"):
        leaderboard(path)
    assert list(leaderboard(path, CARD.name)["name"]) == ["B"]
    assert list(moelab.challenge(SIX.name, board=path).leaderboard()["name"]) == ["A"]
    before = moelab.challenge(SIX.name, board=path.with_name("no.jsonl")).leaderboard()
    assert list(before.columns) == list(leaderboard(path, SIX.name).columns)
    assert "No entry of" in before._repr_html_()


def test_a_terminal_prints_the_challenges_and_a_board(kept, call):
    code, out, _ = call("challenge", "list")
    assert not code
    assert "spare the card" in out
    code, out, _ = call("challenge", "board", kept(entry("Ada")))
    assert not code
    assert "Ada" in out
