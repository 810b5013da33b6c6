"""The five decisions as small protocols, and the plain answer to each as a class.

`Allocate` and `Route` speak before an expert is asked for, `Precision` on every request, `Evict`
when the budget is full, `Prefetch` ahead of need. The classes are also the plain answers (one
shared pool, the router as it is, one bitwidth, nothing ahead), so that a new policy overrides only
the method it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from moelab.scheduling.stream import Key, LookAhead, Prediction, Request, View

if TYPE_CHECKING:
    from moelab.scheduling.trace import LayerInput


@runtime_checkable
class Allocates(Protocol):
    """Before the run: at which bits an expert is asked for, which share of memory a layer has."""

    def bits(self, key: Key, view: View) -> int: ...
    def layer_bytes(self, layer: int, view: View) -> int | None: ...
    def tier_bytes(self, bits: int, view: View) -> int | None: ...


@runtime_checkable
class Routes(Protocol):
    """Each token and layer: whom the router may choose, who stands in for a missing expert."""

    def mask(self, layer: int, view: View) -> Sequence[bool] | None: ...
    def bias(self, layer: int, view: View) -> Sequence[float] | None: ...
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
    """

    name: str
    text: str
    low: float = 0.0
    high: float = 1.0
    step: float = 0.05
    choices: tuple[str, ...] = ()

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
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high:
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
        ``"unread"``; see `moelab.scheduling.trace.LayerInput`.
    """

    title: ClassVar[str] = ""
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    observes: ClassVar[frozenset[str]] = frozenset()

    def observe(self, given: LayerInput, view: View) -> None:
        """Told once a layer, before anything is decided about it."""

    def new_sequence(self) -> None:
        """Told that a new prompt begins."""


class Allocate(Part):
    """One pool for all layers; every expert is asked for at the ``bits`` setting."""

    title = "one pool"

    def bits(self, key: Key, view: View) -> int:
        """Bits at which ``key`` is asked for."""
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

    def mask(self, layer: int, view: View) -> Sequence[bool] | None:
        """Experts the router may choose in ``layer``; None for all."""
        return None

    def bias(self, layer: int, view: View) -> Sequence[float] | None:
        """What is added to each expert's place in ``layer``'s ranking; None for nothing.

        In units of the token's own spread (largest - smallest) of the router's log-scores. It
        changes who is chosen; the gate weights of those chosen stay the router's.
        """
        return None

    def stand_in(self, request: Request, view: View) -> int | None:
        """A resident expert to serve a missing one, or None."""
        return None


class Precision(Part):
    """One bitwidth: what was asked for."""

    title = "as asked for"

    def tier(self, request: Request, asked: int, view: View) -> int:
        """Bits wanted for this request; 0 skips it where it is missing."""
        return asked


class Evict(Part):
    """Lowest `priority` leaves. A policy of your own is a subclass with that one method.

    ``explained`` says of each term of `why` what it is, in a few words.
    """

    explained: ClassVar[Mapping[str, str]] = {"priority": "the lowest leaves"}

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

    def why(self, key: Key, view: View) -> dict[str, float]:
        """The terms of the decision for ``key``, by name."""
        return {"priority": self.priority(key, view)}


class Prefetch(Part):
    """Nothing ahead of need."""

    title = "nothing ahead"

    def depth(self, view: View) -> int:
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
