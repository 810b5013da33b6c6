"""What the suite measured: runs of cases, quality of contenders, and the questions put to them.

The n-th run of every case is given the same prompt, each of another domain (a case that is run more
often gets the same prompts again), and samples as the model's own settings say under one seed; so
runs are compared in pairs, and contenders that compute the same write the same text. (Greedy text
of a small model falls into loops, which flatter every cache.) An encoder-decoder writes greedy
summaries to their end instead, and its quality is their Rouge-2, the papers' own metric.
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
from moelab.runs.quality import unhurried
from moelab.runs.rouge import f_measures
from moelab.runs.summaries import Writer
from moelab.strategies import Allocate, Precision, Route
from moelab.strategies.basics import TierPair

Task = tuple[str, Callable[[], None]]
"""What a progress bar shows, and what is to be done."""
Pairs = Sequence[tuple[str, str]]
"""A source and what people make of it."""


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
SUMMARIES = Extent(tokens=48, repeats=3, texts=256, scored=48)
"""Of an encoder-decoder: pairs are its texts, and a summary ends where it ends."""


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


@dataclass(frozen=True)
class Change:
    """Mean of what pairs of texts gained, with its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Change:
        """Of the same texts, in their order."""
        gains = np.subtract(ours, theirs)
        return cls(float(gains.mean()), float(gains.std(ddof=1) / math.sqrt(len(gains))))

    @property
    def told_apart(self) -> bool:
        """Whether it is more than two standard errors from 0."""
        return abs(self.mean) > 2 * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


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
    # what tasks of a section measured, by name, and how many tasks did
    found: dict[str, Any] = field(default_factory=dict)
    answered: int = 0
    # of an encoder-decoder, (source, reference): to choose on, and to measure on
    chosen: Pairs = ()
    pairs: Pairs = ()
    # another case whose summaries are this one's
    alike: dict[Case, Case] = field(default_factory=dict)

    @classmethod
    def of(
        cls, lab: moelab.Lab, model: str, extent: Extent, chosen: Pairs = (), pairs: Pairs = ()
    ) -> Results:
        """Nothing measured yet, of an open lab; the prompts are what has the longest references."""

        @cache
        def least(contender: str) -> int:
            settle(lab, Case(contender, "100%", "disk"))
            return lab.info()["minimum_budget_bytes"]

        longest = sorted(pairs, key=lambda pair: -len(pair[1]))[: extent.repeats]
        prompts = [source for source, _ in longest]
        prompts = prompts or [texts[0] for texts in lab.prompts().values()] or [PROMPT]
        pairs = pairs[: extent.texts]
        return cls(model, prompts, extent, lab.info(), least, chosen=chosen, pairs=pairs)

    @property
    def pieces(self) -> int:
        """Runs, scores and answers by now: the first of the suite's work, in its order."""
        return sum(map(len, self.runs.values())) + len(self.scores) + self.answered

    def kept(self) -> dict[str, Any]:
        """All that was measured, as JSON has it."""
        both = {"runs": self.runs, "scores": self.scores}
        kept = {name: [[astuple(c), of] for c, of in all_.items()] for name, all_ in both.items()}
        return kept | {"found": self.found, "answered": self.answered}

    def answer(self, task: Callable[[], None]) -> None:
        """Do a section's task."""
        task()
        self.answered += 1

    def take(self, kept: dict[str, Any]) -> None:
        """Go on after what `kept` gave."""
        self.runs, self.scores = (
            {Case(*case): of for case, of in kept[name]} for name in ("runs", "scores")
        )
        self.found, self.answered = kept["found"], kept["answered"]

    def run(self, case: Case) -> None:
        """Measure a case once more."""
        runs = self.runs.setdefault(case, [])
        how = {"ignore_eos": not self.pairs, "tokens": self.extent.tokens, "seed": self.seed}
        runs.append(measure(self.model, case, self.prompt_of(len(runs)), **how))

    def prompt_of(self, run: int) -> str:
        """The prompt of the n-th run of any case."""
        return self.prompts[run % min(self.extent.repeats, len(self.prompts))]

    def scored_as(self, case: Case) -> Case:
        """The case whose quality is this one's."""
        own = case if case.strategy in self.timed else replace(case, device="disk")
        return self.alike.get(own, own)

    def note(self, case: Case, settings: moelab.Settings, known: dict[Any, Case]) -> None:
        """Note what a case's quality hangs on: time, or of summaries nothing but the bits.

        ``known``: who was noted first with the same bits.
        """
        strategy = settings.strategy
        if "in_flight" in strategy.observes:
            self.timed.add(case.strategy)
            return
        own, parts = replace(case, device="disk"), strategy.parts
        low, allocate = getattr(parts["precision"], "low_bits", None), parts["allocate"]
        exact = type(parts["precision"]) in (Precision, TierPair) and low is None
        if self.pairs and exact and type(parts["route"]) is Route:
            chosen = type(allocate).bits is not Allocate.bits
            given = [(p.name, getattr(allocate, p.name)) for p in allocate.parameters if chosen]
            self.alike[own] = known.setdefault((settings.bits, chosen, *given), own)

    @property
    def quality(self) -> tuple[str, ...]:
        """The figures that a case is scored by."""
        return ("Rouge-2",) if self.pairs else ("perplexity", "KL")

    def change(self, case: Case, other: Case) -> Change | None:
        """Rouge-2 of a case over another's, text by text; None where one is missing."""
        cases = [self.scored_as(one) for one in (case, other)]
        both = [self.scores[one]["each"] for one in cases if "each" in self.scores.get(one, ())]
        return Change.of(*both) if len(both) == len(cases) else None

    def lost(self, case: Case, whole: Case) -> str:
        """`change` against the whole model, also as a share of it; empty where there is none."""
        change = self.change(case, whole)
        if change is None or self.scored_as(case) == self.scored_as(whole):
            return ""
        of = self.scores[self.scored_as(whole)]["rouge2"]
        return f"{change} ({change.mean / of:+.1%})" if of else str(change)

    def score(self, case: Case) -> None:
        """Measure the quality of a case, one that is `scored_as` itself."""
        with opened(self.model, case, seed=self.seed) as lab:
            self.scores[case] = self.scored(lab)

    def scored(self, lab: moelab.Lab) -> dict[str, Any]:
        """Quality under an open lab's settings."""
        if self.pairs:
            return summaries(lab, self.pairs, self.extent.scored)
        return score(lab, self.extent)

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
    found = [text for text in lab.probes().values() if isinstance(text, str)]
    texts = [text[len(text) * 3 // 4 :].partition(" ")[2] for text in found]
    return texts or [PROMPT]


def summaries(lab: moelab.Lab, pairs: Pairs, most: int) -> dict[str, Any]:
    """Rouge-2 of greedy summaries of at most so many tokens: the mean, and ``each``."""
    written = []
    with lab._session.claimed() as engine, unhurried(engine):
        write = Writer(lab._session, most)
        for source, _ in pairs:
            engine.new_sequence(record=False)
            written.append(write(lab._encode(source), engine.end_of_token))
    each = f_measures(written, [wanted for _, wanted in pairs], ["rouge2"])[:, 0].round(6)
    return {"rouge2": float(each.mean()), "each": each.tolist()}


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
