"""The suite ``papers``: EdgeMoE, HOBBIT, SwapMoE and everyone together, on the bundled model.

Each section says which cases it needs; a case that several need is measured once. Runs go round all
cases in rotated order, then once more round those whose speeds HOBBIT's is compared with; then
quality is scored, then the sections' own questions are answered. What was measured when Ctrl-C came
is reported as far as it goes.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

import moelab
from moelab import calibration
from moelab.bench.grid import PROMPT, Case, rotated, settle
from moelab.bench.papers import edgemoe, everyone, hobbit, picture, swapmoe
from moelab.bench.papers.measured import FULL, QUICK, Facts, Measured, Report, Task, Versus, look
from moelab.bench.papers.tables import as_markdown, as_rows, circumstances, worded, write_whole

SECTIONS = (edgemoe, hobbit, swapmoe, everyone)
BEGIN, END = "<!-- measured: papers -->", "<!-- end of measured: papers -->"


@dataclass(frozen=True)
class Suite:
    """What was measured, and what the sections make of it."""

    facts: Facts
    measured: Measured
    reports: dict[str, Report]
    complete: bool
    circumstances: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        measured = self.measured
        return {
            "suite": "papers",
            "model": measured.model,
            "complete": self.complete,
            **self.circumstances,
            "tokens": measured.extent.tokens,
            "repeats": measured.extent.repeats,
            "prompts": list(measured.prompts),
            "seed": measured.seed,
            "cases": [row for _, row in measured.rows(list(measured.runs))],
            "found": measured.found,
            "sections": {
                name: {
                    "title": report.title,
                    "tables": {table.caption: as_rows(table.frame) for table in report.tables},
                    "theirs_and_ours": [vars(row) for row in report.versus],
                }
                for name, report in self.reports.items()
            },
        }

    def markdown(self, picture: str | None = None) -> str:
        """The report; ``picture`` is the link to the figure for all."""
        return "\n\n".join(_markdown(self, picture)) + "\n"

    def picture(self) -> str:
        """The figure for all, as SVG."""
        share = everyone.BUDGET.replace("%", " %")
        points = everyone.points(self.facts, self.measured)
        known = moelab.devices()
        return picture.scatter(
            points,
            title=f"Quality against speed at {share} of the experts' memory",
            unchanged=everyone.UNCHANGED,
            devices={d: f"{known[d].title} (emulated)" for d in everyone.DEVICES},
        )


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
        for name in calibration.NAMES:
            lab.calibrate(name, progress=progress)
        facts = look(lab, extent)
        cases, timed = _all_cases(facts), set[str]()
        for case in cases:
            if "in_flight" in settle(lab, case).strategy.observes:
                timed.add(case.strategy)
        prompts = [texts[0] for texts in lab.prompts().values()] or [PROMPT]
    measured = Measured(str(model), prompts, extent, timed=timed)
    work = list(_work(facts, measured, cases))
    complete = False
    with tqdm(total=len(work), disable=not progress, desc="papers") as bar:
        try:
            for words, do in work:
                bar.set_postfix_str(words)
                do()
                bar.update()
            complete = True
        except KeyboardInterrupt:
            bar.set_postfix_str("stopped")
    reports = {section.NAME: section.report(facts, measured) for section in SECTIONS}
    return Suite(facts, measured, reports, complete, circumstances())


def _all_cases(facts: Facts) -> list[Case]:
    """The cases of all sections, each once."""
    listed = itertools.chain.from_iterable(section.cases(facts) for section in SECTIONS)
    return list(dict.fromkeys(listed))


def _work(facts: Facts, measured: Measured, cases: Sequence[Case]) -> Iterator[Task]:
    extent = measured.extent
    again = list(dict.fromkeys(hobbit.cases(facts)))
    for case in (
        *rotated(cases, extent.repeats),
        *rotated(again, extent.compared - extent.repeats),
    ):
        yield str(case), lambda case=case: measured.run(case)
    for case in dict.fromkeys(map(measured.scored_as, cases)):
        yield f"quality of {case}", lambda case=case: measured.score(case)
    for section in SECTIONS:
        yield from section.tasks(facts, measured)


# -- the report in words --------------------------------------------------------------------------


def _markdown(suite: Suite, picture: str | None) -> Iterator[str]:
    machine, extent = suite.circumstances["machine"], suite.measured.extent
    yield (
        f"Measured {suite.circumstances['made'][:10]} on {machine['cores']} cores of "
        f"{machine['processor']} by `moelab bench --suite papers`: the bundled model, "
        f"{extent.tokens} tokens a run, medians of {extent.repeats} runs "
        f"({extent.compared} of what HOBBIT is compared with) on "
        f"{min(extent.repeats, len(suite.measured.prompts))} prompts in rotated order; named "
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
            yield f"![{suite.reports[name].title}, a point for each strategy]({picture})"
        for table in report.tables:
            if len(table.frame):
                yield f"**{table.caption}**"
                shown = table.frame.drop(columns=list(table.hidden))
                yield as_markdown(worded(shown, table.formats))
                if table.note:
                    yield table.note
        if report.versus:
            yield "**Theirs and ours**"
            yield as_markdown(pd.DataFrame([_beside(row) for row in report.versus]))


def _beside(row: Versus) -> dict[str, str]:
    def at(figure: str, device: str) -> str:
        return f"{figure} ({device})" if device else figure

    return {
        "": row.what,
        "theirs, on their device": at(row.theirs, row.their_device),
        "ours, here": at(row.ours, row.our_device),
    }


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
    """Where a suite is written: everything as JSON, the report, a README's section, the figure."""

    json: Path | None = None
    markdown: Path | None = None
    readme: Path | None = None
    picture: Path | None = None

    def check(self, *, quick: bool) -> None:
        """Refuse, before anything is measured, what could not be written afterwards.

        Raises
        ------
        ValueError
            The README has no markers, or the suite is a quick one.
        """
        if self.readme is not None:
            if quick:
                raise ValueError("a quick suite's figures mean little: leave out --readme")
            between_markers(self.readme.read_text("utf-8"), "")

    def write(self, suite: Suite) -> list[Path]:
        """Write each file whole or not at all; README and figure only from a complete suite."""
        written = []
        if self.json is not None:
            text = json.dumps(suite.record(), indent=2) + "\n"
            written.append(write_whole(self.json, text))
        if self.markdown is not None:
            written.append(write_whole(self.markdown, suite.markdown(self._link(self.markdown))))
        if suite.complete and self.picture is not None:
            written.append(write_whole(self.picture, suite.picture()))
        if suite.complete and self.readme is not None:
            new = suite.markdown(self._link(self.readme))
            text = between_markers(self.readme.read_text("utf-8"), new)
            written.append(write_whole(self.readme, text))
        return written

    def _link(self, beside: Path) -> str | None:
        """The figure as seen from another file."""
        if self.picture is None:
            return None
        return Path(os.path.relpath(self.picture, beside.parent)).as_posix()
