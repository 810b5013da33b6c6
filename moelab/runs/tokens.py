"""A run in figures: one row a token, and what is worked out from any stretch of rows.

The window, the summary of a run and a recording all use this one formula. Figures measured on this
machine's disk and figures of an emulated device are never averaged together: who asks for figures
of times gives the tokens since the device last changed (`since_device`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

CAUSES = ("on demand", "prefetch late", "evict")
"""What a token may wait for."""

COUNTS = ("bytes", "hits", "loads", "prefetches", "downgrades", "skips", "substitutes")
COLUMNS = ("total_ms", "compute_ms", *CAUSES, "kl", *COUNTS, "resident_bytes", "budget_bytes")


def row(report: Any) -> tuple[float, ...]:
    """One `TokenReport` as numbers, in the order of `COLUMNS`; a KL not measured is NaN."""
    stalls = [float(report.stall_ms.get(cause, 0.0)) for cause in CAUSES]
    counts = [float(getattr(report, name)) for name in COUNTS]
    kl = math.nan if report.kl is None else float(report.kl)
    memory = float(report.resident_bytes), float(report.budget_bytes)
    return (float(report.total_ms), float(report.compute_ms), *stalls, kl, *counts, *memory)


def since_device(reports: Sequence[Any]) -> int:
    """Index of the first token since the device last changed."""
    last = len(reports)
    while last > 0 and reports[last - 1].device == reports[-1].device:
        last -= 1
    return last


def figures(values: np.ndarray, *, first: int = 0) -> dict[str, float | int | None]:
    """Running figures of some tokens.

    Parameters
    ----------
    values
        [T, C], columns as in `COLUMNS`.
    first
        Index of the first of them. Token 0 carries the prefill: only its KL counts.

    Returns
    -------
    dict
        ``tokens``, ``tokens_per_s``, ``hit_ratio``, ``bytes_per_token``, ``stall_share``,
        ``kl_mean``; None where there is nothing to divide.
    """
    kls = values[:, COLUMNS.index("kl")]
    kls = kls[np.isfinite(kls)]
    decoded = np.delete(values, COLUMNS.index("kl"), axis=1)[int(first == 0) :]
    names = [name for name in COLUMNS if name != "kl"]
    sums = dict(zip(names, decoded.sum(axis=0, dtype=np.float64).tolist(), strict=True))

    def ratio(over: float, under: float) -> float | None:
        return over / under if under else None

    asked = sum(sums[name] for name in ("hits", "loads", "skips", "substitutes"))
    return {
        "tokens": len(values),
        "tokens_per_s": ratio(1e3 * len(decoded), sums["total_ms"]),
        "hit_ratio": ratio(sums["hits"], asked),
        "bytes_per_token": ratio(sums["bytes"], len(decoded)),
        "stall_share": ratio(sum(sums[cause] for cause in CAUSES), sums["total_ms"]),
        "kl_mean": float(kls.mean(dtype=np.float64)) if len(kls) else None,
    }


def titled(title: str, *, outpaced: bool) -> str:
    """A device's title, with a word where this machine's disk is too slow to stand for it.

    Examples
    --------
    >>> titled("NVMe SSD, 3 GB/s", outpaced=True)
    'NVMe SSD, 3 GB/s, faster than this disk'
    """
    return f"{title}, faster than this disk" if outpaced else title
