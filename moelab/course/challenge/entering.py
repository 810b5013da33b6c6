"""`moelab.challenge`: enter settings, be ranked."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from moelab.bench.contenders import ROLES, contender
from moelab.course.challenge import own_code
from moelab.course.challenge.board import Leaderboard, as_board, leaderboard, ranked, verify
from moelab.course.challenge.entries import Entry, append, read, touch
from moelab.course.challenge.process import scored
from moelab.course.challenge.tasks import FIXED, MB, Task, find

LONGEST_NAME = 40


def challenge(name: str, *, board: str | Path | None = None) -> Challenge:
    """A challenge to enter.

    Parameters
    ----------
    name
        ``"six megabytes"`` or ``"spare the card"``.
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
    return Challenge(find(name), None if board is None else Path(board))


class Challenge:
    """A challenge and its board. Made by `challenge`.

    Attributes
    ----------
    task
        The rules.
    board
        The file of entries, or None.
    """

    def __init__(self, task: Task, board: Path | None = None) -> None:
        self.task, self.board = task, board
        self._entries: list[Entry] = []

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
            your own, or ``"file.py:Class"``: its text is sent.

        Returns
        -------
        Entry
            Rank, figures, and which limit failed by how much.

        Raises
        ------
        ValueError
            The engine refuses the settings, or a class is more than a policy; nothing is kept.
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
        plain, own = _as_text({**_strategy(strategy), "budget": budget} | settings)
        request = {
            "challenge": self.task.name,
            "settings": plain,
            "own": own,
            "quick": quick,
        }
        if self.board is not None:
            touch(self.board)  # before half a minute of measuring, not after it
        with tqdm(total=1 + self.task.prompts, disable=not progress, leave=False) as bar:

            def tell(words: str) -> None:
                bar.set_description_str(f"{name}: {words}")
                bar.update()

            answer = scored(request, tell)
        facts = {k: answer[k] for k in ("figures", "made", "versions", "machine")}
        entry = Entry(name=" ".join(name.split()), **request, **facts)
        self._entries.append(entry)
        if self.board is not None:
            append(self.board, entry)
        return self._placed(entry)

    def leaderboard(self, path: str | Path | None = None) -> Leaderboard:
        """The board, best first, as a DataFrame that shows itself with a picture.

        Parameters
        ----------
        path
            A file; default this challenge's, or where it has none, the entries made here.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            There is no entry yet.
        """
        path = self.board if path is None else path
        if path is not None:
            return leaderboard(path, self.task.name)
        if not self._entries:
            raise ValueError("no entry yet: challenge.enter(name, strategy=..., budget=...)")
        return as_board(self._entries, self.task)

    def verify(
        self, path: str | Path | None = None, *, own_code: bool = False, progress: bool = True
    ) -> Leaderboard:
        """Measure every entry of the board again and rank by that; see `verify` of this package.

        Raises
        ------
        ValueError
            This challenge has no file, and none is given.
        """
        path = self.board if path is None else path
        if path is None:
            raise ValueError("which board? give its file: challenge.verify('workshop.jsonl')")
        return verify(path, self.task.name, own_code=own_code, progress=progress)

    def __repr__(self) -> str:
        task = self.task
        return (
            f"{task.name}: {task.question} Limits: {task.peak_bytes / MB:g} MB of experts at the "
            f"peak, KL below {task.kl:g}; on an emulated {task.device}."
        )

    def _repr_html_(self) -> str:
        task = self.task
        return (
            f"<p><b>{escape(task.name)}</b> · {escape(task.question)}<br>Limits: "
            f"{task.peak_bytes / MB:g} MB of experts at the peak, KL below {task.kl:g}; on an "
            f"emulated {escape(task.device)}.<br><i>{escape(task.hint)}</i></p>"
        )

    def _placed(self, entry: Entry) -> Entry:
        """The entry with its rank on the board now."""
        others = self._entries
        if self.board is not None:
            others = [e for e in read(self.board)[0] if e.challenge == self.task.name]
        places = [(e, rank) for e, rank in ranked(others) if rank is not None]
        rank = next((r for e, r in places if e == entry), None)
        return replace(entry, rank=rank, board=len(places))


def _strategy(words: Any) -> dict[str, Any]:
    if not isinstance(words, str):
        raise ValueError(  # noqa: TRY004, one kind of error for all that is refused
            f"strategy={words!r}: write its name ('hobbit'); parts of your own are given one by "
            "one: evict=MyClass"
        )
    return contender(words)


def _as_text(
    settings: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Settings that JSON can carry, and the decisions that come as code."""
    plain, own = {}, {}
    for key, value in settings.items():
        if key in FIXED:
            raise ValueError(f"{key} is fixed in a challenge; leave it out")
        if key in ROLES and isinstance(value, type):
            own[key] = {"class": value.__name__, "source": own_code.source_of(value)}
        elif key in ROLES and isinstance(value, str) and ".py:" in value:
            path, _, name = value.rpartition(":")
            own[key] = {"class": name, "source": own_code.read(path)}
        elif value is None or isinstance(value, (str, int, float)):
            plain[key] = value
        else:
            kind = type(value).__name__
            raise ValueError(
                f"{key}={value!r}: a challenge takes numbers, words and, for a decision, a class "
                f"({key}={kind}, not an object of it)"
            )
    return plain, own
