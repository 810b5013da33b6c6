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
from dataclasses import astuple, dataclass, field, replace
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

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """Of runs in pairs."""
        ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
        return cls(float(np.median(ratios)), min(ratios), max(ratios))

    @property
    def told_apart(self) -> bool:
        """Whether all pairs lie on one side of 1."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclass
class Results:
    """Everything measured so far; what was not is left out, so that half a suite still reports."""

    model: str
    prompts: Sequence[str]
    extent: Extent
    # lab.info() of the model, and the least budget of a contender (asked for while the lab is open)
    info: dict[str, Any] = field(default_factory=dict)
    least: Callable[[str], int] = lambda _: 0
    seed: int = 0
    # figures of each run of a case, in the order of `prompt_of`
    runs: dict[Case, list[dict[str, Any]]] = field(default_factory=dict)
    # quality; most strategies decide alike on every device, and are scored on the disk
    scores: dict[Case, dict[str, Any]] = field(default_factory=dict)
    # strategies whose decisions hang on when loads land; scored on the case's own device
    timed: set[str] = field(default_factory=set)
    # what tasks of a section measured, by name
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

    @property
    def pieces(self) -> int:
        """Runs and scores by now: the first of the suite's work, in its order."""
        return sum(map(len, self.runs.values())) + len(self.scores)

    def kept(self) -> dict[str, list]:
        """Runs and scores as JSON has them; what sections ask is not among them."""
        both = {"runs": self.runs, "scores": self.scores}
        return {name: [[astuple(c), of] for c, of in all_.items()] for name, all_ in both.items()}

    def take(self, kept: dict[str, list]) -> None:
        """Go on after what `kept` gave."""
        self.runs, self.scores = (
            {Case(*case): of for case, of in kept[name]} for name in ("runs", "scores")
        )

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
        if not rows:
            return {}
        speeds = {case: figures(row, unit)[unit] for case, row in rows.items()}
        columns = {f"{named(case.device)}: {unit}": speeds.get(case, math.nan) for case in cases}
        return columns | figures(next(iter(rows.values())), *names)

    def times_as_fast(self, case: Case, other: Case) -> Ratio | None:
        """Tokens per second over the other's, run by run; None where one is missing."""
        pairs = [[run["tokens_per_s"] for run in pair] for pair in self._pairs(case, other)]
        return Ratio.of(*zip(*pairs, strict=True)) if pairs else None

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
    texts = [text[len(text) * 3 // 4 :].partition(" ")[2] for text in lab.probes().values()]
    return texts or [PROMPT]


def score(lab: moelab.Lab, extent: Extent) -> dict[str, Any]:
    """Quality under an open lab's settings, on `unseen` texts together."""
    texts = unseen(lab)[: extent.texts]
    done = [lab.score(t, max_tokens=extent.scored, progress=False) for t in texts]
    tokens = [d.tokens for d in done]
    means = [(d.kl_mean, d.same_top1) for d in done]
    logs = np.log([(d.perplexity, d.perplexity_ratio) for d in done])
    kl, same = np.average(means, axis=0, weights=tokens).tolist()
    perplexity, ratio = np.exp(np.average(logs, axis=0, weights=tokens)).tolist()
    quality = {"kl_mean": kl, "same_top1": same, "perplexity": perplexity}
    return quality | {"perplexity_ratio": ratio, "scored_tokens": sum(tokens)}
