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
from moelab.bench.papers.measured import (
    Facts,
    Measured,
    Ratio,
    Report,
    Table,
    Task,
    Versus,
    named,
    unseen,
)

NAME = "hobbit"
OURS = "hobbit"
INFINITY = "moe_infinity"
ON_DEMAND = "on_demand"
OTHERS = (ON_DEMAND, "lru", "mixtral_offloading", INFINITY)
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
    """Every contender at every budget on every device; those compared follow one another."""
    budgets, devices = facts.quick(BUDGETS[:1], BUDGETS), _devices(facts)
    listed = [_case(who, b, d) for d in devices for b in budgets for who in (OURS, *OTHERS)]
    return list(dict.fromkeys(listed))


def _case(who: str, budget: str, device: str) -> Case:
    """Loading on demand keeps one layer's experts whatever the budget: it is measured once."""
    return Case(who, BUDGETS[0] if who == ON_DEMAND else budget, device)


def _devices(facts: Facts) -> list[str]:
    return facts.quick(DEVICES[1:2], DEVICES)


# -- what no run tells: the gates, and the miss penalty on one stream -----------------------------


def tasks(facts: Facts, measured: Measured) -> list[Task]:
    """Prefetch accuracy and miss penalties, on texts that no calibration saw."""
    return [(GATES, lambda: _look_at_routing(facts, measured))]


def _look_at_routing(facts: Facts, measured: Measured) -> None:
    from moelab.calibration.hobbit import gate_accuracy
    from moelab.calibration.probes import record

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
    ratios = _ratios(facts, measured)
    tables = [
        Table("Decode tokens/s", _speeds(facts, measured), FORMATS, note=DISK),
        Table("How many times as fast HOBBIT decodes", _ratio_table(ratios), note=_told(ratios)),
        Table("Loading against computing, a layer of a token on demand", _regimes(measured, facts)),
        Table("Misses by precision (HOBBIT, decode)", _shares(facts, measured), SHARES, note=LIVE),
        Table("The coming layers' gates, asked early", _gates(measured), SHARES),
        Table("Miss penalty a token, prefetching off", _penalty_table(measured), PENALTIES),
    ]
    text = (
        "All at 16 bit in the same memory; HOBBIT may load an unimportant miss at 4 bit or skip "
        "it. Gates and penalties are measured on the recorded routing of texts that no calibration "
        "saw. The demo's experts are tiny, so loading dominates only on the slow device; the "
        "paper's machines are in that regime."
    )
    tables = [table for table in tables if len(table.frame)]
    return Report("HOBBIT: mixed precision on a miss", text, tables, _versus(measured, ratios))


DISK = (
    "An emulated device is never faster than this machine's disk, so the PCIe column is this disk. "
    "On demand holds one layer's experts whatever the budget."
)
LIVE = (
    "The shares differ from the aim because the thresholds are calibrated on the misses of a "
    "cache without prefetching, and in a run prefetching fetches the important experts first: what "
    "is left to miss is less important."
)
FORMATS = {
    **{f"{named(device)}: tokens/s": "{:.1f}" for device in DEVICES},
    "KL": "{:.4f}",
    "same top-1": "{:.1%}",
    "MB/token": "{:.2f}",
    "hit ratio": "{:.2f}",
}
SHARES = {
    **dict.fromkeys(("high", "low", "skipped"), "{:.1%}"),
    **dict.fromkeys(("first expert right", "chosen experts named"), "{:.1%}"),
    "misses a token": "{:.2f}",
}
PENALTIES = {
    **dict.fromkeys(("HOBBIT", "HOBBIT, equal weights", "LRU", "LFU"), "{:.3f}"),
    **dict.fromkeys(("against LRU", "against LFU"), "{:+.1%}"),
}


def _speeds(facts: Facts, measured: Measured) -> pd.DataFrame:
    rows = []
    for budget, who in _listed():
        found = dict(measured.rows([_case(who, budget, d) for d in _devices(facts)]))
        if not found:
            continue
        row = next(iter(found.values()))
        rows.append(
            {
                "budget": "any" if who == ON_DEMAND else budget,
                "strategy": who,
                **{f"{named(c.device)}: tokens/s": r["tokens_per_s"] for c, r in found.items()},
                "hit ratio": row["hit_ratio"],
                "MB/token": row["bytes_per_token"] / 1e6,
                "KL": row.get("kl_mean", math.nan),
                "same top-1": row.get("same_top1", math.nan),
            }
        )
    return pd.DataFrame(rows)


def _listed() -> list[tuple[str, str]]:
    """(budget, contender) of the rows: on demand once, before all."""
    others = [who for who in OTHERS if who != ON_DEMAND]
    return [(BUDGETS[0], ON_DEMAND), *itertools.product(BUDGETS, (OURS, *others))]


def _ratios(facts: Facts, measured: Measured) -> dict[tuple[str, str, str], Ratio]:
    """(budget, device, other) -> how many times as fast HOBBIT is."""
    out = {}
    for key in itertools.product(BUDGETS, _devices(facts), OTHERS):
        budget, device, who = key
        ratio = measured.times_as_fast(Case(OURS, budget, device), _case(who, budget, device))
        if ratio is not None:
            out[key] = ratio
    return out


def _ratio_table(ratios: dict[tuple[str, str, str], Ratio]) -> pd.DataFrame:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for (budget, device, who), ratio in ratios.items():
        row = rows.setdefault((budget, who), {"budget": budget, "as fast as": who})
        row[named(device)] = str(ratio)
    return pd.DataFrame(list(rows.values()))


def _told(ratios: dict[tuple[str, str, str], Ratio]) -> str:
    """How to read the ratios, and how many of them say anything."""
    faster = sum(ratio.low > 1 for ratio in ratios.values())
    slower = sum(ratio.high < 1 for ratio in ratios.values())
    return (
        "The median of the ratios of paired runs (same prompt, same turn), in brackets the lowest "
        "and the highest; it need not be the quotient of the medians above. All pairs on one side "
        f"of 1: HOBBIT is faster in {faster} of {len(ratios)}, slower in {slower}; the other "
        f"{len(ratios) - faster - slower} are not told apart from 1."
    )


def _regimes(measured: Measured, facts: Facts) -> pd.DataFrame:
    layers = facts.info["layers"]
    rows = [_regime("RTX 4090, PCIe 4.0 (the paper's)", PAPER_LOAD_MS, PAPER_COMPUTE_MS)]
    for case, row in measured.rows([_case(ON_DEMAND, "", d) for d in _devices(facts)]):
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


def _versus(measured: Measured, ratios: dict[tuple[str, str, str], Ratio]) -> list[Versus]:
    out = []
    if ratios:
        told = {key: ratio for key, ratio in ratios.items() if ratio.told_apart}
        for word, pick in (("best", max), ("worst", min)):
            ours, where = "none is told apart from 1", ""
            if told:
                budget, device, other = key = pick(told, key=lambda key: told[key].median)
                ours, where = f"{told[key]} over {other}", f"{named(device)}, {budget}"
            what = f"decode speed, {word} ratio of those whose whole range is on one side of 1"
            out.append(Versus(what, *PAPER_RATIOS[word], ours, where))
        for budget in dict.fromkeys(budget for budget, *_ in ratios):
            over = [(d, r) for (b, d, who), r in ratios.items() if (b, who) == (budget, INFINITY)]
            ours = ", ".join(f"{named(device)} {_in_words(ratio)}" for device, ratio in over)
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


def _in_words(ratio: Ratio) -> str:
    return (
        str(ratio)
        if ratio.told_apart
        else f"not told apart from 1 ({ratio.low:.2f}-{ratio.high:.2f})"
    )
