"""The five decisions as small protocols, and the plain answer to each as a class.

The classes are also the plain answers (one shared pool, the router as it is, one bitwidth, nothing
ahead), so that a new policy overrides only the method it is about. When each method is asked:

    settings change     bits, layer_bytes, tier_bytes; check of parts whose parameters changed
    and before a run    begin; pinned experts are resident by then
    before each router  mask and bias; look_ahead after them
    a layer's step      1. observe, of every part
                        2. tier of each request (a token's, not a prompt's), stand_in of each miss
                        3. score, where a load or a prefetch is the first to lack room
                        4. predict, then tier of each prediction that is not there at the
                           bits asked for (after a prompt only where a part says so, and at
                           those bits)
                        5. after_layer
    a new prompt        new_sequence, of every part

No part decides over a pinned expert. The view shows the cache as it is when a method is asked.

n experts of the model, E of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from moelab.scheduling.stream import Key, LookAhead, Prediction, Request, View

if TYPE_CHECKING:
    from moelab.scheduling.steps import LayerInput


@runtime_checkable
class Allocates(Protocol):
    """When settings change: at which bits an expert is asked for, which share a layer has."""

    def bits(self, view: View) -> int | np.ndarray: ...
    def layer_bytes(self, layer: int, view: View) -> int | None: ...
    def tier_bytes(self, bits: int, view: View) -> int | None: ...


@runtime_checkable
class Routes(Protocol):
    """Each token and layer: whom the router may choose, who stands in for a missing expert."""

    def mask(self, layer: int, view: View) -> Sequence[bool] | np.ndarray | None: ...
    def bias(self, layer: int, view: View) -> Sequence[float] | np.ndarray | None: ...
    def stand_in(self, request: Request, view: View) -> int | None: ...


@runtime_checkable
class SetsPrecision(Protocol):
    """Each request: the bits wanted, 0 to skip the expert when it is missing."""

    def tier(self, request: Request, asked: int, view: View) -> int: ...


@runtime_checkable
class Evicts(Protocol):
    """A layer lacks room: who leaves, and why."""

    def score(self, view: View) -> np.ndarray: ...
    def terms(self, view: View) -> Mapping[str, np.ndarray]: ...
    def after_layer(self, layer: int, view: View) -> Iterable[Key]: ...


@runtime_checkable
class Prefetches(Protocol):
    """Ahead of need: how many routers to ask now, and whom to fetch."""

    def look_ahead(self, view: View) -> int: ...
    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]: ...
    def begin(self, view: View) -> Iterable[Prediction]: ...


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number or a choice of a part that a person may change while a run goes on.

    Attributes
    ----------
    name
        Attribute of the part, and keyword of ``lab.update``.
    text
        One line that says what it does.
    low, high, step
        Range of a number.
    choices
        Instead of a range: the strings it may be.
    tier
        Instead of a range: one of the store's tiers, or None for none.
    """

    name: str
    text: str
    low: float = 0.0
    high: float = 1.0
    step: float = 0.05
    choices: tuple[str, ...] = ()
    tier: bool = False

    def checked(self, value: Any) -> Any:
        """The value, a whole number where the step is one.

        Raises
        ------
        ValueError
            It is out of range or not among the choices.
        """
        if self.choices:
            if value not in self.choices:
                names = ", ".join(self.choices)
                raise ValueError(f"{self.name}={value!r}: choose one of {names}")
            return value
        if self.tier:
            if value in (None, 0, "off"):
                return None
            if type(value) is not int or not 1 <= value <= 16:
                raise ValueError(f"{self.name}={value!r}: bits of a tier of the store, 0 for none")
            return value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high:  # NaN too
            raise ValueError(f"{self.name}={value!r}: from {self.low:g} to {self.high:g}")
        return round(value) if self.step >= 1 else float(value)


class Part:
    """What the five decisions have in common.

    Attributes
    ----------
    title
        A few words for a list to choose from.
    parameters
        What a person may change of it at any time.
    observes
        What it wants to be told with every layer besides the routing: of ``"wanted"`` (the
        router's unmasked choice), ``"norms"`` (of the layer's input), ``"in_flight"``,
        ``"unread"``, ``"probabilities"`` (of all experts), ``"embedding"``; see
        `moelab.scheduling.steps.LayerInput`.
    learns
        Whether what it observes changes what it knows: after a drafted pass of which some tokens
        were rejected it is put back, and observes those that were kept.
    """

    title: ClassVar[str] = ""
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    observes: ClassVar[frozenset[str]] = frozenset()
    learns: ClassVar[bool] = True

    def observe(self, given: LayerInput, view: View) -> None:
        """Told once a layer, before anything is decided about it."""

    def new_sequence(self) -> None:
        """Told that a new prompt begins."""

    def check(self) -> None:
        """Raise ValueError where the values of its parameters do not go together."""


class Allocate(Part):
    """One pool for all layers; every expert is asked for at the ``bits`` setting."""

    title = "one pool"

    def bits(self, view: View) -> int | np.ndarray:
        """Bits at which experts are asked for: one number, or ``[n]``."""
        return view.knobs.bits

    def layer_bytes(self, layer: int, view: View) -> int | None:
        """Bytes this layer's experts may take; None where all layers share one pool."""
        return None

    def tier_bytes(self, bits: int, view: View) -> int | None:
        """Bytes that copies at ``bits`` may take; None where all tiers share one pool."""
        return None


class Route(Part):
    """As the router says."""

    title = "as the router says"

    def mask(self, layer: int, view: View) -> Sequence[bool] | np.ndarray | None:
        """Experts the router may choose in ``layer``, ``[E]``; None for all."""
        return None

    def bias(self, layer: int, view: View) -> Sequence[float] | np.ndarray | None:
        """What is added to each expert's place in ``layer``'s ranking, ``[E]``; None for nothing.

        In units of the token's own spread (largest - smallest) of the router's log-scores. It
        changes who is chosen; the gate weights of those chosen stay the router's.
        """
        return None

    def stand_in(self, request: Request, view: View) -> int | None:
        """A resident expert of the layer to serve a missing one, or None."""
        return None


class Precision(Part):
    """One bitwidth: what was asked for."""

    title = "as asked for"

    def tier(self, request: Request, asked: int, view: View) -> int:
        """Bits wanted for this request; 0 skips it where it is missing."""
        return asked


class Evict(Part):
    """The lowest `score` leaves; among equals the least recently used.

    A policy of your own is a subclass with that one method, asked at most once a layer; again only
    for a prompt that is larger than its room. It must not change anything: what it goes by is
    counted in `observe`, or stands in ``view``.
    ``explained`` says of each term of `terms` what it is, in a few words.
    """

    explained: ClassVar[Mapping[str, str]] = {"score": "the lowest leaves"}

    def score(self, view: View) -> np.ndarray:
        """How much each expert deserves to stay, ``[n]``."""
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        """What the score is made of, by name, each ``[n]``; to explain an eviction."""
        return {"score": self.score(view)}

    def after_layer(self, layer: int, view: View) -> Iterable[Key]:
        """Keys to evict as soon as ``layer`` is computed."""
        return ()


class Prefetch(Part):
    """Nothing ahead of need."""

    title = "nothing ahead"
    in_prefill: ClassVar[bool] = False
    """Whether it is asked after a prompt too; coming routers then answer for all of its tokens."""

    def look_ahead(self, view: View) -> int:
        """How many of the next layers' routers to ask with this layer's input."""
        return 0

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        """Experts expected in the coming layers, most wanted first."""
        return ()

    def begin(self, view: View) -> Iterable[Prediction]:
        """Experts to be resident before a run's first token and after a change of settings."""
        return ()
