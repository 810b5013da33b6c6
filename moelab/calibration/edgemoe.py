"""What EdgeMoE knows of a model before it runs: importance, curves K -> loss, the path table.

``lab.calibrate("edgemoe")`` measures, in this order,

1. the loss with all experts at each level (`levels`),
2. the importance of each expert: the loss with it at the lowest level and all others at INT4,
3. the search for K under the tolerated loss P, and a few K more for every pair of levels, so that
   P can be moved afterwards without measuring again (`curves`),
4. the path table, counted on one part of the texts, and its accuracy on the other.

The loss is that of a figure of quality (`figures`): the paper's is its task's metric, Rouge-2 of
summaries (``quality="rouge2"``); by default it is the relative rise of perplexity, for any text.
The paper's codec scales symmetrically per output channel; moelab's stores have a scale and a
minimum per group of 64, so INT2 costs less here. Everything is measured on the first three quarters
of each text, of several pairs on three quarters of them; `held_out` figures on the rest. By Rouge-2
that takes about (experts + 35) x 24 summaries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from moelab.calibration.figures import Evaluator, Parts, asked_for
from moelab.calibration.hobbit import gate_accuracy
from moelab.calibration.probes import Text, parted, record
from moelab.calibration.profile import Kept, once
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.trace import Trace
from moelab.strategies.edgemoe import (
    TOLERATED,
    Before,
    Experts,
    PathTable,
    Place,
    Sensitivity,
    activated,
    assign,
    bracket,
    by_importance,
    mixed,
)

if TYPE_CHECKING:
    from moelab.lab import Lab

LEVELS = (16, 8, 4, 2)
"""The paper's: full, INT8, INT4, INT2. Other tiers of a store are not used."""
COUNTED = 0.75
"""Share of each text that is measured and counted; the rest is held out."""
PATH_TOKENS = 1024
"""Tokens of each text that the path table takes at most."""
CURVE_POINTS = 8
"""Parts into which a curve K -> loss is divided, besides the points of the search."""


class Measured:
    """The loss of an assignment of bits; each is measured once and kept on disk by its name.

    The evaluator gives a figure's parts for key -> bits, ``best`` are the bits of full precision,
    ``done`` is called once for each name (a progress bar), ``on`` begins the names on disk.
    """

    def __init__(
        self, evaluator: Evaluator, best: int, kept: Kept, done: Callable[[], object], on: str = ""
    ) -> None:
        self._evaluator, self._kept, self._done, self._on = evaluator, kept, done, on
        self._known: dict[str, Parts] = {}
        self.full = self._parts("full", lambda _: best)
        self._evaluator.figure.loss(self.full, self.full)  # refuses what can lose nothing

    def __call__(self, name: str, bits: Callable[[Place], int]) -> float:
        """The loss under its figure; ``name`` says which assignment it is."""
        return self._evaluator.figure.loss(self._parts(name, bits), self.full)

    def curve(self, order: Sequence[Place], low: int, high: int, k: int) -> float:
        """Loss with the ``k`` first of ``order`` at ``low`` and the others at ``high``."""
        if k in (0, len(order)):
            return self.level(low if k else high)
        return self(f"curve {low}/{high} {k}", mixed(order, k, low, high).__getitem__)

    def level(self, bits: int) -> float:
        """Loss with every expert at ``bits``."""
        return self(f"level {bits}", lambda _: bits)

    def noise(self) -> dict[str, float]:
        """Standard errors of the losses so far, by name; empty where the figure tells none."""
        every = ((n, self._evaluator.figure.error(p, self.full)) for n, p in self._known.items())
        return {name: error for name, error in every if error is not None}

    def _parts(self, name: str, bits: Callable[[Place], int]) -> Parts:
        if name not in self._known:
            measure = partial(self._evaluator, bits)
            self._known[name] = once(self._kept, self._on + name, measure)
            self._done()
        return self._known[name]


def importance(loss: Measured, experts: Sequence[int], low: int, others: int) -> list[list[float]]:
    """Loss with one expert at ``low`` while all others are at ``others`` bits, ``[S][E]``."""

    def one(*at: int) -> float:
        return loss("importance {}.{}".format(*at), lambda key: low if key == at else others)

    return [[one(layer, e) for e in range(count)] for layer, count in enumerate(experts)]


def sensitivity(
    loss: Measured, experts: Sequence[int], levels: Sequence[int], tolerated: float
) -> dict[str, Any]:
    """Measurements 1 to 3: levels, importance, the search for K, and the curves K -> loss."""
    losses = {bits: loss.level(bits) for bits in levels}
    found = importance(loss, experts, levels[-1], levels[-2])
    order, curves = by_importance(found), {}
    for low, high in zip(levels[1:], levels, strict=False):
        ks = [round(len(order) * part / CURVE_POINTS) for part in range(CURVE_POINTS + 1)]
        curves[low, high] = {k: loss.curve(order, low, high, k) for k in ks}
    low, high = bracket(losses, tolerated)
    at_low = lambda bits: sum(b == low for b in bits.values())  # noqa: E731
    if low < high:
        _, points = assign(
            found, low, high, lambda bits: loss.curve(order, low, high, at_low(bits)), tolerated
        )
        curves[low, high] |= dict(points)
    return {
        "levels": {str(bits): value for bits, value in losses.items()},
        "importance": found,
        "curves": {
            f"{low}/{high}": [list(point) for point in sorted(points.items())]
            for (low, high), points in curves.items()
        },
        "tolerated": tolerated,
    }


# -- the path table -------------------------------------------------------------------------------


def sightings(steps: Iterable[LayerInput]) -> Iterator[tuple[int, Before, Experts]]:
    """Walk a recorded run: (layer, experts of the two layers before, experts activated).

    The walk goes on over the border of two tokens; a prompt begins a new one.
    """
    before: Before = ()
    for given in steps:
        if given.prefill and given.layer == 0:
            before = ()
        experts = activated(given)
        if not given.prefill:
            yield given.layer, before, experts
        before = (*before, experts)[-2:]


def accuracy(table: PathTable, run: Trace) -> dict[str, Any]:
    """How well a table foretells a recorded run that was not counted.

    Returns
    -------
    dict
        ``recall[n - 1]``: share of the activations that were among the n likeliest; ``by_layer``:
        the same at n = top-k, layer by layer; ``coverage``: share of the lookups whose longest
        known key has two, one, no previous layers.
    """
    shape, most = run.shape, max(run.shape.experts)
    found, known, asked, of_layer = Counter[int](), Counter(), Counter[int](), Counter[int]()
    for layer, before, chosen in sightings(run.steps):
        known[table.known(layer, before)] += 1
        place = {e: n for n, (e, _) in enumerate(table.probabilities(layer, before))}
        asked[layer] += len(chosen)
        for n in (place[e] for e in chosen if e in place):
            found[n] += 1
            of_layer[layer] += n < shape.top_k
    total, lookups = asked.total() or 1, known.total() or 1
    return {
        "recall": [sum(found[n] for n in range(first)) / total for first in range(1, most + 1)],
        "by_layer": [of_layer[layer] / asked[layer] for layer in sorted(asked)],
        "coverage": {str(n): known[n] / lookups for n in (2, 1, 0)},
    }


def paths(lab: Lab, counted: Sequence[Text], held_out: Sequence[Text]) -> dict[str, Any]:
    """Measurement 4: the table of the counted texts, and how well it foretells the others."""
    table, frequencies = PathTable(), PathTable()
    for layer, before, experts in sightings(record(lab, counted, tokens=PATH_TOKENS).steps):
        table.count(layer, before, experts)
        frequencies.count(layer, (), experts)
    unseen = record(lab, held_out, tokens=PATH_TOKENS, look_ahead=1)
    figures = accuracy(table, unseen)
    figures["frequencies"] = accuracy(frequencies, unseen)["recall"]
    if ahead := gate_accuracy(unseen).get("+1"):  # none where an encoder's layer is alone
        figures["stale_gate"] = ahead["top_k"]
    return {"paths": table.to_json(), "accuracy": figures}


def split(text: Text) -> tuple[Text, Text]:
    """The part that is counted and the part held out, cut between two words; of a pair's target."""
    if not isinstance(text, str):
        source, parts = text[0], split(text[1])
        return (source, str(parts[0])), (source, str(parts[1]))
    cut = text.rfind(" ", 0, int(len(text) * COUNTED) + 1)
    if cut <= 0:
        raise ValueError(f"a text of {len(text)} characters is too short to split: {text!r}")
    return text[:cut], text[cut:]


# -- the calibration ------------------------------------------------------------------------------


def made_from(
    lab: Lab,
    *,
    tolerated: float = TOLERATED,
    max_tokens: int = 96,
    quality: str = "loss",
    pairs: int | None = None,
) -> dict[str, Any]:
    """What the profile depends on besides the texts.

    Parameters
    ----------
    tolerated
        P: the loss up to which K is searched closely.
    max_tokens
        Tokens of each text that a loss is measured on. The path table takes all of them.
    quality
        The figure that P bounds: ``"loss"``, ``"kl"`` or of an encoder-decoder ``"rouge2"``.
    pairs
        Texts that it is measured on, of either part; default all, 24 for Rouge-2.

    Raises
    ------
    ValueError
        The store has fewer than two of EdgeMoE's levels, or the model none of that figure.
    """
    levels = [bits for bits in LEVELS if bits in lab._shape.nbytes]
    if len(levels) < 2:
        raise ValueError(
            f"EdgeMoE mixes two of {LEVELS} bits and this store has {sorted(lab._shape.nbytes)}; "
            "pack it again with tiers=(16, 4, 2)"
        )
    own = {"tolerated": tolerated, "max_tokens": max_tokens}
    # Version 0.3 had one figure: its profiles are named as it named them.
    return {"counted": COUNTED, "levels": levels, **own, **asked_for(lab, quality, pairs, "loss")}


def make(
    lab: Lab, texts: Sequence[Text], made: dict[str, Any], kept: Kept, *, progress: bool
) -> dict[str, Any]:
    """The profile's data, see the module's first lines."""
    counted, held_out = parted(texts, 1 - COUNTED, split)
    quality = made.get("quality", "loss")
    how = {"max_tokens": made["max_tokens"], "quality": quality, "most": made.get("pairs")}
    shape, levels, tolerated = lab._shape, made["levels"], made["tolerated"]
    count, best = sum(shape.experts), max(shape.nbytes)
    curves = (len(levels) - 1) * (CURVE_POINTS - 1) + math.ceil(math.log2(count))
    total = 2 * (1 + len(levels)) + count + curves + 2
    with tqdm(total=total, disable=not progress, desc="edgemoe") as bar:
        loss = Measured(Evaluator(lab, counted, **how), best, kept, bar.update)
        unseen = Measured(Evaluator(lab, held_out, **how), best, kept, bar.update, "held out: ")
        data = sensitivity(loss, shape.experts, levels, tolerated)
        if noise := loss.noise():
            data["full"], data["standard_errors"] = float(np.mean(loss.full)), noise
        bits = Sensitivity.of(data).bits(tolerated)
        assigned = unseen(f"assigned for {tolerated}", bits.__getitem__)
        of_levels = {str(level): unseen.level(level) for level in levels}
        data["held_out"] = {"levels": of_levels, "assigned": assigned}
        if noise := unseen.noise():
            data["held_out"]["standard_errors"] = noise
        walked = once(kept, "paths", lambda: paths(lab, counted, held_out))
        bar.total = bar.n + 1
        bar.update()
    return data | walked | {"quality": quality}
