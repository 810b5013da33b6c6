"""SwapMoE from 15 % to all of the memory: what the output pays so that no token ever waits.

Beside it static pruning (the same experts for ever) and loading on demand (no loss, all the wait);
and what the planner's split of the memory over the layers brings against an even one.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

import moelab
from moelab.bench.cases import Case, opened
from moelab.bench.papers.results import Report, Results, Task, named, score
from moelab.bench.tables import Table, Versus, figures

NAME = "swapmoe"
BUDGETS = ("15%", "25%", "37.5%", "50%", "62.5%", "75%", "100%")
DEVICE = "sd_card"
WHOLE = Case("in_ram", "100%", DEVICE)
WAITING = Case("on_demand", "25%", DEVICE)
PLANS = ("planned", "uniform")
PAPER = "Jetson Nano, AGX Orin"


def _budgets(results: Results) -> list[str]:
    return results.extent.choose(("25%", "100%"), BUDGETS)


def cases(results: Results) -> list[Case]:
    """SwapMoE and static pruning at every budget; the whole model, and loading on demand."""
    pairs = [(who, b) for b in _budgets(results) for who in ("swapmoe", "static_pruning")]
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
            profile = lab.calibrate("swapmoe", progress=False).data
            scored = results.scores.get(case)  # the planner's: measured before
            if name == "uniform":
                even = moelab.strategies.swapmoe(profile | {"plans": {}})
                lab.update(strategy=even.replace(name="swapmoe, uniform"))
                scored = None
            resident = (lab.cache_map()["bits"] > 0).sum(axis=1).tolist()
            found[name] = {"experts": resident, **(scored or score(lab, results.extent))}
    results.found.setdefault("plans", {})[budget] = found


# -- the tables -----------------------------------------------------------------------------------


def report(results: Results) -> Report:
    """Memory, time, stalls and quality by budget; the planner's table; theirs beside ours."""
    by = {case: _row(row, results) for case, row in results.rows(cases(results)).items()}
    text = (
        f"On the {named(DEVICE)} at 16 bit. Stalls are events in which a decoded token waited for "
        "an expert, the mean of all runs; the prompt's are counted apart. Quality is against the "
        "whole model."
    )
    tables = [
        Table("SwapMoE by budget", pd.DataFrame(list(by.values())), FORMATS),
        Table("The planner's split against an even one", _plans(results)),
    ]
    versus = [*_versus(by), *_who_is_better(by, results)]
    return Report("SwapMoE: no token waits", text, tables, versus)


FORMATS = {
    **dict.fromkeys(("stalls a run", "stalls in prompt", "tokens above budget"), "{:.0f}"),
    "memory": "{:.1%}",
}


def _row(row: dict[str, Any], results: Results) -> dict[str, Any]:
    return {
        "strategy": row["strategy"],
        "budget": row["budget"],
        **figures(row, "peak MB"),
        "memory": row["peak_resident_bytes"] / results.info["all_experts_bytes"],
        **figures(row, "ms/token"),
        "stalls a run": row["stalls"],
        "stalls in prompt": row["stalls_in_prompt"],
        "tokens above budget": round(row["tokens_above_budget"] * row["repeats"]),
        **figures(row, "MB/token", "KL", "same top-1", "perplexity"),
    }


def _plans(results: Results) -> pd.DataFrame:
    rows = []
    for budget, found in results.found.get("plans", {}).items():
        row: dict[str, Any] = {"budget": budget}
        for name in PLANS:
            row[f"{name}: experts"] = " ".join(map(str, found[name]["experts"]))
            row |= {f"{name}: {n}": f for n, f in figures(found[name], "KL", "perplexity").items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _versus(by: dict[Case, dict[str, Any]]) -> list[Versus]:
    if WHOLE not in by:
        return []
    whole, rows = by[WHOLE], []
    for budget, theirs in {
        "37.5%": "-67 % memory, -50 % latency, Rouge-2 -0.041",
        "62.5%": "-37 % memory, -18 % latency, Rouge-2 -0.012",
    }.items():
        if row := by.get(Case("swapmoe", budget, DEVICE)):
            ours = (
                f"{row['peak MB'] / whole['peak MB'] - 1:+.0%} memory, "
                f"{row['ms/token'] / whole['ms/token'] - 1:+.0%} latency, "
                f"perplexity {row['perplexity']:+.0%}"
            )
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
    swap, static = (
        {c.budget: r["KL"] for c, r in by.items() if c.strategy == who and c.budget != "100%"}
        for who in ("swapmoe", "static_pruning")
    )
    plans = {
        budget: found
        for budget, found in results.found.get("plans", {}).items()
        if found["planned"]["experts"] != found["uniform"]["experts"]
    }
    planned, even = ({b: f[name]["perplexity_ratio"] for b, f in plans.items()} for name in PLANS)
    pairs = (
        ("KL of static pruning against SwapMoE's", "their baseline", swap, static),
        ("perplexity of an even split against the planned", "no figure quoted", planned, even),
    )
    return [
        Versus(what, theirs, "", _where_lower(ours, others), named(DEVICE))
        for what, theirs, ours, others in pairs
        if ours.keys() & others.keys()
    ]


def _where_lower(ours: dict[str, float], others: dict[str, float]) -> str:
    """In words: where others do worse than ours, and where better."""
    listed = {
        "worse": [b for b in ours if b in others and others[b] > ours[b]],
        "better": [b for b in ours if b in others and others[b] < ours[b]],
    }
    return "; ".join(f"{word} at {', '.join(where)}" for word, where in listed.items() if where)
