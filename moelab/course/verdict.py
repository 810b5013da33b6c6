"""What an exercise's check says, and how one is registered.

A check is a function from an answer to (right, what was measured, with a hint). It stores no
answers: what an answer is held against is measured by the engine when it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Real
from typing import Any

import moelab

Said = tuple[bool, str]
"""Right or not, and the measured figures with a hint."""

CHECKS: dict[str, Callable[..., Said]] = {}
"""Exercise -> its check, filled by `exercise`."""

_LOOKS = {
    True: ("right", "\u2713", "#009e73"),
    False: ("not yet", "\u2717", "#d55e00"),
    None: ("not answered yet", "\u25cb", "#808890"),
}
"""Word, sign and colour of the bar beside it."""


class RefusedError(ValueError):
    """The answer is of the wrong kind; the message says what to give."""


@dataclass(frozen=True, slots=True, repr=False)
class Verdict:
    """An exercise's answer, judged.

    Attributes
    ----------
    exercise
        Its number, ``"03.1"``.
    right
        True or False; None where nothing was answered.
    said
        What was measured, and a hint.
    """

    exercise: str
    right: bool | None
    said: str

    def __repr__(self) -> str:
        return f"{self.exercise} {_LOOKS[self.right][0]}: {self.said}"

    def _repr_html_(self) -> str:
        word, sign, colour = _LOOKS[self.right]
        said = escape(self.said[:1].upper() + self.said[1:])
        return (
            f'<div role="status" style="border-left:4px solid {colour};padding:2px 10px;'
            f'max-width:52em"><b>{sign} {self.exercise} {word}.</b> {said}</div>'
        )


def exercise(number: str) -> Callable[[Callable[..., Said]], Callable[..., Said]]:
    """Register a check under an exercise's number."""

    def register(judge: Callable[..., Said]) -> Callable[..., Said]:
        assert number not in CHECKS, number
        CHECKS[number] = judge
        return judge

    return register


def unanswered(answer: Any) -> bool:
    """Whether an answer, or a part of it, is still None or ``...``."""
    if answer is None or answer is ...:
        return True
    if isinstance(answer, Mapping):
        return any(map(unanswered, answer.values())) or not answer
    return isinstance(answer, (list, tuple)) and (any(map(unanswered, answer)) or not answer)


# -- answers of the right kind --------------------------------------------------------------------


def a_number(answer: Any, what: str) -> float:
    """The answer as a number."""
    if isinstance(answer, bool) or not isinstance(answer, Real):
        raise RefusedError(f"give a number: {what}; this is {answer!r}")
    return float(answer)


def settings(answer: Any, example: str) -> dict[str, Any]:
    """The answer as settings for ``lab.update``."""
    if not isinstance(answer, Mapping):
        raise RefusedError(f"give settings as a dict, {example}; this is {answer!r}")
    return dict(answer)


def numbers(answer: Any, what: str) -> list[int]:
    """The answer as whole numbers."""
    if not isinstance(answer, Sequence) or not all(type(n) is int for n in answer):
        raise RefusedError(f"give a list of whole numbers, {what}; this is {answer!r}")
    return list(answer)


# -- what answers are held against ----------------------------------------------------------------


def opened(**changes: Any) -> moelab.Lab:
    """The bundled model, freshly opened with nothing in memory, and settings changed."""
    lab = moelab.open("demo", measure_kl=False, progress=False)
    try:
        lab.update(**changes)
    except BaseException:
        lab.close()
        raise
    return lab


def unseen(lab: moelab.Lab, texts: int = 6) -> list[str]:
    """Texts that no calibration saw, of so many domains."""
    from moelab.bench.papers.results import unseen

    return unseen(lab)[:texts]


def recorded(lab: moelab.Lab, *, tokens: int = 32, look_ahead: int = 0) -> moelab.Trace:
    """The model's routing of `unseen` texts."""
    from moelab.calibration.probes import record

    return record(lab, unseen(lab), tokens=tokens, look_ahead=look_ahead)


def kl_of(lab: moelab.Lab, *, texts: int = 3, tokens: int = 10) -> float:
    """Mean KL under the lab's settings, in nats, on a little of `unseen` texts."""
    found = [lab.score(t, max_tokens=tokens, progress=False) for t in unseen(lab, texts)]
    return sum(score.kl_mean for score in found) / len(found)


def is_run(answer: Any, *, least: int) -> moelab.Run:
    """The answer as a run of at least so many tokens."""
    if not isinstance(answer, moelab.Run):
        raise RefusedError(f"give the run itself, for example lab.run; this is {answer!r}")
    if len(answer.token_reports) < least:
        raise RefusedError(f"this run has {len(answer.token_reports)} tokens; let it write {least}")
    return answer
