"""Strategy x budget x device, each row measured through the public API.

A row is the median of its repeats. Quality is scored apart from the timed runs and once per
strategy and budget: decisions do not depend on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

import moelab
from moelab.bench.cases import PROMPT, Case, measure, opened, row, settle
from moelab.bench.tables import figures, worded
from moelab.models.chat import Text, pair_of, takes_pairs
from moelab.runs.rounds import rotated

STRATEGIES = ("on_demand", "lru", "lru + look-ahead", "lru + mixed 16/4")
BUDGETS = ("25%", "50%")
DEVICES = ("disk", "hdd")
SETTINGS = ("budget_bytes", "bits", "low_bits", "prefetch")


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
        As for `moelab.open`.
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
        prompt; of an encoder-decoder on what it makes of that with all experts in memory.
    seed
        Of the lab.

    Returns
    -------
    DataFrame
        One `row` per case: strategy, budget, device, ``timing`` (measured or emulated), the
        settings in force (budget_bytes, bits, low_bits, prefetch), tokens, repeats, the figures of
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
    prompt, settings, text, two = _check(model, cases, prompt, tokens if quality else 0)
    how = {"temperature": 0, "ignore_eos": not two}  # behind its end a summary repeats itself
    scored = {(c.strategy, c.budget) for c in cases} if quality else set()
    runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    scores: dict[tuple[str, str], dict[str, float]] = {}
    with tqdm(total=len(cases) * repeats + len(scored), disable=not progress, desc="bench") as bar:
        for case in rotated(cases, repeats):
            bar.set_postfix_str(str(case))
            run = measure(model, case, prompt, tokens=tokens, seed=seed, **how)
            runs[case].append(run)
            bar.update()
        for strategy, budget in sorted(scored):
            bar.set_postfix_str(f"quality of {strategy}, {budget}")
            with opened(model, Case(strategy, budget, "disk"), seed=seed) as lab:
                score = lab._scored(text, progress=False, summaries=False)
            scores[strategy, budget] = {"kl_mean": score.kl_mean, "same_top1": score.same_top1}
            bar.update()
    frame = pd.DataFrame(
        [row(c, runs[c]) | settings[c] | scores.get((c.strategy, c.budget), {}) for c in cases]
    )
    frame.attrs = {"model": str(model), "prompt": prompt, "seed": seed}
    return frame


def report(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns people compare, as words; for `as_markdown`."""
    names = ["tokens/s", "hit ratio", "MB/token", "stall share"]
    names += ["KL"] if "kl_mean" in frame else []
    shown = frame[["strategy", "budget", "device"]].copy()
    shown["device"] += frame["timing"].map(lambda how: " (emulated)" * (how == "emulated"))
    rows = [figures(case, *names) for case in frame.to_dict("records")]
    return worded(shown.join(pd.DataFrame(rows)))


def _check(
    model: str | Path, cases: Sequence[Case], prompt: str | None, tokens: int
) -> tuple[str, dict[Case, dict[str, Any]], Text | None, bool]:
    """Refuse what would fail later; the prompt, each case's settings in full, and what to score.

    Last, whether the model summarises.
    """
    with moelab.open(model, budget="100%", measure_kl=False) as lab:
        settings = {
            case: {name: getattr(now, name) for name in SETTINGS}
            for case in cases
            if (now := settle(lab, case))
        }
        own = [text for texts in lab.prompts().values() for text in texts]
        asked = prompt if prompt is not None else next(iter(own), PROMPT)
        text: Text | None = None if lab.probes() else asked
        two = takes_pairs(lab._engine.model)
        if text and tokens and two:
            lab.update(strategy="lru", bits=max(lab.info()["tiers"]), budget="100%")
            run = lab.generate(asked, max_new_tokens=tokens, temperature=0, ignore_eos=True)
            text = pair_of(asked, run.text)
    return asked, settings, text, two
