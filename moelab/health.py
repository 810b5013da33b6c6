"""Say what is missing here and how to mend it: `moelab.doctor()`, or `moelab doctor` in a terminal.

Every line is one of three: ok; note (works, and something is worth knowing); problem (something
does not work). Notes and problems bring the command that mends them. Speeds are measured now. What
it does not know is the browser: a kernel cannot ask which extensions the front end has loaded.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

State = Literal["ok", "note", "problem"]
SIGNS: dict[State, tuple[str, str]] = {
    "ok": ("✓", "#00795a"),
    "note": ("i", "#0072b2"),
    "problem": ("✗", "#b32400"),
}
"""A sign and a colour (dark enough for white letters) to every state; the word stands beside."""
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, its state, what was found, and how to mend it."""

    name: str
    state: State
    found: str
    mend: str = ""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """All lines; a table in a notebook, text elsewhere.

    Examples
    --------
    >>> found = Diagnosis((Check("memory", "note", "0.6 GB are free", "close other kernels"),))
    >>> found.healthy
    True
    >>> print(found)
    memory  note     0.6 GB are free
                     mend: close other kernels
    <BLANKLINE>
    no problem, 1 note
    """

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether no line is a problem."""
        return not self.problems

    @property
    def problems(self) -> tuple[Check, ...]:
        """The lines that say what does not work."""
        return tuple(check for check in self.checks if check.state == "problem")

    def __repr__(self) -> str:
        wide = max((len(check.name) for check in self.checks), default=0)
        lines = []
        for check in self.checks:
            head, indent = f"{check.name:<{wide}}  {check.state:<7}  ", " " * (wide + 11)
            room = {"width": _WIDTH, "subsequent_indent": indent, "break_long_words": False}
            lines += textwrap.wrap(check.found, initial_indent=head, **room)
            if check.mend:  # never broken: it is there to be copied
                lines.append(f"{indent}mend: {check.mend}")
        return "\n".join([*lines, "", self.verdict()])

    def verdict(self) -> str:
        """One line: how many problems and notes."""
        notes = sum(check.state == "note" for check in self.checks)
        told = [_count(len(self.problems), "problem"), *([_count(notes, "note")] if notes else [])]
        return ", ".join(told)

    def _repr_html_(self) -> str:
        rows = "".join(_row(check) for check in self.checks)
        head = "".join(
            f'<th scope="col" style="text-align:left">{word}</th>'
            for word in ("checked", "state", "found")
        )
        return (
            '<table style="border-collapse:collapse;max-width:60em">'
            '<caption style="text-align:left;caption-side:top;padding:4px 0"><b>moelab doctor</b>: '
            f"{escape(self.verdict())}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )


def doctor() -> Diagnosis:
    """Look at everything moelab stands on, from Python to the disk; takes some seconds.

    Nothing is changed but a scratch file of 24 MB in the cache folder, which is deleted again, and
    numba's cache, into which the kernels are compiled where that has not been done yet.

    Returns
    -------
    Diagnosis
        One line per check, in the order in which things build on each other.

    Examples
    --------
    >>> import moelab
    >>> moelab.doctor().healthy
    True
    """
    from moelab.checks import CHECKS

    return Diagnosis(tuple(_all(CHECKS)))


def _all(checks: Sequence[Callable[[], Iterator[Check]]]) -> Iterator[Check]:
    """Run every check; one that fails itself is a problem too, and does not end the others."""
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001, that it failed is what is to be told
            words = " ".join(str(error).split())
            yield Check(name, "problem", f"cannot be checked: {type(error).__name__}: {words}")


def _row(check: Check) -> str:
    sign, colour = SIGNS[check.state]
    mark = (
        f'<span style="background:{colour};color:#fff;border-radius:9px;padding:1px 8px;'
        f'white-space:nowrap"><span aria-hidden="true">{sign}</span> {check.state}</span>'
    )
    mend = f"<br>mend: <code>{escape(check.mend)}</code>" if check.mend else ""
    style = 'style="text-align:left;vertical-align:top"'
    return (
        f'<tr data-state="{check.state}"><th scope="row" {style}>{escape(check.name)}</th>'
        f"<td {style}>{mark}</td><td {style}>{escape(check.found)}{mend}</td></tr>"
    )


def _count(n: int, thing: str) -> str:
    return f"{n or 'no'} {thing}{'s' if n > 1 else ''}"
