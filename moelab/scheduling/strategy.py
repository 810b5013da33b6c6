"""A strategy is five decisions over one stream of expert activations.

`Allocate` and `Route` speak before an expert is asked for, `Precision` on every request, `Evict`
when the budget is full, `Prefetch` ahead of need. Each is a small protocol; the classes here are
also the plain answers (one shared pool, the router as it is, one bitwidth, nothing ahead), so that
a new policy overrides only the method it is about.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from moelab.scheduling.cache import Cache

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
    """What a decision may look at. Read it, never write it."""

    shape: Shape
    knobs: Knobs
    cache: Cache
    token: int = 0
    layer: int = 0
    prefill: bool = False


@runtime_checkable
class Allocates(Protocol):
    """Before the run: at which bits an expert is asked for, which share of memory a layer has."""

    def bits(self, key: Key, view: View) -> int: ...
    def layer_bytes(self, layer: int, view: View) -> int | None: ...


@runtime_checkable
class Routes(Protocol):
    """Each token and layer: whom the router may choose, who stands in for a missing expert."""

    def mask(self, layer: int, view: View) -> Sequence[bool] | None: ...
    def stand_in(self, request: Request, view: View) -> int | None: ...


@runtime_checkable
class SetsPrecision(Protocol):
    """Each request: the bits wanted, 0 to skip the expert when it is missing."""

    def tier(self, request: Request, asked: int, view: View) -> int: ...


@runtime_checkable
class Evicts(Protocol):
    """Budget full: who leaves. `used` and `loaded` tell what happened, `why` gives the terms."""

    def loaded(self, key: Key, bits: int, view: View) -> None: ...
    def used(self, key: Key, bits: int, view: View) -> None: ...
    def gone(self, key: Key) -> None: ...
    def victim(self, allowed: Callable[[Key], bool], view: View) -> Key | None: ...
    def after_layer(self, layer: int, view: View) -> Iterable[Key]: ...
    def new_sequence(self) -> None: ...
    def why(self, key: Key, view: View) -> dict[str, float]: ...


@runtime_checkable
class Prefetches(Protocol):
    """Ahead of need: how many routers to ask now, and whom to fetch."""

    def depth(self, view: View) -> int: ...
    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]: ...


class Allocate:
    """One pool for all layers; every expert is asked for at the ``bits`` setting."""

    def bits(self, key: Key, view: View) -> int:
        """Bits at which ``key`` is asked for."""
        return view.knobs.bits

    def layer_bytes(self, layer: int, view: View) -> int | None:
        """Bytes this layer's experts may take; None where all layers share one pool."""
        return None


class Route:
    """As the router says."""

    def mask(self, layer: int, view: View) -> Sequence[bool] | None:
        """Experts the router may choose in ``layer``; None for all."""
        return None

    def stand_in(self, request: Request, view: View) -> int | None:
        """A resident expert to serve a missing one, or None."""
        return None


class Precision:
    """One bitwidth: what was asked for."""

    def tier(self, request: Request, asked: int, view: View) -> int:
        """Bits wanted for this request; 0 skips it where it is missing."""
        return asked


class Evict:
    """Lowest `priority` leaves. A policy of your own is a subclass with that one method."""

    def priority(self, key: Key, view: View) -> float:
        """How much ``key`` deserves to stay."""
        raise NotImplementedError(f"{type(self).__name__} must define priority(key, view)")

    def loaded(self, key: Key, bits: int, view: View) -> None:
        """A copy of ``key`` at ``bits`` was issued."""

    def used(self, key: Key, bits: int, view: View) -> None:
        """``key`` serves a token now."""

    def gone(self, key: Key) -> None:
        """``key`` left the cache."""

    def victim(self, allowed: Callable[[Key], bool], view: View) -> Key | None:
        """The resident expert to evict, among those ``allowed``; None where there is none."""
        keys = [k for k in view.cache if allowed(k)]
        return min(keys, key=lambda k: self.priority(k, view), default=None)

    def after_layer(self, layer: int, view: View) -> Iterable[Key]:
        """Experts to drop as soon as ``layer`` is computed."""
        return ()

    def new_sequence(self) -> None:
        """A new prompt begins."""

    def why(self, key: Key, view: View) -> dict[str, float]:
        """The terms of the decision for ``key``, by name."""
        return {"priority": self.priority(key, view)}


class Prefetch:
    """Nothing ahead of need."""

    def depth(self, view: View) -> int:
        """How many of the next layers' routers to ask with this layer's input."""
        return 0

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        """Experts expected in the coming layers, most wanted first."""
        return ()


_PROTOCOLS = {
    "allocate": Allocates,
    "route": Routes,
    "precision": SetsPrecision,
    "evict": Evicts,
    "prefetch": Prefetches,
}


@dataclass(frozen=True, slots=True)
class Strategy:
    """Five decisions with a name. ``strategy.replace(evict=MyPolicy())`` mixes strategies.

    The objects are templates: each scheduler works on its own copy (`fresh`), so one strategy can
    serve many labs.

    Raises
    ------
    TypeError
        A part lacks a method of its protocol; the message names the part and the methods.
    """

    name: str
    evict: Evicts
    allocate: Allocates = dataclasses.field(default_factory=Allocate)
    route: Routes = dataclasses.field(default_factory=Route)
    precision: SetsPrecision = dataclasses.field(default_factory=Precision)
    prefetch: Prefetches = dataclasses.field(default_factory=Prefetch)

    def __post_init__(self) -> None:
        for part, protocol in _PROTOCOLS.items():
            have = getattr(self, part)
            if isinstance(have, type) or not isinstance(have, protocol):
                want = sorted(m for m in vars(protocol) if not m.startswith("_"))
                raise TypeError(
                    f"{part}={have!r} is not usable as {part}: it must be an object with "
                    f"{', '.join(want)}; subclass moelab.strategies.{part.capitalize()}"
                )

    def replace(self, **parts: Any) -> Strategy:
        """The same strategy with other parts; the name gains a ``*`` unless one is given."""
        parts.setdefault("name", self.name if self.name.endswith("*") else self.name + "*")
        return dataclasses.replace(self, **parts)

    def fresh(self) -> Strategy:
        """A copy with state of its own."""
        return copy.deepcopy(self)
