"""EdgeMoE's ladder: from everything in memory to bits, preloading and a buffer, one rung at a time.

Budgets are what each rung needs, as in the paper: loading on demand holds one layer's experts,
preloading three more (the paper preloads one to three), the buffer is the paper's ten experts.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

import moelab
from moelab.bench.grid import Case
from moelab.bench.papers.measured import Facts, Measured, Report, Table, Task, Versus, named

NAME = "edgemoe"
DEVICES = ("tx2_ssd", "sd_card")
PRELOADED, BUFFERED = 3, 10
BITS = "on_demand + allocate edgemoe"
PRELOAD = f"{BITS} + prefetch edgemoe"
RUNGS = {
    "everything in RAM": "in_ram",
    "everything in RAM, 8 bit": "in_ram + 8 bit",
    "everything in RAM, 4 bit": "in_ram + 4 bit",
    "on demand": "on_demand",
    "on demand, 4 bit": "on_demand + 4 bit",
    "+ bit assignment": BITS,
    "+ preload": PRELOAD,
    "+ buffer (EdgeMoE)": f"{PRELOAD} + evict edgemoe",
    "buffer by the printed formula": f"{PRELOAD} + evict edgemoe + rule=printed",
    "buffer by LRU": f"{PRELOAD} + evict lru",
}
SAME_BITS = tuple(name for name, words in RUNGS.items() if words.startswith(PRELOAD))


def rungs(facts: Facts) -> dict[str, tuple[str, str]]:
    """Rung -> (contender, budget)."""
    out = {}
    for name, words in RUNGS.items():
        one = facts.least(words) / facts.top_k
        experts = {PRELOAD: facts.top_k + PRELOADED}.get(
            words, BUFFERED if words.startswith(PRELOAD) else facts.top_k
        )
        out[name] = words, "100%" if words.startswith("in_ram") else str(round(one * experts))
    return out


def cases(facts: Facts) -> list[Case]:
    """Every rung on every device."""
    devices = facts.quick(DEVICES[:1], DEVICES)
    return [Case(*rung, device) for rung in rungs(facts).values() for device in devices]


def tasks(_facts: Facts, measured: Measured) -> list[Task]:
    """What the profile says of the assignment that is used."""
    return [("EdgeMoE's bits", lambda: _look_at_bits(measured))]


def _look_at_bits(measured: Measured) -> None:
    with moelab.open(measured.model, measure_kl=False, progress=False) as lab:
        lab.update(strategy="edgemoe")
        allocate = lab.settings.strategy.parts["allocate"]
        known = allocate.sensitivity
        low, high, k = known.choose(allocate.tolerated)
        curve = known.curves.get((low, high), [(0, known.levels[high])])
    measured.found["edgemoe bits"] = {
        "tolerated": allocate.tolerated,
        "low": low,
        "high": high,
        "experts at low": k,
        "calibrated loss": dict(curve)[k],
    }


def report(facts: Facts, measured: Measured) -> Report:
    """The ladder as a table, a row a rung; theirs beside ours."""
    ladder, devices = rungs(facts), facts.quick(DEVICES[:1], DEVICES)
    rows = []
    for name, (words, budget) in ladder.items():
        found = dict(measured.rows([Case(words, budget, device) for device in devices]))
        if found:
            rows.append(_row(name, found, _same_text(measured, ladder, name, devices)))
    bits = measured.found.get("edgemoe bits")
    chosen = (
        f" The assignment holds {bits['experts at low']} experts at {bits['low']} bit and the "
        f"others at {bits['high']}: perplexity {bits['calibrated loss']:+.1%} on the text it was "
        f"made on (tolerated: {bits['tolerated']:.0%}), in the table on text it never saw."
        if bits
        else ""
    )
    text = (
        "Seconds per decoded token, peak memory of the experts and loss, one decision added at a "
        "time. Preloading and the buffer may change time only: *same text* says whether every run "
        f"wrote the tokens that the bits alone wrote.{chosen}"
    )
    table = Table("EdgeMoE's ladder", pd.DataFrame(rows), FORMATS, ("contender",), note=WHY_MORE)
    return Report("EdgeMoE: the ladder", text, [table], _versus(measured, ladder, rows, devices))


WHY_MORE = (
    "Loss on unseen text tends to be above what was tolerated: the experts were ranked, and their "
    "number chosen, by losses measured with noise on a few texts, and what looks harmless there is "
    "partly luck of those texts (winner's curse). Ratios of speed: median of paired runs, in "
    "brackets the lowest and the highest."
)
FORMATS = {
    **{f"{named(device)}: s/token": "{:.4f}" for device in DEVICES},
    "peak MB": "{:.2f}",
    "perplexity": "{:+.1%}",
    "KL": "{:.4f}",
}


def _row(name: str, found: dict[Case, dict[str, Any]], same: bool | None) -> dict[str, Any]:
    case, any_row = next(iter(found.items()))
    return {
        "rung": name,
        "contender": case.strategy,
        "budget MB": f"{any_row['budget_bytes'] / 1e6:.2f}",
        **{f"{named(c.device)}: s/token": 1 / row["tokens_per_s"] for c, row in found.items()},
        "peak MB": max(row["peak_resident_bytes"] for row in found.values()) / 1e6,
        "perplexity": any_row.get("perplexity_ratio", math.nan) - 1,
        "KL": any_row.get("kl_mean", math.nan),
        "same text": None if same is None else "yes" if same else "NO",
    }


def _same_text(
    measured: Measured, ladder: dict[str, tuple[str, str]], name: str, devices: list[str]
) -> bool | None:
    """Whether a rung wrote, on every device and prompt, what the bits alone wrote."""
    if name not in SAME_BITS:
        return None
    alone = Case(*ladder["+ bit assignment"], devices[0])
    told = [measured.same_text(Case(*ladder[name], device), alone) for device in devices]
    told = [same for same in told if same is not None]
    return all(told) if told else None


def _versus(
    measured: Measured, ladder: dict[str, tuple[str, str]], rows: list[dict], devices: list[str]
) -> list[Versus]:
    by = {row["rung"]: row for row in rows}
    if missing := set(ladder) - set(by):
        return [Versus(f"not measured: {', '.join(sorted(missing))}", "", "", "", "")]
    steps = ("on demand", "+ bit assignment", "+ preload", "+ buffer (EdgeMoE)")
    out = []
    for device in devices:
        column = f"{named(device)}: s/token"
        out.append(
            Versus(
                "s/token: on demand, + quantisation, + preload, + buffer",
                ".789, .392, .305, .245",
                "Jetson TX2, SSD 550 MB/s",
                ", ".join(f"{by[step].get(column, math.nan):.4f}" for step in steps),
                named(device),
            )
        )

    def speed(over: str, device: str) -> str:
        whole = Case(*ladder["+ buffer (EdgeMoE)"], device)
        return str(measured.times_as_fast(whole, Case(*ladder[over], device)))

    theirs = {
        "on demand": ("2.64-3.03x TX2, 2.55-3.25x Pi", "TX2 SSD, Raspberry Pi 4B SD card"),
        "on demand, 4 bit": ("1.19-2.12x", "TX2, Pi 4B"),
    }
    for over, (figure, where) in theirs.items():
        ours = ", ".join(f"{speed(over, device)} {named(device)}" for device in devices)
        out.append(Versus(f"decode speed over {over}", figure, where, ours, ""))
    whole, memory = by["+ buffer (EdgeMoE)"], by["everything in RAM"]["peak MB"]
    less = f"{memory / whole['peak MB']:.1f}x"
    loss = f"perplexity {whole['perplexity']:+.1%}"
    same = f"{by['+ preload']['same text']} and {whole['same text']}"
    return [
        *out,
        Versus("memory below everything in RAM", "2.1-38.6x", "TX2, Pi 4B", less, ""),
        Versus("loss", "under 2 % (Rouge-2)", "", loss, "unseen text"),
        Versus("same text with preload and with the buffer", "by design", "", same, "all runs"),
    ]
