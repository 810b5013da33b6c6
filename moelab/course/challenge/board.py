"""The table of a board, best first, and its check: every entry measured again.

Ranks are worked out from figures; `verify` does not believe those of the file: it measures each
entry again from its settings, ranks by that, and says whose figures do not reproduce.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from tqdm.auto import tqdm

from moelab.course.challenge.entries import Entry, read
from moelab.course.challenge.own_code import RIGHTS
from moelab.course.challenge.scoring import scored
from moelab.course.challenge.tasks import MB, TASKS, Task
from moelab.views.picture import box, words

RULES = (
    ("peak_resident_bytes", 1.02, 0.0, MB, "MB peak"),
    ("bytes_per_token", 1.1, 0.0, 1000, "kB/token"),
    ("kl", 1.1, 0.002, 1, "KL"),
)
"""A figure, how far its second measurement may lie above it (times, and more), and how it is shown.
Speeds are not compared: they hang on the machine's load, so all are replaced by those of now."""

WIDTH, ROW, NAME, BAR = 860, 30, 210, 380
SOFT, LINE, KEPT, OUT = "#59636e", "#d8dee4", "#0072b2", "#8a8f98"
GAUGE = NAME + BAR + 120
MOST_ROWS = 30
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
    'font-family="system-ui,Helvetica,Arial,sans-serif" font-size="13">'
    '<defs><pattern id="h" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="6" height="6" fill="#e6e8eb"/>'
    '<rect width="2" height="6" fill="#8a8f98"/></pattern></defs>'
    '<rect x="0.5" y="0.5" width="{inner}" height="{tall}" rx="8" fill="#fff" stroke="#d8dee4"/>'
)


def ranked(entries: Sequence[Entry]) -> list[tuple[Entry, int | None]]:
    """Entries with their ranks, best first: each name's best one counts, the others follow.

    Without a rank are those beyond a limit, quick ones, a name's second best, and those that
    `verify` found wrong or did not run.
    """
    fit = sorted((e for e in entries if e.ranks), key=lambda e: (e.task.order(e.figures), e.made))
    best: dict[str, Entry] = {}
    later = [e for e in fit if best.setdefault(e.name, e) is not e]
    unfit = [e for e in entries if not e.ranks]
    return [*zip(best.values(), itertools.count(1)), *((e, None) for e in later + unfit)]


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
        task = getattr(self, "task", None)
        if task is None or "rank" not in self:  # a part of a board, or one of another shape
            return str(self.to_html())
        data = base64.b64encode(self.svg().encode()).decode()
        label = escape(f"Leaderboard of {task.name}, {len(self)} entries", quote=True)
        machines = len(set(self["machine"]))
        hidden = ["own code", "made", "version", *(["machine"] if machines < 2 else [])]
        shown = pd.DataFrame(self).drop(columns=hidden).astype({"rank": object})
        shown = shown.where(shown.notna(), "")  # no rank: an empty cell
        table = shown.to_html(
            index=False, float_format=lambda x: f"{x:.4g}", border=0, justify="left"
        )
        notes = [f"Figures come from {machines} machines: <code>verify</code> measures all on one."]
        notes = notes[machines < 2 :]
        if any(self["own code"]):
            notes.append(f"Where settings name a class: {RIGHTS}.")
        if self.faults:
            faults = "".join(f"<li>{escape(fault)}</li>" for fault in self.faults)
            notes.append(f"Lines that could not be read:</p><ul>{faults}</ul><p>")
        image = f'<img alt="{label}" width="{WIDTH}" src="data:image/svg+xml;base64,{data}"/>'
        return image + table + "".join(f"<p>{note}</p>" for note in notes)

    def svg(self) -> str:
        """The picture alone: a bar for each entry, and beside it how much of the KL was used up."""
        task: Task = self.task
        rows = self.head(MOST_ROWS)
        height = 74 + ROW * len(rows) + 14
        most = max([*rows[task.unit], 1e-9])
        best = "longest wins" if task.best == "most" else "shortest wins"
        parts = [
            HEAD.format(width=WIDTH, height=height, inner=WIDTH - 1, tall=height - 1),
            words(18, 28, task.name, weight=650, size=15),
            words(18, 52, f"limits: {task.peak_bytes / MB:g} MB, KL {task.kl:g}", fill=SOFT),
            words(NAME, 52, f"{task.unit}, {best}", fill=SOFT),
            words(GAUGE, 52, f"KL, of {task.kl:g}", fill=SOFT),
        ]
        for i, row in enumerate(rows.to_dict("records")):
            parts += _bar(row, task, 66 + ROW * i, max(2.0, BAR * row[task.unit] / most))
        return "".join([*parts, "</svg>"])


def _bar(row: dict, task: Task, y: float, wide: float) -> list[str]:
    """One entry: its name, the bar (hatched where it does not rank), and how much KL it used."""
    ranks = not pd.isna(row["rank"])
    name = f"{row['rank']}. {row['name']}" if ranks else row["name"]
    short = name if len(name) <= 24 else f"{name[:23]}…"
    used = min(1.0, row["KL"] / task.kl)
    return [
        words(NAME - 10, y + 16, short, anchor="end"),
        box(NAME, y + 2, wide, 18, KEPT if ranks else "url(#h)"),
        words(NAME + wide + 8, y + 16, f"{row[task.unit]:.3g}{_note(row)}"),
        box(GAUGE, y + 7, 90, 8, LINE),
        box(GAUGE, y + 7, 90 * used, 8, KEPT if row["KL"] < task.kl else OUT),
        words(GAUGE + 98, y + 16, f"{row['KL']:.3f}", fill=SOFT),
    ]


def _note(row: dict) -> str:
    """Why a bar does not rank, if it does not."""
    if row.get("verified", "yes") != "yes":
        return " ✗ not verified"
    if row["limits"].startswith("quick"):
        return " (quick)"
    if row["limits"] != "kept":
        return " ✗"
    return " (a better one ranks)" if pd.isna(row["rank"]) else ""


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
    return as_board(*_of_one(path, challenge))


def verify(
    path: str | Path, challenge: str | None = None, *, own_code: bool = False, progress: bool = True
) -> Leaderboard:
    """Measure every entry of a board again, from its settings alone, and rank by that.

    The store in this machine's cache is checked by its checksums; who can rewrite that as well can
    be told only by a ``verify`` on another machine.

    Parameters
    ----------
    path, challenge
        As for `leaderboard`.
    own_code
        Also run entries that bring a class of their own: code out of the file runs as it is on
        this machine, with your rights. Read it first (``own`` in each line), and run only that of
        people you trust.

    Returns
    -------
    Leaderboard
        By the new figures. ``claimed`` is the goal's figure in the file, ``verified`` ``"yes"``,
        ``"not run: own code"`` or what does not reproduce (a speed is only replaced); only
        ``"yes"`` ranks.

    Examples
    --------
    >>> board = verify("workshop.jsonl")  # doctest: +SKIP
    >>> board[board["verified"] != "yes"]  # doctest: +SKIP
    """
    entries, task, faults = _of_one(path, challenge)
    answers: dict[str, dict[str, Any] | str] = {}
    if own_code and progress and any(e.own for e in entries):
        tqdm.write(f"verify: {RIGHTS}, here yours")
    again = [
        _again(entry, answers, own_code=own_code)
        for entry in tqdm(entries, disable=not progress, desc="verify")
    ]
    return as_board(again, task, faults)


def _again(entry: Entry, answers: dict[str, dict[str, Any] | str], *, own_code: bool) -> Entry:
    """An entry measured anew (equal ones once), with whether its figures stand."""
    if entry.own and not own_code:
        return replace(entry, verified="not run: own code", claimed=entry.figures)
    key = json.dumps(entry.request, sort_keys=True)
    if key not in answers:
        try:
            answers[key] = scored(entry.request)
        except (ValueError, RuntimeError) as error:
            answers[key] = f"refused: {error}"
    answer = answers[key]
    if isinstance(answer, str):
        return replace(entry, verified=answer, claimed=entry.figures)
    wrong = differences(entry.figures, answer["figures"])
    new = {name: answer[name] for name in ("figures", "versions", "machine")}
    return replace(entry, **new, verified="; ".join(wrong) or "yes", claimed=entry.figures)


def differences(claimed: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """What was claimed better than it was measured again, in words."""
    return [
        f"{claimed[name] / scale:.4g} {unit} claimed, {measured[name] / scale:.4g} measured"
        for name, factor, more, scale, unit in RULES
        if not measured[name] <= claimed[name] * factor + more  # NaN too
    ]


def as_board(entries: Sequence[Entry], task: Task, faults: Sequence[str] = ()) -> Leaderboard:
    """A table of entries, ranked."""
    board = Leaderboard(pd.DataFrame([_row(e, rank) for e, rank in ranked(entries)]))
    board["rank"] = board["rank"].astype("Int64")
    board.task, board.faults = task, list(faults)
    return board


def _of_one(path: str | Path, challenge: str | None) -> tuple[list[Entry], Task, list[str]]:
    """The entries of one challenge in a file, its rules, and the lines that could not be read."""
    entries, faults = read(path)
    there = list(dict.fromkeys(e.challenge for e in entries))
    if challenge is None and len(there) > 1:
        raise ValueError(f"{path} has several challenges; say which: {', '.join(there)}")
    wanted = challenge or next(iter(there), "")
    kept = [e for e in entries if e.challenge == wanted]
    if not kept:
        raise ValueError(f"{path} has no entry" + (f" of {wanted!r}" if wanted else ""))
    return kept, TASKS[wanted], faults


def _row(entry: Entry, rank: int | None) -> dict[str, Any]:
    figures, task, checked = entry.figures, entry.task, bool(entry.verified)
    limits = "; ".join(entry.failures) or "kept"
    return {
        "rank": rank,
        "name": entry.name,
        task.unit: figures[task.goal] / task.scale,
        **({"claimed": task.goal_words(entry.claimed)} if checked else {}),
        "peak MB": figures["peak_resident_bytes"] / MB,
        "KL": figures["kl"],
        "limits": f"quick, does not rank; {limits}" if entry.quick else limits,
        "settings": entry.words,
        "own code": bool(entry.own),
        **({"verified": entry.verified} if checked else {}),
        "machine": str(entry.machine.get("processor", "")),
        "version": entry.versions.get("moelab", ""),
        "made": entry.made,
    }
