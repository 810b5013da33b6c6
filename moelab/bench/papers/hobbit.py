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
from moelab.bench.cases import Case, settle
from moelab.bench.papers.results import Ratio, Report, Results, Task, named, unseen
from moelab.bench.tables import Table, Versus

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
TIMES = ("device", "load ms", "compute ms")
PAPER_TIMES = ("RTX 4090, PCIe 4.0 (the paper's)", 80 * 2 / 8, 3.0)
"""Of one layer: loading 2 of its 8 experts, and computing it."""
EQUAL = "w_lru=0.25 + w_lfu=0.25 + w_lhu=0.25 + w_fld=0.25"
PENALISED = {
    "HOBBIT": OURS,
    "HOBBIT, equal weights": f"{OURS} + {EQUAL}",
    "LRU": f"{OURS} + evict lru",
    "LFU": f"{OURS} + evict lfu",
}
"""Contenders whose miss penalty is counted."""


def cases(results: Results) -> list[Case]:
    """Every contender at every budget on every device; those compared follow one another."""
    budgets = results.extent.choose(BUDGETS[:1], BUDGETS)
    grid = itertools.product(_devices(results), budgets, (OURS, *OTHERS))
    return list(dict.fromkeys(_case(who, budget, device) for device, budget, who in grid))


def _case(who: str, budget: str, device: str) -> Case:
    """Loading on demand keeps one layer's experts whatever the budget: it is measured once."""
    return Case(who, BUDGETS[0] if who == ON_DEMAND else budget, device)


def _devices(results: Results) -> list[str]:
    return results.extent.choose(DEVICES[1:2], DEVICES)


# -- what no run tells: the gates, and the miss penalty on one stream -----------------------------


def tasks(results: Results) -> list[Task]:
    """Prefetch accuracy and miss penalties, on texts that no calibration saw."""
    return [(GATES, lambda: _measure_routing(results))]


def _measure_routing(results: Results) -> None:
    """The gates; the miss penalty of a token with prefetching off, where who leaves is all."""
    from moelab.calibration.hobbit import decide, gate_accuracy
    from moelab.calibration.probes import record

    tokens = 12 if results.extent.quick else TEXT_TOKENS
    budgets = results.extent.choose(BUDGETS[:1], BUDGETS)
    penalties: dict[str, dict[str, float]] = {budget: {} for budget in budgets}
    with moelab.open(results.model, measure_kl=False, progress=False) as lab:
        trace = record(lab, unseen(lab), tokens=tokens, look_ahead=3)
        results.found["gates"] = gate_accuracy(trace)
        for budget, (name, words) in itertools.product(budgets, PENALISED.items()):
            settle(lab, Case(words, budget, "disk"))
            now = lab.update(prefetch=0)
            penalties[budget][name] = decide(trace, now.strategy, now.knobs()).penalty
    results.found["penalties"] = penalties


# -- the tables -----------------------------------------------------------------------------------


def report(results: Results) -> Report:
    """Speeds and ratios, the machines' regimes, precision of misses, gates, miss penalties."""
    ratios, regimes = _ratios(results), _regimes(results)
    tables = [
        Table("Decode tokens/s", _speeds(results), note=DISK),
        Table("How many times as fast HOBBIT decodes", _ratio_table(ratios), note=_told(ratios)),
        Table("Loading against computing, a layer of a token on demand", regimes, FORMATS),
        Table("Misses by precision (HOBBIT, decode)", _shares(results), FORMATS, LIVE),
        Table("The coming layers' gates, asked early", _gates(results), FORMATS),
        Table("Miss penalty a token, prefetching off", _penalty_table(results), FORMATS),
    ]
    text = (
        "All at 16 bit in the same memory; HOBBIT may load an unimportant miss at 4 bit or skip "
        "it. Gates and penalties are measured on the recorded routing of texts that no calibration "
        "saw. The demo's experts are tiny, so loading dominates only on the slow device; the "
        "paper's machines are in that regime."
    )
    return Report("HOBBIT: mixed precision on a miss", text, tables, _versus(results, ratios))


DISK = (
    "An emulated device is never faster than this machine's disk, so the PCIe column is this disk. "
    "On demand holds one layer's experts whatever the budget."
)
LIVE = (
    "The paper's shares are of all selections, and so are the thresholds. What misses is another "
    "mix: prefetching fetches the important experts first, and what is left to miss is less so."
)
FORMATS = {
    **dict.fromkeys(PAPER_SHARES, "{:.1%}"),
    **dict.fromkeys(("first expert right", "chosen experts named"), "{:.1%}"),
    **dict.fromkeys((*TIMES[1:], "load : compute", "misses a token"), "{:.2f}"),
    **dict.fromkeys(PENALISED, "{:.3f}"),
    **dict.fromkeys(("against LRU", "against LFU"), "{:+.1%}"),
}


def _speeds(results: Results) -> pd.DataFrame:
    rows = []
    for budget, who in (("any", ON_DEMAND), *itertools.product(BUDGETS, (OURS, *OTHERS[1:]))):
        each = [_case(who, budget, device) for device in _devices(results)]
        names = ("hit ratio", "MB/token", "KL", "same top-1")
        if found := results.on_devices("tokens/s", each, *names):
            rows.append({"budget": budget, "strategy": who, **found})
    return pd.DataFrame(rows)


def _ratios(results: Results) -> dict[tuple[str, str, str], Ratio]:
    """(budget, device, other) -> how many times as fast HOBBIT is."""
    return {
        (budget, device, who): ratio
        for budget, device, who in itertools.product(BUDGETS, _devices(results), OTHERS)
        if (ratio := results.times_as_fast(Case(OURS, budget, device), _case(who, budget, device)))
    }


def _ratio_table(ratios: dict[tuple[str, str, str], Ratio]) -> pd.DataFrame:
    rows: dict[tuple[str, str], dict[str, str]] = {}
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


def _regimes(results: Results) -> pd.DataFrame:
    layers = results.info.get("layers")
    found = results.rows([_case(ON_DEMAND, "", device) for device in _devices(results)])
    times = [
        (named(case.device), row["stall_ms"] / layers, row["compute_ms"] / layers)
        for case, row in found.items()
    ]
    frame = pd.DataFrame([PAPER_TIMES, *times] if times else [], columns=list(TIMES))
    return frame.assign(**{"load : compute": frame["load ms"] / frame["compute ms"]})


def _shares(results: Results) -> pd.DataFrame:
    rows: dict[str, dict[str, Any]] = {}
    cases = [Case(OURS, budget, device) for budget in BUDGETS for device in _devices(results)]
    for case, row in results.rows(cases).items():  # no device changes what is decided
        misses = sum(row[name] for name in PAPER_SHARES)
        shares = {name: row[name] / misses if misses else math.nan for name in PAPER_SHARES}
        a_token = {"misses a token": misses / (row["tokens"] - 1)}
        rows.setdefault(case.budget, {"budget": case.budget, **shares, **a_token})
    paper = {"budget": "the paper's aim (Mixtral)", **PAPER_SHARES}
    return pd.DataFrame([*rows.values(), paper] if rows else [])


def _gates(results: Results) -> pd.DataFrame:
    """Layers ahead, and how right the gates were."""
    gates = results.found.get("gates", {})
    rows = [(far, right["first"], right["top_k"]) for far, right in gates.items()]
    names = ("layers ahead", "first expert right", "chosen experts named")
    return pd.DataFrame(rows, columns=list(names))


def _against(found: dict[str, float], other: str) -> float:
    """How much more a miss of HOBBIT costs than with another eviction."""
    return found["HOBBIT"] / found[other] - 1 if found[other] else math.nan


def _penalty_table(results: Results) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"budget": budget, **found}
            | {f"against {other}": _against(found, other) for other in ("LRU", "LFU")}
            for budget, found in results.found.get("penalties", {}).items()
        ]
    )


def _versus(results: Results, ratios: dict[tuple[str, str, str], Ratio]) -> list[Versus]:
    out = []
    told = {key: ratio for key, ratio in ratios.items() if ratio.told_apart}
    for word, pick in (("best", max), ("worst", min)) if ratios else ():
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
        out.append(Versus(what, theirs, "Jetson AGX Orin, NVMe", ours))
    if gates := results.found.get("gates"):
        ours = ", ".join(f"{100 * right['first']:.0f} %" for right in gates.values())
        what = "first expert right, +1, +2, +3 layers"
        out.append(Versus(what, "96, ~90, ~90 %", "Mixtral", ours))
    for budget, found in results.found.get("penalties", {}).items():
        if found["LRU"]:
            what = f"miss penalty against LRU, budget {budget}"
            ours = f"{_against(found, 'LRU'):+.1%}"
            out.append(Versus(what, "-5 to -9 %", "Mixtral, Phi-MoE", ours))
    return out


def _in_words(ratio: Ratio) -> str:
    apart = f"not told apart from 1 ({ratio.low:.2f}-{ratio.high:.2f})"
    return str(ratio) if ratio.told_apart else apart
