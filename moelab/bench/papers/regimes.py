"""HOBBIT, EdgeMoE and MoE-Infinity at the sizes that they were made for, as ghosts on this disk.

On the bundled models loads are small and the papers' ideas drown in noise; with experts of tens of
megabytes a token waits for loads most of its time. Loads, stalls, deciding and computing of a ghost
are measured; routing is modelled, weights are random, so there is no quality here.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

import moelab
from moelab.bench.cases import contender
from moelab.bench.kept import Kept
from moelab.bench.papers.results import Ratio
from moelab.bench.tables import Table, circumstances
from moelab.replays.files import Trace
from moelab.replays.routing import nearest
from moelab.replays.routing import routing as drawn
from moelab.runs.rounds import rotated
from moelab.settings import parse_budget
from moelab.store.architecture import Architecture

TIERS = (8, 4, 2)
DENSE_BITS = 4
CONTENDERS = {
    "on demand": "on_demand + 8 bit",
    "on demand, 4 bit": "on_demand + 4 bit",
    "LRU": "lru + 8 bit",
    "mixtral-offloading": "mixtral_offloading + 8 bit",
    "MoE-Infinity": "moe_infinity + 8 bit",
    "HOBBIT, 8 and 2 bit": "hobbit + mixed 8/2",
    "EdgeMoE, 4 bit": "lru + 4 bit + evict edgemoe + prefetch edgemoe",
}
HOBBIT, EDGEMOE, INFINITY = "HOBBIT, 8 and 2 bit", "EdgeMoE, 4 bit", "MoE-Infinity"
PAIRS = {
    (HOBBIT, INFINITY): "3.64x Mixtral, 9.93x Phi-MoE (Jetson AGX Orin, NVMe)",
    (HOBBIT, "mixtral-offloading"): "2.3 to 3.9x over the best of four (RTX 4090, PCIe 4.0)",
    (HOBBIT, "LRU"): "1.19 to 1.57x by dynamic loading alone",
    (EDGEMOE, "on demand"): "2.64 to 3.03x (Jetson TX2, Switch Transformers)",
    (EDGEMOE, "on demand, 4 bit"): "1.19 to 2.12x (Jetson TX2, Switch Transformers)",
    (INFINITY, "on demand"): "",
    (INFINITY, "LRU"): "",
}
"""Who is compared with whom, and what the first one's paper says."""
KEEP_NOTHING = ("on demand", "on demand, 4 bit")
LEAST_BITS = 4
"""Of contenders that fill memory: so many distinct experts it holds at most, or nearly."""
MOST_FILLING = 24
"""Tokens before those that count."""
REQUESTS = ["hits", "late", "loads", "skips", "substitutes"]


@dataclass(frozen=True)
class Regime:
    """A model whose claims are looked at: tokens that count, memory of its experts, and device.

    ``routing``: a file that it was recorded in, see `moelab.Trace.load`; so many experts as were
    active there are active then. Without it routing is modelled.
    """

    model: str | Mapping[str, Any]
    tokens: int
    budget: str = "25%"
    device: str = "disk"
    routing: str | Path | None = None


REGIMES = (
    Regime("mixtral-8x7b", 3),
    Regime("phi-3.5-moe", 4),
    Regime("qwen3-30b-a3b", 8),
    Regime("gpt-oss-120b", 5, "12.5%"),
)
QUICK = (Regime("granite-3.1-1b-a400m", 4),)


SHARES = dict.fromkeys(("high", "low", "skipped"), "{:.0%}")
FORMATS = {"hits": "{:.1%}", "MB a token": "{:,.0f}", "waiting": "{:.0%}", "MB/s then": "{:,.0f}"}
FORMATS |= {"memory then": "{:.0%}"} | SHARES


def regimes(
    models: Sequence[Regime] = REGIMES,
    *,
    repeats: int = 3,
    disk: str = "4GB",
    progress: bool = True,
) -> pd.DataFrame:
    """Measure every contender on a ghost of each model.

    Parameters
    ----------
    models
        What to measure.
    repeats
        Rounds of all contenders.
    disk
        Of random experts to read, for each ghost; it is freed when the ghost has been measured.
    progress
        Show a bar. Ctrl-C ends the measuring and gives what there is (``attrs["complete"]``); the
        same call goes on after it.

    Returns
    -------
    pandas.DataFrame
        A row a run. ``attrs["models"]`` says what each model is.

    Raises
    ------
    ValueError
        Memory is short of a ghost's dense weights and budget; says of how much.
    StoreError
        The disk is short.
    """
    kept = Kept("regimes", models, repeats, disk)
    rows: list[dict[str, Any]] = kept.load() or []
    told: dict[str, Any] = {"models": {}, "complete": False}
    cases = len(models) * repeats * len(CONTENDERS)
    bar = tqdm(total=cases, initial=len(rows), disable=not progress)
    with contextlib.suppress(KeyboardInterrupt), bar:
        for regime in models:
            _measure(regime, repeats, disk, rows, told, bar, kept)
        told["complete"] = True
        kept.complete()
    frame = pd.DataFrame(rows)
    frame.attrs = {"suite": "regimes", "repeats": repeats, **told}
    return frame


def measured(*, quick: bool) -> pd.DataFrame:
    """All of `REGIMES`, or a small one."""
    return regimes(QUICK if quick else REGIMES)


def _measure(
    regime: Regime,
    repeats: int,
    disk: str,
    rows: list[dict],
    told: dict[str, Any],
    bar: Any,
    kept: Kept,
) -> None:
    found = Architecture(regime.model, tiers=TIERS)
    name, model = found.name, regime.model
    if regime.routing is None:
        like, profile = nearest(name, found.shape)
        trace = drawn(profile, tokens=MOST_FILLING + regime.tokens, prompt=0)
        whose = f"modelled after {like}"
    else:
        trace, whose = Trace.load(regime.routing), "as it was recorded"
        model = {**found.config, "num_experts_per_tok": trace.shape.top_k}
        found = Architecture(model, tiers=TIERS)
    shape = found.shape
    budget = parse_budget(regime.budget, shape)
    filling = _filling(trace, budget // shape.nbytes[LEAST_BITS])
    bar.set_postfix_str(f"{name}: random experts are written")
    how = {"bits": max(TIERS), "dense_bits": DENSE_BITS, "budget": regime.budget}
    on = "" if regime.device == "disk" else f", {regime.device} (emulated)"
    name += on if regime.routing is None else f", recorded{on}"
    about = (
        f"{shape.layers} x {max(shape.experts)} experts of "
        f"{shape.nbytes[max(TIERS)] / 1e6:.0f} MB at 8 bit, top {shape.top_k}; memory for "
        f"{regime.budget.replace('%', ' %')} of them; routing {whose}"
    )
    known = sum(row["model"] == name for row in rows)  # kept of a suite that was stopped
    todo = list(rotated(list(CONTENDERS), repeats))[known:]
    if not todo:
        told["models"][name] = about
        return
    lab = moelab.ghost(
        model, routing=trace, disk=disk, tiers=TIERS, measure_kl=False, progress=False, **how
    )
    try:
        told["models"][name] = about
        for words in todo:
            bar.set_postfix_str(f"{name}: {words}")
            warm = 1 if words in KEEP_NOTHING else filling
            _settle(lab, CONTENDERS[words], regime)
            run = lab.generate("x", max_new_tokens=warm + regime.tokens)
            rows.append({"model": name, "contender": words, **_figures(run, warm, budget)})
            kept.save(rows)
            bar.update()
    finally:
        moelab.ghost.remove(lab)


def _filling(trace: Trace, slots: int) -> int:
    """Tokens that ask for so many distinct experts, at most `MOST_FILLING`."""
    seen: set[tuple[int, int]] = set()
    layers = trace.shape.layers
    for at, given in enumerate(trace.steps[: MOST_FILLING * layers]):
        seen.update((given.layer, expert) for token in given.experts for expert in token)
        if len(seen) >= slots:
            return at // layers + 1
    return MOST_FILLING


def _settle(lab: moelab.Lab, words: str, regime: Regime) -> None:
    """Set a contender up, with an empty cache."""
    lab.update(strategy=moelab.strategies.lru(), bits=max(TIERS), device="disk")
    lab.update(budget=lab.info()["minimum_budget_bytes"])
    lab.update(**contender(words), budget=regime.budget, device=regime.device)


def _figures(run: moelab.Run, warm: int, budget: int) -> dict[str, float]:
    """What the tokens after the first ``warm`` say."""
    tokens = run.per_token.iloc[warm:]
    events = run.events.query(f"token >= {warm}")
    loads, skips = events.query("kind == 'load'"), events.query("kind == 'skip'")
    low = int((loads["bits"] < loads["bits_asked"]).sum())
    misses = len(loads) + len(skips)
    shares = {"high": len(loads) - low, "low": low, "skipped": len(skips)}
    return {
        "tokens/s": 1e3 * len(tokens) / tokens["total_ms"].sum(),
        "hits": tokens["hits"].sum() / tokens[REQUESTS].sum().sum(),
        "MB a token": tokens["bytes"].mean() / 1e6,
        "waiting": tokens["stall_ms"].sum() / tokens["total_ms"].sum(),
        "memory then": run.per_token["resident_bytes"].iloc[warm - 1] / budget,
        **{name: count / misses if misses else math.nan for name, count in shares.items()},
    }


# -- the page -------------------------------------------------------------------------------------


TITLE = """# The papers at the size of their models

An expert of the bundled model has 0.22 MB, and most differences between strategies drown there in
what else a token takes ([PAPERS_MEASURED.md](PAPERS_MEASURED.md)). Those of the models that the
papers speak of have 5 to 180 MB: a token waits for the disk. `moelab bench --suite regimes
--markdown notebooks/PAPERS_AT_SIZE.md` writes this page."""


def report(frame: pd.DataFrame) -> str:
    """The page: what each contender did, and ratios with their ranges."""
    made, machine = itemgetter("made", "machine")(circumstances())
    how = (
        f"Measured {made[:10]} on {machine['cores']} cores of {machine['processor']} by `moelab "
        "bench --suite regimes`: ghosts of the models at their real sizes (random weights), "
        f"attention and head at {DENSE_BITS} bit, experts at 8, 4 or 2 bit, "
        f"equal memory for all of a model. Medians of {frame.attrs['repeats']} runs in rotated "
        "order, in brackets the lowest and the highest. The first tokens, as many as ask for all "
        f"the experts that memory holds at {LEAST_BITS} bit (at most {MOST_FILLING}; one where "
        "nothing is kept), do not count: 'memory then' is what was full when counting began. There "
        "is no text: what HOBBIT's 2 bit and "
        "EdgeMoE's 4 bit cost in quality is not here. EdgeMoE counts its paths as it decodes, at "
        "one bitwidth for all; coming layers' gates cannot be asked."
    )
    parts = [TITLE, how]
    if not frame.attrs["complete"]:
        parts.append("**Stopped early: what was not measured by then is missing.**")
    for table in _tables(frame):
        if len(table.frame):
            parts += table.markdown()
    return "\n\n".join(parts) + "\n"


def _tables(frame: pd.DataFrame) -> Iterator[Table]:
    about: dict[str, str] = frame.attrs["models"]
    runs = dict(list(frame.groupby(["model", "contender"]))) if len(frame) else {}
    for name, words in about.items():
        rows = [_row(who, runs[name, who]) for who in CONTENDERS if (name, who) in runs]
        yield Table(f"{name}: {words}", pd.DataFrame(rows), FORMATS)
    ratios = {
        (name, pair): Ratio.of(*(runs[name, who]["tokens/s"].tolist() for who in pair))
        for name, pair in itertools.product(about, PAIRS)
        if all((name, who) in runs for who in pair)
    }
    told = sum(ratio.told_apart for ratio in ratios.values())
    note = (
        f"Ratios of paired runs: {told} of {len(ratios)} lie with their whole range on one side "
        "of 1, the others are not told apart from it. The papers' figures are of other machines, "
        "and of whole systems against each other; here only the decisions differ. What the disk "
        "gives while a token waits (MB/s then) differs too: read a ratio beside the MB a token."
    )
    rows = [
        {"": " over ".join(pair)}
        | {name: str(ratios.get((name, pair), "")) for name in about}
        | {"the paper": theirs}
        for pair, theirs in PAIRS.items()
    ]
    yield Table("How many times as fast", pd.DataFrame(rows if ratios else []), note=note)


def _row(who: str, runs: pd.DataFrame) -> dict[str, Any]:
    speeds = runs["tokens/s"]
    middle: dict[str, Any] = runs.median(numeric_only=True).to_dict()
    said = f"{speeds.median():.2f} ({speeds.min():.2f}-{speeds.max():.2f})"
    rate = runs["MB a token"] * runs["tokens/s"] / runs["waiting"]
    # Where little is waited for, most was read meanwhile.
    middle["MB/s then"] = rate.median() if middle["waiting"] > 0.5 else math.nan
    names = [name for name in FORMATS if who == HOBBIT or name not in SHARES]
    return {"": who, "tokens/s": said, **{name: middle[name] for name in names}}
