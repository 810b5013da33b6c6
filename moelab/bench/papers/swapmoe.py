"""SwapMoE from 15 % to all of the memory: what the output pays so that no token ever waits.

Beside it static pruning (the same experts for ever) and loading on demand (no loss, all the wait);
and what the planner's split of the memory over the layers brings against an even one.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

import moelab
from moelab.bench.grid import Case, opened
from moelab.bench.papers.measured import Facts, Measured, Report, Table, Task, Versus, named, score

NAME = "swapmoe"
BUDGETS = ("15%", "25%", "37.5%", "50%", "62.5%", "75%", "100%")
DEVICE = "sd_card"
WHOLE = Case("in_ram", "100%", DEVICE)
WAITING = Case("on_demand", "25%", DEVICE)


def _budgets(facts: Facts) -> list[str]:
    return facts.quick(("25%", "100%"), BUDGETS)


def cases(facts: Facts) -> list[Case]:
    """SwapMoE and static pruning at every budget; the whole model, and loading on demand."""
    pairs = [(who, b) for b in _budgets(facts) for who in ("swapmoe", "static_pruning")]
    return [WHOLE, WAITING, *(Case(who, budget, DEVICE) for who, budget in pairs)]


# -- the planner ----------------------------------------------------------------------------------


def tasks(facts: Facts, measured: Measured) -> list[Task]:
    """Quality of the planner's choice and of an even split, at every budget below all."""

    def plan(budget: str) -> Task:
        return f"SwapMoE's plan, {budget}", lambda: _plan(facts, measured, budget)

    return [plan(budget) for budget in _budgets(facts) if budget != "100%"]


def _plan(facts: Facts, measured: Measured, budget: str) -> None:
    found: dict[str, Any] = {}
    case = measured.scored_as(Case("swapmoe", budget, DEVICE))
    for name, keep in (("planned", True), ("uniform", False)):
        with opened(measured.model, case) as lab:
            profile = lab.calibrate("swapmoe", progress=False).data
            if not keep:
                even = moelab.strategies.swapmoe(profile | {"plans": {}})
                lab.update(strategy=even.replace(name="swapmoe, uniform"))
            resident = (lab.cache_map()["bits"] > 0).sum(axis=1).tolist()
            scored = measured.scores.get(case) if keep else None  # the same case: measured before
            found[name] = {"experts": resident, **(scored or score(lab, facts.extent))}
    measured.found.setdefault("plans", {})[budget] = found


# -- the tables -----------------------------------------------------------------------------------


def report(facts: Facts, measured: Measured) -> Report:
    """Memory, time, stalls and quality by budget; the planner's table; theirs beside ours."""
    by = {case: _row(case, row, facts) for case, row in measured.rows(cases(facts))}
    order = [WHOLE, WAITING, *(c for c in by if c not in (WHOLE, WAITING))]
    text = (
        f"On the {named(DEVICE)} at 16 bit. Stalls are events in which a decoded token waited for "
        "an expert, the mean of all runs; the prompt's are counted apart. Quality is against the "
        "whole model."
    )
    tables = [
        Table("SwapMoE by budget", pd.DataFrame([by[c] for c in order if c in by]), FORMATS),
        Table("The planner's split against an even one", _plans(measured), FORMATS),
    ]
    tables = [table for table in tables if len(table.frame)]
    versus = [*_versus(by), *_who_is_better(by, measured)]
    return Report("SwapMoE: no token waits", text, tables, versus)


FORMATS = {
    **dict.fromkeys(("peak MB", "ms/token"), "{:.2f}"),
    **dict.fromkeys(("stalls a run", "stalls in prompt"), "{:.0f}"),
    **dict.fromkeys(("memory", "same top-1"), "{:.1%}"),
    **dict.fromkeys(("KL", "KL planned", "KL uniform"), "{:.4f}"),
    **dict.fromkeys(("perplexity", "perplexity planned", "perplexity uniform"), "{:+.1%}"),
    "MB/token": "{:.3f}",
}


def _row(case: Case, row: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {
        "strategy": case.strategy,
        "budget": case.budget,
        "peak MB": row["peak_resident_bytes"] / 1e6,
        "memory": row["peak_resident_bytes"] / facts.info["all_experts_bytes"],
        "ms/token": 1e3 / row["tokens_per_s"],
        "stalls a run": row["stalls"] / row["repeats"],
        "stalls in prompt": row["stalls_in_prompt"] / row["repeats"],
        "tokens above budget": row["tokens_above_budget"],
        "MB/token": row["bytes_per_token"] / 1e6,
        "KL": row.get("kl_mean", math.nan),
        "same top-1": row.get("same_top1", math.nan),
        "perplexity": row.get("perplexity_ratio", math.nan) - 1,
    }


def _plans(measured: Measured) -> pd.DataFrame:
    rows = []
    for budget, found in measured.found.get("plans", {}).items():
        row: dict[str, Any] = {"budget": budget}
        for name in ("planned", "uniform"):
            row[f"experts {name}"] = " ".join(map(str, found[name]["experts"]))
            row[f"KL {name}"] = found[name]["kl_mean"]
            row[f"perplexity {name}"] = found[name]["perplexity_ratio"] - 1
        rows.append(row)
    return pd.DataFrame(rows)


def _versus(by: dict[Case, dict[str, Any]]) -> list[Versus]:
    if WHOLE not in by:
        return []
    out, whole = [], by[WHOLE]
    for budget, theirs in {
        "37.5%": "-67 % memory, -50 % latency, Rouge-2 -0.041",
        "62.5%": "-37 % memory, -18 % latency, Rouge-2 -0.012",
    }.items():
        row = by.get(Case("swapmoe", budget, DEVICE))
        if row is None:
            continue
        ours = (
            f"{row['peak MB'] / whole['peak MB'] - 1:+.0%} memory, "
            f"{row['ms/token'] / whole['ms/token'] - 1:+.0%} latency, "
            f"perplexity {row['perplexity']:+.0%}"
        )
        out.append(
            Versus(f"against the whole model, budget {budget}", theirs, PAPER, ours, named(DEVICE))
        )
    swaps = [row for case, row in by.items() if case.strategy == "swapmoe"]
    if WAITING in by and swaps:
        slower = [by[WAITING]["ms/token"] / row["ms/token"] for row in swaps]
        ours = f"{min(slower):.1f}-{max(slower):.1f}x slower"
        out.append(Versus("loading on demand", "6.2-8.9x slower", PAPER, ours, named(DEVICE)))
        stalls = f"{sum(row['stalls a run'] for row in swaps):.3g} stalls"
        out.append(Versus("waiting for a load", "never", PAPER, stalls, named(DEVICE)))
        above = f"{sum(row['tokens above budget'] for row in swaps)}, counted from the event logs"
        out.append(Versus("tokens above the budget", "one printed", PAPER, above, named(DEVICE)))
    return out


def _who_is_better(by: dict[Case, dict[str, Any]], measured: Measured) -> list[Versus]:
    """At which budgets SwapMoE beats static pruning, and the planner's split an even one."""
    swap, static, planned, even = {}, {}, {}, {}
    for case, row in by.items():
        kept = {"swapmoe": swap, "static_pruning": static}.get(case.strategy)
        if kept is not None and case.budget != "100%":
            kept[case.budget] = row["KL"]
    for budget, found in measured.found.get("plans", {}).items():
        if found["planned"]["experts"] != found["uniform"]["experts"]:
            planned[budget] = found["planned"]["perplexity_ratio"]
            even[budget] = found["uniform"]["perplexity_ratio"]
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
    both = [b for b in ours if b in others]
    listed = {
        "worse": [b for b in both if others[b] > ours[b]],
        "better": [b for b in both if others[b] < ours[b]],
    }
    return "; ".join(f"{word} at {', '.join(where)}" for word, where in listed.items() if where)


PAPER = "Jetson Nano, AGX Orin"
