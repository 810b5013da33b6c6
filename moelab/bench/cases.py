"""A case: a contender at a budget on a device, and what its runs say, as one row of figures.

A contender is written as people say it: ``"lru + look-ahead 2"``, ``"hobbit + evict lru"``.
Every run opens the model anew, so that it starts with an empty cache and no run helps the next;
repeats go through all cases in rotated order, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import moelab
from moelab.scheduling.events import GUESSED
from moelab.scheduling.stream import Shape

ROLES = tuple(moelab.strategies.lru().parts)
"""The five decisions; each may be taken from another strategy."""
PROMPT = "Once upon a time there was a man who"
COUNTED = {
    "stalls": "kind == 'stall' and dur_ms > 0 and token > 0",
    "stalls_in_prompt": "kind == 'stall' and dur_ms > 0 and token == 0",
    "high": "kind == 'load' and bits >= bits_asked and token > 0",
    "low": "kind == 'load' and bits < bits_asked and token > 0",
    "skipped": "kind == 'skip' and token > 0",
    "prefetches": "kind == 'prefetch' and token > 0",
    "prefetches_used": f"kind == 'hit' and cause in {GUESSED} and token > 0",
}
"""Events of a run: a miss came high (at the bits asked for), low, or was skipped."""
MEANS = (*COUNTED, "downgrades", "skips", "substitutes", "tokens_above_budget")


def contender(text: str) -> dict[str, Any]:
    """Settings for a contender written in words.

    Parameters
    ----------
    text
        A name of ``moelab.strategies.NAMES``, then any of these, joined by ``+``:
        ``N bit``, ``mixed HIGH/LOW``, ``look-ahead [layers]``, a decision of another strategy
        (``evict edgemoe``), or a parameter of the strategy (``rule=printed``).

    Returns
    -------
    dict
        For ``lab.update``: what is not named is the strategy's own.

    Raises
    ------
    ValueError
        The strategy or an addition is not known, or two additions set the same thing.

    Examples
    --------
    >>> contender("lru + mixed 16/4")
    {'strategy': 'lru', 'bits': 16, 'low_bits': 4}
    >>> contender("on_demand + allocate edgemoe + prefetch edgemoe")
    {'strategy': 'on_demand', 'allocate': 'edgemoe', 'prefetch': 'edgemoe'}
    """
    name, *additions = (part.strip() for part in text.split("+"))
    settings: dict[str, Any] = {"strategy": _known(name, text)}
    for addition in additions:
        for setting, value in _addition(addition, text).items():
            if setting in settings:
                raise ValueError(f"{addition!r} in {text!r} sets {setting} a second time")
            settings[setting] = value
    return settings


def _addition(addition: str, text: str) -> dict[str, Any]:
    if found := re.fullmatch(r"look-ahead(?: ([1-3]))?", addition):
        return {"prefetch": int(found[1] or 1)}
    if found := re.fullmatch(r"mixed (\d+)/(\d+)", addition):
        return {"bits": int(found[1]), "low_bits": int(found[2])}
    if found := re.fullmatch(r"(\d+) bit", addition):
        return {"bits": int(found[1])}
    if found := re.fullmatch(rf"({'|'.join(ROLES)}) (\w+)", addition):
        return {found[1]: _known(found[2], text)}
    if found := re.fullmatch(r"([a-z]\w*) ?= ?([\w.]+)", addition):
        try:
            return {found[1]: ast.literal_eval(found[2])}
        except (SyntaxError, ValueError):  # a word
            return {found[1]: found[2]}
    raise ValueError(
        f"unknown addition {addition!r} in {text!r}; write 'look-ahead', 'look-ahead 2', "
        "'mixed 16/4', '4 bit', 'evict edgemoe' (or another decision) or 'parameter=value'"
    )


def _known(name: str, text: str) -> str:
    if name not in moelab.strategies.NAMES:
        names = ", ".join(moelab.strategies.NAMES)
        raise ValueError(f"unknown strategy {name!r} in {text!r}; choose one of {names}")
    return name


# -- a case, and its runs ------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row to be: a contender at a budget on a device."""

    strategy: str
    budget: str
    device: str

    def __str__(self) -> str:
        return f"{self.strategy}, {self.budget}, {self.device}"


@contextmanager
def opened(model: str | Path, case: Case, *, seed: int = 0) -> Iterator[moelab.Lab]:
    """A model with an empty cache, set as the case says."""
    with moelab.open(model, budget="100%", measure_kl=False, seed=seed, progress=False) as lab:
        settle(lab, case)
        yield lab


def settle(lab: moelab.Lab, case: Case) -> moelab.Settings:
    """Set an open lab as the case says, whatever it was set to before.

    Raises
    ------
    ValueError
        The case is refused; the message begins with it.
    """
    plain = {"bits": max(lab.info()["tiers"]), "budget": "100%", "device": "disk"}
    changes = contender(case.strategy) | {"budget": case.budget, "device": case.device}
    try:
        lab.update(strategy=moelab.strategies.lru(), **plain)
        return lab.update(**changes)
    except ValueError as error:
        raise ValueError(f"{case}: {error}") from error


def measure(
    model: str | Path, case: Case, prompt: str, *, tokens: int, seed: int, **how: Any
) -> dict[str, Any]:
    """Run a case once; its `run_figures`. ``how`` goes to ``lab.generate``."""
    how = {"ignore_eos": True, "measure_kl": False} | how
    with opened(model, case, seed=seed) as lab:
        return run_figures(lab.generate(prompt, max_new_tokens=tokens, **how))


def run_figures(run: moelab.Run) -> dict[str, Any]:
    """A run's summary, and what its events say: the numbers of `COUNTED`, and the budget kept."""
    events, tokens, shape = run.events, run.per_token.iloc[1:], run.trace.shape
    resident = sum(shape.size(key, bits) for key, bits in run.trace.resident)
    budgets = [token.budget_bytes for token in run.token_reports]
    return run.summary() | {
        "generated": list(run.tokens),
        "compute_ms": float(tokens["compute_ms"].median()),
        "stall_ms": float(tokens["stall_ms"].mean()),
        "tokens_above_budget": above_budget(events, resident, shape, budgets),
        **{name: len(events.query(which)) for name, which in COUNTED.items()},
    }


def above_budget(events: pd.DataFrame, resident: int, shape: Shape, budgets: Sequence[int]) -> int:
    """Tokens in which the experts took more than the budget, counted from the log alone.

    From a run's events in order, the bytes of the experts in memory when it began, those of each
    expert by the model's shape, and the budget of each token.
    """
    sign = events["kind"].map({"load": 1, "prefetch": 1, "evict": -1}.get).fillna(0).tolist()
    columns = (events[name].tolist() for name in ("layer", "expert", "bits"))
    moved = [
        way and way * shape.size(shape.key(layer, expert), bits)
        for way, layer, expert, bits in zip(sign, *columns, strict=True)
    ]
    held = resident + np.cumsum(moved)
    return len(set(events.loc[held > events["token"].map(budgets.__getitem__), "token"]))


def row(case: Case, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A case's runs as one row: medians, `MEANS` as means, the largest memory, both speeds."""
    out: dict[str, Any] = {**vars(case), "repeats": len(runs)}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        if isinstance(first, str):
            out.setdefault(name, first)
        elif isinstance(first, (int, float)) and None not in values:
            of_all = max if name == "peak_resident_bytes" else np.median
            of_all = np.mean if name in MEANS else of_all
            out[name] = first if len(set(values)) == 1 else float(of_all(values))
    speeds = [run["tokens_per_s"] for run in runs if run["tokens_per_s"] is not None] or [None]
    return out | {"tokens_per_s_min": min(speeds), "tokens_per_s_max": max(speeds)}
