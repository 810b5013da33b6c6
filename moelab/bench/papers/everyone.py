"""One figure for all: what each strategy's speed costs in quality, at the same memory."""

from __future__ import annotations

from typing import Any

import pandas as pd

import moelab
from moelab.bench.cases import Case
from moelab.bench.papers.results import Report, Results, Task, named
from moelab.bench.tables import Table, figures

NAME = "everyone"
BUDGET = "25%"
DEVICES = ("sd_card", "nvme")
MORE = ("lru + 4 bit", "lru + 2 bit", "lru + look-ahead", "lru + mixed 16/4", "on_demand + 4 bit")
"""Plain answers beside the strategies, to measure the papers' ideas against."""
UNCHANGED = 1e-6
"""Below this KL the output is the full model's, up to rounding."""


def contenders(results: Results) -> list[str]:
    """Every strategy, and the plain answers; everything in RAM only at bits that fit."""
    info = results.info
    share = float(BUDGET.rstrip("%")) / 100 * info["all_experts_bytes"]
    experts = info["all_experts_bytes"] / info["expert_bytes"][max(info["tiers"])]
    fitting = [bits for bits, n in info["expert_bytes"].items() if n * experts <= share]
    whole = [f"in_ram + {max(fitting)} bit"] if fitting else []
    names = [name for name in moelab.strategies.NAMES if name != "in_ram"]
    return [*names, *whole, *results.extent.choose((), MORE)]


def _devices(results: Results) -> list[str]:
    return results.extent.choose(DEVICES[1:], DEVICES)


def cases(results: Results) -> list[Case]:
    """Everyone at one budget on two devices."""
    return [Case(who, BUDGET, on) for who in contenders(results) for on in _devices(results)]


def tasks(_results: Results) -> list[Task]:
    """Nothing besides the runs."""
    return []


def points(results: Results) -> list[dict[str, Any]]:
    """A point for each contender and device: tokens/s and KL."""
    return [
        {"strategy": case.strategy, "device": case.device, **figures(row, "tokens/s", "KL")}
        for case, row in results.rows(cases(results)).items()
        if "kl_mean" in row
    ]


def report(results: Results) -> Report:
    """One table for all, the fastest first."""
    devices, rows = _devices(results), []
    for who in contenders(results):
        each = [Case(who, BUDGET, device) for device in devices]
        names = ("hit ratio", "MB/token", "KL", "same top-1")
        if row := results.on_devices("tokens/s", each, *names):
            rows.append({"strategy": who, **row})
    frame = pd.DataFrame(rows)
    if rows:
        frame = frame.sort_values(f"{named(devices[0])}: tokens/s", ascending=False, kind="stable")
    unchanged = sum(row["KL"] < UNCHANGED for row in rows)
    text = (
        f"Every strategy with {BUDGET} of the memory that all experts take at 16 bit. {unchanged} "
        f"of {len(rows)} leave the output as it is (KL 0); the others buy speed with it, or "
        "memory that needs no loads."
    )
    tables = [Table("Everyone at the same budget", frame)]
    return Report("Everyone: quality against speed", text, tables, [])
