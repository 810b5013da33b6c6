"""What a suite measured: runs of cases, quality of contenders, and the questions put to them.

The n-th run of every case is given the same prompt, each of another domain (a case that is run more
often gets the same prompts again), and samples as the model's own settings say under one seed; so
runs are compared in pairs, and contenders that compute the same write the same text. (Greedy text
of a small model falls into loops, which flatter every cache.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

import moelab
from moelab.bench.grid import PROMPT, Case, opened, settle

Task = tuple[str, Callable[[], None]]
"""What a progress bar shows, and what is to be done."""


@dataclass(frozen=True)
class Extent:
    """How much is measured: tokens of a run, repeats of a case, texts scored and tokens of each."""

    tokens: int
    repeats: int
    texts: int
    scored: int
    quick: bool = False

    @property
    def compared(self) -> int:
        """Repeats of the cases that a section compares closely: each prompt twice."""
        return 2 * self.repeats


FULL = Extent(tokens=32, repeats=3, texts=100, scored=40)
QUICK = Extent(tokens=5, repeats=1, texts=2, scored=8, quick=True)


@dataclass(frozen=True)
class Facts:
    """What a section must know of the model before it can say what to measure."""

    info: dict[str, Any]
    least: Callable[[str], int]
    extent: Extent

    @property
    def top_k(self) -> int:
        """Experts a token activates in a layer."""
        return self.info["top_k"]

    def quick(self, few: Sequence, all_: Sequence) -> list:
        """The few in a quick suite, else all."""
        return list(few if self.extent.quick else all_)


def named(device: str) -> str:
    """A device's name for tables, short."""
    return re.split(r",| \(| x16", moelab.devices()[device].title)[0]


def look(lab: moelab.Lab, extent: Extent) -> Facts:
    """The facts of an open lab; ``least`` is the smallest budget a contender can do with.

    It remembers, and so still answers, when the lab is closed, about what it was asked before.
    """

    @cache
    def least(contender: str) -> int:
        settle(lab, Case(contender, "100%", "disk"))
        return lab.info()["minimum_budget_bytes"]

    return Facts(lab.info(), least, extent)


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of paired runs, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        """Whether all pairs lie on one side of 1."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclass
class Measured:
    """Everything measured so far; a case that was not is None, so that half a suite still reports.

    Attributes
    ----------
    runs
        Figures of each run of a case, in the order of `prompt_of`.
    scores
        Case -> quality; most strategies decide alike on every device, and are scored on the disk.
    timed
        Strategies whose decisions hang on when loads land; scored on the case's own device.
    found
        What tasks of a section measured, by name.
    """

    model: str
    prompts: Sequence[str]
    extent: Extent
    seed: int = 0
    runs: dict[Case, list[dict[str, Any]]] = field(default_factory=dict)
    scores: dict[Case, dict[str, Any]] = field(default_factory=dict)
    timed: set[str] = field(default_factory=set)
    found: dict[str, Any] = field(default_factory=dict)

    def run(self, case: Case) -> None:
        """Measure a case once more."""
        runs = self.runs.setdefault(case, [])
        prompt = self.prompt_of(len(runs))
        with opened(self.model, case, seed=self.seed) as lab:
            run = lab.generate(
                prompt, max_new_tokens=self.extent.tokens, ignore_eos=True, measure_kl=False
            )
            runs.append(figures(run))

    def prompt_of(self, run: int) -> str:
        """The prompt of the n-th run of any case."""
        return self.prompts[run % min(self.extent.repeats, len(self.prompts))]

    def scored_as(self, case: Case) -> Case:
        """The case whose quality is this one's."""
        return case if case.strategy in self.timed else replace(case, device="disk")

    def score(self, case: Case) -> None:
        """Measure the quality of a case, one that is `scored_as` itself."""
        with opened(self.model, case, seed=self.seed) as lab:
            self.scores[case] = score(lab, self.extent)

    def row(self, case: Case) -> dict[str, Any] | None:
        """Medians of a case's runs (counts and memory: sums and the largest), with its quality."""
        runs = self.runs.get(case)
        if not runs:
            return None
        speeds = [run["tokens_per_s"] for run in runs]
        return {
            "strategy": case.strategy,
            "budget": case.budget,
            "device": case.device,
            "repeats": len(runs),
            **_together(runs),
            "tokens_per_s_min": min(speeds),
            "tokens_per_s_max": max(speeds),
            **self.scores.get(self.scored_as(case), {}),
        }

    def rows(self, cases: Sequence[Case]) -> Iterator[tuple[Case, dict[str, Any]]]:
        """The cases that were measured, each with its row."""
        for case in cases:
            if (row := self.row(case)) is not None:
                yield case, row

    def times_as_fast(self, case: Case, other: Case) -> Ratio | None:
        """Tokens per second over the other's, run by run; None where one is missing."""
        pairs = zip(self.runs.get(case, ()), self.runs.get(other, ()), strict=False)
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
        return Ratio(float(np.median(ratios)), min(ratios), max(ratios)) if ratios else None

    def same_text(self, case: Case, other: Case) -> bool | None:
        """Whether both wrote the same tokens on every prompt; None where one is missing."""
        pairs = zip(self.runs.get(case, ()), self.runs.get(other, ()), strict=False)
        same = [a["generated"] == b["generated"] for a, b in pairs]
        return all(same) if same else None


_SUMMED = (
    *("stalls", "stalls_in_prompt", "high", "low", "skipped", "prefetches", "prefetches_used"),
    *("downgrades", "skips", "substitutes", "tokens_above_budget"),
)
_LARGEST = ("peak_resident_bytes",)


def figures(run: moelab.Run) -> dict[str, Any]:
    """A run's summary, and what its events say of the decoded tokens: stalls, misses, prefetches.

    A miss came ``high`` (at the bits asked for), ``low``, or was ``skipped``. ``stalls_in_prompt``
    are those before the first decoded token; ``tokens_above_budget`` see `above_budget`.
    """
    events, tokens = run.events, run.per_token.iloc[1:]
    decoded = events[events["token"] > 0]
    kinds, stalled = decoded["kind"], (events["kind"] == "stall") & (events["dur_ms"] > 0)
    loads = decoded[kinds == "load"]
    high = loads["bits"] >= loads["bits_asked"]
    return run.summary() | {
        "generated": list(run.tokens),
        "compute_ms": float(tokens["compute_ms"].median()),
        "stall_ms": float(tokens["stall_ms"].mean()),
        "tokens_above_budget": above_budget(
            events,
            sum(run.trace.shape.nbytes[bits] for _, bits in run.trace.resident),
            run.trace.shape.nbytes,
            [token.budget_bytes for token in run.token_reports],
        ),
        "stalls": int((stalled & (events["token"] > 0)).sum()),
        "stalls_in_prompt": int((stalled & (events["token"] == 0)).sum()),
        "high": int(high.sum()),
        "low": int((~high).sum()),
        "skipped": int((kinds == "skip").sum()),
        "prefetches": int((kinds == "prefetch").sum()),
        "prefetches_used": int(((kinds == "hit") & (decoded["cause"] == "prefetched")).sum()),
    }


def above_budget(
    events: pd.DataFrame, resident: int, nbytes: Mapping[int, int], budgets: Sequence[int]
) -> int:
    """Tokens in which the experts took more than the budget, counted from the log alone.

    Parameters
    ----------
    events
        Of a run, in order.
    resident
        Bytes of the experts in memory when the run began.
    nbytes
        Of an expert by its bits.
    budgets
        Of each token.
    """
    above = set[int]()
    for token, kind, bits in zip(events["token"], events["kind"], events["bits"], strict=True):
        if kind in ("load", "prefetch"):
            resident += nbytes[bits]
        elif kind == "evict":
            resident -= nbytes[bits]
        if resident > budgets[token]:
            above.add(token)
    return len(above)


def unseen(lab: moelab.Lab) -> list[str]:
    """Texts that no calibration saw: the last quarter of each that the model brings."""
    return [text[len(text) * 3 // 4 :].partition(" ")[2] for text in lab.probes().values()] or [
        PROMPT
    ]


def score(lab: moelab.Lab, extent: Extent) -> dict[str, Any]:
    """Quality under an open lab's settings, on `unseen` texts together."""
    texts = unseen(lab)[: extent.texts]
    done = [lab.score(t, max_tokens=extent.scored, progress=False) for t in texts]
    tokens = [d.tokens for d in done]

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=tokens))

    return {
        "kl_mean": mean([d.kl_mean for d in done]),
        "same_top1": mean([d.same_top1 for d in done]),
        "perplexity": math.exp(mean([math.log(d.perplexity) for d in done])),
        "perplexity_ratio": math.exp(mean([math.log(d.perplexity_ratio) for d in done])),
        "scored_tokens": sum(tokens),
    }


def _together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        if name in _SUMMED:
            out[name] = sum(values)
        elif name in _LARGEST:
            out[name] = max(values)
        elif isinstance(first, (int, float)) and None not in values:
            out[name] = float(np.median(values))
        elif isinstance(first, str):
            out[name] = first
    return out


@dataclass(frozen=True)
class Table:
    """A table of a section, and a note to be read under it.

    ``formats`` are for people, by column; ``hidden`` columns are in JSON only.
    """

    caption: str
    frame: pd.DataFrame
    formats: dict[str, str] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Versus:
    """A paper's figure beside ours."""

    what: str
    theirs: str
    their_device: str
    ours: str
    our_device: str


@dataclass(frozen=True)
class Report:
    """A section's answer."""

    title: str
    text: str
    tables: list[Table]
    versus: list[Versus]
