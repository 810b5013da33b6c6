"""Say what is missing here and how to mend it: `moelab.doctor()`, or `moelab doctor` in a terminal.

Every line is one of three: ok; note (works, and something is worth knowing); problem (something
does not work). Notes and problems bring the command that mends them. Speeds are measured now. What
it does not know is the browser: a kernel cannot ask which extensions the front end has loaded.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from html import escape

from moelab import checks
from moelab.checks import Check

SIGNS = {"ok": ("✓", "#00795a"), "note": ("i", "#0072b2"), "problem": ("✗", "#b32400")}
"""A sign and a colour (dark enough for white letters) to every state; the word stands beside."""


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

    def verdict(self) -> str:
        """One line: how many problems and notes."""
        notes = [check for check in self.checks if check.state == "note"]
        told = [(self.problems, "problem")] + [(notes, "note")] * bool(notes)
        return ", ".join(f"{len(n) or 'no'} {word}{'s' * (len(n) > 1)}" for n, word in told)

    def __repr__(self) -> str:
        wide = max((len(check.name) for check in self.checks), default=0)
        indent, lines = " " * (wide + 11), []
        text = textwrap.TextWrapper(100, subsequent_indent=indent, break_long_words=False)
        for check in self.checks:
            lines += text.wrap(f"{check.name:<{wide}}  {check.state:<7}  {check.found}")
            if check.mend:  # never broken: it is there to be copied
                lines.append(f"{indent}mend: {check.mend}")
        return "\n".join([*lines, "", self.verdict()])

    def _repr_html_(self) -> str:
        cell = 'style="text-align:left;vertical-align:top"'
        mark = "color:#fff;border-radius:9px;padding:1px 8px;white-space:nowrap;background"
        rows = ""
        for check in self.checks:
            sign, colour = SIGNS[check.state]
            mend = f"<br>mend: <code>{escape(check.mend)}</code>" if check.mend else ""
            rows += (
                f'<tr data-state="{check.state}"><th scope="row" {cell}>{escape(check.name)}</th>'
                f'<td {cell}><span style="{mark}:{colour}"><span aria-hidden="true">{sign}</span> '
                f"{check.state}</span></td><td {cell}>{escape(check.found)}{mend}</td></tr>"
            )
        head = "".join(f'<th scope="col" {cell}>{n}</th>' for n in ("checked", "state", "found"))
        return (
            '<table style="border-collapse:collapse;max-width:60em">'
            '<caption style="text-align:left;caption-side:top;padding:4px 0"><b>moelab doctor</b>: '
            f"{self.verdict()}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
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
    found: list[Check] = []
    for check in checks.CHECKS:
        try:
            found.extend(check())
        except Exception as error:  # noqa: BLE001, a problem too, and it does not end the others
            name, words = check.__name__.replace("_", " "), " ".join(str(error).split())
            words = f"cannot be checked: {type(error).__name__}: {words}"
            found.append(Check(name, "problem", words))
    return Diagnosis(tuple(found))
