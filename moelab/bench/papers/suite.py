"""The suite ``papers``: EdgeMoE, HOBBIT, SwapMoE and everyone together, on one model.

Each section says which cases it needs; a case that several need is measured once. Runs go round all
cases in rotated order, then once more round those whose speeds HOBBIT's is compared with; then
quality is scored, then the sections' own questions are answered. What was measured when Ctrl-C came
is reported as far as it goes; all is kept, and the same call goes on after it.

On an encoder-decoder it is EdgeMoE's and SwapMoE's own tables, on their own task: summaries, judged
by Rouge-2 on pairs that nothing was chosen on. A summary hangs on neither time nor memory where
every expert may be chosen at bits that are fixed, so those of equal bits are written once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

import moelab
from moelab import calibration
from moelab.bench.cases import Case, settle
from moelab.bench.kept import Kept
from moelab.bench.papers import edgemoe, everyone, hobbit, paths, swapmoe
from moelab.bench.papers.results import (
    FULL,
    QUICK,
    SUMMARIES,
    Pairs,
    Report,
    Results,
    Task,
)
from moelab.bench.tables import as_json, as_markdown, as_rows, circumstances
from moelab.demo import synopsis
from moelab.models.chat import takes_pairs
from moelab.runs.rounds import rotated
from moelab.scheduling.writing import write_atomically
from moelab.strategies import CALIBRATED

SECTIONS = (edgemoe, hobbit, swapmoe, everyone)
OF_SUMMARIES = (edgemoe, paths, swapmoe)
BY_ROUGE: dict[str, dict[str, Any]] = {
    "edgemoe": {"quality": "rouge2", "pairs": 96},
    "swapmoe": {"quality": "kl", "pairs": 24, "every": (4, 16)},
}
"""How summaries are calibrated for: bits by Rouge-2, as in the paper; the planner, which weighs one
short layer against another, by KL: the Rouge-2 of a few dozen summaries tells none apart."""


def marks(model: str | Path) -> tuple[str, str]:
    """The lines in a file between which the tables of a model stand."""
    what = "papers" if model == "demo" else f"papers on {model}"
    return f"<!-- measured: {what} -->", f"<!-- end of measured: {what} -->"


BEGIN, END = marks("demo")


@dataclass(frozen=True)
class Suite:
    """What was measured, and what the sections make of it."""

    results: Results
    reports: dict[str, Report]
    complete: bool
    circumstances: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        results, extent = self.results, self.results.extent
        sections = {
            name: {
                "title": report.title,
                "tables": {table.caption: as_rows(table.frame) for table in report.tables},
                "theirs_and_ours": [row._asdict() for row in report.versus],
            }
            for name, report in self.reports.items()
        }
        what = {"suite": "papers", "model": results.model, "complete": self.complete}
        how = {"tokens": extent.tokens, "repeats": extent.repeats}
        how |= {"prompts": list(results.prompts), "seed": results.seed}
        cases = list(results.rows(list(results.runs)).values())
        found = {"cases": cases, "found": results.found, "sections": sections}
        return what | self.circumstances | how | found

    def markdown(self, picture: str | None = None) -> str:
        """The report; ``picture`` is the link to the figure for all."""
        return "\n\n".join(_markdown(self, picture)) + "\n"


def held_out() -> tuple[Pairs, Pairs]:
    """The pairs of ``"synopsis"``: to choose on, and to measure on."""
    parts = synopsis.pairs("validation"), synopsis.pairs("test")
    chosen, tried = ([pair for section in part.values() for pair in section] for part in parts)
    return chosen, tried


def papers(
    model: str | Path = "demo",
    *,
    pairs: tuple[Pairs, Pairs] | None = None,
    quick: bool = False,
    progress: bool = True,
) -> Suite:
    """Measure the suite.

    Parameters
    ----------
    model
        ``"demo"``, ``"synopsis"``, a store, a checkpoint folder or a hub id.
    pairs
        Of an encoder-decoder: (source, reference) to choose bits and plans on, and others to
        measure on; default those that ``"synopsis"`` brings.
    quick
        A minute's worth, once calibrated: few tokens, one repeat, fewer devices and budgets. It
        shows that everything works; its figures mean little.
    progress
        Show a bar. Ctrl-C ends the measuring and reports what there is (``complete`` is False).

    Raises
    ------
    ValueError
        A case is refused, or an encoder-decoder has too few pairs; nothing has been measured then.
    """
    how = {"budget": "100%", "measure_kl": False}  # room to calibrate in
    with moelab.open(model, **how, progress=progress) as lab:
        two = takes_pairs(lab._engine.model)
        if two and pairs is None and model != synopsis.NAME:
            raise ValueError(
                f"{str(model)!r} writes summaries: papers(model, pairs=(...)) says whose"
            )
        chosen, tried = (pairs or held_out()) if two else ((), ())
        if two and min(len(chosen), len(tried)) < 2:
            raise ValueError(f"pairs=({len(chosen)}, {len(tried)} pairs): give 2 or more of each")
        sections = OF_SUMMARIES if two else SECTIONS
        for name in (one for one in calibration.NAMES if one in CALIBRATED.values()):
            if not two:
                lab.calibrate(name, progress=progress)
            elif name in {section.NAME for section in sections}:
                lab.calibrate(name, progress=progress, texts=chosen, **BY_ROUGE[name])
        extent = QUICK if quick else SUMMARIES if two else FULL
        results = Results.of(lab, str(model), extent, chosen, tried)
        listed = itertools.chain.from_iterable(section.cases(results) for section in sections)
        cases, known = list(dict.fromkeys(listed)), dict[Any, Case]()
        for case in cases:
            results.note(case, settle(lab, case), known)
    kept = Kept("papers", results.info["store"], extent, cases, results.pairs)
    results.take(kept.load() or {"runs": [], "scores": [], "found": {}, "answered": 0})
    work, complete = list(_work(results, cases, sections))[results.pieces :], False
    with contextlib.suppress(KeyboardInterrupt):
        for words, do in (bar := tqdm(work, "papers", disable=not progress)):
            bar.set_postfix_str(words)
            before = results.pieces
            do()
            if results.pieces > before:
                kept.save(results.kept())
        complete = True
        kept.complete()
    reports = {section.NAME: section.report(results) for section in sections}
    return Suite(results, reports, complete, circumstances())


def _work(results: Results, cases: Sequence[Case], sections: Sequence[Any]) -> Iterator[Task]:
    extent = results.extent
    again = list(dict.fromkeys(hobbit.cases(results))) if hobbit in sections else []
    rounds = (rotated(cases, extent.repeats), rotated(again, extent.compared - extent.repeats))
    for case in itertools.chain(*rounds):
        yield str(case), lambda case=case: results.run(case)
    for case in dict.fromkeys(map(results.scored_as, cases)):
        yield f"quality of {case}", lambda case=case: results.score(case)
    for words, do in itertools.chain.from_iterable(one.tasks(results) for one in sections):
        yield words, lambda do=do: results.answer(do)


def _markdown(suite: Suite, picture: str | None) -> Iterator[str]:
    """The report's paragraphs."""
    machine, results = suite.circumstances["machine"], suite.results
    extent = results.extent
    yield (
        f"Measured {suite.circumstances['made'][:10]} on {machine['cores']} cores of "
        f"{machine['processor']} by `moelab bench --suite papers{_asked(results)}"
        f"medians of {extent.repeats} runs "
        f"{'' if results.pairs else f'({extent.compared} of what HOBBIT is compared with) '}on "
        f"{min(extent.repeats, len(results.prompts))} prompts in rotated order; named "
        "devices are emulated over real loads. Quality is scored apart, on text that neither "
        f"training nor calibration saw{_judged(results)}."
    )
    if not suite.complete:
        yield "**Stopped early: what was not measured by then is missing.**"
    if extent.quick:
        yield "**A quick run: it shows that everything works; its figures mean little.**"
    for name, report in suite.reports.items():
        yield f"### {report.title}"
        yield report.text
        if name == everyone.NAME and picture is not None:
            yield f"![{report.title}, a point for each strategy]({picture})"
        for table in report.tables:
            if len(table.frame):
                yield from table.markdown()
        if report.versus:
            yield "**Theirs and ours**"
            yield as_markdown(pd.DataFrame([row.beside() for row in report.versus]))


def _asked(results: Results) -> str:
    """The rest of the command, the model and how much a run writes."""
    if results.pairs:
        return f" --model {results.model}`: summaries to their end, greedy, "
    return f"`: the demo, {results.extent.tokens} tokens a run, "


def _judged(results: Results) -> str:
    """Of summaries: on how many, and how sure that is."""
    if not results.pairs:
        return ""
    return (
        f": Rouge-2 (F, stemmed) of {len(results.pairs)} greedy summaries against what people "
        f"wrote; bits were chosen on {_of('edgemoe', results)} other pairs, plans on "
        f"{_of('swapmoe', results)} of these. A difference is "
        "the mean over the same pairs, ± its standard error: below twice that it is not told apart "
        "from none"
    )


def _of(name: str, results: Results) -> int:
    """On how many pairs a calibration measured quality."""
    return min(BY_ROUGE[name]["pairs"], len(results.chosen))


def between_markers(text: str, new: str, model: str | Path = "demo") -> str:
    """The text with what stands between the `marks` of a model replaced.

    Raises
    ------
    ValueError
        A marker is missing.
    """
    first, last = marks(model)
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the file needs the lines {first} and {last} around what is to be kept")
    return f"{before}{first}\n\n{new.strip()}\n\n{last}{after}"


@dataclass(frozen=True)
class Files:
    """Where a suite is written: everything as JSON, the report, the kept tables, the figure."""

    json: Path | None = None
    markdown: Path | None = None
    tables: Path | None = None
    picture: Path | None = None

    def check(self, *, quick: bool, model: str | Path = "demo") -> None:
        """Refuse, before anything is measured, what could not be written afterwards.

        Raises
        ------
        ValueError
            The file of the tables has no markers, or the suite is a quick one.
        ImportError
            A figure is wanted and matplotlib is not installed.
        """
        if self.tables is not None:
            if quick:
                raise ValueError("a quick suite's figures mean little: leave out --tables")
            between_markers(self.tables.read_text("utf-8"), "", model)
        if self.picture is not None and find_spec("matplotlib") is None:
            raise ImportError("--picture needs matplotlib; run: pip install 'moelab[export]'")

    def write(self, suite: Suite) -> list[Path]:
        """Write each file whole or not at all; tables and figure only from a complete suite."""
        texts: dict[Path, str] = {}
        if self.json is not None:
            texts[self.json] = as_json(suite.record())
        if self.markdown is not None:
            texts[self.markdown] = suite.markdown(self._link(self.markdown))
        if suite.complete and self.picture is not None and everyone.NAME in suite.reports:
            texts[self.picture] = everyone.picture(suite.results)
        if suite.complete and self.tables is not None:
            new = suite.markdown(self._link(self.tables))
            before = self.tables.read_text("utf-8")
            texts[self.tables] = between_markers(before, new, suite.results.model)
        for path, text in texts.items():
            write_atomically(path, text.encode())
        return list(texts)

    def _link(self, beside: Path) -> str | None:
        """The figure as seen from another file."""
        seen = self.picture and Path(os.path.relpath(self.picture, beside.parent))
        return seen.as_posix() if seen else None
