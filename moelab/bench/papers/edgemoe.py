"""EdgeMoE's ladder: from everything in memory to bits, preloading and a buffer, one rung at a time.

Budgets are what each rung needs, as in the paper: loading on demand holds one layer's experts,
preloading three more (the paper preloads one to three), the buffer is the paper's ten experts.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

import moelab
from moelab.bench.cases import Case
from moelab.bench.papers.results import Report, Results, Task, named, score
from moelab.bench.tables import Table, Versus, figures

NAME = "edgemoe"
DEVICES = ("tx2_ssd", "sd_card")
PRELOADED, BUFFERED = 3, 10
DENSE_BITS = (16, 8, 4)
DENSE = "What is no expert at fewer bits, every expert at 16 (the paper keeps it whole)"
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


WHOLE = Case("in_ram", "100%", "disk")
AGAINST = "against the whole model"


def _devices(results: Results) -> list[str]:
    return results.extent.choose(DEVICES[:1], DEVICES)


def rungs(results: Results) -> dict[str, tuple[str, str]]:
    """Rung -> (contender, budget)."""
    top_k = results.info["top_k"]

    def budget(words: str) -> str:
        if words.startswith("in_ram"):
            return "100%"
        experts = BUFFERED if words.startswith(PRELOAD) else top_k
        experts = top_k + PRELOADED if words == PRELOAD else experts
        return str(round(results.least(words) / top_k * experts))

    return {name: (words, budget(words)) for name, words in RUNGS.items()}


def cases(results: Results) -> list[Case]:
    """Every rung on every device."""
    return [Case(*rung, on) for rung in rungs(results).values() for on in _devices(results)]


def tasks(results: Results) -> list[Task]:
    """What the profile says of the assignment that is used, and fewer bits for all else."""
    asked = [("EdgeMoE's bits", lambda: _assigned_bits(results))]
    if not results.pairs:
        asked.append(("EdgeMoE's non-experts", lambda: _dense_bits(results)))
    return asked


def _assigned_bits(results: Results) -> None:
    with moelab.open(results.model, measure_kl=False, progress=False) as lab:
        lab.update(strategy="edgemoe")
        allocate = lab.settings.strategy.parts["allocate"]
        known = allocate.sensitivity
        low, high, k = known.choose(allocate.tolerated)
        curve = known.curves.get((low, high), [(0, known.levels[high])])
    results.found["edgemoe bits"] = {
        "tolerated": allocate.tolerated,
        "low": low,
        "high": high,
        "experts at low": k,
        "calibrated loss": dict(curve)[k],
    }


def _dense_bits(results: Results) -> None:
    """Perplexity with what is no expert at fewer bits, every expert whole."""
    rows, whole = list[dict[str, Any]](), 0.0
    for bits in DENSE_BITS:
        how = {"budget": "100%", "dense_bits": bits, "measure_kl": False}
        with moelab.open(results.model, **how, progress=False) as lab:
            found = score(lab, results.extent)["perplexity"]
            held = lab.info()["dense_bytes"] / 1e6
        whole = whole or found
        rows.append({"bits": str(bits), "MB": held, "perplexity": found / whole - 1})
    results.found["dense bits"] = rows


def report(results: Results) -> Report:
    """The ladder as a table, a row a rung; theirs beside ours."""
    rows = [row for name in RUNGS if (row := _row(results, name))]
    bits = results.found.get("edgemoe bits")
    chosen = f" {_said(bits, summaries=bool(results.pairs))}" if bits else ""
    text = (
        "Seconds per decoded token, peak memory of the experts and loss, one decision added at a "
        "time. Preloading and the buffer may change time only: *same text* says whether every run "
        f"wrote the tokens that the bits alone wrote.{chosen}"
    )
    tables = [Table("EdgeMoE's ladder", pd.DataFrame(rows), note=_note(bits))]
    if dense := results.found.get("dense bits"):
        tables.append(Table(DENSE, pd.DataFrame(dense), {"MB": "{:.2f}"}))
    return Report("EdgeMoE: the ladder", text, tables, _versus(results, rows))


def _said(bits: dict[str, Any], *, summaries: bool) -> str:
    """The assignment in words, and what it costs where it was made."""
    held = f"{bits['experts at low']} experts at {bits['low']} bit and the others at"
    held = held if bits["experts at low"] else "every expert at"
    what, loss = "perplexity", bits["calibrated loss"]
    if summaries:
        what, loss = "Rouge-2", -loss
    return (
        f"The assignment holds {held} {bits['high']} bit: {what} {loss:+.1%} on the text it was "
        f"made on (tolerated: {bits['tolerated']:.0%}), in the table on text it never saw."
    )


WHY_MORE = (
    "Loss on unseen text tends to be above what was tolerated: the experts were ranked, and their "
    "number chosen, by losses measured with noise on a few texts, and what looks harmless there is "
    "partly luck of those texts (winner's curse). "
)


def _note(bits: dict[str, Any] | None) -> str:
    """Under the ladder: why it loses more, where a choice was made, and what ratios are."""
    ratios = "Ratios of speed: median of paired runs, in brackets the lowest and the highest."
    return WHY_MORE * bool(bits and bits["experts at low"]) + ratios


def _row(results: Results, name: str) -> dict[str, Any] | None:
    each = [Case(*rungs(results)[name], device) for device in _devices(results)]
    rows = list(results.rows(each).values())
    if not rows:
        return None
    # Whether it wrote, on every device and prompt, what the bits alone wrote.
    alone = Case(*rungs(results)["+ bit assignment"], each[0].device)
    told = {results.same_text(case, alone) for case in each} - {None}
    same = ("yes" if all(told) else "NO") if told and name in SAME_BITS else None
    return {
        "rung": name,
        "contender": each[0].strategy,
        "budget MB": f"{rows[0]['budget_bytes'] / 1e6:.2f}",
        **results.on_devices("s/token", each),
        "peak MB": max(row["peak_resident_bytes"] for row in rows) / 1e6,
        **figures(rows[0], *results.quality),
        **({AGAINST: results.lost(each[0], WHOLE)} if results.pairs else {}),
        "same text": same,
    }


def _versus(results: Results, rows: list[dict[str, Any]]) -> list[Versus]:
    by, devices, ladder = {row["rung"]: row for row in rows}, _devices(results), rungs(results)
    if missing := set(ladder) - set(by):
        return [Versus(f"not measured: {', '.join(sorted(missing))}", "", "", "")]
    steps = ("on demand", "+ bit assignment", "+ preload", "+ buffer (EdgeMoE)")
    what = "s/token: on demand, + quantisation, + preload, + buffer"
    theirs = (".789, .392, .305, .245", "Jetson TX2, SSD 550 MB/s")
    out = []
    for device in devices:
        ours = ", ".join(f"{by[step][f'{named(device)}: s/token']:.4f}" for step in steps)
        out.append(Versus(what, *theirs, ours, named(device)))
    for over, theirs in {
        "on demand": ("2.64-3.03x TX2, 2.55-3.25x Pi", "TX2 SSD, Raspberry Pi 4B SD card"),
        "on demand, 4 bit": ("1.19-2.12x", "TX2, Pi 4B"),
    }.items():
        ours = ", ".join(
            f"{results.times_as_fast(Case(*ladder[steps[-1]], on), Case(*ladder[over], on))} "
            f"{named(on)}"
            for on in devices
        )
        out.append(Versus(f"decode speed over {over}", *theirs, ours))
    whole, memory = by[steps[-1]], by["everything in RAM"]["peak MB"]
    less = f"{memory / whole['peak MB']:.1f}x"
    loss = (
        f"Rouge-2 {whole[AGAINST]}" if results.pairs else f"perplexity {whole['perplexity']:+.1%}"
    )
    same = f"{by['+ preload']['same text']} and {whole['same text']}"
    return [
        *out,
        Versus("memory below everything in RAM", "2.1-38.6x", "TX2, Pi 4B", less),
        Versus("loss", "under 2 % of Rouge-2", "", loss, "unseen text"),
        Versus("same text with preload and with the buffer", "by design", "", same, "all runs"),
    ]
