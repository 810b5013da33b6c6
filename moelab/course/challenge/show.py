"""How an entry and a board are shown: words, a small HTML table, and one SVG without scripts."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

import pandas as pd

from moelab.course.challenge.own_code import RIGHTS
from moelab.course.challenge.tasks import MB, Task
from moelab.views.picture import box, words

if TYPE_CHECKING:
    from moelab.course.challenge.board import Leaderboard
    from moelab.course.challenge.entries import Entry

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


def entry_words(entry: Entry) -> str:
    """An entry in plain text: verdict first, then the figures."""
    rows = [f"{entry.challenge} · {entry.name}: {verdict(entry)}"]
    rows += [f"  {name}: {value}" for name, value in measured(entry)]
    return "\n".join([*rows, *(f"  failed: {failure}" for failure in entry.failures)])


def entry_html(entry: Entry) -> str:
    """An entry as HTML: the verdict, the figures, and each limit with how it was kept."""
    left = "style='text-align:left'"
    rows = "".join(
        f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(value)}</td></tr>"
        for name, value in measured(entry)
    )
    failed = "".join(f"<li>✗ {escape(failure)}</li>" for failure in entry.failures)
    return (
        f"<div><p><b>{escape(entry.name)}</b> · {escape(entry.challenge)}: "
        f"<b>{escape(verdict(entry))}</b></p>"
        + (f"<ul style='list-style:none;padding-left:0'>{failed}</ul>" if failed else "")
        + f"<table>{rows}</table></div>"
    )


def verdict(entry: Entry) -> str:
    """One line: the rank, or why there is none."""
    if not entry.accepted:
        return "disqualified"
    if entry.quick:
        return "both limits kept; a quick trial does not rank"
    if entry.rank is None:
        return "both limits kept; an earlier entry of the same name is better"
    return f"rank {entry.rank} of {entry.board}"


def measured(entry: Entry) -> list[tuple[str, str]]:
    """Names and values of what was measured, and with which settings."""
    f, task = entry.figures, entry.task
    speeds = f"({f['tokens_per_s_min']:.3g} to {f['tokens_per_s_max']:.3g})"
    kls = f"(held-out {f['kl_held_out']:.4f}, own text {f['kl_written']:.4f})"
    return [
        ("speed", f"{f['tokens_per_s']:.3g} tokens/s {speeds}"),
        ("read", f"{f['bytes_per_token'] / 1000:.3g} kB per token"),
        ("peak memory", f"{f['peak_resident_bytes'] / MB:.2f} MB of {task.peak_bytes / MB:g} MB"),
        ("KL", f"{f['kl']:.4f}, below {task.kl:g} asked for {kls}"),
        ("hit ratio", f"{f['hit_ratio']:.0%}"),
        ("settings", entry.words + (f" ({RIGHTS})" if entry.own else "")),
    ]


def board_html(board: Leaderboard) -> str:
    """The picture, the table under it, and what is wrong with the file."""
    task = getattr(board, "task", None)
    if task is None or "rank" not in board:  # a part of a board, or one of another shape
        return str(board.to_html())
    data = base64.b64encode(board.svg().encode()).decode()
    label = escape(f"Leaderboard of {task.name}, {len(board)} entries", quote=True)
    machines = len(set(board["machine"]))
    hidden = ["own code", "made", "version", *(["machine"] if machines < 2 else [])]
    shown = pd.DataFrame(board).drop(columns=hidden).astype({"rank": object})
    table = shown.to_html(
        index=False, float_format=lambda x: f"{x:.4g}", border=0, justify="left", na_rep=""
    )
    notes = [f"Figures come from {machines} machines: <code>verify</code> measures all on one."]
    notes = notes[machines < 2 :]
    if board["own code"].any():
        notes.append(f"Where settings name a class: {RIGHTS}.")
    if board.faults:
        faults = "".join(f"<li>{escape(fault)}</li>" for fault in board.faults)
        notes.append(f"Lines that could not be read:</p><ul>{faults}</ul><p>")
    image = f'<img alt="{label}" width="{WIDTH}" src="data:image/svg+xml;base64,{data}"/>'
    return image + table + "".join(f"<p>{note}</p>" for note in notes)


def board_svg(board: Leaderboard) -> str:
    """A bar for each entry: the goal's figure, and beside it how much of the KL was used up."""
    task: Task = board.task
    rows = board.head(MOST_ROWS)
    height = 74 + ROW * len(rows) + 14
    most = max([*rows[task.unit], 1e-9])
    best = "longest wins" if task.best == "most" else "shortest wins"
    parts = [
        HEAD.format(width=WIDTH, height=height, inner=WIDTH - 1, tall=height - 1),
        words(18, 28, task.name, weight=650, size=15),
        words(18, 52, f"limits: {task.peak_bytes / MB:g} MB, KL {task.kl:g}", fill=SOFT, size=13),
        words(NAME, 52, f"{task.unit}, {best}", fill=SOFT, size=13),
        words(GAUGE, 52, f"KL, of {task.kl:g}", fill=SOFT, size=13),
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
        words(NAME - 10, y + 16, short, anchor="end", size=13),
        box(NAME, y + 2, wide, 18, KEPT if ranks else "url(#h)"),
        words(NAME + wide + 8, y + 16, f"{row[task.unit]:.3g}{_note(row)}", size=13),
        box(GAUGE, y + 7, 90, 8, LINE),
        box(GAUGE, y + 7, 90 * used, 8, KEPT if row["KL"] < task.kl else OUT),
        words(GAUGE + 98, y + 16, f"{row['KL']:.3f}", fill=SOFT, size=13),
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
