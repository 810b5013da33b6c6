"""What the suite measured: runs of cases, quality of contenders, and the questions put to them.

The n-th run of every case is given the same prompt, each of another domain (a case that is run more
often gets the same prompts again), and samples as the model's own settings say under one seed; so
runs are compared in pairs, and contenders that compute the same write the same text. (Greedy text
of a small model falls into loops, which flatter every cache.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

import moelab
from moelab.bench.cases import PROMPT, Case, measure, opened, row, settle
from moelab.bench.tables import Table, Versus, figures

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

    def choose(self, few: Sequence, every: Sequence) -> list:
        """The few in a quick suite, else all."""
        return list(few if self.quick else every)


FULL = Extent(tokens=32, repeats=3, texts=100, scored=40)
QUICK = Extent(tokens=5, repeats=1, texts=2, scored=8, quick=True)


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
class Results:
    """Everything measured so far; what was not is left out, so that half a suite still reports.

    Attributes
    ----------
    info
        ``lab.info()`` of the model.
    least
        The smallest budget that a contender can do with; of those it was asked for while the lab
        was open.
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
    info: dict[str, Any] = field(default_factory=dict)
    least: Callable[[str], int] = lambda _: 0
    seed: int = 0
    runs: dict[Case, list[dict[str, Any]]] = field(default_factory=dict)
    scores: dict[Case, dict[str, Any]] = field(default_factory=dict)
    timed: set[str] = field(default_factory=set)
    found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, lab: moelab.Lab, model: str, extent: Extent) -> Results:
        """Nothing measured yet, of an open lab."""

        @cache
        def least(contender: str) -> int:
            settle(lab, Case(contender, "100%", "disk"))
            return lab.info()["minimum_budget_bytes"]

        prompts = [texts[0] for texts in lab.prompts().values()] or [PROMPT]
        return cls(model, prompts, extent, lab.info(), least)

    def run(self, case: Case) -> None:
        """Measure a case once more."""
        runs = self.runs.setdefault(case, [])
        prompt = self.prompt_of(len(runs))
        runs.append(measure(self.model, case, prompt, tokens=self.extent.tokens, seed=self.seed))

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

    def rows(self, cases: Sequence[Case]) -> dict[Case, dict[str, Any]]:
        """The cases that were measured, each with its row: figures and quality."""
        return {
            case: row(case, self.runs[case]) | self.scores.get(self.scored_as(case), {})
            for case in cases
            if self.runs.get(case)
        }

    def on_devices(self, unit: str, cases: Sequence[Case], *names: str) -> dict[str, float]:
        """A contender's speed on each device, then these figures of the first; {} if none."""
        rows = self.rows(cases)
        speeds = {
            f"{named(case.device)}: {unit}": figures(rows[case], unit)[unit]
            if case in rows
            else math.nan
            for case in cases
        }
        return speeds | figures(next(iter(rows.values())), *names) if rows else {}

    def times_as_fast(self, case: Case, other: Case) -> Ratio | None:
        """Tokens per second over the other's, run by run; None where one is missing."""
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in self._pairs(case, other)]
        return Ratio(float(np.median(ratios)), min(ratios), max(ratios)) if ratios else None

    def same_text(self, case: Case, other: Case) -> bool | None:
        """Whether both wrote the same tokens on every prompt; None where one is missing."""
        same = [a["generated"] == b["generated"] for a, b in self._pairs(case, other)]
        return all(same) if same else None

    def _pairs(self, case: Case, other: Case) -> Iterator[tuple[dict, dict]]:
        return zip(self.runs.get(case, ()), self.runs.get(other, ()), strict=False)


@dataclass(frozen=True)
class Report:
    """A section's answer."""

    title: str
    text: str
    tables: list[Table]
    versus: list[Versus]


def named(device: str) -> str:
    """A device's name for tables, short."""
    return re.split(r",| \(| x16", moelab.devices()[device].title)[0]


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
