"""Entries, and the board they are kept on: a file of JSON lines that several people append to.

A line holds an entry's settings and what was measured. Whether the limits hold is worked out from
the figures whenever it is read; whether the figures are true is for `verify`.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moelab.bench.contenders import ROLES
from moelab.course.challenge.tasks import TASKS, Task

FORMAT = 1
LONGEST_LINE = 200_000
_PLAIN = (str, int, float, bool, type(None))
_MOST = 1e15
_NUMBERS = ("tokens_per_s", "bytes_per_token", "peak_resident_bytes", "kl")


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
    rank
        On the board at that moment; None where it has none.
    board
        How many ranked then.
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
    def request(self) -> dict[str, Any]:
        """What the scoring process needs to measure it again."""
        names = ("challenge", "settings", "own", "quick")
        return {name: getattr(self, name) for name in names}

    @property
    def code(self) -> str:
        """The line that enters the same again."""
        words = [repr(self.name), *(f"{k}={v!r}" for k, v in self.settings.items())]
        words += [f"{role}={part['class']}" for role, part in self.own.items()]
        return f"moelab.challenge({self.challenge!r}).enter({', '.join(words)})"

    @property
    def words(self) -> str:
        """The settings in a few words, for a table."""
        shown = [f"{k}={v}" for k, v in self.settings.items() if k != "strategy"]
        shown += [f"{role}={part['class']}" for role, part in self.own.items()]
        return ", ".join([str(self.settings.get("strategy", "lru")), *shown])

    def line(self) -> str:
        """As a line of the file."""
        facts = asdict(self)
        del facts["rank"], facts["board"]
        return json.dumps({"format": FORMAT} | facts, ensure_ascii=False) + "\n"

    def __repr__(self) -> str:
        from moelab.course.challenge.look import entry_words

        return entry_words(self)

    def _repr_html_(self) -> str:
        from moelab.course.challenge.look import entry_html

        return entry_html(self)


def touch(path: str | Path) -> None:
    """Begin the file if there is none.

    Raises
    ------
    OSError
        It could not be appended to.
    """
    Path(path).open("ab").close()


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
            except (ValueError, TypeError, RecursionError) as error:
                faults.append(f"line {number}: {error}")
    return entries, faults


def _entry(line: bytes) -> Entry:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"{len(line)} bytes; {LONGEST_LINE} at most")
    facts = json.loads(line)
    if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
        raise ValueError(f"not an entry of format {FORMAT}")
    entry = Entry(**{k: v for k, v in facts.items() if k not in ("rank", "board")})
    for name in ("challenge", "name", "made"):
        _must(isinstance(getattr(entry, name), str), f"{name} must be a text")
    if entry.challenge not in TASKS:
        raise ValueError(f"unknown challenge {entry.challenge!r}")
    _must(isinstance(entry.quick, bool), "quick must be true or false")
    for name in ("settings", "figures", "own", "versions", "machine"):
        _must(isinstance(getattr(entry, name), dict), f"{name} must be an object")
    for name in ("settings", "figures", "versions", "machine"):
        for key, value in getattr(entry, name).items():
            _must(isinstance(value, _PLAIN), f"{name}.{key} must be a number or a text")
    for role, part in entry.own.items():
        _must(role in ROLES, f"own.{role}: no decision of that name")
        fit = isinstance(part, dict) and part.keys() == {"class", "source"}
        _must(fit and all(isinstance(v, str) for v in part.values()), f"own.{role} is no class")
    for name in _NUMBERS:
        _must(_is_number(entry.figures.get(name)), f"figures.{name} must be a finite number")
    return entry


def _is_number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and abs(value) < _MOST


def _must(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)
