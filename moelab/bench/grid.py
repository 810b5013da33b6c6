"""Strategy x budget x device, each row measured through the public API.

Every run opens the model anew, so that it starts with an empty cache and no run helps the next;
repeats go through all settings in rotated order, so that a machine that slows down slows all of
them; a row is the median of its repeats. Quality is scored apart from the timed runs and once per
strategy and budget: decisions do not depend on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import moelab
from moelab.bench.papers.contenders import contender

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


def opened(model: str | Path, case: Case, *, seed: int = 0) -> moelab.Lab:
    """Open a model with an empty cache, set as the case says."""
    lab = moelab.open(model, budget="100%", measure_kl=False, seed=seed, progress=False)
    try:
        lab.update(**case.changes)
    except BaseException:
        lab.close()
        raise
    return lab


def settle(lab: moelab.Lab, case: Case) -> moelab.Settings:
    """Set an open lab as the case says, whatever it was set to before.

    Raises
    ------
    ValueError
        The case is refused; the message begins with it.
    """
    plain = {"bits": max(lab.info()["tiers"]), "budget": "100%", "device": "disk"}
    try:
        lab.update(strategy=moelab.strategies.lru(), **plain)
        return lab.update(**case.changes)
    except ValueError as error:
        raise ValueError(f"{case}: {error}") from error


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
        for case in rotated(cases, repeats):
            bar.set_postfix_str(str(case))
            with opened(model, case, seed=seed) as lab:
                run = lab.generate(
                    prompt, max_new_tokens=tokens, temperature=0, ignore_eos=True, measure_kl=False
                )
                runs[case].append(run.summary())
            bar.update()
        for strategy, budget in sorted(scored):
            bar.set_postfix_str(f"quality of {strategy}, {budget}")
            case = Case(strategy, budget, "disk")
            with opened(model, case, seed=seed) as lab:
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


def _check(
    model: str | Path, cases: Sequence[Case], prompt: str | None
) -> tuple[str, dict[Case, dict[str, Any]]]:
    """Refuse what would fail later; return the prompt and each case's settings in full."""
    fixed = {}
    names = ("budget_bytes", "bits", "low_bits", "prefetch")
    with moelab.open(model, budget="100%", measure_kl=False) as lab:
        for case in cases:
            now = settle(lab, case)
            fixed[case] = {name: getattr(now, name) for name in names}
        own = [text for texts in lab.prompts().values() for text in texts]
    return prompt if prompt is not None else next(iter(own), PROMPT), fixed


def rotated(cases: Sequence[Case], repeats: int) -> Iterator[Case]:
    """All cases ``repeats`` times, each time beginning elsewhere."""
    for repeat in range(repeats):
        start = repeat * len(cases) // repeats
        yield from (*cases[start:], *cases[:start])


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
