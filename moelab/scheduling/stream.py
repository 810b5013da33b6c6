"""The words of a decision: keys, requests, predictions, and what may be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from moelab.scheduling.cache import Cache
    from moelab.scheduling.parts import Allocates, SetsPrecision

Key = tuple[int, int]
"""(layer, expert), both counted from 0 over the MoE layers."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a scheduler must know of a model: layers, experts, bytes.

    Parameters
    ----------
    experts
        Number of experts of each MoE layer.
    top_k
        Experts a token activates in one layer.
    nbytes
        Bytes of one expert at each tier, ``{16: 147456, 4: 45056, ...}``.
    """

    experts: tuple[int, ...]
    top_k: int
    nbytes: Mapping[int, int]

    @property
    def layers(self) -> int:
        """Number of MoE layers."""
        return len(self.experts)

    def all_bytes(self, bits: int) -> int:
        """Bytes of every expert of the model at ``bits``."""
        return sum(self.experts) * self.nbytes[bits]

    def token_cycle_bytes(self, bits: int) -> int:
        """Bytes one token touches: top-k x layers x bytes of an expert."""
        return self.top_k * self.layers * self.nbytes[bits]


@dataclass(frozen=True, slots=True)
class Knobs:
    """The settings a decision may read; they change while a run goes on.

    ``low_bits`` None means one precision only. ``t1`` and ``t2`` are HOBBIT's thresholds on the
    unimportance score. ``prefetch`` is how many layers ahead to look (0: off).
    """

    budget_bytes: int
    bits: int = 16
    low_bits: int | None = None
    t1: float = 0.6
    t2: float = 0.9
    prefetch: int = 0


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
    """An expert expected in a coming layer, best first; weight, rank and score as in `Request`."""

    key: Key
    weight: float = 1.0
    rank: int = 0
    score: float = 0.0


class LookAhead(NamedTuple):
    """A coming layer's router asked now, with this layer's input: experts, best first."""

    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(slots=True)
class View:
    """What a decision may look at. Read it, never write it.

    ``in_flight`` holds resident copies whose bytes had not landed when that was last told, and
    those issued since; only strategies that observe ``"in_flight"`` are told.
    """

    shape: Shape
    knobs: Knobs
    cache: Cache
    token: int = 0
    layer: int = 0
    prefill: bool = False
    in_flight: set[Key] = field(default_factory=set)
    allocate: Allocates | None = None
    precision: SetsPrecision | None = None
    keep: Mapping[Key, int] = field(default_factory=dict)

    def asked_bits(self, key: Key) -> int:
        """Bits at which ``key`` is asked for."""
        if key in self.keep:
            return self.keep[key]
        return self.knobs.bits if self.allocate is None else self.allocate.bits(key, self)

    def wanted_bits(self, request: Request) -> int:
        """Bits at which a missing expert would be loaded for this request, 0: skipped."""
        asked = self.asked_bits((request.layer, request.expert))
        return asked if self.precision is None else self.precision.tier(request, asked, self)
