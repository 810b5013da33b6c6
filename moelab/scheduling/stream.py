"""The words of a decision: keys, requests, predictions, and what a strategy may look at.

A *key* is one expert as a whole number, ``offset[layer] + expert``; everything known of all n
experts is an array ``[n]`` over keys. Outside the scheduler an expert is (layer, expert).

L layers, E experts of a layer, n experts of the model, K active experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from moelab.scheduling.cache import Cache
    from moelab.scheduling.parts import SetsPrecision

FULL, ZIPPED = 16, 12
"""Bits of two tiers with the same weights; whatever else has fewer bits has lost some of them."""
MIXED = 5
"""The tier whose experts have bits of their own (`moelab.store.mixed`), chosen as ``"mixed"``: the
number is a place in the order of tiers, no count of bits. By their largest experts' bytes it may be
below tiers of fewer bits: these are no low tiers beside it then (`Shape.below`)."""

Key = int
"""An expert of the model: ``offset[layer] + expert``."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a scheduler must know of a model: layers, experts, bytes.

    Parameters
    ----------
    experts
        Number of experts of each MoE layer; layers may differ.
    top_k
        Experts a token activates in one layer.
    nbytes
        Bytes of one expert at each tier, ``{16: 147456, 4: 45056, ...}``; of the largest where
        they differ.
    encoder_layers
        How many of the layers, the first ones, are an encoder's: only a prompt runs through them. A
        prompt's pass has all layers, a decoded token's begins behind the encoder.
    free
        Experts without weights that each layer has besides, numbered from E on; they are no keys.
    own
        Bytes of each of the n experts at the tiers where they differ.

    Attributes
    ----------
    offset
        First key of each layer, and n behind the last: ``L + 1`` numbers.
    layer_of, index_of
        Layer, and number within it, of every key ``[n]``.

    Examples
    --------
    >>> shape = Shape((4, 6), 2, {16: 1600, 4: 400})
    >>> shape.key(1, 3), shape.place(7), shape.n
    (7, (1, 3), 10)
    """

    experts: tuple[int, ...]
    top_k: int
    nbytes: Mapping[int, int]
    encoder_layers: int = 0
    free: int = 0
    own: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    offset: tuple[int, ...] = field(init=False, repr=False, compare=False)
    layer_of: np.ndarray = field(init=False, repr=False, compare=False)
    index_of: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        layers = np.repeat(np.arange(len(self.experts)), self.experts)
        offset = (0, *accumulate(self.experts))
        index = np.arange(offset[-1]) - np.array(offset)[layers]
        for name, value in (("offset", offset), ("layer_of", layers), ("index_of", index)):
            object.__setattr__(self, name, value)

    @property
    def layers(self) -> int:
        """Number of MoE layers."""
        return len(self.experts)

    @property
    def n(self) -> int:
        """Number of experts of the model."""
        return self.offset[-1]

    def key(self, layer: int, expert: int) -> Key:
        """The key of an expert."""
        return self.offset[layer] + expert

    def place(self, key: Key) -> tuple[int, int]:
        """(layer, expert) of a key."""
        return int(self.layer_of[key]), int(self.index_of[key])

    def keys(self, layer: int) -> slice:
        """The keys of a layer, to take its part ``[E]`` of an array over all experts."""
        return slice(self.offset[layer], self.offset[layer + 1])

    def size(self, key: Key, bits: int) -> int:
        """Bytes of this expert at ``bits``."""
        if not self.own:  # asked for every copy that comes or goes
            return self.nbytes[bits]
        own = self.own.get(bits)
        return self.nbytes[bits] if own is None else own[key]

    def own_cells(self) -> dict[int, list[int]]:
        """`own` as cells ``[L * E]`` of the layers' most experts, free ones too; else 0."""
        width = max(self.experts) + self.free
        at = self.layer_of * width + self.index_of
        cells = np.zeros((len(self.own), self.layers * width), np.int64)
        for row, sizes in zip(cells, self.own.values(), strict=True):
            row[at] = sizes
        return dict(zip(self.own, cells.tolist(), strict=True))

    def below(self, low: int, bits: int) -> bool:
        """Whether the tier ``low`` is a lower one; beside `MIXED` it takes fewer bytes, too."""
        fewer = self.nbytes[low] < self.nbytes[bits]
        return low < bits and (fewer or MIXED not in (low, bits))

    def all_bytes(self, bits: int) -> int:
        """Bytes of every expert of the model at ``bits``."""
        own = self.own.get(bits)
        return self.n * self.nbytes[bits] if own is None else sum(own)

    def token_cycle_bytes(self, bits: int) -> int:
        """Bytes one decoded token touches: top-k x layers x bytes of the largest expert."""
        return self.top_k * len(self.path()) * self.nbytes[bits]

    # -- the way of a token through the layers ------------------------------------------------

    def path(self, *, prefill: bool = False) -> range:
        """The layers of one pass: of a decoded token, or of a prompt."""
        return range(0 if prefill else self.encoder_layers, self.layers)

    def begins(self, layer: int, *, prefill: bool) -> bool:
        """Whether a pass begins with this layer."""
        return layer == self.path(prefill=prefill).start

    def following(self, layer: int) -> int:
        """The layer after this one; after the last the first of the next token."""
        return layer + 1 if layer + 1 < self.layers else self.encoder_layers

    def stack_end(self, layer: int) -> int:
        """The layer behind the last of the encoder or decoder that this one is in.

        An encoder's tokens are not those of its decoder: no router is asked across that border.
        """
        return self.encoder_layers if layer < self.encoder_layers else self.layers

    def away(self, layer: int) -> np.ndarray:
        """How many layers from this one the turn of each comes, 0 of its own ``[L]``.

        Layers are walked as a ring, of which the encoder's are no part: behind this one they come
        with the next prompt only, which is as far as L.
        """
        return _away(self.layers, self.encoder_layers, layer)

    def next_turn(self, layer: int) -> np.ndarray:
        """As `away`, but of its own layer: a whole round ``[L]``."""
        own = self.layers if layer < self.encoder_layers else len(self.path())
        away = self.away(layer)
        return np.where(away, away, own)

    def steps_of(self, passes: int) -> int:
        """Layers that a sequence has run through after so many passes, the prompt's first."""
        return passes * len(self.path()) + (self.encoder_layers if passes else 0)

    def passes_of(self, steps: int) -> int:
        """Passes that are complete after so many layers of a sequence."""
        return max(0, steps - self.encoder_layers) // len(self.path())


@lru_cache(maxsize=1024)
def _away(layers: int, encoder_layers: int, layer: int) -> np.ndarray:
    away = np.arange(layers) - layer
    away[away < 0] += layers - encoder_layers
    away[: min(layer, encoder_layers)] = layers
    away.flags.writeable = False
    return away


@dataclass(frozen=True, slots=True)
class Knobs:
    """The settings that belong to no part of a strategy and that decisions read."""

    budget_bytes: int
    bits: int = 16


class Request(NamedTuple):
    """One expert asked for by a layer.

    ``weight`` is its gate weight normalised over the token's top-k, ``rank`` its place (0 =
    largest), ``score`` HOBBIT's unimportance: the sum of the weights ranked before it. In prefill
    one request stands for all ``tokens`` that chose the expert, with the largest of their gate
    weights as the router gave them, rank 0 and score 0.
    """

    expert: int
    weight: float
    rank: int = 0
    score: float = 0.0
    tokens: int = 1
    layer: int = 0


class Prediction(NamedTuple):
    """An expert expected in a coming layer; weight, rank and score as in `Request`.

    ``instead``: the key whose place it takes where there is no room, -1 where the evict decision
    is to choose.
    """

    layer: int
    expert: int
    weight: float = 1.0
    rank: int = 0
    score: float = 0.0
    instead: Key = -1


@dataclass(frozen=True, slots=True)
class LookAhead:
    """A coming layer's router asked now, with this layer's input: experts, best first."""

    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]
    ranked: list[Request] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, layer: int, experts: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]
    ) -> LookAhead:
        """What a router said of some tokens: an expert's weight is the sum of theirs."""
        if len(experts) == 1:
            return cls(layer, tuple(experts[0]), tuple(weights[0]))
        total: dict[int, float] = {}
        for row, its in zip(experts, weights, strict=True):
            for expert, weight in zip(row, its, strict=True):
                total[expert] = total.get(expert, 0.0) + abs(weight)
        best = sorted(total, key=lambda expert: -total[expert])
        return cls(layer, tuple(best), tuple(total[expert] for expert in best))

    def requests(self) -> list[Request]:
        """Its experts as one token's `Request`s; worked out once."""
        if self.ranked is None:
            object.__setattr__(self, "ranked", ranked(self.experts, self.weights, self.layer))
        assert self.ranked is not None
        return self.ranked


def ranked(
    experts: tuple[int, ...] | list[int], weights: tuple[float, ...] | list[float], layer: int = 0
) -> list[Request]:
    """One token's requests: weights normalised to sum 1, HOBBIT's score = weights ranked before."""
    total = sum(map(abs, weights)) or 1.0
    pairs = sorted((-abs(w), e) for e, w in zip(experts, weights, strict=True))
    out, before = [], 0.0
    for rank, (negative, expert) in enumerate(pairs):
        share = -negative / total
        out.append(Request(expert, share, rank, before, 1, layer))
        before += share
    return out


class View:
    """What a decision may look at: arrays ``[n]`` over all experts, kept once by the cache.

    The arrays are read-only and live: they show what is so now.

    Attributes
    ----------
    shape, knobs
        The model; budget and bits.
    token, layer, prefill
        Token of this sequence (the prompt is 0), layer at work, whether it is the prompt.
    bits
        Bits of the resident copy, 0 where there is none.
    last_use
        When it was last used or loaded: a clock that ticks with each; also of earlier sequences.
    last_token
        Token of its last use in this sequence, counted from 1; 0: none.
    uses, high_uses
        Uses in this sequence, and those by a request for full precision (the bits asked for),
        whatever copy served it; a prompt counts as one.
    in_flight
        Resident, but its bytes had not landed when that was last told; only told where a part
        observes ``"in_flight"``.
    asked
        Bits at which each is asked for: the allocate decision's.
    """

    def __init__(self, shape: Shape, knobs: Knobs, cache: Cache) -> None:
        self.shape, self.knobs, self.cache = shape, knobs, cache
        self.token = self.layer = 0
        self.prefill = False
        for name in ("bits", "last_use", "last_token", "uses", "high_uses", "in_flight"):
            array = getattr(cache, name).view()
            array.flags.writeable = False
            setattr(self, name, array)
        self.asked = np.full(shape.n, knobs.bits, np.int64)
        self.precision: SetsPrecision | None = None

    bits: np.ndarray
    last_use: np.ndarray
    last_token: np.ndarray
    uses: np.ndarray
    high_uses: np.ndarray
    in_flight: np.ndarray

    @property
    def layer_of(self) -> np.ndarray:
        """Layer of every expert."""
        return self.shape.layer_of

    @property
    def index_of(self) -> np.ndarray:
        """Number of every expert within its layer."""
        return self.shape.index_of

    @property
    def clock(self) -> int:
        """The latest `last_use`."""
        return self.cache.clock

    @property
    def protected(self) -> np.ndarray:
        """Resident and predicted for a coming layer."""
        return self.cache.held & self.cache.PROTECTED > 0

    @property
    def pinned(self) -> np.ndarray:
        """Kept for good: no part decides over it."""
        return self.cache.held & self.cache.PINNED > 0

    @property
    def low_bits(self) -> int | None:
        """The precision part's low tier where it is below ``bits``, None for one precision."""
        low = getattr(self.precision, "low_bits", None)
        return low if low is not None and low < self.knobs.bits else None

    def residents(self, layer: int | None = None) -> np.ndarray:
        """Keys of the resident experts, of one layer or all; least recently used first."""
        first, last = (0, self.shape.n) if layer is None else self.shape.offset[layer : layer + 2]
        keys = first + np.flatnonzero(self.bits[first:last])
        return keys[np.argsort(self.last_use[keys], kind="stable")]

    def wanted_bits(self, request: Request) -> int:
        """Bits at which a missing expert would be loaded for this request, 0: skipped."""
        asked = int(self.asked[self.shape.key(request.layer, request.expert)])
        if self.prefill or self.precision is None:
            return asked
        return self.precision.tier(request, asked, self)
