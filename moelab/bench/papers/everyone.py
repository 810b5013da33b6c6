"""One figure for all: what each strategy's speed costs in quality, at the same memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

import moelab
from moelab.bench.grid import Case
from moelab.bench.papers.measured import Facts, Measured, Report, Table, Task, named

NAME = "everyone"
BUDGET = "25%"
DEVICES = ("sd_card", "nvme")
MORE = ("lru + 4 bit", "lru + 2 bit", "lru + look-ahead", "lru + mixed 16/4", "on_demand + 4 bit")
"""Plain answers beside the strategies, to measure the papers' ideas against."""
UNCHANGED = 1e-6
"""Below this KL the output is the full model's, up to rounding."""


def contenders(facts: Facts) -> list[str]:
    """Every strategy, and the plain answers; everything in RAM only at bits that fit."""
    share = float(BUDGET.rstrip("%")) / 100 * facts.info["all_experts_bytes"]
    best = facts.info["expert_bytes"][max(facts.info["tiers"])]
    experts = facts.info["all_experts_bytes"] / best
    fitting = [bits for bits, n in facts.info["expert_bytes"].items() if n * experts <= share]
    whole = [f"in_ram + {max(fitting)} bit"] if fitting else []
    names = [name for name in moelab.strategies.NAMES if name != "in_ram"]
    return [*names, *whole, *facts.quick((), MORE)]


def cases(facts: Facts) -> list[Case]:
    """Everyone at one budget on two devices."""
    devices = facts.quick(DEVICES[1:], DEVICES)
    return [Case(who, BUDGET, device) for who in contenders(facts) for device in devices]


def tasks(_facts: Facts, _measured: Measured) -> list[Task]:
    """Nothing besides the runs."""
    return []


def points(facts: Facts, measured: Measured) -> list[dict[str, Any]]:
    """A point for each contender and device: tokens/s and KL."""
    return [
        {
            "strategy": case.strategy,
            "device": case.device,
            "tokens/s": row["tokens_per_s"],
            "KL": row["kl_mean"],
        }
        for case, row in measured.rows(cases(facts))
        if "kl_mean" in row
    ]


def report(facts: Facts, measured: Measured) -> Report:
    """One table for all, the fastest first."""
    rows: dict[str, dict[str, Any]] = {}
    devices = facts.quick(DEVICES[1:], DEVICES)
    for case, row in measured.rows(cases(facts)):
        of_all = rows.setdefault(case.strategy, _row(case, row, devices))
        of_all[f"{named(case.device)}: tokens/s"] = row["tokens_per_s"]
    ordered = sorted(rows.values(), key=lambda row: -_speed(row, devices[0]))
    unchanged = sum(row["KL"] < UNCHANGED for row in ordered)
    text = (
        f"Every strategy with {BUDGET} of the memory that all experts take at 16 bit. {unchanged} "
        f"of {len(ordered)} leave the output as it is (KL 0); the others buy speed with it, or "
        "memory that needs no loads."
    )
    table = Table("Everyone at the same budget", pd.DataFrame(ordered), FORMATS)
    return Report("Everyone: quality against speed", text, [table], [])


FORMATS = {
    **{f"{named(device)}: tokens/s": "{:.1f}" for device in DEVICES},
    **dict.fromkeys(("KL",), "{:.4f}"),
    "same top-1": "{:.1%}",
    "hit ratio": "{:.2f}",
    "MB/token": "{:.2f}",
}


def _row(case: Case, row: dict[str, Any], devices: list[str]) -> dict[str, Any]:
    return {
        "strategy": case.strategy,
        **{f"{named(device)}: tokens/s": math.nan for device in devices},
        "hit ratio": row["hit_ratio"],
        "MB/token": row["bytes_per_token"] / 1e6,
        "KL": row.get("kl_mean", math.nan),
        "same top-1": row.get("same_top1", math.nan),
    }


def _speed(row: Mapping[str, Any], device: str) -> float:
    speed = row[f"{named(device)}: tokens/s"]
    return 0.0 if math.isnan(speed) else speed
