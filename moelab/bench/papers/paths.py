"""EdgeMoE's paths on top-1 routing: how few most tokens walk, and how well they are foretold.

A token's path is its expert in each sparse layer, of the encoder or of the decoder. The paper says
that the most frequent 20 % of the paths cover 99 % of the activations, and counts a table on them.
Routing is recorded at full precision, a reference after its source; the table is counted on the
pairs that may be chosen on, and tried on the others. T tokens, L layers of a stack.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

import moelab
from moelab.bench.papers.results import Report, Results, Task
from moelab.bench.tables import Table, Versus
from moelab.calibration.hobbit import gate_accuracy
from moelab.calibration.probes import record
from moelab.scheduling.trace import Trace
from moelab.strategies.edgemoe_paths import LONGEST, Before, PathTable

NAME = "paths"
TOP, COVERED = 0.2, 0.99
"""The paper's: so many of the paths cover so many of the activations."""
SHARES = ("paths, the most frequent first", "share of the tokens")
FORMATS = {
    "tokens": "{:,}",
    **dict.fromkeys(("20 % cover", "20 % cover of other texts", "once"), "{:.1%}"),
    **dict.fromkeys(("of these", "of all possible"), "{:.1%}"),
    **dict.fromkeys(("path table", "layer's frequencies", "stale gate", "chance"), "{:.1%}"),
}


def cases(_results: Results) -> list[Any]:
    """No runs: routing is recorded."""
    return []


def tasks(results: Results) -> list[Task]:
    """Paths and what they foretell."""
    return [("EdgeMoE's paths", lambda: _measure(results))]


def _measure(results: Results) -> None:
    with moelab.open(results.model, measure_kl=False, progress=False) as lab:
        traces = [
            record(lab, texts, tokens=results.extent.scored, look_ahead=1)
            for texts in (results.chosen[: results.extent.texts], results.pairs)
        ]
    (counted, tried), most = map(walked, traces), max(traces[0].shape.experts)
    of_stacks = {stack: (counted[stack], tried[stack], most) for stack in counted}
    results.found["paths"] = [{"stack": s, **shares(*given)} for s, given in of_stacks.items()]
    results.found["foretold"] = [
        {"stack": stack, **row} for stack, given in of_stacks.items() for row in foretold(*given)
    ]
    results.found["stale gate"] = gate_accuracy(traces[1]).get("+1", {}).get("top_k")


def walked(trace: Trace) -> dict[str, np.ndarray]:
    """The expert with the largest weight of each token in each layer, by stack ``[T, L]``."""
    columns: list[list[int]] = [[] for _ in range(trace.shape.layers)]
    for given in trace.steps:
        columns[given.layer] += [token[0] for token in given.experts]
    own = trace.shape.encoder_layers
    return {"encoder": np.array(columns[:own]).T, "decoder": np.array(columns[own:]).T}


def ranked(paths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct paths, the most frequent first, and the share of the tokens on each."""
    found, counts = np.unique(paths, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return found[order], counts[order] / len(paths)


def covering(trace: Trace) -> pd.DataFrame:
    """How many tokens the most frequent paths cover, a row for each of a ``stack``'s paths."""
    frames = []
    for stack, paths in walked(trace).items():
        covered = ranked(paths)[1].cumsum()
        which = np.arange(1, len(covered) + 1) / len(covered)
        frames.append(pd.DataFrame({SHARES[0]: which, SHARES[1]: covered, "stack": stack}))
    return pd.concat(frames, ignore_index=True)


def shares(others: np.ndarray, paths: np.ndarray, experts: int) -> dict[str, Any]:
    """How many of the distinct ``paths`` cover most tokens; ``others`` are of other texts."""
    part = ranked(paths)[1]
    covered, distinct = part.cumsum(), len(part)
    need = int(np.searchsorted(covered, COVERED - 1e-9)) + 1
    known, _ = ranked(others)
    likely = set(map(tuple, known[: math.ceil(TOP * len(known))].tolist()))
    return {
        "tokens": len(paths),
        "distinct": distinct,
        "needed": need,
        "of_distinct": need / distinct,
        "of_possible": need / experts ** paths.shape[1],
        "top": float(covered[math.ceil(TOP * distinct) - 1]),
        "top_unseen": float(np.mean([tuple(path) in likely for path in paths.tolist()])),
        "once": float((part * len(paths) < 1.5).mean()),
    }


def foretold(counted: np.ndarray, tried: np.ndarray, experts: int) -> list[dict[str, Any]]:
    """By layer: how often the likeliest expert after the last two layers' was the next one."""
    table, frequencies, rows = PathTable(), PathTable(), []
    for path in counted.tolist():
        for layer, expert in enumerate(path):
            table.count(layer, _before(path, layer), (expert,))
            frequencies.count(layer, (), (expert,))
    for layer in range(1, tried.shape[1]):
        usual = _likeliest(frequencies, layer, ())
        hits = [_likeliest(table, layer, _before(p, layer)) == p[layer] for p in tried.tolist()]
        row = {"layer": layer, "table": float(np.mean(hits))}
        row["frequencies"] = float((tried[:, layer] == usual).mean())
        rows.append(row | {"chance": 1 / experts})
    return rows


def _before(path: list[int], layer: int) -> Before:
    return tuple((expert,) for expert in path[max(0, layer - LONGEST) : layer])


def _likeliest(table: PathTable, layer: int, before: Before) -> int | None:
    return next((expert for expert, _ in table.probabilities(layer, before)), None)


def report(results: Results) -> Report:
    """The paper's claim of few paths as such, and the table's accuracy."""
    rows = [
        {
            "": one["stack"],
            "tokens": one["tokens"],
            "distinct paths": one["distinct"],
            "cover 99 %": one["needed"],
            "of these": one["of_distinct"],
            "of all possible": one["of_possible"],
            "20 % cover": one["top"],
            "20 % cover of other texts": one["top_unseen"],
            "once": one["once"],
        }
        for one in results.found.get("paths", [])
    ]
    right = [
        {
            "": f"{one['stack']}, sparse layer {one['layer'] + 1}",
            "path table": one["table"],
            "layer's frequencies": one["frequencies"],
            "chance": one["chance"],
        }
        for one in results.found.get("foretold", [])
    ]
    text = (
        "A path is a token's expert in each sparse layer of its stack, at full precision, on the "
        "pairs that are measured on. *Cover 99 %*: so many of the paths that occur, the most "
        "frequent first, hold 99 % of the tokens. *Once*: the share of the paths that a single "
        "token walked; where it is large, more tokens would have shown more paths, and shares of "
        "paths that occur say little. *Of other texts*: the most frequent 20 % of the paths of the "
        "pairs that may be chosen on, and how many of these tokens walk one of them."
    )
    tables = [
        Table("Activation paths", pd.DataFrame(rows), FORMATS),
        Table(
            "The next layer's expert foretold, first guess",
            pd.DataFrame(right),
            FORMATS,
            _gate(results),
        ),
    ]
    versus = [
        Versus(
            f"the most frequent 20 % of the paths, {one['stack']}",
            "cover 99 % of the activations",
            "",
            f"cover {one['top']:.1%} ({one['top_unseen']:.1%} of texts that did not rank them)",
        )
        for one in results.found.get("paths", [])
    ]
    return Report("EdgeMoE: few paths", text, tables, versus)


def _gate(results: Results) -> str:
    if results.found.get("stale gate") is None:  # a stack of one sparse layer has none
        return ""
    return (
        "The table is counted on the validation pairs. Asked one layer early, the decoder's next "
        f"router is right in {results.found['stale gate']:.1%} (HOBBIT's way, for comparison)."
    )
