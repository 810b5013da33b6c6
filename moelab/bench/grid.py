"""The bench: strategy x budget x device, each row measured here and now, through the public API.

A contender is written as people say it: ``"lru"``, ``"lru + look-ahead"``, ``"lru + mixed 16/4"``,
``"lfu + 4 bit + look-ahead 2"``. Every run opens the model anew, so that it starts with an empty
cache and no run helps the next; repeats go through all settings in rotated order, so that a machine
that slows down slows all of them; a row is the median of its repeats. Quality is scored apart from
the timed runs and once per strategy and budget: decisions do not depend on the device.
"""

from __future__ import annotations

import itertools
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from tqdm.auto import tqdm

import moelab

STRATEGIES = ("on_demand", "lru", "lru + look-ahead", "lru + mixed 16/4")
BUDGETS = ("25%", "50%")
DEVICES = ("disk", "hdd")
PROMPT = "Once upon a time there was a man who"

_FROM_RUN = (
    "tokens_per_s",
    "ttft_ms",
    "tpot_ms_median",
    "tpot_ms_p99",
    "hit_ratio",
    "byte_hit_ratio",
    "bytes_per_token",
    "stall_share",
    "downgrades",
    "skips",
    "peak_resident_bytes",
)


@dataclass(frozen=True)
class Case:
    """One row to be: a contender at a budget on a device."""

    strategy: str
    budget: str
    device: str

    @property
    def changes(self) -> dict[str, Any]:
        """What ``lab.update`` is to be told."""
        return contender(self.strategy) | {"budget": self.budget, "device": self.device}

    def __str__(self) -> str:
        return f"{self.strategy}, {self.budget}, {self.device}"


def contender(text: str) -> dict[str, Any]:
    """Settings for a contender written in words.

    Parameters
    ----------
    text
        A name of ``moelab.strategies.NAMES``, then any of ``look-ahead [layers]``,
        ``mixed HIGH/LOW`` and ``N bit``, joined by ``+``.

    Returns
    -------
    dict
        For ``lab.update``: strategy and prefetch, bits and low_bits where they are named.

    Raises
    ------
    ValueError
        The strategy or an addition is not known.

    Examples
    --------
    >>> contender("lru + mixed 16/4")
    {'strategy': 'lru', 'prefetch': 0, 'bits': 16, 'low_bits': 4}
    >>> contender("lfu + look-ahead 2")
    {'strategy': 'lfu', 'prefetch': 2}
    """
    name, *additions = (part.strip() for part in text.split("+"))
    if name not in moelab.strategies.NAMES:
        names = ", ".join(moelab.strategies.NAMES)
        raise ValueError(f"unknown strategy {name!r} in {text!r}; choose one of {names}")
    settings: dict[str, Any] = {"strategy": name, "prefetch": 0}
    for addition in additions:
        if found := re.fullmatch(r"look-ahead(?: ([1-3]))?", addition):
            settings["prefetch"] = int(found[1] or 1)
        elif found := re.fullmatch(r"mixed (\d+)/(\d+)", addition):
            settings |= {"bits": int(found[1]), "low_bits": int(found[2])}
        elif found := re.fullmatch(r"(\d+) bit", addition):
            settings["bits"] = int(found[1])
        else:
            raise ValueError(
                f"unknown addition {addition!r} in {text!r}; "
                "write 'look-ahead', 'look-ahead 2', 'mixed 16/4' or '4 bit'"
            )
    return settings


def bench(
    model: str | Path = "demo",
    *,
    strategies: Sequence[str] = STRATEGIES,
    budgets: Sequence[str] = BUDGETS,
    devices: Sequence[str] = DEVICES,
    tokens: int = 64,
    prompt: str | None = None,
    repeats: int = 3,
    quality: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure every strategy at every budget on every device.

    Parameters
    ----------
    model
        ``"demo"``, a store, a checkpoint folder or a hub id.
    strategies
        Contenders, see `contender`.
    budgets, devices
        As `moelab.open` takes them.
    tokens
        Generated per run, greedily, past the model's end of text.
    prompt
        Default: the first prompt the model brings, else `PROMPT`.
    repeats
        Timed runs per row; the row is their median.
    quality
        Score the KL against full precision too: on the model's own held-out texts, else on the
        prompt.
    seed
        Of the lab.

    Returns
    -------
    DataFrame
        One row per case: strategy, budget, device, ``timing`` (measured or emulated), the settings
        in force (budget_bytes, bits, low_bits, prefetch), tokens, repeats, the figures of
        ``run.summary()``, the lowest and highest tokens_per_s, kl_mean and same_top1; ``attrs``
        has model, prompt and seed.

    Raises
    ------
    ValueError
        A case is refused, a budget too small for it for example; nothing has been measured then.

    Examples
    --------
    >>> frame = bench(strategies=["lru"], budgets=["25%"], devices=["disk"], tokens=8, repeats=1)
    >>> len(frame)
    1
    """
    if tokens < 2 or repeats < 1:
        raise ValueError(f"tokens={tokens}, repeats={repeats}: need 2 tokens and 1 repeat or more")
    cases = [Case(*c) for c in itertools.product(strategies, budgets, devices)]
    prompt, fixed = _check(model, cases, prompt)
    scored = {(c.strategy, c.budget) for c in cases} if quality else set()
    runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    scores: dict[tuple[str, str], dict[str, float]] = {}
    with tqdm(total=len(cases) * repeats + len(scored), disable=not progress, desc="bench") as bar:
        for case in _rotated(cases, repeats):
            bar.set_postfix_str(str(case))
            with moelab.open(model, seed=seed, progress=False, **_opened(case)) as lab:
                run = lab.generate(
                    prompt, max_new_tokens=tokens, temperature=0, ignore_eos=True, measure_kl=False
                )
                runs[case].append(run.summary())
            bar.update()
        for strategy, budget in sorted(scored):
            bar.set_postfix_str(f"quality of {strategy}, {budget}")
            case = Case(strategy, budget, "disk")
            with moelab.open(model, seed=seed, progress=False, **_opened(case)) as lab:
                score = lab.score(None if lab.probes() else prompt, progress=False)
            scores[strategy, budget] = {"kl_mean": score.kl_mean, "same_top1": score.same_top1}
            bar.update()
    frame = pd.DataFrame([_row(c, fixed[c], runs[c], scores) for c in cases])
    frame.attrs = {"model": str(model), "prompt": prompt, "seed": seed}
    return frame


def report(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns people compare, as words; for `as_markdown`."""
    emulated = [" (emulated)" if timing == "emulated" else "" for timing in frame["timing"]]
    words = {
        "strategy": frame["strategy"],
        "budget": frame["budget"],
        "device": frame["device"] + emulated,
        "tokens/s": frame["tokens_per_s"].map("{:.1f}".format),
        "hit ratio": frame["hit_ratio"].map("{:.3f}".format),
        "MB/token": (frame["bytes_per_token"] / 1e6).map("{:.3f}".format),
        "stall share": frame["stall_share"].map("{:.3f}".format),
    }
    if "kl_mean" in frame:
        words["KL"] = frame["kl_mean"].map("{:.4f}".format)
    return pd.DataFrame(words)


def as_markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown, padded so that it also reads as plain text."""
    rows = [list(frame.columns), *(list(map(str, row)) for row in frame.itertuples(index=False))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(frame.columns))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def as_record(frame: pd.DataFrame) -> dict[str, Any]:
    """Everything as plain values for JSON: model, prompt, versions, machine, and the rows."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return {
        **{str(key): value for key, value in frame.attrs.items()},
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"moelab": moelab.__version__}
        | {name: metadata.version(name) for name in ("torch", "transformers", "numba", "numpy")},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": psutil.cpu_count(logical=True),
            "memory_bytes": psutil.virtual_memory().total,
            "python": platform.python_version(),
        },
        "rows": rows,
    }


def _check(
    model: str | Path, cases: Sequence[Case], prompt: str | None
) -> tuple[str, dict[Case, dict[str, Any]]]:
    """Refuse what would fail later; return the prompt and each case's settings in full."""
    fixed = {}
    with moelab.open(model, budget="100%", measure_kl=False) as lab:
        top = max(lab.info()["tiers"])
        for case in cases:
            try:
                now = lab.update(**{"bits": top, "low_bits": None} | case.changes)
            except ValueError as error:
                raise ValueError(f"{case}: {error}") from error
            names = ("budget_bytes", "bits", "low_bits", "prefetch")
            fixed[case] = {name: getattr(now, name) for name in names}
        own = [text for texts in lab.prompts().values() for text in texts]
    return prompt if prompt is not None else next(iter(own), PROMPT), fixed


def _opened(case: Case) -> dict[str, Any]:
    """Arguments of `moelab.open`."""
    return case.changes | {"measure_kl": False}


def _rotated(cases: list[Case], repeats: int) -> Iterator[Case]:
    """All cases ``repeats`` times, each time beginning elsewhere."""
    for repeat in range(repeats):
        start = repeat * len(cases) // repeats
        yield from cases[start:] + cases[:start]


def _row(
    case: Case,
    fixed: dict[str, Any],
    runs: list[dict[str, Any]],
    scores: dict[tuple[str, str], dict[str, float]],
) -> dict[str, Any]:
    speeds = [run["tokens_per_s"] for run in runs]
    return {
        "strategy": case.strategy,
        "budget": case.budget,
        "device": case.device,
        "timing": runs[0]["timing"],
        **fixed,
        "tokens": runs[0]["tokens"],
        "repeats": len(runs),
        **{name: float(np.median([run[name] for run in runs])) for name in _FROM_RUN},
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        **scores.get((case.strategy, case.budget), {}),
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()
