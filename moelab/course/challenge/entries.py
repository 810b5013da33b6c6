"""Entries, and the board they are kept on: a file of JSON lines that several people append to.

A line holds an entry's settings and what was measured. Whether the limits hold is worked out from
the figures whenever it is read; whether the figures are true is for `verify`.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import fastjsonschema

from moelab.bench.cases import ROLES
from moelab.course.challenge.own_code import RIGHTS
from moelab.course.challenge.tasks import MB, TASKS, Task

FORMAT = 1
LONGEST_LINE = 200_000
_MOST = 1e15
_NUMBERS = ("tokens_per_s", "tokens_per_s_min", "tokens_per_s_max", "bytes_per_token", "hit_ratio")
_NUMBERS += ("peak_resident_bytes", "kl", "kl_held_out", "kl_written")
_OF_NOW = ("rank", "board", "verified", "claimed")
"""What an entry is at the moment, on a board or after `verify`; no line of a file says it."""

_TEXT, _NUMBER = {"type": "string"}, {"type": "number"}
_NAME = r"^[A-Za-z_]\w{0,79}$"
_PLAIN = {"type": ["string", "number", "boolean", "null"]}


def _object(*needed: str, more: Any = False, **fields: Any) -> dict[str, Any]:
    fields = {"type": "object", "properties": fields, "required": needed}
    return fields | {"additionalProperties": more}


_VALUES = _object(more=_PLAIN)
_SETTINGS = _VALUES | {"propertyNames": {"pattern": _NAME}}
_CLASS = _object("class", "source", **{"class": _TEXT | {"pattern": _NAME}, "source": _TEXT})
SCHEMA = _object(
    *("format", "challenge", "name", "settings", "figures"),
    format={"const": FORMAT},
    challenge={"enum": list(TASKS)},
    quick={"type": "boolean"},
    figures=_object(*_NUMBERS, more=_PLAIN, **dict.fromkeys(_NUMBERS, _NUMBER)),
    own=_object(**dict.fromkeys(ROLES, _CLASS)),
    **dict.fromkeys(("name", "made"), _TEXT),
    **dict.fromkeys(("versions", "machine"), _VALUES),
    settings=_SETTINGS,
    **{name: {} for name in _OF_NOW},
)
"""A line of a board."""


@dataclass(frozen=True)
class Entry:
    """One entry: settings, and what the scoring process measured.

    Attributes
    ----------
    challenge, name
        What was entered, and who did.
    settings
        As ``lab.update`` takes them.
    own
        Decision -> ``class`` and ``source`` of a policy of one's own.
    quick
        A trial: it never ranks.
    figures
        See `moelab.course.challenge.scoring.measure`.
    made, versions, machine
        When and with what.
    rank, board
        Its rank (None: it has none) and how many ranked, on the board at that moment.
    verified, claimed
        Of one that `verify` measured again: ``"yes"`` or why not, and the figures of the file.
    """

    challenge: str
    name: str
    settings: dict[str, Any]
    figures: dict[str, Any]
    own: dict[str, dict[str, str]] = field(default_factory=dict)
    quick: bool = False
    made: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    board: int = 0
    verified: str = ""
    claimed: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The challenge's rules, as this version of moelab has them."""
        return TASKS[self.challenge]

    @property
    def failures(self) -> list[str]:
        """The limits that do not hold, with the numbers."""
        return self.task.failures(self.figures)

    @property
    def accepted(self) -> bool:
        """Whether both limits hold."""
        return not self.failures

    @property
    def ranks(self) -> bool:
        """Whether it takes part: both limits hold, it is no trial, and not found wrong."""
        return self.accepted and not self.quick and self.verified in ("", "yes")

    @property
    def request(self) -> dict[str, Any]:
        """What the scoring process needs to measure it again."""
        names = ("challenge", "settings", "own", "quick")
        return {name: getattr(self, name) for name in names}

    @property
    def code(self) -> str:
        """The line that enters the same again."""
        words = [repr(self.name), *(f"{k}={v!r}" for k, v in self.settings.items())]
        return f"moelab.challenge({self.challenge!r}).enter({', '.join(words + self._classes)})"

    @property
    def words(self) -> str:
        """The settings in a few words, for a table."""
        shown = [f"{k}={v}" for k, v in self.settings.items() if k != "strategy"]
        return ", ".join([str(self.settings.get("strategy", "lru")), *shown, *self._classes])

    @property
    def _classes(self) -> list[str]:
        return [f"{role}={part['class']}" for role, part in self.own.items()]

    def line(self) -> str:
        """As a line of the file."""
        kept = {name: value for name, value in asdict(self).items() if name not in _OF_NOW}
        return json.dumps({"format": FORMAT} | kept, ensure_ascii=False) + "\n"

    @property
    def verdict(self) -> str:
        """One line: the rank, or why there is none."""
        if not self.accepted:
            return "disqualified"
        if self.quick:
            return "both limits kept; a quick trial does not rank"
        if self.rank is None:
            return "both limits kept; an earlier entry of the same name is better"
        return f"rank {self.rank} of {self.board}"

    def _measured(self) -> list[tuple[str, str]]:
        """Names and values of what was measured, and with which settings."""
        f, task = self.figures, self.task
        speeds = f"({f['tokens_per_s_min']:.3g} to {f['tokens_per_s_max']:.3g})"
        kls = f"(held-out {f['kl_held_out']:.4f}, own text {f['kl_written']:.4f})"
        peak = f"{f['peak_resident_bytes'] / MB:.2f} MB of {task.peak_bytes / MB:g} MB"
        return [
            ("speed", f"{f['tokens_per_s']:.3g} tokens/s {speeds}"),
            ("read", f"{f['bytes_per_token'] / 1000:.3g} kB per token"),
            ("peak memory", peak),
            ("KL", f"{f['kl']:.4f}, below {task.kl:g} asked for {kls}"),
            ("hit ratio", f"{f['hit_ratio']:.0%}"),
            ("settings", self.words + (f" ({RIGHTS})" if self.own else "")),
        ]

    def __repr__(self) -> str:
        rows = [f"{self.challenge} · {self.name}: {self.verdict}"]
        rows += [f"  {name}: {value}" for name, value in self._measured()]
        return "\n".join([*rows, *(f"  failed: {failure}" for failure in self.failures)])

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        rows = "".join(
            f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(value)}</td></tr>"
            for name, value in self._measured()
        )
        failed = "".join(f"<br>✗ {escape(failure)}" for failure in self.failures)
        return (
            f"<div><p><b>{escape(self.name)}</b> · {escape(self.challenge)}: "
            f"<b>{escape(self.verdict)}</b>{failed}</p><table>{rows}</table></div>"
        )


def append(path: str | Path, entry: Entry) -> None:
    """Add an entry; several processes may do so at the same moment.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    with Path(path).open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file closes
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        file.write((b"\n" if torn else b"") + entry.line().encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: str | Path) -> tuple[list[Entry], list[str]]:
    """The entries of a file, and what is wrong with the lines that hold none.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    """
    path, entries, faults = Path(path), [], []
    if not path.is_file():
        raise FileNotFoundError(f"there is no board {path}; it begins with the first entry")
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        lines = file.read().splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                entries.append(_entry(line))
            except (ValueError, RecursionError) as error:
                faults.append(f"line {number}: {error}")
    return entries, faults


@functools.cache
def _schema() -> Callable[[Any], Any]:
    return fastjsonschema.compile(SCHEMA)  # pyright: ignore[reportReturnType]


def _refused(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _entry(line: bytes) -> Entry:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"{len(line)} bytes; {LONGEST_LINE} at most")
    found = json.loads(line, parse_constant=_refused)
    try:
        _schema()(found)
        json.dumps(found, ensure_ascii=False).encode()  # half a character is no text
    except fastjsonschema.JsonSchemaValueException as error:
        words = error.message.removeprefix("data.").replace("data ", "an entry ", 1)
        raise ValueError(f"{words}; this is {reprlib.repr(error.value)}") from None
    for name in _NUMBERS:
        if not abs(value := found["figures"][name]) < _MOST:  # NaN too
            raise ValueError(f"figures.{name} must be a finite number; this is {value}")
    del found["format"]
    return Entry(**{name: value for name, value in found.items() if name not in _OF_NOW})
