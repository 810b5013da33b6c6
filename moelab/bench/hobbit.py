"""HOBBIT against loading on demand, LRU, mixtral-offloading and MoE-Infinity at equal budgets.

How much there is to win hangs on how long loading takes beside computing, so that is measured too:
on the paper's machines a layer loads for 80 ms and computes for 3.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pandas as pd

import moelab
from moelab.bench.grid import Case, settle
from moelab.bench.measured import Facts, Measured, Report, Table, Task, Versus, named, unseen

NAME = "hobbit"
OURS = "hobbit"
INFINITY = "moe_infinity"
OTHERS = ("on_demand", "lru", "mixtral_offloading", INFINITY)
BUDGETS = ("25%", "50%")
DEVICES = ("sd_card", "nvme", "pcie4")
GATES = "HOBBIT's gates and miss penalty"
TEXT_TOKENS = 96
PAPER_SHARES = {"high": 0.67, "low": 0.30, "skipped": 0.03}
PAPER_RATIOS = {
    "best": ("9.93x over MoE-Infinity, 18.9x over llama.cpp", "Phi-MoE, Jetson AGX Orin"),
    "worst": ("2.3x", "RTX 4090, PCIe 4.0"),
}
PAPER_LOAD_MS, PAPER_COMPUTE_MS = 80 * 2 / 8, 3.0
"""Of one layer on an RTX 4090: loading 2 of its 8 experts, and computing it."""


def cases(facts: Facts) -> list[Case]:
    """Every contender at every budget on every device."""
    budgets, devices = facts.quick(BUDGETS[:1], BUDGETS), _devices(facts)
    return [Case(who, b, d) for b in budgets for who in (OURS, *OTHERS) for d in devices]


def _devices(facts: Facts) -> list[str]:
    return facts.quick(DEVICES[1:2], DEVICES)


# -- what no run tells: the gates, and the miss penalty on one stream -----------------------------


def tasks(facts: Facts, measured: Measured) -> list[Task]:
    """Prefetch accuracy and miss penalties, on texts that no calibration saw."""
    return [(GATES, lambda: _look_at_routing(facts, measured))]


def _look_at_routing(facts: Facts, measured: Measured) -> None:
    from moelab.calibration.hobbit import gate_accuracy
    from moelab.calibration.measure import record

    tokens = 12 if facts.extent.quick else TEXT_TOKENS
    with moelab.open(measured.model, measure_kl=False, progress=False) as lab:
        trace = record(lab, unseen(lab), tokens=tokens, look_ahead=3)
        measured.found["gates"] = gate_accuracy(trace)
        measured.found["penalties"] = {
            budget: _penalties(lab, trace, budget) for budget in facts.quick(BUDGETS[:1], BUDGETS)
        }


def _penalties(lab: moelab.Lab, trace: moelab.Trace, budget: str) -> dict[str, float]:
    """Miss penalty of a token on one recorded stream, prefetching off: who leaves is all."""
    from moelab.calibration.hobbit import decide

    out = {}
    equal = "w_lru=0.25 + w_lfu=0.25 + w_lhu=0.25 + w_fld=0.25"
    for name, words in {
        "HOBBIT": OURS,
        "HOBBIT, equal weights": f"{OURS} + {equal}",
        "LRU": f"{OURS} + evict lru",
        "LFU": f"{OURS} + evict lfu",
    }.items():
        settle(lab, Case(words, budget, "disk"))
        now = lab.update(prefetch=0)
        out[name] = decide(trace, now.strategy, now.knobs()).penalty
    return out


# -- the tables -----------------------------------------------------------------------------------


def report(facts: Facts, measured: Measured) -> Report:
    """Speeds and ratios, the machines' regimes, precision of misses, gates, miss penalties."""
    speeds, ratios = _speeds(facts, measured)
    tables = [
        Table("Decode tokens/s (in brackets: how many times as fast HOBBIT is)", speeds, FORMATS),
        Table("Loading against computing, a layer of a token on demand", _regimes(measured, facts)),
        Table("Misses by precision (HOBBIT, decode)", _shares(facts, measured), SHARES),
        Table("The coming layers' gates, asked early", _gates(measured), SHARES),
        Table("Miss penalty a token, prefetching off", _penalty_table(measured), PENALTIES),
    ]
    text = (
        "All at 16 bit in the same memory; HOBBIT may load an unimportant miss at 4 bit or skip "
        "it. Ratios are medians over the same prompts. Gates and penalties are measured on "
        "the recorded routing of texts that no calibration saw. The demo's experts are tiny, so "
        "loading dominates only on the slow device; the paper's machines are in that regime. An "
        "emulated device is never faster than this machine's disk."
    )
    tables = [table for table in tables if len(table.frame)]
    return Report("HOBBIT: mixed precision on a miss", text, tables, _versus(measured, ratios))


FORMATS = {"KL": "{:.4f}", "same top-1": "{:.1%}", "MB/token": "{:.2f}", "hit ratio": "{:.2f}"}
SHARES = {
    **dict.fromkeys(("high", "low", "skipped"), "{:.1%}"),
    **dict.fromkeys(("first expert right", "chosen experts named"), "{:.1%}"),
    "misses a token": "{:.2f}",
}
PENALTIES = {
    **dict.fromkeys(("HOBBIT", "HOBBIT, equal weights", "LRU", "LFU"), "{:.3f}"),
    **dict.fromkeys(("against LRU", "against LFU"), "{:+.1%}"),
}


def _speeds(facts: Facts, measured: Measured) -> tuple[pd.DataFrame, dict[tuple, float]]:
    """The table, and (budget, device, other) -> how many times as fast HOBBIT is."""
    rows, ratios = [], {}
    devices = _devices(facts)
    for budget in BUDGETS:
        for who in (OURS, *OTHERS):
            found = dict(measured.rows([Case(who, budget, d) for d in devices]))
            if not found:
                continue
            words = {}
            for case, row in found.items():
                ratio = measured.times_as_fast(Case(OURS, budget, case.device), case)
                column = f"{named(case.device)}: tokens/s"
                words[column] = f"{row['tokens_per_s']:.1f}"
                if who != OURS and not math.isnan(ratio):
                    ratios[budget, case.device, who] = ratio
                    words[column] += f" ({ratio:.2f}x)"
            row = next(iter(found.values()))
            rows.append(
                {
                    "budget": budget,
                    "strategy": who,
                    **words,
                    "hit ratio": row["hit_ratio"],
                    "MB/token": row["bytes_per_token"] / 1e6,
                    "KL": row.get("kl_mean", math.nan),
                    "same top-1": row.get("same_top1", math.nan),
                }
            )
    return pd.DataFrame(rows), ratios


def _regimes(measured: Measured, facts: Facts) -> pd.DataFrame:
    layers = facts.info["layers"]
    rows = [_regime("RTX 4090, PCIe 4.0 (the paper's)", PAPER_LOAD_MS, PAPER_COMPUTE_MS)]
    for case, row in measured.rows([Case("on_demand", "25%", d) for d in _devices(facts)]):
        rows.append(
            _regime(named(case.device), row["stall_ms"] / layers, row["compute_ms"] / layers)
        )
    return pd.DataFrame(rows if len(rows) > 1 else [])


def _regime(device: str, load_ms: float, compute_ms: float) -> dict[str, Any]:
    return {
        "device": device,
        "load ms": f"{load_ms:.2f}",
        "compute ms": f"{compute_ms:.2f}",
        "load : compute": f"{load_ms / compute_ms:.2f}",
    }


def _shares(facts: Facts, measured: Measured) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        found = measured.rows([Case(OURS, budget, d) for d in _devices(facts)])
        for _, row in itertools.islice(found, 1):  # no device changes what is decided
            misses = sum(row[name] for name in PAPER_SHARES)
            rows.append(
                {"budget": budget}
                | {name: row[name] / misses if misses else math.nan for name in PAPER_SHARES}
                | {"misses a token": misses / (row["repeats"] * (row["tokens"] - 1))}
            )
    paper = {"budget": "the paper's aim (Mixtral)", **PAPER_SHARES}
    return pd.DataFrame([*rows, paper] if rows else [])


def _gates(measured: Measured) -> pd.DataFrame:
    """Layers ahead, and how right the gates were."""
    return pd.DataFrame(
        [
            {
                "layers ahead": far,
                "first expert right": right["first"],
                "chosen experts named": right["top_k"],
            }
            for far, right in measured.found.get("gates", {}).items()
        ]
    )


def _penalty_table(measured: Measured) -> pd.DataFrame:
    rows = []
    for budget, found in measured.found.get("penalties", {}).items():
        against = {
            f"against {other}": found["HOBBIT"] / found[other] - 1 if found[other] else math.nan
            for other in ("LRU", "LFU")
        }
        rows.append({"budget": budget, **found, **against})
    return pd.DataFrame(rows)


def _versus(measured: Measured, ratios: dict[tuple, float]) -> list[Versus]:
    out = []
    if ratios:
        for word, pick in (("best", max), ("worst", min)):
            budget, device, other = key = pick(ratios, key=ratios.__getitem__)
            ours = f"{ratios[key]:.2f}x over {other}"
            what = f"decode speed, {word} ratio of all"
            out.append(Versus(what, *PAPER_RATIOS[word], ours, f"{named(device)}, {budget}"))
        for budget in dict.fromkeys(budget for budget, *_ in ratios):
            over = [(d, r) for (b, d, who), r in ratios.items() if (b, who) == (budget, INFINITY)]
            ours = ", ".join(f"{ratio:.2f}x {named(device)}" for device, ratio in over)
            what = f"decode speed over MoE-Infinity, budget {budget}"
            theirs = "3.64x Mixtral, 9.93x Phi-MoE"
            out.append(Versus(what, theirs, "Jetson AGX Orin, NVMe", ours, ""))
    if gates := measured.found.get("gates"):
        ours = ", ".join(f"{100 * right['first']:.0f} %" for right in gates.values())
        out.append(
            Versus("first expert right, +1, +2, +3 layers", "96, ~90, ~90 %", "Mixtral", ours, "")
        )
    for budget, found in measured.found.get("penalties", {}).items():
        if found["LRU"]:
            ours = f"{found['HOBBIT'] / found['LRU'] - 1:+.1%}"
            what = f"miss penalty against LRU, budget {budget}"
            out.append(Versus(what, "-5 to -9 %", "Mixtral, Phi-MoE", ours, ""))
    return out
