"""The table of a board, best first, and its check: every entry measured again.

Ranks are worked out from figures; `verify` does not believe those of the file: it measures each
entry again from its settings, ranks by that, and says whose figures do not reproduce.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from moelab.course.challenge.entries import Entry, read
from moelab.course.challenge.tasks import MB, TASKS, Task

SAME_BYTES, SAME_SHARE, SAME_KL, SAME_SPEED = 0.02, 0.1, 0.002, 1.5
"""How far a figure may lie from its second measurement; a speed may be claimed half again as high
on the same machine. On another one speeds are not compared, only replaced."""


def ranked(entries: Sequence[Entry]) -> list[tuple[Entry, int | None]]:
    """Entries with their ranks, best first: each name's best one counts, the others follow.

    Without a rank are those beyond a limit, quick ones, and a name's second best.
    """
    fit = [e for e in entries if e.accepted and not e.quick]
    fit.sort(key=lambda e: (e.task.order(e.figures), e.made))
    best: dict[str, Entry] = {}
    for entry in fit:
        best.setdefault(entry.name, entry)
    first = {id(entry): rank for rank, entry in enumerate(best.values(), start=1)}
    rest = [e for e in fit if id(e) not in first] + [e for e in entries if e not in fit]
    return [(entry, first.get(id(entry))) for entry in [*best.values(), *rest]]


class Leaderboard(pd.DataFrame):
    """A board of one challenge as a DataFrame; shown, it is a table with a picture.

    Columns: rank, name, the goal with its unit, peak MB, KL, limits (``"kept"`` or what failed),
    settings, own code, machine, version, made; after `verify` also ``claimed`` and ``verified``.
    """

    _metadata: ClassVar[list[str]] = ["task", "faults"]  # pyright: ignore[reportIncompatibleVariableOverride]
    task: Task
    faults: list[str]

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame  # a part of it is a plain table

    def _repr_html_(self) -> str:
        from moelab.course.challenge.look import board_html

        return board_html(self)

    def svg(self) -> str:
        """The picture alone: goal against KL, with the limit, best entries named."""
        from moelab.course.challenge.look import board_svg

        return board_svg(self)


def leaderboard(path: str | Path, challenge: str | None = None) -> Leaderboard:
    """The board in a file, best first.

    Parameters
    ----------
    path
        A file of entries.
    challenge
        Which one; may be left out where the file holds entries of only one.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It holds entries of several challenges, or none.

    Examples
    --------
    >>> leaderboard("workshop.jsonl")  # doctest: +SKIP
    """
    entries, faults = read(path)
    return as_board(*_of_one(entries, path, challenge), faults)


def verify(
    path: str | Path,
    challenge: str | None = None,
    *,
    own_code: bool = False,
    progress: bool = True,
) -> Leaderboard:
    """Measure every entry of a board again, from its settings alone, and rank by that.

    The store in this machine's cache is checked by its checksums; who can rewrite that as well can
    be told only by a ``verify`` on another machine.

    Parameters
    ----------
    path, challenge
        As for `leaderboard`.
    own_code
        Also run entries that bring a class of their own. That runs code out of the file on this
        machine with your rights; what it is looked through for is no protection against somebody
        who means harm. Only for people you trust; read it first (``own`` in each line).

    Returns
    -------
    Leaderboard
        By the new figures. ``claimed`` is the goal's figure in the file, ``verified`` ``"yes"``,
        ``"not run: own code"`` or what does not reproduce; only ``"yes"`` ranks.

    Examples
    --------
    >>> board = verify("workshop.jsonl")  # doctest: +SKIP
    >>> board[board["verified"] != "yes"]  # doctest: +SKIP
    """
    from tqdm.auto import tqdm

    entries, faults = read(path)
    kept, task = _of_one(entries, path, challenge)
    answers: dict[str, dict[str, Any] | str] = {}
    verdicts, measured = [], []
    with tqdm(total=len(kept), disable=not progress, desc="verify") as bar:
        for entry in kept:
            new, verdict = _again(entry, answers, own_code=own_code)
            measured.append(new)
            verdicts.append(verdict)
            bar.update()
    board = as_board(measured, task, faults, verdicts)
    claims = {id(new): old for new, old in zip(measured, kept, strict=True)}
    order = [entry for entry, _ in _ordered(measured, verdicts)]
    board.insert(3, "claimed", [task.goal_words(claims[id(e)].figures) for e in order])
    return board


def _again(
    entry: Entry, answers: dict[str, dict[str, Any] | str], *, own_code: bool
) -> tuple[Entry, str]:
    """An entry measured anew (equal ones once), and whether its figures stand."""
    from moelab.course.challenge.process import scored

    if entry.own and not own_code:
        return entry, "not run: own code"
    key = json.dumps(entry.request, sort_keys=True)
    if key not in answers:
        try:
            answers[key] = scored(entry.request)
        except (ValueError, RuntimeError) as error:
            answers[key] = f"refused: {error}"
    answer = answers[key]
    if isinstance(answer, str):
        return entry, answer
    same_machine = entry.machine == answer["machine"]
    wrong = differences(entry.figures, answer["figures"], speeds=same_machine)
    facts = {name: answer[name] for name in ("figures", "versions", "machine")}
    return Entry(**(asdict(entry) | facts)), "; ".join(wrong) or "yes"


def differences(claimed: dict[str, Any], measured: dict[str, Any], *, speeds: bool) -> list[str]:
    """What was claimed better than it was measured again, in words.

    Parameters
    ----------
    speeds
        Compare tokens per second too.
    """
    rules = [
        ("peak_resident_bytes", 1 + SAME_BYTES, 0.0, MB, "MB peak"),
        ("bytes_per_token", 1 + SAME_SHARE, 0.0, 1000, "kB/token"),
        ("kl", 1 + SAME_SHARE, SAME_KL, 1, "KL"),
    ]
    wrong = [
        f"{claimed[name] / scale:.4g} {unit} claimed, {measured[name] / scale:.4g} measured"
        for name, factor, more, scale, unit in rules
        if not measured[name] <= claimed[name] * factor + more
    ]
    fast, found = claimed["tokens_per_s"], measured["tokens_per_s"]
    if speeds and not fast <= found * SAME_SPEED:
        wrong.append(f"{fast:.4g} tokens/s claimed, {found:.4g} measured")
    return wrong


def as_board(
    entries: Sequence[Entry],
    task: Task,
    faults: Sequence[str] = (),
    verdicts: Sequence[str] | None = None,
) -> Leaderboard:
    """A table of entries, ranked; of those with a verdict only ``"yes"`` ranks."""
    told = {id(e): v for e, v in zip(entries, verdicts or (), strict=bool(verdicts))}
    rows = [_row(e, rank, told.get(id(e))) for e, rank in _ordered(entries, verdicts)]
    board = Leaderboard(pd.DataFrame(rows))
    board["rank"] = board["rank"].astype("Int64")
    board.task, board.faults = task, list(faults)
    return board


def _ordered(
    entries: Sequence[Entry], verdicts: Sequence[str] | None
) -> list[tuple[Entry, int | None]]:
    told = ["yes"] * len(entries) if verdicts is None else list(verdicts)
    stand = [e for e, v in zip(entries, told, strict=True) if v == "yes"]
    fall = [(e, None) for e, v in zip(entries, told, strict=True) if v != "yes"]
    return [*ranked(stand), *fall]


def _of_one(
    entries: list[Entry], path: str | Path, challenge: str | None
) -> tuple[list[Entry], Task]:
    there = list(dict.fromkeys(e.challenge for e in entries))
    if challenge is None and len(there) > 1:
        raise ValueError(f"{path} has several challenges; say which: {', '.join(there)}")
    wanted = challenge or next(iter(there), "")
    kept = [e for e in entries if e.challenge == wanted]
    if not kept:
        raise ValueError(f"{path} has no entry" + (f" of {wanted!r}" if wanted else ""))
    return kept, TASKS[wanted]


def _row(entry: Entry, rank: int | None, verdict: str | None) -> dict[str, Any]:
    figures, task = entry.figures, entry.task
    limits = "; ".join(entry.failures) or "kept"
    return {
        "rank": rank,
        "name": entry.name,
        task.unit: figures[task.goal] / task.scale,
        "peak MB": figures["peak_resident_bytes"] / MB,
        "KL": figures["kl"],
        "limits": f"quick, does not rank; {limits}" if entry.quick else limits,
        "settings": entry.words,
        "own code": bool(entry.own),
        **({} if verdict is None else {"verified": verdict}),
        "machine": str(entry.machine.get("processor", "")),
        "version": entry.versions.get("moelab", ""),
        "made": entry.made,
    }
