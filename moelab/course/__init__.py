"""The course's exercises, checked by the engine: ``check("03.1", answer)``.

Every check measures: it opens the bundled model, or reads the run or lab it is given, and says
right or not yet with the figures it found. No answers are stored, so a policy nobody thought of is
as welcome as the expected one.

>>> from moelab.course import check
>>> check("00.1", ...)
00.1 not answered yet: Put your answer in place of the dots.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from moelab.course import field, papers, practice
from moelab.course.verdict import CHECKS, Verdict, unanswered

__all__ = ["CHECKS", "Verdict", "check", "field", "papers", "practice"]


def check(exercise: str, answer: Any = None, **given: Any) -> Verdict:
    """Judge an answer.

    Parameters
    ----------
    exercise
        Its number as the notebook has it.
    answer
        What the exercise asks for: a number, settings, a policy, a run. None or ``...`` is not
        answered yet, which is no error, so that a notebook runs from top to bottom.
    given
        The run or lab an exercise is about, where it says so.

    Raises
    ------
    ValueError
        There is no such exercise. What the engine refuses is part of the verdict; what a policy of
        your own raises comes as it is, with its traceback.
    """
    if exercise not in CHECKS:
        raise ValueError(
            f"there is no exercise {exercise!r}; there are {', '.join(sorted(CHECKS))}"
        )
    if unanswered(answer):
        return Verdict(exercise, None, "Put your answer in place of the dots.")
    judge = CHECKS[exercise]
    for name, wanted in signature(judge).parameters.items():
        needed = wanted.kind is wanted.KEYWORD_ONLY and wanted.default is wanted.empty
        if needed and name not in given:
            call = f'check("{exercise}", answer, {name}={name})'
            return Verdict(exercise, False, f"Give the {name} it is about too: {call}.")
    try:
        return Verdict(exercise, *judge(answer, **given))
    except ValueError as refused:
        return Verdict(exercise, False, f"{refused}.")
