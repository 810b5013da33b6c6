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
from moelab.bench.measured import Facts, Measured, Report, Table, Task, Versus, named, score

NAME = "swapmoe"
BUDGETS = ("15%", "25%", "37.5%", "50%", "75%", "100%")
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
    for name, keep in (("planned", True), ("uniform", False)):
        with opened(measured.model, Case("swapmoe", budget, DEVICE)) as lab:
            profile = lab.calibrate("swapmoe", progress=False).data
            if not keep:
                even = moelab.strategies.swapmoe(profile | {"plans": {}})
                lab.update(strategy=even.replace(name="swapmoe, uniform"))
            resident = (lab.cache_map()["bits"] > 0).sum(axis=1).tolist()
            found[name] = {"experts": resident, **score(lab, facts.extent)}
    measured.found.setdefault("plans", {})[budget] = found


# -- the tables -----------------------------------------------------------------------------------


def report(facts: Facts, measured: Measured) -> Report:
    """Memory, time, stalls and quality by budget; the planner's table; theirs beside ours."""
    by = {case: _row(case, row, facts) for case, row in measured.rows(cases(facts))}
    order = [WHOLE, WAITING, *(c for c in by if c not in (WHOLE, WAITING))]
    text = (
        f"On the {named(DEVICE)} at 16 bit. Stalls are events in which a decoded token waited for "
        "an expert, all runs together; the prompt's are counted apart. Quality is against the "
        "whole model."
    )
    tables = [
        Table("SwapMoE by budget", pd.DataFrame([by[c] for c in order if c in by]), FORMATS),
        Table("The planner's split against an even one", _plans(measured), FORMATS),
    ]
    tables = [table for table in tables if len(table.frame)]
    return Report("SwapMoE: no token waits", text, tables, _versus(by))


FORMATS = {
    **dict.fromkeys(("peak MB", "ms/token", "s/token"), "{:.2f}"),
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
        "stalls": row["stalls"],
        "stalls in prompt": row["stalls_in_prompt"],
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
        "75%": "-37 % memory, -18 % latency, Rouge-2 -0.012",
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
        stalls = f"{sum(row['stalls'] for row in swaps)} stalls"
        out.append(Versus("waiting for a load", "never", PAPER, stalls, named(DEVICE)))
        above = sum(row["memory"] > float(row["budget"].rstrip("%")) / 100 + 1e-9 for row in swaps)
        over = f"{above} of {len(swaps)}"
        out.append(Versus("runs above their budget", "one printed", PAPER, over, named(DEVICE)))
    return out


PAPER = "Jetson Nano, AGX Orin"
