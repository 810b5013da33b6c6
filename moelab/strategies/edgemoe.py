"""EdgeMoE (Yi et al., arXiv 2308.14352): bits per expert, preloading along paths, a buffer.

The paper's symbols: S MoE layers, counted from 0; I the layer computed now; i an expert's layer;
f an expert's activation frequency; L what decides who leaves; P the tolerated loss; K how many
experts are stored at the lower of two bitwidths. A token walks the layers as a ring: after layer
S - 1 comes layer 0 of the next token.

Only the bits change what the model says: preloading and the buffer change nothing but time. The
numbers a strategy starts from (importance, curves, path table) are measured by
``lab.calibrate("edgemoe")``. Prefill is left alone, as in the paper: nothing is preloaded there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np

from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import (
    Allocate,
    Evict,
    LookAhead,
    Parameter,
    Prediction,
    Prefetch,
    Strategy,
    View,
)
from moelab.strategies.edgemoe_paths import Before, Experts, PairTable, PathTable

TOLERATED = 0.02
"""P of the paper: 2 %."""
Place = tuple[int, int]
"""(layer, expert)."""

# -- allocate: bits per expert under a tolerated loss ---------------------------------------------


def bracket(losses: Mapping[int, float], tolerated: float) -> tuple[int, int]:
    """The two adjacent levels (low, high) between which the tolerated loss P lies.

    Parameters
    ----------
    losses
        Bits -> loss with every expert at that level.
    tolerated
        P.

    Returns
    -------
    tuple[int, int]
        ``high``: the fewest bits whose loss is within P; ``low``: the next level below. Both are
        the same where even the lowest level is within P, or not even the highest is.

    Examples
    --------
    >>> bracket({16: 0.0, 8: 0.001, 4: 0.01, 2: 0.3}, tolerated=0.02)
    (2, 4)
    """
    levels = sorted(losses)
    within = [bits for bits in levels if losses[bits] <= tolerated]
    high = within[0] if within else levels[-1]
    below = [bits for bits in levels if bits < high]
    return (below[-1] if within and below else high), high


def by_importance(importance: Sequence[Sequence[float]]) -> list[Place]:
    """Every expert, the least important first, from losses ``[S][E]``."""
    keys = [(layer, e) for layer, row in enumerate(importance) for e in range(len(row))]
    return sorted(keys, key=lambda key: (importance[key[0]][key[1]], key))


def mixed(order: Sequence[Place], k: int, low: int, high: int) -> dict[Place, int]:
    """Bits of every expert: the first ``k`` of ``order`` at ``low``, the others at ``high``."""
    return {key: low if place < k else high for place, key in enumerate(order)}


def assign(
    importance: Sequence[Sequence[float]],
    low: int,
    high: int,
    loss_of: Callable[[Mapping[Place, int]], float],
    tolerated: float = TOLERATED,
) -> tuple[dict[Place, int], list[tuple[int, float]]]:
    """Search K, the number of experts at ``low``, until the measured loss reaches P.

    By bisection: about log2(experts) measurements. A measured loss is not strictly monotone in K:
    the K found was itself measured to be within P and K + 1 not to be, but further crossings may
    exist. K is 0 where not even K = 0 is within P.

    Parameters
    ----------
    importance
        Loss with one expert at the lowest level, ``[S][E]``.
    low, high
        The two bitwidths, from `bracket`; only these are ever mixed.
    loss_of
        Measures the loss of an assignment, key -> bits.
    tolerated
        P.

    Returns
    -------
    tuple
        The assignment, and the measured points (K, loss) by rising K.
    """
    order = by_importance(importance)
    curve = {k: loss_of(mixed(order, k, low, high)) for k in (0, len(order))}
    within, beyond = 0, len(order)
    if curve[beyond] <= tolerated:
        within = beyond
    while beyond - within > 1 and curve[0] <= tolerated:
        k = (within + beyond) // 2
        curve[k] = loss_of(mixed(order, k, low, high))
        within, beyond = (k, beyond) if curve[k] <= tolerated else (within, k)
    return mixed(order, within, low, high), sorted(curve.items())


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What was measured of a model: enough to assign bits for any P without measuring again.

    ``importance`` ``[S][E]``; ``levels`` bits -> loss of all experts at that level; ``curves``
    (low, high) -> measured points (K, loss).
    """

    importance: Sequence[Sequence[float]]
    levels: Mapping[int, float]
    curves: Mapping[tuple[int, int], Sequence[tuple[int, float]]]

    @classmethod
    def of(cls, profile: Mapping[str, Any]) -> Self:
        """Out of a profile's JSON."""
        curves = {}
        for pair, points in profile["curves"].items():
            low, high = map(int, pair.split("/"))
            curves[low, high] = [(int(k), float(loss)) for k, loss in points]
        levels = {int(bits): loss for bits, loss in profile["levels"].items()}
        return cls(profile["importance"], levels, curves)

    def choose(self, tolerated: float) -> tuple[int, int, int]:
        """(low, high, K) for P: of the *measured* K the largest whose loss is within P."""
        low, high = bracket(self.levels, tolerated)
        points = self.curves.get((low, high), ())
        return low, high, max((k for k, loss in points if loss <= tolerated), default=0)

    def bits(self, tolerated: float) -> dict[Place, int]:
        """Bits of every expert for P."""
        low, high, k = self.choose(tolerated)
        return mixed(by_importance(self.importance), k, low, high)


class BitAssignment(Allocate):
    """Bits per expert, fixed while P is, never above the ``bits`` setting.

    Without measurements every expert is asked for at ``bits``.
    """

    title = "bits by importance (EdgeMoE)"
    parameters = (
        Parameter(
            "tolerated",
            "P: loss allowed, by the figure it was calibrated with; more experts at fewer bits",
            0.0,
            0.25,
            0.005,
        ),
    )

    def __init__(
        self, sensitivity: Sensitivity | None = None, tolerated: float = TOLERATED
    ) -> None:
        if tolerated < 0:
            raise ValueError(f"tolerated={tolerated!r}: a loss, 0 or more (0.02 is the paper's)")
        self.sensitivity, self.tolerated = sensitivity, tolerated

    def bits(self, view: View) -> int | np.ndarray:
        shape, most = view.shape, view.knobs.bits
        asked = np.full(shape.n, most)
        if self.sensitivity:
            for place, bits in self.sensitivity.bits(self.tolerated).items():
                asked[shape.key(*place)] = min(bits, most)
        return asked


# -- prefetch: along the paths --------------------------------------------------------------------


def activated(given: LayerInput) -> Experts:
    """The experts of the newest token in this layer (batch 1, as in the paper)."""
    return tuple(sorted(given.experts[-1])) if given.experts else ()


KEYS = ("auto", "sets", "pairs")


class Preload(Prefetch):
    """Preload the coming layer's likeliest experts until its router has spoken.

    The I/O thread takes them one by one, likeliest first, while this layer computes; after the
    last layer, those of layer 0 of the next token (ours: the paths are walked as a ring, like the
    distances of eviction). When the coming layer's router has spoken, the engine withdraws those
    whose read had not begun (`LayerInput.unread`): a wrong guess costs at most the read it is in.

    Parameters
    ----------
    table
        Counted offline; without one, the strategy counts its own as it decodes.
    key
        What paths are known by: ``"sets"``, the paper's exact sets of experts of two layers;
        ``"pairs"``, ours, one expert of the layer before at a time; ``"auto"``: pairs where top-k
        is above 2. A table of its own counts by what is in force.
    width
        Experts of the coming layer to preload at most, those in memory not counted; the paper
        reports 1 to 3. Ours: a preload takes its room in the buffer when it is issued, so too many
        push others out.
    """

    title = "path table over two layers (EdgeMoE)"
    parameters = (
        Parameter("width", "experts of the coming layer to preload at most", 0.0, 16.0, 1.0),
        Parameter("key", "what paths are known by; auto: pairs above top-2", choices=KEYS),
    )
    observes = frozenset({"unread"})

    def __init__(self, table: PathTable | None = None, width: int = 1, key: str = "auto") -> None:
        self.table = PathTable() if table is None else table
        self.width, self.key = (
            p.checked(v) for p, v in zip(self.parameters, (width, key), strict=True)
        )
        self._pairs: PairTable | None = None
        self._before: Before = ()

    def paths(self, view: View) -> PathTable | PairTable:
        """The table in force."""
        if self.key == "sets" or (self.key == "auto" and view.shape.top_k <= 2):
            return self.table
        if self._pairs is None:
            self._pairs = self.table.pairs(view.shape.experts, view.shape.encoder_layers)
        return self._pairs

    def observe(self, given: LayerInput, view: View) -> None:
        experts, table = activated(given), self.paths(view)
        if not (table.frozen or given.prefill):
            table.count(given.layer, self._before, experts)
        self._before = (*self._before, experts)[-2:]

    def new_sequence(self) -> None:
        self._before = ()

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        coming = view.shape.following(layer)
        keys, table = view.shape.keys(coming), self.paths(view)
        absent = view.bits[keys] < view.asked[keys]
        # Pairs give nearly every expert some probability: one below chance is no guess.
        least = 0.0 if table is self.table else view.shape.top_k / view.shape.experts[coming]
        left = int(self.width)
        for rank, (expert, p) in enumerate(table.probabilities(coming, self._before)):
            # Of the likeliest, as many as come, those in memory are guesses too: they stay.
            likely = rank < view.shape.top_k
            if p < least or not (left or likely):
                break
            if absent[expert] and left:
                left -= 1
                yield Prediction(coming, expert, p, rank)
            elif likely and not absent[expert]:
                yield Prediction(coming, expert, p, rank)


# -- evict: frequency over layer distance ---------------------------------------------------------

RULES = ("described", "printed")


def distance(i: int | np.ndarray, now: int, layers: int, rule: str = "described") -> np.ndarray:
    """Layers on the ring between each expert's layer i and the current layer I, 1 to S.

    ``described``: (i - I) mod S, how far ahead its layer is. ``printed``: (S - i + I) mod S, how
    far behind. Both are 0 at i = I, where the formula would divide by zero: an expert of the
    current layer is needed again one whole round later, hence S.
    """
    steps = (i - now) if rule == "described" else (layers - i + now)
    return np.where(steps % layers, steps % layers, layers)


@lru_cache
def _distances(layers: int, encoder: int, rule: str) -> np.ndarray:
    """`distance` of every layer from every layer at work ``[L at work, L]``.

    The ring of a decoded token begins behind the first ``encoder`` layers; of these, what the
    prompt has run through is as far as can be, by either rule.
    """
    found, every = np.full((layers, layers), layers), np.arange(layers)
    for now in range(layers):
        first = encoder if now >= encoder else 0
        ring = distance(every[first:], now, layers - first, rule)
        found[now, max(first, min(now, encoder)) :] = ring[max(0, min(now, encoder) - first) :]
    return found


class FrequencyOverDistance(Evict):
    """The highest L = -f/d leaves: seldom activated, and far from its turn.

    As printed in the paper, d = (S - i + I) mod S sends the *next* layer's experts away first,
    against the paper's own words ("farther layers go first"); as described, d = (i - I) mod S.
    f is an expert's activations per token of this sequence, its prompt included (ours: the paper
    leaves the window open). Among equals the least recently used leaves.
    """

    title = "frequency over layer distance (EdgeMoE)"
    explained: ClassVar = {
        "f": "activations per token of this sequence",
        "d": "distance of its layer from the one computed now",
        "L": "-f/d; the highest leaves",
    }
    parameters = (
        Parameter("rule", "layer distance as the paper describes it or prints it", choices=RULES),
    )

    def __init__(self, rule: str = "described") -> None:
        self.rule = self.parameters[0].checked(rule)
        self._activations = np.zeros(0)  # in this sequence [n]
        self._tokens = np.zeros(0)  # that each layer has seen [L]

    def observe(self, given: LayerInput, view: View) -> None:
        if not len(self._tokens):
            self._activations = np.zeros(view.shape.n)
            self._tokens = np.zeros(view.shape.layers)
        self._tokens[given.layer] += len(given.experts)
        first = view.shape.offset[given.layer]
        counts = self._activations.data  # by an array of six indices it takes five times as long
        for row in given.experts:
            for expert in row:
                counts[first + expert] += 1

    def new_sequence(self) -> None:
        self._activations = self._tokens = np.zeros(0)

    def frequency(self, view: View) -> np.ndarray:
        """f: activations of each expert per token of this sequence ``[n]``."""
        if not len(self._tokens):
            return np.zeros(view.shape.n)
        return self._activations / np.maximum(self._tokens, 1)[view.layer_of]

    def distance(self, view: View) -> np.ndarray:
        """d: of each layer from the one at work, 1 to S ``[L]``."""
        return _distances(view.shape.layers, view.shape.encoder_layers, self.rule)[view.layer]

    def score(self, view: View) -> np.ndarray:
        if not len(self._tokens):
            return np.zeros(view.shape.n)
        return (
            self._activations / (np.maximum(self._tokens, 1) * self.distance(view))[view.layer_of]
        )

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        f, d = self.frequency(view), self.distance(view)[view.layer_of]
        return {"f": f, "d": d, "L": -f / d}


def edgemoe(
    profile: Mapping[str, Any] | None = None,
    *,
    rule: str = "described",
    tolerated: float | None = None,
    width: int = 1,
    key: str = "auto",
) -> Strategy:
    """Bits by each expert's importance, preloading along paths, frequency over distance.

    Parameters
    ----------
    profile
        Made by ``lab.calibrate("edgemoe")``. Without one every expert is asked for at the ``bits``
        setting and the path table is counted while decoding.
    rule
        Of eviction: ``"described"`` or ``"printed"``, see `FrequencyOverDistance`.
    tolerated
        P, the loss allowed for fewer bits; default the profile's, 2 % there unless asked otherwise.
    width, key
        Experts of the coming layer to preload at most, and what paths are known by: see `Preload`.
    """
    sensitivity = Sensitivity.of(profile) if profile else None
    table = PathTable.of(profile["paths"]) if profile else None
    own = float(profile["tolerated"]) if profile else TOLERATED
    allocate = BitAssignment(sensitivity, own if tolerated is None else tolerated)
    return Strategy(
        "edgemoe", FrequencyOverDistance(rule), allocate, prefetch=Preload(table, width, key)
    )
