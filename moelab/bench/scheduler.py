"""What deciding costs: the scheduler alone over a made routing stream, without model or disk.

Timed is what an engine asks for in a layer: `Scheduler.step`, and mask, bias and depth of the next;
neither making the stream nor obeying the plan is. It is CPU time, so that other programs do not
count, and the clock's own microsecond a layer is in it. Strategies have no profile: what a
calibration would change of their cost is not known here.

The stream: an expert's score is sqrt(s) times its popularity in its layer plus sqrt(1 - s) times
what comes with the token, of which a part goes over to the next token. Layers differ in s. At
48 x 128, top-6, that resembles a trace of Qwen3-30B-A3B: 87 % of a layer's requests go to its 25 %
most used experts (there 86 %), the next token uses 42 % of a token's experts again (38 %), and LRU
with room for a quarter of the experts hits 82 % (83 %).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import moelab
from moelab.bench.tables import as_markdown, circumstances
from moelab.scheduling.events import HIT, LOAD, SKIP, SUBSTITUTE
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Knobs, LookAhead, Shape

NBYTES = {16: 1600, 4: 400}
SMALL, LARGE = (6, 16, 2), (48, 128, 8)
"""Layers, experts of each, top-k."""
SHARE = 25
"""Budget in % of the experts, where it is not what varies."""
GROWING = ("lru", "lfu", "hobbit", "edgemoe")
GROWTH = tuple(
    (LARGE[0], experts, LARGE[2], budget)
    for experts, budget in ((32, 25), (64, 25), (128, 12.5), (128, 25), (128, 50), (256, 25))
)
NOT_SWITCHED = ("in_ram", "swapmoe", "static_pruning")
"""Strategies whose prefetching is the strategy: it cannot be switched off."""
FULL = {"prompt": 64, "warm": 4, "tokens": 8, "repeats": 3, "seed": 0}
QUICK = {"prompt": 16, "warm": 2, "tokens": 4, "repeats": 1, "seed": 0}
SHOWN = {
    "ms": ("ms/token", "{:.2f}"),
    "activations_per_s": ("activations/s", "{:,.0f}"),
    "hit_ratio": ("hit ratio", "{:.3f}"),
}
COLUMNS = ("layers", "experts", "top_k", "budget", "strategy", "look_ahead", *SHOWN)
WIDTH = 2048
"""Of an embedding."""
POPULARITY, TO_NEXT_TOKEN, GUESS_NOISE = (0.2, 0.9), 0.4, 0.25
"""s of the least and the most predictable layer, the part that goes over, noise of a look-ahead."""


# -- the stream: T tokens, L layers, E experts of each --------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Scores of a prompt's and the following tokens ``[T, L, E]``, and a look-ahead's of them."""

    shape: Shape
    scores: np.ndarray
    guesses: np.ndarray
    prompt: int

    def given(self, layer: int, token: int, depth: int, mask: Any, bias: Any) -> LayerInput:
        """What a layer tells of the n-th token after the prompt, under a mask and a bias."""
        at, k = self.prompt + token, self.shape.top_k
        own = scores = self.scores[at, layer]
        if bias is not None:
            scores = scores + np.asarray(bias) * np.ptp(scores)
        if mask is not None:
            scores = np.where(mask, scores, -np.inf)
        wanted = (None, None) if scores is own else _chosen(own[None], k)
        ahead = ()
        if depth:
            experts, weights = _chosen(self.guesses[at : at + 1, layer + 1], k)
            ahead = (LookAhead(layer + 1, experts[0], weights[0]),)
        chosen = _chosen(scores[None], k)
        return LayerInput(layer, *chosen, False, ahead, *wanted, (1.0,), **self.whole(layer, at))

    def read(self, layer: int) -> LayerInput:
        """What a layer tells of the prompt."""
        chosen = _chosen(self.scores[: self.prompt, layer], self.shape.top_k)
        norms = (1.0,) * self.prompt
        return LayerInput(layer, *chosen, True, norms=norms, **self.whole(layer, 0))

    def whole(self, layer: int, at: int) -> dict[str, Any]:
        """Probabilities of all experts, and for an embedding what comes with the token."""
        p = np.exp(self.scores[at, layer])
        told = {"probabilities": array("d", (p / p.sum()).tolist())}
        token = {"embedding": array("d", self.scores[at].ravel()[:WIDTH])}
        return told if layer else told | token


@lru_cache(maxsize=1)
def stream(layers: int, experts: int, top_k: int, *, prompt: int, tokens: int, seed: int) -> Stream:
    """Make a stream of a prompt and tokens; the same seed makes the same stream."""
    rng = np.random.default_rng(seed)
    s = rng.permutation(np.linspace(*POPULARITY, layers))[:, None]  # [L, 1]
    popular, comes = rng.standard_normal((2, layers, experts))
    scores = np.empty((prompt + tokens, layers, experts))
    for t in range(len(scores)):
        new = rng.standard_normal((layers, experts))
        comes = TO_NEXT_TOKEN * comes + np.sqrt(1 - TO_NEXT_TOKEN**2) * new
        scores[t] = np.sqrt(s) * popular + np.sqrt(1 - s) * comes
    guesses = scores + GUESS_NOISE * rng.standard_normal(scores.shape)
    return Stream(Shape((experts,) * layers, top_k, NBYTES), scores, guesses, prompt)


def _chosen(scores: np.ndarray, top_k: int) -> tuple[tuple, tuple]:
    """The top-k experts by falling score and their gate weights, of scores ``[T, E]``."""
    best = np.argsort(-scores, axis=1)[:, :top_k]
    weights = np.exp(np.take_along_axis(scores, best, axis=1))
    weights /= weights.sum(axis=1, keepdims=True)
    return tuple(map(tuple, best.tolist())), tuple(map(tuple, weights.tolist()))


# -- what hangs on the scheduler's API ------------------------------------------------------------


def _looking(name: str, look_ahead: int) -> Strategy | None:
    """A strategy that looks ahead so many layers; None where it cannot."""
    strategy = moelab.strategies.make(name)
    if name in NOT_SWITCHED:
        return strategy if look_ahead else None
    tuned = {"depth": look_ahead} | ({} if look_ahead else {"width": 0})
    return strategy.tuned(**{n: v for n, v in tuned.items() if n in strategy.parameters})


def _scheduler(made: Stream, strategy: Strategy, budget: float) -> Scheduler:
    """A scheduler that has read the prompt twice: it has a past, and its cache is full."""
    knobs = Knobs(round(made.shape.all_bytes(16) * budget / 100), 16)
    live = Scheduler(made.shape, strategy, knobs)
    for _ in range(2):
        live.new_sequence()
        live.begin()
        for layer in range(made.shape.layers):
            live.step(made.read(layer))
        live.end_of_token()
    return live


def _token(live: Scheduler, made: Stream, at: int) -> np.ndarray:
    """Let a scheduler decide a token: the CPU seconds it took, hits, requests."""
    layers, seconds, hits, requests = made.shape.layers, 0.0, 0, 0
    mask, bias, depth = live.mask(0), live.bias(0), live.look_ahead(0, prefill=False)
    for layer in range(layers):
        given, coming = made.given(layer, at, depth, mask, bias), (layer + 1) % layers
        begun = time.process_time()
        plan = live.step(given)
        mask, bias = live.mask(coming), live.bias(coming)
        depth = live.look_ahead(coming, prefill=False)
        if coming == 0:
            live.end_of_token()
        seconds += time.process_time() - begun
        kinds = [row[0] for row in plan.rows]
        hits += kinds.count(HIT) + kinds.count(SUBSTITUTE)
        requests += sum(map(kinds.count, (HIT, SUBSTITUTE, LOAD, SKIP)))
    return np.array([seconds, hits, requests])


# -- the suite ------------------------------------------------------------------------------------


def deciding(*, quick: bool = False, progress: bool = True, **extent: int) -> pd.DataFrame:
    """Measure every strategy at both sizes, and some as the model and the budget grow.

    Parameters
    ----------
    quick
        The small size only, few tokens, once.
    progress
        Show a bar. Ctrl-C ends the measuring and keeps the rows there are.
    extent
        Other numbers than `FULL` or `QUICK` have: tokens of the prompt, to warm up and timed.

    Returns
    -------
    DataFrame
        A row has `COLUMNS`: experts of each layer, budget in % of the experts, ms of a token;
        ``attrs`` has the extent, and whether it is complete. For `deciding_report`, `as_record`.
    """
    how = {**(QUICK if quick else FULL), **extent}
    sizes = [(*SMALL, SHARE)] if quick else [(*SMALL, SHARE), (*LARGE, SHARE)]
    cases: list[Any] = [*itertools.product(sizes, moelab.strategies.NAMES, (0, 1))]
    cases += [] if quick else itertools.product(GROWTH, GROWING, (1,))
    rows, complete, tokens = [], False, how["warm"] + how["tokens"]
    with contextlib.suppress(KeyboardInterrupt):
        for case in tqdm(dict.fromkeys(cases), "scheduler", disable=not progress):
            (*size, budget), name, look_ahead = case
            made = stream(*size, prompt=how["prompt"], tokens=tokens, seed=how["seed"])
            if (strategy := _looking(name, look_ahead)) is not None:
                found = _measured(made, budget, strategy, how)
                rows.append((*size, budget, name, look_ahead, *found))
        complete = True
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.attrs = {"suite": "scheduler", "complete": complete, **how}
    return frame


def _measured(
    made: Stream, budget: float, strategy: Strategy, how: Mapping[str, int]
) -> tuple[float, float, float]:
    """Milliseconds a token, activations/s, hit ratio."""
    runs = []
    for _ in range(how["repeats"]):
        live = _scheduler(made, strategy, budget)
        tokens = [_token(live, made, at) for at in range(how["warm"] + how["tokens"])]
        runs.append(np.sum(tokens[how["warm"] :], axis=0))
    seconds, hits, requests = np.median(runs, axis=0).tolist()
    activations = made.shape.layers * made.shape.top_k * how["tokens"]
    return 1e3 * seconds / how["tokens"], activations / seconds, hits / requests


def deciding_report(frame: pd.DataFrame) -> str:
    """The tables in Markdown: every strategy at each size, then how the cost grows."""
    machine, how = circumstances()["machine"], frame.attrs
    told = (
        f"CPU time of the scheduler alone on {machine['processor']}, {machine['cores']} cores; "
        f"median of {how['repeats']} times {how['tokens']} tokens, the cache full. An activation: "
        "an expert of a token in a layer. Empty: the strategy's prefetching cannot be switched off."
    )
    out = [told] if how["complete"] else [told, "**Stopped early.**"]
    shown = frame.assign(
        ahead=["one layer ahead" if n else "no look-ahead" for n in frame["look_ahead"]],
        case=[f"{n}, {b:g} %" for n, b in zip(frame["experts"], frame["budget"], strict=True)],
        **{title: frame[name].map(form.format) for name, (title, form) in SHOWN.items()},
    )
    for layers, experts, top_k in (SMALL, LARGE):
        part = shown.query(f"layers == {layers} and experts == {experts} and budget == {SHARE}")
        if len(part):
            out.append(f"**{layers} x {experts}, top-{top_k}, {SHARE:g} % of the experts**")
            out.append(_wide(part, "ahead", [title for title, _ in SHOWN.values()]))
    shown = shown.sort_values(["experts", "budget"], kind="stable")
    grown = shown.query(f"layers == {LARGE[0]} and look_ahead == 1 and strategy in {GROWING}")
    if len(grown):
        out.append(f"**{LARGE[0]} layers, top-{LARGE[2]}: experts of each, and the budget**")
        out.append(_wide(grown, "case", ["ms/token"]))
    return "\n\n".join(out) + "\n"


def _wide(part: pd.DataFrame, across: str, values: list[str]) -> str:
    """A row for each strategy, the cases side by side."""
    wide = part.pivot_table(values, "strategy", across, aggfunc="first")
    columns = [(value, case) for value in values for case in dict.fromkeys(part[across])]
    wide = wide.loc[[n for n in moelab.strategies.NAMES if n in wide.index], columns].fillna("")
    wide.columns = [", ".join(words) for words in columns]
    return as_markdown(wide.reset_index())
