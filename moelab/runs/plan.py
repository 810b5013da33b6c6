"""Which settings for this budget, this device and this much loss: predicted, then checked.

One short run is recorded. Every combination of strategy, bits and look-ahead is decided over its
stream and timed by the virtual clock. Then quality is measured, of the fastest first, until one is
good enough. What it does not know: other texts than those it was shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from moelab.models.chat import pair_of, takes_pairs
from moelab.runs.eligible import aheads, eligible
from moelab.runs.prediction import Prediction, Predictor
from moelab.scheduling.events import HIT, LOAD, SKIP, SUBSTITUTE
from moelab.settings import parse_budget
from moelab.spelling import in_words
from moelab.store.devices import device as find_device

if TYPE_CHECKING:
    import pandas as pd

    from moelab.lab import Lab
    from moelab.runs.run import Run

AHEAD = 2
"""Layers to look ahead at most."""
TOKENS, SCORED = 32, 24
"""Of the recorded run, and of each text that quality is measured on."""
BUDGETS = tuple(f"{percent}%" for percent in (10, 15, 20, 25, 33, 50, 75, 100))
ROUNDING = 1e-6
"""Nats that the same weights in another order of sums may differ by."""
ALIKE = 0.02
"""Predictions nearer than that are not told apart: the simpler, which comes first, is taken."""


@dataclass(repr=False)
class Plan(Mapping[str, Any]):
    """Settings, and why: ``lab.update(**plan)`` puts them in force.

    Attributes
    ----------
    settings
        What to set.
    prediction
        Of these settings; ``plan.prediction.check()`` makes that run.
    kl
        Mean KL of these settings against full precision, measured, in nats.
    reasons
        A sentence for each choice.
    table
        Every combination: its settings, predicted ``token_ms`` and ``hit_ratio``, and ``kl`` where
        it was measured.
    left_out
        Strategies that were not tried, and why: the recorded stream cannot stand for them.
    """

    settings: dict[str, Any]
    prediction: Prediction
    kl: float
    reasons: list[str]
    table: pd.DataFrame = field(repr=False)
    left_out: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    def __repr__(self) -> str:
        words = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        ms = self.prediction.token_ms
        head = f"<Plan: {words}: {ms:.1f} ms a token (modelled), KL {self.kl:.4f} (measured)"
        said = [*self.reasons]
        if self.left_out:
            said.append(f"not tried, plan.left_out says why: {', '.join(self.left_out)}")
        return "\n".join([head, *(f"  {one}" for one in said)]) + ">"


def plan(
    lab: Lab,
    *,
    budget: Any = None,
    device: str | None = None,
    max_kl: float = 0.05,
    run: Run | None = None,
    strategies: Sequence[str] | None = None,
    progress: bool | None = None,
) -> Plan:
    """Find the fastest settings within a budget and a loss.

    Parameters
    ----------
    budget, device
        As in ``lab.update``; default: as they are.
    max_kl
        The mean KL against full precision that may be lost, in nats.
    run
        Whose stream is decided again, recorded in this lab with ``prefetch=2`` or more; default: a
        short one is made.
    strategies
        To choose from, in the order of preference where they are alike; default: all that the
        recorded stream can stand for, see `moelab.runs.eligible`.
    progress
        Show a bar; default as the lab was opened.

    Raises
    ------
    ValueError
        A setting is refused, or nothing within the budget loses so little.
    RuntimeError
        The lab is at work.

    Examples
    --------
    >>> plan = moelab.plan(lab, budget="25%", device="emmc", max_kl=0.05)  # doctest: +SKIP
    >>> lab.update(**plan)  # doctest: +SKIP
    """
    if not isinstance(max_kl, int | float) or not max_kl >= 0:
        raise ValueError(f"max_kl={max_kl!r}: nats, 0 or more")
    if not hasattr(lab, "_session"):
        raise TypeError(f"this is a {type(lab).__name__}; give the lab: moelab.plan(lab)")
    if isinstance(strategies, str):
        strategies = (strategies,)
    given = {"budget": budget, "device": device}
    fixed = {name: value for name, value in given.items() if value is not None}
    if budget == "auto":
        raise ValueError("budget='auto' follows the machine during a run; give a plan a size")
    if budget is not None:  # refused before work begins
        parse_budget(budget, lab._shape)
    if device is not None:
        find_device(device)
    bar = lab._progress if progress is None else progress
    with _beside(lab) as second:
        run = run or _recorded(second)
        left_out: dict[str, str] = {}
        if strategies is None:
            strategies, left_out = eligible(second, run, fixed)
        predict = Predictor(run, second)
        found = _candidates(second, predict, fixed, strategies, progress=bar)
        found.sort(key=lambda one: one[1].token_ms)
        chosen, losses = _good_enough(second, run, found, max_kl, progress=bar)
    chosen = _simplest(found, losses, chosen, max_kl, strategies)
    settings, prediction = found[chosen]
    prediction = dataclasses.replace(prediction, _lab=lab)
    return Plan(
        settings,
        prediction,
        losses[chosen],
        _reasons(found, losses, chosen, max_kl),
        _table(found, losses),
        left_out,
    )


Found = list[tuple[dict[str, Any], Prediction]]


def surface(
    lab: Lab,
    run: Run | None = None,
    *,
    budgets: Sequence[Any] | None = None,
    strategies: Sequence[str] = ("lru", "lfu"),
    told: Callable[[float], None] = lambda _: None,
) -> pd.DataFrame:
    """Memory, speed and loss at once: of each budget and tier the fastest settings.

    Parameters
    ----------
    lab, run, strategies
        As in `plan`; strategies of one precision, whose loss hangs on their bits alone.
    budgets
        As in ``lab.update`` (default: eight from 10 to 100 %); those below a need are left out.
    told
        Is told how much is done, 0 to 1.

    Returns
    -------
    DataFrame
        A row for each budget and tier: ``budget_bytes``, ``bits``, ``strategy``, ``prefetch``;
        ``tokens_per_s`` and ``hit_ratio`` predicted; ``kl_mean`` measured; ``best``: no other is
        smaller, faster and nearer to full precision. ``attrs["error"]``: how far the model is off
        for the run itself.
    """
    import pandas as pd

    budgets = budgets or BUDGETS
    found, losses = list[dict[str, Any]](), dict[int, float]()
    steps, done = len(budgets) + len(lab._shape.nbytes), 0
    with _beside(lab) as second:
        run = run or _recorded(second)
        predict = Predictor(run, second)
        for budget in budgets:
            with contextlib.suppress(ValueError):  # less than any of them needs
                of = _candidates(second, predict, {"budget": budget}, strategies, progress=False)
                nbytes = parse_budget(budget, lab._shape)
                found += [{**one, "budget_bytes": nbytes, "was": p} for one, p in of]
            told((done := done + 1) / steps)
        for bits in lab._shape.nbytes:
            second.update(strategy="lru", bits=bits)
            losses[bits] = _lost(second, run)
            told((done := done + 1) / steps)
    rows = pd.DataFrame(found)
    error = found[0]["was"].error
    rows["tokens_per_s"] = [1e3 / p.token_ms for p in rows["was"]]
    rows["hit_ratio"] = [p.replay.hit_ratio for p in rows.pop("was")]
    rows["kl_mean"] = [losses[bits] for bits in rows["bits"]]
    fastest = rows.groupby(["budget_bytes", "bits"])["tokens_per_s"].idxmax()
    rows = rows.loc[fastest].reset_index(drop=True)
    figures = rows[["budget_bytes", "tokens_per_s", "kl_mean"]].to_numpy() * [1, -1, 1]
    beaten = [((figures <= one).all(1) & (figures < one).any(1)).any() for one in figures]
    columns = ["budget_bytes", "bits", "strategy", "prefetch"]
    rows = rows[[*columns, "tokens_per_s", "hit_ratio", "kl_mean"]].assign(best=~np.array(beaten))
    rows.attrs["error"] = error
    return rows


@contextlib.contextmanager
def _beside(lab: Lab) -> Iterator[Lab]:
    """A second lab to try things in, so that what is set in the first stays as it is shown."""
    settings = dataclasses.replace(lab.settings, measure_kl=False)
    lab._session.claim()  # what fails here fails in the second lab: nothing is to be recovered
    try:
        with lab._beside(settings) as second:
            yield second
            lab._session.take_over(second._session)
    finally:
        lab._session.release()


def _recorded(lab: Lab) -> Run:
    """A short run that looks ahead, so that strategies which do can be decided over it."""
    before = lab.settings
    lab.update(strategy="lru", prefetch=AHEAD, device="disk")
    prompts = [text for texts in lab.prompts().values() for text in texts]
    prompt = prompts[0] if prompts else "Once upon a time there was a"
    run = lab.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True, chat=False)
    lab._session.put(before)
    return run


def _candidates(
    lab: Lab,
    predict: Predictor,
    fixed: dict[str, Any],
    strategies: Sequence[str],
    *,
    progress: bool,
) -> Found:
    """Every combination that these settings allow, with what it would take."""
    tiers = sorted(lab._shape.nbytes, reverse=True)
    every = list(itertools.product(strategies, tiers))
    found: Found = []
    refused = "there is no combination to choose from"
    for name, bits in tqdm(every, desc="predicting", unit="setting", disable=not progress):
        plain = {**fixed, "strategy": name, "bits": bits}
        try:
            settings = lab.settings.change(lab._shape, make=lab._strategies, **plain)
            for ahead in aheads(settings.strategy, AHEAD) if settings.bits == bits else ():
                asked = {**plain, "prefetch": ahead}
                settings = lab.settings.change(lab._shape, make=lab._strategies, **asked)
                if settings.prefetch == ahead:  # it may have a way of its own
                    found.append((asked, predict(**asked)))
        except ValueError as error:
            refused = in_words(error)
    if not found:
        raise ValueError(refused)
    return found


def _lost(lab: Lab, run: Run) -> float:
    """Mean KL of the settings in force: on the model's probes, or on what the run wrote."""
    two = takes_pairs(lab._engine.model)
    wrote = pair_of(run.prompt, run.text) if two else run.prompt + run.text
    text = None if lab.probes() else wrote
    return lab._scored(text, SCORED, progress=False, summaries=False).kl_mean


def _good_enough(
    lab: Lab, run: Run, found: Found, max_kl: float, *, progress: bool
) -> tuple[int, dict[int, float]]:
    """The first of ``found`` that loses no more than that, and what was measured on the way.

    Those that are as fast as it are measured too: one of them may lose less. Those that skip, or
    serve at fewer bits, are measured where they are faster than what does not; and where their bits
    alone lose too much, they are expected to.
    """
    known: dict[Any, float] = {}  # of one precision, bits say it all
    losses: dict[int, float] = {}
    chosen, limit = None, float("inf")

    def loss(of: Any, settings: dict[str, Any]) -> float:
        if of not in known:
            lab.update(**settings)
            known[of] = _lost(lab, run)
        return known[of]

    mixed = [_mixed(prediction, settings["bits"]) for settings, prediction in found]
    order = sorted(range(len(found)), key=mixed.__getitem__)
    for at in tqdm(order, desc="scoring", disable=not progress):
        (settings, prediction), bits = found[at], found[at][0]["bits"]
        if mixed[at]:
            if prediction.token_ms * (1 + ALIKE) >= limit or chosen is None or mixed[chosen]:
                continue
            if loss(bits, {**settings, "strategy": "lru"}) > max_kl + ROUNDING:
                continue
        elif prediction.token_ms > limit and bits not in known:
            continue
        losses[at] = loss(at if mixed[at] else bits, settings)
        if (chosen is None or mixed[at]) and losses[at] <= max_kl + ROUNDING:
            chosen, limit = at, prediction.token_ms * (1 + ALIKE)
    if chosen is None:
        least = min(known.values())
        raise ValueError(f"max_kl={max_kl}: the least within this budget is {least:.2g} nats")
    return chosen, losses


def _mixed(prediction: Prediction, bits: int) -> bool:
    """Whether an expert was served at other bits than these, by another one, or not at all."""
    kinds = {(row[0], row[4]) for row in prediction.replay.rows}
    return any(
        kind in (SKIP, SUBSTITUTE) or (kind in (HIT, LOAD) and served not in (0, bits))
        for kind, served in kinds
    )


def _simplest(
    found: Found, losses: dict[int, float], chosen: int, max_kl: float, order: Sequence[str]
) -> int:
    """Of those that are not told apart from the fastest, the one that does least."""
    limit = found[chosen][1].token_ms * (1 + ALIKE)
    alike = [
        at for at, (_, prediction) in enumerate(found)
        if prediction.token_ms <= limit and losses.get(at, max_kl + 1) <= max_kl + ROUNDING
    ]  # fmt: skip

    def does(at: int) -> tuple[int, int, int]:
        settings = found[at][0]
        return settings["prefetch"], -settings["bits"], order.index(settings["strategy"])

    return min(alike, key=does)


def _reasons(found: Found, losses: dict[int, float], chosen: int, max_kl: float) -> list[str]:
    """Why these bits, this look-ahead and this strategy: what another one would have been."""
    settings, prediction = found[chosen]
    said = []
    for name in ("bits", "prefetch", "strategy"):
        others = [
            (one[name], other.token_ms, losses.get(at))
            for at, (one, other) in enumerate(found)
            if one[name] != settings[name] and all(one[k] == settings[k] for k in one if k != name)
        ]
        words = [
            f"{value}: {ms:.1f} ms"
            + (f", KL {kl:.3g}" + " is too much" * (kl > max_kl) if kl else "")
            for value, ms, kl in others
        ]
        mine = f"{name}={settings[name]!r}, {prediction.token_ms:.1f} ms"
        said.append(
            f"{mine} ({'; '.join(words)})" if words else f"{mine} (nothing else is allowed)"
        )
    return said


def _table(found: Found, losses: dict[int, float]) -> pd.DataFrame:
    import pandas as pd

    rows = [
        settings
        | {"token_ms": one.token_ms, "hit_ratio": one.replay.hit_ratio, "kl": losses.get(at)}
        | {"approximate": one.approximate}
        for at, (settings, one) in enumerate(found)
    ]
    return pd.DataFrame(rows).astype({"kl": float})
