"""What a user may rely on of comparisons and saved runs."""

from __future__ import annotations

import ast
import json
import math
import time

import pytest

import moelab
from moelab.runs.compare import Comparison
from moelab.runs.rounds import rotated
from moelab.runs.saved import SavedRuns
from moelab.scheduling.stream import Shape
from moelab.settings import Settings
from moelab.spelling import _word, changed, in_turn, opened, short, shown, shown_strategy
from moelab.strategies import Evict, make
from moelab.widgets.drawer import Drawer

SHAPE = Shape((12,) * 8, 2, {16: 221184, 8: 118784, 4: 65536, 3: 49152, 2: 36864})
START = Settings(5_308_416, 16, make("lru"))


class Recorded:
    """As much of a recording as a comparison reads."""

    def __init__(self, ids, *, device="disk", updates=(), **figures):
        timing = "measured" if device == "disk" else "emulated"
        self.document = {
            "prompt": "Once",
            "ids": list(ids),
            "pieces": [f" <{i}>" for i in ids],
            "max_new_tokens": 64,
            "ignore_eos": False,
            "messages": [], "model": {},
            "sampling": {
                "temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 3,
            },
            "start": {"layer": [], "expert": [], "bits": []},
            "settings": [
                {"token": 0, "short": f"lru, 25 %, {device}", "code": "lab = ...", "update": ""},
                *({"token": t, "short": "", "code": "", "update": u} for t, u in updates),
            ],
            "summary": {
                "tokens_per_s": 50.0,
                "hit_ratio": 0.5,
                "kl_mean": None,
                "peak_resident_bytes": 5_000_000,
                "timing": timing,
                "device": device,
            }
            | figures,
        }  # fmt: skip


def test_the_first_different_token_is_found_in_ids_not_in_words():
    a = Recorded([1, 2, 3, 4])
    assert Comparison({"a": a, "b": Recorded([1, 2, 3, 4])}).diverges_at is None
    assert Comparison({"a": a, "b": Recorded([1, 2, 9, 4])}).diverges_at == 2
    assert Comparison({"a": a, "b": Recorded([1, 2])}).diverges_at == 2
    assert Comparison({"a": a, "b": Recorded([1, 2, 3, 5]), "c": Recorded([1, 7])}).diverges_at == 1
    assert Comparison({"a": a}).diverges_at is None


def test_two_runs_have_the_difference_of_every_figure():
    b = Recorded([1], tokens_per_s=60.0, hit_ratio=0.75, kl_mean=0.1)
    table = Comparison({"a": Recorded([1]), "b": b}).table()
    assert table.loc["tokens_per_s", "difference"] == 10
    assert table.loc["hit_ratio", "difference"] == 0.25
    assert math.isnan(table.loc["kl_mean", "difference"]), "a KL that was not measured has none"
    assert table.loc["timing", "a"] == "measured"
    three = Comparison({n: Recorded([1]) for n in "abc"}).table()
    assert list(three.columns) == ["a", "b", "c"]


def test_measured_and_emulated_times_have_no_difference():
    both = Comparison({"a": Recorded([1]), "b": Recorded([1], device="hdd", tokens_per_s=9.0)})
    table = both.table()
    assert math.isnan(table.loc["tokens_per_s", "difference"])
    assert table.loc["hit_ratio", "difference"] == 0
    assert list(table.loc["timing"])[:2] == ["measured", "emulated"]
    assert not both.same_device
    assert "different devices" in both._repr_html_()


def test_a_run_is_beaten_only_by_one_that_is_nowhere_worse_on_the_same_device():
    runs = {
        "good": Recorded([1], tokens_per_s=60.0, kl_mean=0.01),
        "slower": Recorded([1], tokens_per_s=50.0, kl_mean=0.01),
        "slower, finer": Recorded([1], tokens_per_s=50.0, kl_mean=0.001),
        "smaller": Recorded([1], tokens_per_s=10.0, kl_mean=0.5, peak_resident_bytes=1),
        "other device": Recorded([1], device="hdd", tokens_per_s=1.0, kl_mean=0.9),
        "no KL, slower": Recorded([1], tokens_per_s=49.0),
    }
    assert Comparison(runs).front() == ["good", "slower, finer", "smaller", "other device"]
    assert Comparison({"a": Recorded([1]), "b": Recorded([1])}).front() == ["a", "b"], "a tie"


def repeated(*speeds, **figures):
    """A run that was made as often as it has speeds."""
    made = Recorded([1], tokens_per_s=speeds[0], **figures)
    made.document["repeats"] = [{"tokens_per_s": speed} for speed in speeds]
    return made


@pytest.mark.parametrize(
    ("runs", "verdict", "front"),
    [
        (
            {"lru": repeated(14.8, 12.9, 14.1), "what if": repeated(13.2, 15.0, 14.0)},
            ("not told apart: 'lru' 14.1 (12.9\N{EN DASH}14.8), 'what if' 14 "
             "(13.2\N{EN DASH}15) tokens/s, 3 runs each"),
            ["lru", "what if"],
        ),
        (
            {"lru": repeated(12.0, 12.2, 11.9), "hobbit": repeated(15.0, 14.8, 15.1)},
            ("'hobbit' is the fastest: 15 (14.8\N{EN DASH}15.1) against 'lru' 12 "
             "(11.9\N{EN DASH}12.2) tokens/s, 3 runs each"),
            ["hobbit"],
        ),
        (
            {"a": repeated(14.5, 15.7, 15.0), "once more": repeated(14.1, 13.7, 14.0)},
            ("not told apart: 'a' 15 (14.5\N{EN DASH}15.7), 'once more' 14 "
             "(13.7\N{EN DASH}14.1) tokens/s, 3 runs each"),
            ["a", "once more"],
        ),
        (
            {"lru": Recorded([1]), "hobbit": repeated(55.0, 56.0)},
            ("'hobbit' 55.5 (55\N{EN DASH}56), 'lru' 50 tokens/s; 'lru' was made once, so the "
             "difference may be noise: lab.repeat() or lab.what_if() tells"),
            ["hobbit"],
        ),
        (
            {"none": Recorded([], tokens_per_s=None), "lru": Recorded([1])},
            "'none' wrote fewer than two tokens: it has no speed",
            ["lru"],
        ),
        (
            {"disk": Recorded([1]), "card": Recorded([1], device="sd_card")},
            "times come from different devices or ways of timing: speeds are not compared",
            ["disk", "card"],
        ),
        ({"lru": Recorded([1])}, "one run: there is nothing to compare it with", ["lru"]),
    ],
)  # fmt: skip
def test_a_comparison_says_whether_a_difference_is_noise(runs, verdict, front):
    beside = Comparison(runs)
    assert beside.verdict() == verdict
    assert beside.front() == front
    assert verdict in repr(beside)
    if verdict.startswith("not told apart"):
        assert math.isnan(beside.table().loc["tokens_per_s", "difference"])
        shown = beside.table().loc[["runs", "slowest", "tokens_per_s"]].iloc[:, 0].tolist()
        assert shown in ([3, 12.9, 14.1], [3, 14.5, 15.0])


def test_the_scatter_shows_kl_by_colour_and_size_and_how_it_was_timed_by_shape():
    runs = {
        "fine": Recorded([1], kl_mean=0.0001),
        "rough": Recorded([1], kl_mean=0.5, tokens_per_s=70.0, peak_resident_bytes=6e6),
        "unknown": Recorded([1], tokens_per_s=1.0),
        "emulated": Recorded([1], device="hdd", kl_mean=0.01),
    }
    measured, emulated, front, _ = Comparison(runs).figure().data
    fine, rough, _ = measured.marker.size
    assert rough > fine
    assert measured.marker.color[1] > measured.marker.color[0]
    assert [s.endswith("-open") for s in measured.marker.symbol] == [False, False, True]
    assert measured.marker.symbol[0] != emulated.marker.symbol[0]
    assert list(measured.text) == ["fine", "rough", "unknown"]
    assert list(front.x) == [5, 6]
    near = {name: Recorded([1], kl_mean=kl) for name, kl in (("a", 0.011), ("b", 0.04))}
    ticks = Comparison(near).figure().data[0].marker.colorbar.ticktext
    assert ticks == ("2e-02", "5e-02", "1e-01"), "also where all KLs lie within a decade"


def test_text_is_shown_as_text_with_the_first_different_token_marked():
    page = Comparison({"a & b": Recorded([1, 2]), "b": Recorded([1, 3])})._repr_html_()
    assert "a &amp; b" in page
    assert "&lt;1&gt;<mark title='token 1: the first that differs'> &lt;2&gt;</mark>" in page
    assert "<1>" not in page
    same = Comparison({"a": Recorded([1]), "b": Recorded([1])})
    assert "<mark" not in same._repr_html_()
    assert "the same tokens" in repr(same)


def test_code_has_the_settings_and_what_changed_at_which_token():
    run = Recorded([1], updates=[(4, "bits=4"), (6, ""), (9, 'strategy="hobbit", t1=0.4')])
    run.document["start"]["expert"] = [3, 4]
    code = Comparison({"a": run}).code("a")
    assert "began with 2 experts resident" in code
    given = {}

    class Lab:
        def generate(self, prompt, **options):
            given.update(options, prompt=prompt)

    exec(code.replace("lab = ...", "lab = Lab()"), {"Lab": Lab})
    assert given["prompt"] == "Once"
    assert given["seed"] == 3
    assert given["changes"] == {4: {"bits": 4}, 9: {"strategy": "hobbit", "t1": 0.4}}
    with pytest.raises(ValueError, match="no run 'b'; there are 'a'"):
        Comparison({"a": run}).code("b")


# -- settings as code ------------------------------------------------------------------------------


class Own(Evict):
    def score(self, view):
        return 0 * view.last_use


def words(settings):
    told = shown(settings) | shown_strategy(settings.strategy)
    return {k: v for k, v in told.items() if k != "strategy"}  # a mix of a mix is named otherwise


def test_settings_spelled_as_code_lead_to_the_same_settings():
    steps = [
        {"budget": "50%"},
        {"strategy": "hobbit"},
        {"t1": 0.4, "w_lru": 0.5},
        {"w_lru": 0.25},
        {"evict": "edgemoe"},
        {"prefetch": 1},
        {"prefetch": "moe_infinity"},
        {"strategy": "lru"},
        {"bits": 4, "device": "sd_card", "seed": 5, "measure_kl": True},
        {"pin": {(5, 3): 8}},
        {"strategy": "hobbit"},
        {"bits": 4},
        {"strategy": "swapmoe"},
        {"evict": Own()},
        {"strategy": "edgemoe"},
        {"pin": {}},
    ]
    now = START
    for step in steps:
        new = now.change(SHAPE, **step)
        update = eval(f"dict({changed(now, new)})", {"Own": Own})
        assert words(now.change(SHAPE, **update)) == words(new), step
        assert words(again(opened("demo", new))) == words(new), step
        now = new


def again(code):
    """What the code of `opened` makes, without opening a model."""

    class Lab:
        def __init__(self, model, *, budget, bits, strategy, **more):
            given = {} if strategy == "lru" else {"strategy": strategy}
            self.settings = START.change(SHAPE, budget=budget, bits=bits, **given, **more)

        def update(self, **changes):
            self.settings = self.settings.change(SHAPE, **changes)

    names = {"Own": Own, "moelab": type("moelab", (), {"open": Lab})}
    exec(code, names)
    return names["lab"].settings


@pytest.mark.parametrize(("first", "then", "low"), [(16, 4, 4), (4, 16, 3), (2, 8, 4)])
def test_low_bits_that_the_strategy_would_not_bring_are_spelled_out(first, then, low):
    before = START.change(SHAPE, bits=first)
    hobbit = before.change(SHAPE, strategy="hobbit").change(SHAPE, bits=then)
    assert (hobbit.bits, hobbit.low_bits) == (then, low)
    assert words(again(opened("demo", hobbit))) == words(hobbit)
    for start in (START, before):
        update = eval(f"dict({changed(start, hobbit)})")
        assert words(start.change(SHAPE, **update)) == words(hobbit)
    assert "low_bits" not in opened("demo", START.change(SHAPE, strategy="hobbit"))


def test_settings_are_told_in_a_few_words():
    settings = START.change(SHAPE, strategy="hobbit", device="sd_card", pin={(5, 3): 8})
    assert short(settings, SHAPE) == "hobbit, 25 %, 16/4 bit, SD card, expert 5.3 pinned at 8 bit"
    assert short(START, SHAPE) == "lru, 25 %, 16 bit, disk"


@pytest.mark.parametrize("value", ["sd_card", "C:\\new\\table", 'a "b"', "two\nlines", 1_000, None])
def test_a_value_is_spelled_so_that_python_reads_it_back(value):
    assert ast.literal_eval(_word(value)) == value


def test_settings_that_changed_on_the_way_are_shown_as_changed():
    a, b, c = (f"lru, {share} %, 16 bit, disk" for share in (25, 50, 10))
    assert in_turn([a]) == a
    assert in_turn([a, b]) == "lru, 25 % → 50 %, 16 bit, disk"
    assert in_turn([a, b, a]) == "lru, 25 % → 50 % → 25 %, 16 bit, disk"
    assert in_turn([a, c, b, a, b]) == "lru, 25 % → … → 50 %, 16 bit, disk"
    assert in_turn([a, a, b]) == "lru, 25 % → 50 %, 16 bit, disk, 1 other change"
    assert in_turn([a, f"{a}, expert 5.3 pinned at 8 bit"]) == (
        f"{a}, no pin → expert 5.3 pinned at 8 bit"
    )


# -- the real thing --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_runs(demo_store):
    with moelab.open("demo", budget="25%", measure_kl=False, progress=False) as lab:
        run = lab.generate(
            "Once upon a time", max_new_tokens=10, seed=2, changes={5: {"bits": 4, "evict": "lfu"}}
        )
        lab.save_run(run, "a quarter")
        lab.update(budget="50%")
        lab.generate("Once upon a time", max_new_tokens=6)
        lab.save_run()
        yield lab, run


def test_copied_code_makes_the_same_run_again(saved_runs):
    lab, run = saved_runs
    names = {}
    exec(lab.saved.compare().code("a quarter"), names)
    with names["lab"]:
        assert names["run"].tokens == run.tokens
        mine, theirs = (
            r.log.records()[["at", "layer", "expert", "kind"]] for r in (run, names["run"])
        )
        assert mine[mine["kind"] != 7].tolist() == theirs[theirs["kind"] != 7].tolist()


def test_saved_runs_are_named_renamed_saved_and_loaded(saved_runs, tmp_path):
    lab, run = saved_runs
    assert list(lab.saved) == ["a quarter", "lru + evict lfu, 50 %, 4 bit, disk"]
    files = lab.saved.save(tmp_path / "saved")
    assert files[0].name == "a quarter.moelab.json.gz"
    other = SavedRuns()
    assert other.load(tmp_path / "saved") == ["a quarter", "lru + evict lfu, 50 %, 4 bit, disk"]
    assert other["a quarter"].document["ids"] == run.tokens
    assert other.run("a quarter") is None
    assert lab.saved.run("a quarter") is run
    assert other.add(run, "a quarter") == "a quarter (2)"
    third = SavedRuns()
    third.add(run, "a quarter")
    third.take_over(lab.saved)
    assert list(third) == list(lab.saved)
    assert third["a quarter"] is not lab.saved["a quarter"], "its own stays"
    assert other.rename("a quarter (2)", "another") == "another"
    assert list(other)[-1] == "another"
    other.remove("another")
    with pytest.raises(KeyError, match="no run is saved as 'another'; there are 'a quarter'"):
        other.remove("another")
    with pytest.raises(ValueError, match="a saved run needs a name"):
        other.rename("a quarter", " ")
    with pytest.raises(ValueError, match="no recording"):
        other.load(tmp_path)
    changed = "lru → lru + evict lfu, 25 %, 16 bit → 4 bit, disk"
    assert lab.saved.add(run.recording()) == changed
    lab.saved.remove(changed)
    table = other.compare().table()
    assert table.loc["settings", "a quarter"] == changed
    assert table.loc["tokens", "a quarter"] == len(run.tokens)


def test_a_runs_memory_is_its_own_whatever_was_resident_before(saved_runs):
    lab, _ = saved_runs
    before = lab.settings
    lab.update(budget="100%", bits=16)
    lab.generate("Once upon a time", max_new_tokens=6)
    lab.update(bits=2)
    run = lab.generate("Once upon a time", max_new_tokens=3)
    assert 0 < run.summary()["peak_resident_bytes"] <= 96 * 36_864
    on_the_way = lab.generate("Once upon a time", max_new_tokens=4, changes={1: {"bits": 16}})
    assert on_the_way.summary()["peak_resident_bytes"] > run.summary()["peak_resident_bytes"]
    lab.update(budget=before.budget_bytes, bits=before.bits)


def test_what_if_and_compare_show_two_texts(saved_runs):
    lab, run = saved_runs
    beside = lab.what_if(run, bits=2, repeats=1)
    assert beside.names == ["as it was", "bits=2"]
    assert beside.texts()["as it was"] == run.text
    assert beside.diverges_at is not None
    assert "bits=2" in beside._repr_html_()
    same = moelab.compare(run, run)
    assert same.diverges_at is None
    assert len(same.names) == 2


def test_the_drawer_tells_of_saved_runs_does_a_what_if_and_says_what_is_refused(saved_runs):
    lab, run = saved_runs
    told, sent = [], []
    runs = Drawer(lambda: lab, told.append, sent.append)
    runs.refresh()
    runs.refresh()
    assert len(told) == 1, "nothing new is not told again"
    first = told[0]["saved"][0]
    assert first["name"] == "a quarter"
    assert first["tokens_per_s"] == run.summary()["tokens_per_s"]
    assert first["code"] == lab.saved.compare().code("a quarter")
    json.dumps(told)

    lab.update(budget="60%")
    runs.hear({"ask": "since", "of": "a quarter"})
    assert sent[-1]["since"]["words"] == "budget=12.7 MB"
    runs.hear({"ask": "whatif", "of": "a quarter", "keep": [2, 5, 8]})
    end = time.monotonic() + 60
    while told[-1]["again"]["state"] == "running" and time.monotonic() < end:
        time.sleep(0.05)
        runs.refresh()
    assert told[-1]["again"]["state"] == "done", told[-1]
    assert told[-1]["again"]["names"][0] == "a quarter"
    name = told[-1]["again"]["names"][1]
    assert name == "what if pin={(2, 5): 8}, budget=12.7 MB"
    runs.hear({"ask": "beside", "names": ["a quarter", name]})
    assert sent[-1]["beside"]["names"] == ["a quarter", name]
    json.dumps(sent)

    lab.update(pin={(2, 5): 8})
    for ask, words in (
        ({"ask": "whatif", "of": "a quarter", "keep": [99, 0, 8]}, "no expert 0 in layer 99"),
        ({"ask": "remove", "name": "nobody"}, "no run is saved as 'nobody'"),
        ({"ask": "whatif", "of": name}, "nothing differs from that run yet"),
    ):
        runs.hear(ask)
        assert words in told[-1]["error"]
    runs.hear({"ask": "remove", "name": name})
    assert told[-1]["error"] == ""
    assert name not in [row["name"] for row in told[-1]["saved"]]


def test_runs_are_made_again_in_turn_and_their_ranges_are_saved(saved_runs, tmp_path):
    lab, run = saved_runs
    beside = lab.what_if(run, bits=2, repeats=2)
    first, second = beside.recordings.values()
    assert [len(r.document["repeats"]) for r in (first, second)] == [2, 2]
    assert beside.ranges("as it was")[0] <= run.summary()["tokens_per_s"]
    assert (
        moelab.Recording.load(first.save(tmp_path / "a")).document["repeats"]
        == (first.document["repeats"])
    )
    assert len(second.document["ids"]) <= len(run.tokens)
    again = lab.repeat("a quarter", repeats=3)
    assert again.names == ["a quarter"]
    assert len(lab.saved["a quarter"].document["repeats"]) == 3
    assert "repeats=0: a whole number from 1 to 100" in refused(lab.what_if, run, repeats=0)
    loaded = SavedRuns()
    lab._saved, kept = loaded, lab._saved
    assert "no run is saved yet" in refused(lab.repeat)
    lab._saved = kept


def refused(call, *given, **named):
    with pytest.raises(ValueError) as error:
        call(*given, **named)
    return str(error.value)


def test_a_run_is_saved_once_unless_it_is_given_another_name(saved_runs):
    _, run = saved_runs
    saved = SavedRuns()
    first = saved.add(run)
    assert saved.add(run) == first
    assert saved.add(run, "again") == "again"
    assert list(saved) == [first, "again"]


def test_repeats_begin_elsewhere_each_time():
    assert "".join(rotated("abc", 3)) == "abcbcacab"
