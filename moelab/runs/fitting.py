"""What a recorded run says of the machine that it ran on, for the virtual clock of a replay.

A step of the clock is a forward pass: a token, or of a drafted run a verified chain. What the draft
itself took is no part of a pass: it lies in memory, whatever the budget and the device are.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moelab.replays.clock import Computing, Spent
from moelab.runs.speculation import complete
from moelab.scheduling.events import LOAD, PREFETCH
from moelab.store.devices import Device

if TYPE_CHECKING:
    from moelab.runs.run import Run

ENOUGH = 8
"""Loads of a run that say how fast its disk is."""


def passes_of(run: Run) -> list[Spent]:
    """What each pass after the prompt took, the engine's own time, without drafting.

    Raises
    ------
    ValueError
        The run decoded no token, or was drafted and stopped within its first pass.
    """
    reports = run.token_reports[1:]
    none = "this run decoded no token: there is nothing to learn its times from"
    if not reports:
        raise ValueError(none)
    parts = np.array([(r.compute_ms, r.deciding_ms, sum(r.stall_ms.values())) for r in reports])
    if run.speculation is None:
        return [Spent(*one) for one in parts.tolist()]
    found = []
    for one in complete(run._verified, len(run.tokens)):
        compute, *rest = parts[one.token - 1 : one.token - 1 + one.kept].sum(axis=0).tolist()
        found.append(Spent(max(0.0, compute - one.draft_ms), *rest))
    if not found:
        raise ValueError(none.replace("decoded no token", "was stopped within its first pass"))
    return found


def token_ms(run: Run) -> float:
    """The median of the decoded tokens, of a drafted run the mean: the engine's own time."""
    if run.speculation is None:
        return float(run.summary()["tpot_ms_median"])
    return statistics.fmean(report.total_ms for report in run.token_reports[1:])


def typical(tokens: Sequence[Spent]) -> Spent:
    """The median of each part."""
    columns = zip(*(dataclasses.astuple(spent) for spent in tokens), strict=True)
    return Spent(*map(statistics.median, columns))


def as_measured(computing: Computing, run: Run, found: Sequence[Spent]) -> Computing:
    """As the run's passes were, which take ``found`` by the clock so far: layers take the rest.

    Of a drafted run a layer takes as many times as long as its pass has rows.
    """
    path = run.trace.shape.path()
    steps = [s for s in run.trace.steps if s.layer == path.start and not s.prefill]
    rows = statistics.median(len(step.experts) for step in steps)
    return computing.fitted(len(path), typical(found), typical(passes_of(run)), rows)


def disk_as_measured(run: Run, disk: Device) -> Device:
    """The disk at the pace of this run's own loads, where there are some: a cache may lie below."""
    if {report.device for report in run.token_reports} != {"disk"}:
        return disk
    rows = run.log.records()
    rows = rows[np.isin(rows["kind"], (LOAD, PREFETCH)) & (rows["dur_ms"] > 0)]
    if len(rows) < ENOUGH:
        return disk
    rows = rows[np.argsort(rows["start_ms"])]
    ends = np.maximum.accumulate(rows["start_ms"] + rows["dur_ms"])
    # Time in which any load was on its way: what each adds behind all before it.
    begun = np.maximum(rows["start_ms"][1:], ends[:-1])
    busy = rows["dur_ms"][0] + np.maximum(0.0, ends[1:] - begun).sum()
    pace = 1e3 * rows["bytes"].sum() / busy
    return dataclasses.replace(disk, bandwidth_bytes_s=float(pace), latency_ms=0.0)
