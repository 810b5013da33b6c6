"""The course's checks: the engine judges, nobody's answer is stored, and no answer is no error.

That every exercise accepts its solution and refuses a wrong answer is in test_notebooks.py, which
runs each notebook's teacher's note.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import moelab
from moelab.course import CHECKS, check
from moelab.strategies import Evict

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_exercise = pytest.mark.parametrize("number", CHECKS)


def given(number):
    """What a check wants besides the answer."""
    return {
        "01.1": {"run": None},
        "02.3": {"run": None},
        "06.1": {"run": None},
        "08.1": {"run": None},
    }.get(number, {"lab": None} if number == "03.3" else {})


@pytest.fixture
def no_engine(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("this needs no engine")

    monkeypatch.setattr(moelab, "open", refuse, raising=False)


def test_notebooks_ask_what_can_be_checked_and_nothing_else():
    asked = [x for path in NOTEBOOKS for x in re.findall(r"\*\*(\d\d\.\d)\*\*", path.read_text())]
    assert sorted(asked) == sorted(CHECKS)


@each_exercise
def test_no_answer_yet_is_no_error(number, no_engine):
    for nothing in (None, ..., {"bits": ...}, [...], (3, ...)):
        verdict = check(number, nothing, **given(number))
        assert verdict.right is None
        assert "not answered yet" in repr(verdict)


@each_exercise
def test_an_answer_of_the_wrong_kind_is_told_what_to_give(number, no_engine):
    verdict = check(number, object(), **given(number))
    assert verdict.right is False
    assert re.search(r"give|must be an object", verdict.said)


@pytest.mark.parametrize(
    ("number", "answer", "told"),
    [
        ("02.2", 14.5, "whole number"),
        ("02.3", 0.5, r'check\("02\.3", answer, run=run\)'),
        ("03.2", "prefetch", "allocate, route, precision, evict as"),
        ("04.2", {"device": "disk"}, "about 'hdd'"),
        ("08.2", {"bits": 4, "device": "nvme"}, "about 'sd_card'"),
    ],
)
def test_an_answer_to_another_question_is_told_which_is_asked(number, answer, told, no_engine):
    verdict = check(number, answer)
    assert verdict.right is False
    assert re.search(told, verdict.said)


def test_an_unknown_exercise_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no exercise '9\.9'; there are 00\.1, 00\.2, 01\.1"):
        check("9.9", 1)


def test_what_the_engine_refuses_is_said():
    verdict = check("03.1", {"t1": 0.9, "t2": 0.1})
    assert verdict.right is False
    assert "need 0 <= t1 <= t2" in verdict.said
    assert check("08.2", {"budget": "1%"}).said.startswith("budget")


def test_what_a_policy_of_ones_own_raises_comes_with_its_traceback():
    class Broken(Evict):
        def score(self, view):
            return {}[view.token]

    with pytest.raises(KeyError):
        check("05.1", Broken())


def test_a_verdict_is_shown_with_its_words_escaped_and_a_sign_beside_the_colour():
    verdict = check("00.1", "<b>")
    assert "&lt;b&gt;" in verdict._repr_html_()
    assert "\u2717 00.1 not yet" in verdict._repr_html_()


def test_an_answer_is_right_for_the_run_it_was_read_from_and_for_no_other(demo_lab):
    demo_lab.update(device="nvme")
    runs = [
        demo_lab.generate(prompt, max_new_tokens=16, ignore_eos=True)
        for prompt in ("The sea", "def f(x):")
    ]
    longest = []
    for run in runs:
        waits = [
            (row.wait_ms, (token, row.layer, row.expert))
            for token in range(1, 16)
            for row in run.blame(token).itertuples()
        ]
        longest.append(max(waits)[1])
    right = [check("01.1", longest[0], run=run).right for run in runs]
    assert right == [True, longest[0] == longest[1]]
    at = 1e3 * runs[0].per_token.bytes[1:].mean() / runs[0].per_token.compute_ms[1:].median()
    assert check("08.1", at, run=runs[0]).right
    assert not check("08.1", at / 10, run=runs[0]).right
    assert "did you mean MB/s? Then give 25e6" in check("08.1", 25, run=runs[0]).said
