"""The suite ``papers``: EdgeMoE, HOBBIT, SwapMoE and everyone together, on the bundled model.

Each section says which cases it needs; a case that several need is measured once. Runs go round all
cases in rotated order, then once more round those whose speeds HOBBIT's is compared with; then
quality is scored, then the sections' own questions are answered. What was measured when Ctrl-C came
is reported as far as it goes; runs and scores are kept, and the same call goes on after them.
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
from moelab.bench.papers import edgemoe, everyone, hobbit, swapmoe
from moelab.bench.papers.results import FULL, QUICK, Report, Results, Task
from moelab.bench.tables import as_json, as_markdown, as_rows, circumstances
from moelab.runs.rounds import rotated
from moelab.scheduling.writing import write_atomically
from moelab.strategies import CALIBRATED

SECTIONS = (edgemoe, hobbit, swapmoe, everyone)
BEGIN, END = "<!-- measured: papers -->", "<!-- end of measured: papers -->"


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


def papers(model: str | Path = "demo", *, quick: bool = False, progress: bool = True) -> Suite:
    """Measure the suite.

    Parameters
    ----------
    model
        ``"demo"``, a store, a checkpoint folder or a hub id.
    quick
        A minute's worth: few tokens, one repeat, fewer devices and budgets. It shows that
        everything works; its figures mean little.
    progress
        Show a bar. Ctrl-C ends the measuring and reports what there is (``complete`` is False).

    Raises
    ------
    ValueError
        A case is refused; nothing has been measured then.
    """
    extent = QUICK if quick else FULL
    with moelab.open(model, measure_kl=False, progress=progress) as lab:
        for name in (one for one in calibration.NAMES if one in CALIBRATED.values()):
            lab.calibrate(name, progress=progress)
        results = Results.of(lab, str(model), extent)
        listed = itertools.chain.from_iterable(section.cases(results) for section in SECTIONS)
        cases = list(dict.fromkeys(listed))
        for case in cases:
            if "in_flight" in settle(lab, case).strategy.observes:
                results.timed.add(case.strategy)
    kept = Kept("papers", model, extent, cases)
    results.take(kept.load() or {"runs": [], "scores": []})
    work, complete = list(_work(results, cases))[results.pieces :], False
    with contextlib.suppress(KeyboardInterrupt):
        for words, do in (bar := tqdm(work, "papers", disable=not progress)):
            bar.set_postfix_str(words)
            before = results.pieces
            do()
            if results.pieces > before:
                kept.save(results.kept())
        complete = True
        kept.complete()
    reports = {section.NAME: section.report(results) for section in SECTIONS}
    return Suite(results, reports, complete, circumstances())


def _work(results: Results, cases: Sequence[Case]) -> Iterator[Task]:
    extent = results.extent
    again = list(dict.fromkeys(hobbit.cases(results)))
    rounds = (rotated(cases, extent.repeats), rotated(again, extent.compared - extent.repeats))
    for case in itertools.chain(*rounds):
        yield str(case), lambda case=case: results.run(case)
    for case in dict.fromkeys(map(results.scored_as, cases)):
        yield f"quality of {case}", lambda case=case: results.score(case)
    for section in SECTIONS:
        yield from section.tasks(results)


def _markdown(suite: Suite, picture: str | None) -> Iterator[str]:
    """The report's paragraphs."""
    machine, extent = suite.circumstances["machine"], suite.results.extent
    yield (
        f"Measured {suite.circumstances['made'][:10]} on {machine['cores']} cores of "
        f"{machine['processor']} by `moelab bench --suite papers`: the bundled model, "
        f"{extent.tokens} tokens a run, medians of {extent.repeats} runs "
        f"({extent.compared} of what HOBBIT is compared with) on "
        f"{min(extent.repeats, len(suite.results.prompts))} prompts in rotated order; named "
        "devices are emulated over real loads. Quality is scored apart, on text that neither "
        "training nor calibration saw."
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


def between_markers(text: str, new: str) -> str:
    """The text with what stands between `BEGIN` and `END` replaced.

    Raises
    ------
    ValueError
        A marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the file needs the lines {BEGIN} and {END} around what is to be kept")
    return f"{before}{BEGIN}\n\n{new.strip()}\n\n{END}{after}"


@dataclass(frozen=True)
class Files:
    """Where a suite is written: everything as JSON, the report, the kept tables, the figure."""

    json: Path | None = None
    markdown: Path | None = None
    tables: Path | None = None
    picture: Path | None = None

    def check(self, *, quick: bool) -> None:
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
            between_markers(self.tables.read_text("utf-8"), "")
        if self.picture is not None and find_spec("matplotlib") is None:
            raise ImportError("--picture needs matplotlib; run: pip install 'moelab[export]'")

    def write(self, suite: Suite) -> list[Path]:
        """Write each file whole or not at all; tables and figure only from a complete suite."""
        texts: dict[Path, str] = {}
        if self.json is not None:
            texts[self.json] = as_json(suite.record())
        if self.markdown is not None:
            texts[self.markdown] = suite.markdown(self._link(self.markdown))
        if suite.complete and self.picture is not None:
            texts[self.picture] = everyone.picture(suite.results)
        if suite.complete and self.tables is not None:
            new = suite.markdown(self._link(self.tables))
            texts[self.tables] = between_markers(self.tables.read_text("utf-8"), new)
        for path, text in texts.items():
            write_atomically(path, text.encode())
        return list(texts)

    def _link(self, beside: Path) -> str | None:
        """The figure as seen from another file."""
        seen = self.picture and Path(os.path.relpath(self.picture, beside.parent))
        return seen.as_posix() if seen else None
