"""The table of a board, best first, and its check: every entry measured again.

Ranks are worked out from figures; `verify` does not believe those of the file: it measures each
entry again from its settings, ranks by that, and says whose figures do not reproduce.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import textwrap
import warnings
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

RULES = (
    ("peak_resident_bytes", 1.02, 0.0, MB, "MB peak"),
    ("bytes_per_token", 1.1, 0.0, 1000, "kB/token"),
    ("kl", 1.1, 0.002, 1, "KL"),
)
"""A figure, how far its second measurement may lie above it (times, and more), and how it is shown.
Speeds are not compared: they hang on the machine's load, so all are replaced by those of now."""

KEPT, OUT, SOFT = "#0072b2", "#e6e8eb", "#59636e"
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "moelab",  # the same board gives the same bytes
    "text.parse_math": False,
    "hatch.color": SOFT,
}
MOST_ROWS = 30
COLUMNS = ("peak MB", "KL", "limits", "settings", "own code", "machine", "version", "made")


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
        if not len(self) and not self.faults:
            return f"<p>No entry of {escape(task.name)} yet; <code>.enter(name, ...)</code></p>"
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
        image = ""
        with contextlib.suppress(ImportError):  # without matplotlib the table says it alone
            data = base64.b64encode(self.svg().encode()).decode()
            image = f'<img alt="{label}" src="data:image/svg+xml;base64,{data}"/>'
        return image + table + "".join(f"<p>{note}</p>" for note in notes)

    def svg(self) -> str:
        """The picture alone: a bar for each entry (hatched: no rank), and its KL with the limit.

        Raises
        ------
        ImportError
            matplotlib is not installed; the message has the command that installs it.
        """
        try:
            import matplotlib as mpl
        except ImportError as error:
            raise ImportError("the picture needs: pip install 'moelab[export]'") from error
        file = io.StringIO()
        with mpl.rc_context(LOOK), warnings.catch_warnings(action="ignore"):  # of rare letters
            _drawn(self.task, self.head(MOST_ROWS).iloc[::-1]).savefig(
                file, format="svg", metadata={"Date": None}
            )
        return file.getvalue()


def _drawn(task: Task, rows: pd.DataFrame) -> Any:
    """The goal's figure and the KL of each entry, the best one above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 + 0.3 * len(rows)), layout="constrained")
    goal, kl = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    names = []
    for y, row in enumerate(rows.to_dict("records")):
        ranks = not pd.isna(row["rank"])
        names.append(textwrap.shorten(f"{row['rank']}. " * ranks + row["name"], 30))
        for axes, column, note in (goal, task.unit, _note(row)), (kl, "KL", ""):
            bar = axes.barh(
                y, row[column], color=KEPT if ranks else OUT, hatch="" if ranks else "//"
            )
            axes.bar_label(bar, [f"{row[column]:.3g}{note}"], padding=4)
    for axes in (goal, kl):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.3)
    goal.set_yticks(range(len(rows)), names)
    best = "longest wins" if task.best == "most" else "shortest wins"
    goal.set_title(f"{task.name}: {task.unit}, {best}", loc="left")
    kl.set_title(f"KL, limit {task.kl:g}", loc="left")
    kl.axvline(task.kl, color=SOFT, linestyle=":", zorder=0)
    return figure


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
    rows = [_row(e, rank) for e, rank in ranked(entries)]
    none = None if rows else ["rank", "name", task.unit, *COLUMNS]
    board = Leaderboard(pd.DataFrame(rows, columns=none))
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
