"""What an exercise's check says, how one is registered, and what its answer is held against.

A check is a function from an answer to (right, what was measured, with a hint). It stores no
answers: what an answer is held against is measured by the engine when it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    assert number not in CHECKS, number
    return lambda judge: CHECKS.setdefault(number, judge)


def judged(said: str, *unmet: tuple[bool, str], right: str = "") -> Said:
    """What was measured with the hint of the first demand that is not met; right where none is."""
    hint = next((hint for wrong, hint in unmet if wrong), None)
    return hint is None, f"{said}. {right if hint is None else hint}".rstrip()


def unanswered(answer: Any) -> bool:
    """Whether an answer, or a part of it, is still None or ``...``."""
    parts = [*answer.values()] if isinstance(answer, Mapping) else answer
    if isinstance(parts, (list, tuple)):
        return not parts or any(map(unanswered, parts))
    return answer is None or answer is ...


# -- answers of the right kind --------------------------------------------------------------------


def given(
    answer: Any, kind: type | tuple[type, ...], what: str, *, length: int | None = None
) -> Any:
    """The answer, if it is of the kind (and length) that is asked for.

    Raises
    ------
    RefusedError
        It is not; the message says ``what`` to give.
    """
    wrong = isinstance(answer, bool) or not isinstance(answer, kind)
    if wrong or (length and len(answer) != length):  # pyright: ignore[reportArgumentType]
        raise RefusedError(f"give {what}; this is {answer!r}")
    return answer


def a_number(answer: Any, what: str, *, whole: bool = False) -> float:
    """The answer as a number."""
    value = float(given(answer, Real, kind := f"a {'whole ' if whole else ''}number: {what}"))
    if whole and not value.is_integer():
        raise RefusedError(f"give {kind}; this is {answer!r}")
    return value


def settings(answer: Any, example: str, *, device: str | None = None) -> dict[str, Any]:
    """The answer as settings for ``lab.update``, on the device that the exercise is about."""
    found = dict(given(answer, Mapping, f"settings as a dict, {example}"))
    if device and found.setdefault("device", device) != device:
        raise RefusedError(
            f"this exercise is about {device!r}: leave device out; this is {found['device']!r}"
        )
    return found


def is_run(answer: Any, *, least: int) -> moelab.Run:
    """The answer as a run of at least so many tokens."""
    run = given(answer, moelab.Run, "the run itself, for example lab.run")
    if len(run.token_reports) < least:
        raise RefusedError(f"this run has {len(run.token_reports)} tokens; let it write {least}")
    return run


# -- what answers are held against ----------------------------------------------------------------


@contextmanager
def opened(**changes: Any) -> Iterator[moelab.Lab]:
    """The bundled model, freshly opened with nothing in memory, and settings changed."""
    with moelab.open("demo", measure_kl=False, progress=False) as lab:
        lab.update(**changes)
        yield lab


def written(lab: moelab.Lab, prompt: str, tokens: int) -> moelab.Run:
    """A run of so many tokens, the same text whenever the model computes the same."""
    return lab.generate(prompt, max_new_tokens=tokens, ignore_eos=True, seed=1)


def unseen(lab: moelab.Lab, texts: int = 6) -> list[str]:
    """Texts that no calibration saw, of so many domains."""
    from moelab.bench.papers.results import unseen

    return unseen(lab)[:texts]


def recorded(lab: moelab.Lab, *, tokens: int = 32, look_ahead: int = 0) -> moelab.Trace:
    """The model's routing of `unseen` texts."""
    from moelab.calibration.probes import record

    return record(lab, unseen(lab), tokens=tokens, look_ahead=look_ahead)


def hit_ratio(trace: moelab.Trace, strategy: moelab.Strategy, budget: int, bits: int) -> float:
    """Hits of a recorded trace with so many bytes for experts."""
    from moelab.scheduling.strategy import Knobs

    return moelab.replay(trace, strategy, Knobs(budget, bits=bits)).hit_ratio


def belady(trace: moelab.Trace, experts: int) -> float:
    """The hit ratio that no eviction can better, with room for so many experts."""
    from moelab.replays.bounds import belady_hits

    hits, asked = belady_hits(trace, experts)
    return hits / asked


def kl_of(lab: moelab.Lab, *, texts: int = 3, tokens: int = 10) -> float:
    """Mean KL under the lab's settings, in nats, on a little of `unseen` texts."""
    found = [lab.score(t, max_tokens=tokens, progress=False) for t in unseen(lab, texts)]
    return sum(score.kl_mean for score in found) / len(found)
