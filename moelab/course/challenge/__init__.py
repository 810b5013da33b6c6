"""Challenges: a memory limit, a loss limit and one figure to win by, scored by the real engine.

An entry is settings, never figures: they go as JSON to a fresh process, which opens the bundled
model on a fixed device, runs fixed prompts, and measures memory, loss and speed itself. So nothing
that was patched or edited in a notebook counts, and `verify` measures a whole board again.

>>> moelab.challenge("six megabytes")  # doctest: +ELLIPSIS
six megabytes: ...
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from moelab.bench.cases import ROLES, contender
from moelab.course.challenge.board import Leaderboard, as_board, leaderboard, ranked, verify
from moelab.course.challenge.entries import Entry, append, read
from moelab.course.challenge.own_code import RIGHTS, source_of, text_of
from moelab.course.challenge.scoring import scored
from moelab.course.challenge.tasks import FIXED, TASKS, Task, find

__all__ = ["TASKS", "Challenge", "Entry", "Leaderboard", "Task"]
__all__ += ["challenge", "leaderboard", "verify"]

LONGEST_NAME = 40


def challenge(name: str, *, board: str | Path | None = None) -> Challenge:
    """A challenge to enter.

    Parameters
    ----------
    name
        ``"six megabytes"``, ``"spare the card"`` or ``"beat Belady's shadow"``.
    board
        A file that keeps the entries, one for all who take part (a shared folder will do); it
        begins with the first entry. Without one, entries are kept as long as this object.

    Raises
    ------
    ValueError
        There is no such challenge.

    Examples
    --------
    >>> six = moelab.challenge("six megabytes", board="workshop.jsonl")
    >>> six.enter("Ada", strategy="hobbit", budget="6MB", low_bits=4)  # doctest: +SKIP
    >>> six.leaderboard()  # doctest: +SKIP
    """
    return Challenge(find(name), board)


class Challenge:
    """A challenge and its board. Made by `challenge`.

    Attributes
    ----------
    task
        The rules.
    board
        The file of entries.
    """

    def __init__(self, task: Task, board: str | Path | None = None) -> None:
        if board is None:
            self._folder = tempfile.TemporaryDirectory()  # ends with this object
            board = Path(self._folder.name) / "board.jsonl"
        self.task, self.board = task, Path(board)

    def enter(
        self,
        name: str,
        *,
        strategy: str = "lru",
        budget: str | float,
        quick: bool = False,
        progress: bool = True,
        **settings: Any,
    ) -> Entry:
        """Have settings measured, and be ranked; takes about half a minute.

        Parameters
        ----------
        name
            Whose entry it is.
        strategy
            A name, or words as `moelab bench` takes them: ``"lru + mixed 16/4"``.
        budget
            As for `moelab.open`.
        quick
            A trial in a few seconds, on few tokens; it is kept but never ranks.
        settings
            Anything ``lab.update`` takes as a number or a word (``bits``, ``low_bits``, ``t1``,
            ``evict="edgemoe"``, parameters of the strategy). A decision may also be a class of
            your own, or ``"file.py:Class"``: its text is sent, and runs as it is in the measuring
            process, with your rights.

        Returns
        -------
        Entry
            Rank, figures, and which limit failed by how much.

        Raises
        ------
        ValueError
            The engine refuses the settings, or a class cannot be sent; nothing is kept.
        OSError
            The board cannot be written; nothing is measured.

        Examples
        --------
        >>> moelab.challenge("six megabytes").enter(
        ...     "Ada", strategy="lru + 4 bit", budget="5MB", quick=True
        ... )  # doctest: +SKIP
        """
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME:
            raise ValueError(f"name {name!r}: 1 to {LONGEST_NAME} characters")
        if not isinstance(strategy, str):
            raise ValueError(  # noqa: TRY004, one kind of error for all that is refused
                f"strategy={strategy!r}: write its name ('hobbit'); parts of your own are given "
                "one by one: evict=MyClass"
            )
        plain, own = _as_text({**contender(strategy), "budget": budget} | settings)
        request = {"challenge": self.task.name, "settings": plain, "own": own, "quick": quick}
        self.board.open("ab").close()  # before half a minute of measuring, not after it
        if own and progress:
            tqdm.write(f"{name}: {RIGHTS}, here yours")
        with tqdm(total=1 + self.task.prompts, disable=not progress, leave=False) as bar:

            def tell(words: str) -> None:
                bar.set_description_str(f"{name}: {words}")
                bar.update()

            answer = scored(request, tell)
        entry = Entry(name=" ".join(name.split()), **request, **answer)
        append(self.board, entry)
        others = [e for e in read(self.board)[0] if e.challenge == self.task.name]
        places = [(e, rank) for e, rank in ranked(others) if rank is not None]
        rank = next((rank for e, rank in places if e == entry), None)
        return replace(entry, rank=rank, board=len(places))

    def leaderboard(self, path: str | Path | None = None) -> Leaderboard:
        """The board of this challenge, empty before its first entry, or that of another file."""
        entries, faults = read(self.board) if self.board.is_file() else ([], [])
        if path is None and self.task.name not in (e.challenge for e in entries):
            return as_board([], self.task, faults)
        return leaderboard(path or self.board, self.task.name)

    def verify(
        self, path: str | Path | None = None, *, own_code: bool = False, progress: bool = True
    ) -> Leaderboard:
        """Measure every entry of the board again and rank by that; see `verify`."""
        return verify(path or self.board, self.task.name, own_code=own_code, progress=progress)

    def __repr__(self) -> str:
        return f"{self.task.name}: {self.task.question} {self.task.limits}"

    def _repr_html_(self) -> str:
        task = self.task
        name, question, hint = map(escape, (task.name, task.question, task.hint))
        return f"<p><b>{name}</b> · {question}<br>{task.limits}<br><i>{hint}</i></p>"


def _as_text(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Settings that JSON can carry, and the decisions that come as code."""
    plain, own = {}, {}
    for key, value in settings.items():
        if key in FIXED:
            raise ValueError(f"{key} is fixed in a challenge; leave it out")
        if key in ROLES and isinstance(value, type):
            own[key] = {"class": value.__name__, "source": source_of(value)}
        elif key in ROLES and isinstance(value, str) and ".py:" in value:
            path, _, name = value.rpartition(":")
            own[key] = {"class": name, "source": text_of(path)}
        elif value is None or isinstance(value, (str, int, float)):
            plain[key] = value
        else:
            kind = type(value).__name__
            raise ValueError(
                f"{key}={value!r}: a challenge takes numbers, words and, for a decision, a class "
                f"({key}={kind}, not an object of it)"
            )
    return plain, own
