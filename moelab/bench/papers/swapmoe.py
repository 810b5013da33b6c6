"""SwapMoE from 15 % to all of the memory: what the output pays so that no token ever waits.

Beside it static pruning (the same experts for ever) and loading on demand (no loss, all the wait);
and what the planner's split of the memory over the layers brings against an even one.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

import moelab
from moelab.bench.cases import Case, opened
from moelab.bench.papers.edgemoe import AGAINST
from moelab.bench.papers.results import Change, Report, Results, Task, named
from moelab.bench.tables import Table, Versus, figures
from moelab.calibration.profile import find_profile

NAME = "swapmoe"
BUDGETS = ("15%", "25%", "37.5%", "50%", "62.5%", "75%", "100%")
OF_SUMMARIES = ("15%", "33%", "50%", "63%", "100%")
"""Those of the paper's headline, and fewer: at each, every summary is written three times."""
HEADLINE = {
    33: "-67 % memory, -50 % latency, Rouge-2 -0.041",
    63: "-37 % memory, -18 % latency, Rouge-2 -0.012",
}
"""Percent of the memory -> what the paper says of it."""
DEVICE = "sd_card"
WHOLE = Case("in_ram", "100%", DEVICE)
WAITING = Case("on_demand", "25%", DEVICE)
PLANS = ("planned", "uniform")
SHORT = ("swapmoe", "static_pruning")
PAPER = "Jetson Nano, AGX Orin"
OF_ENCODERS = (
    " Virtual experts are swapped while tokens are decoded, an encoder's too: a source is read by "
    "those that the one before it called for, the first by the most important on the validation "
    "pairs."
)


def _budgets(results: Results) -> list[str]:
    return results.extent.choose(("25%", "100%"), OF_SUMMARIES if results.pairs else BUDGETS)


def cases(results: Results) -> list[Case]:
    """SwapMoE and static pruning at every budget; the whole model, and loading on demand."""
    pairs = [(who, b) for b in _budgets(results) for who in SHORT]
    return [WHOLE, WAITING, *(Case(who, budget, DEVICE) for who, budget in pairs)]


# -- the planner ----------------------------------------------------------------------------------


def tasks(results: Results) -> list[Task]:
    """Quality of the planner's choice and of an even split, at every budget below all."""
    return [
        (f"SwapMoE's plan, {budget}", lambda budget=budget: _plan(results, budget))
        for budget in _budgets(results)
        if budget != "100%"
    ]


def _plan(results: Results, budget: str) -> None:
    found: dict[str, Any] = {}
    case = results.scored_as(Case("swapmoe", budget, DEVICE))
    for name in PLANS:
        with opened(results.model, case) as lab:
            scored = results.scores.get(case)  # the planner's: measured before
            if name == "uniform":
                profile = find_profile(lab._store, "swapmoe")
                assert profile is not None  # the suite made one
                even = moelab.strategies.swapmoe(profile.data | {"plans": {}})
                lab.update(strategy=even.replace(name="swapmoe, uniform"))
                scored = None
            resident = (lab.cache_map()["bits"] > 0).sum(axis=1).tolist()
            found[name] = {"experts": resident, **(scored or results.scored(lab))}
    results.found.setdefault("plans", {})[budget] = found


# -- the tables -----------------------------------------------------------------------------------


def report(results: Results) -> Report:
    """Memory, time, stalls and quality by budget; the planner's table; theirs beside ours."""
    by = {case: _row(case, row, results) for case, row in results.rows(cases(results)).items()}
    text = (
        f"On the {named(DEVICE)} at 16 bit. Stalls are events in which a decoded token waited for "
        "an expert, the mean of all runs; the prompt's are counted apart. Quality is against the "
        f"whole model.{OF_ENCODERS if results.pairs else ''}"
    )
    tables = [
        Table("SwapMoE by budget", pd.DataFrame(list(by.values())), FORMATS),
        Table("The planner's split against an even one", _plans(results)),
    ]
    versus = [*_versus(by, results), *_who_is_better(by, results)]
    return Report("SwapMoE: no token waits", text, tables, versus)


NEAR = 5  # points between a budget and the paper's that stand beside each other
READING = "ms to read a source"
FORMATS = {
    **dict.fromkeys(("stalls a run", "stalls in prompt", "tokens above budget"), "{:.0f}"),
    "memory": "{:.1%}",
    READING: "{:.1f}",
}
LESS = {"peak MB": "memory", "ms/token": "latency", READING: "reading a source"}


def _row(case: Case, row: dict[str, Any], results: Results) -> dict[str, Any]:
    return {
        "strategy": row["strategy"],
        "budget": row["budget"],
        **figures(row, "peak MB"),
        "memory": row["peak_resident_bytes"] / results.info["all_experts_bytes"],
        **figures(row, "ms/token"),
        "stalls a run": row["stalls"],
        "stalls in prompt": row["stalls_in_prompt"],
        "tokens above budget": round(row["tokens_above_budget"] * row["repeats"]),
        **({READING: row["ttft_ms"]} if results.pairs else {}),
        **figures(row, "MB/token", *results.quality[::-1]),
        **({AGAINST: results.lost(case, WHOLE)} if results.pairs else figures(row, "same top-1")),
    }


def _plans(results: Results) -> pd.DataFrame:
    rows = []
    for budget, found in results.found.get("plans", {}).items():
        row: dict[str, Any] = {"budget": budget}
        for name in PLANS:
            row[f"{name}: experts"] = " ".join(map(str, found[name]["experts"]))
            shown = figures(found[name], *results.quality[::-1])
            row |= {f"{name}: {n}": f for n, f in shown.items()}
        if results.pairs:
            row["planned over uniform"] = str(_over(found))
        rows.append(row)
    return pd.DataFrame(rows)


def _over(found: dict[str, dict[str, Any]]) -> Change:
    """Rouge-2 of the planned split over the even one's."""
    return Change.of(*(found[name]["each"] for name in PLANS))


def _versus(by: dict[Case, dict[str, Any]], results: Results) -> list[Versus]:
    if WHOLE not in by:
        return []
    whole, rows = by[WHOLE], []
    for percent, theirs in HEADLINE.items():
        budget = min(_budgets(results), key=lambda b: abs(float(b.rstrip("%")) - percent))
        if abs(float(budget.rstrip("%")) - percent) > NEAR:
            continue
        if row := by.get(Case("swapmoe", budget, DEVICE)):
            less = {
                what: f"{row[name] / whole[name] - 1:+.0%} {what}"
                for name, what in LESS.items()
                if name in row
            }
            lost = row.get(AGAINST) or f"{row[results.quality[0]]:+.0%}"
            ours = ", ".join([*less.values(), f"{results.quality[0]} {lost}"])
            rows.append((f"against the whole model, budget {budget}", theirs, ours))
    swaps = [row for case, row in by.items() if case.strategy == "swapmoe"]
    if WAITING in by and swaps:
        slower = [by[WAITING]["ms/token"] / row["ms/token"] for row in swaps]
        stalls = f"{sum(row['stalls a run'] for row in swaps):.3g} stalls"
        above = f"{sum(row['tokens above budget'] for row in swaps)}, counted from the event logs"
        rows += [
            (
                "loading on demand",
                "6.2-8.9x slower",
                f"{min(slower):.1f}-{max(slower):.1f}x slower",
            ),
            ("waiting for a load", "never", stalls),
            ("tokens above the budget", "one printed", above),
        ]
    return [Versus(what, theirs, PAPER, ours, named(DEVICE)) for what, theirs, ours in rows]


def _who_is_better(by: dict[Case, dict[str, Any]], results: Results) -> list[Versus]:
    """At which budgets SwapMoE beats static pruning, and the planner's split an even one."""
    below = [budget for budget in _budgets(results) if budget != "100%"]
    plans = {
        budget: found
        for budget, found in results.found.get("plans", {}).items()
        if found["planned"]["experts"] != found["uniform"]["experts"]
    }
    if results.pairs:
        both = {b: [Case(who, b, DEVICE) for who in SHORT] for b in below}
        over = {b: results.change(*pair) for b, pair in both.items()}
        told = {
            "Rouge-2 over static pruning": ("their baseline", over),
            "Rouge-2 over an even split of the same memory": (
                "no figure quoted",
                {budget: _over(found) for budget, found in plans.items()},
            ),
        }
        return [
            Versus(what, theirs, "", "; ".join(f"{b} {c}" for b, c in ours.items() if c))
            for what, (theirs, ours) in told.items()
            if any(ours.values())
        ]
    swap, static = (
        {c.budget: r["KL"] for c, r in by.items() if c.strategy == who and c.budget in below}
        for who in SHORT
    )
    planned, even = ({b: f[name]["perplexity_ratio"] for b, f in plans.items()} for name in PLANS)
    told = (
        ("KL of static pruning against SwapMoE's", "their baseline", swap, static),
        ("perplexity of an even split against the planned", "no figure quoted", planned, even),
    )
    return [
        Versus(what, theirs, "", _where_lower(ours, others), named(DEVICE))
        for what, theirs, ours, others in told
        if ours.keys() & others.keys()
    ]


def _where_lower(ours: dict[str, float], others: dict[str, float]) -> str:
    """In words: where others do worse than ours, and where better."""
    listed = {
        "worse": [b for b in ours if b in others and others[b] > ours[b]],
        "better": [b for b in ours if b in others and others[b] < ours[b]],
    }
    return "; ".join(f"{word} at {', '.join(where)}" for word, where in listed.items() if where)
