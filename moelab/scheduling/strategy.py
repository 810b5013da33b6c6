"""A strategy is five decisions over one stream of expert activations, composed from parts.

It knows how it was made: the keywords of ``lab.update`` that lead to it (`Strategy.keywords`), so
that settings can be written down as code.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moelab.scheduling.parts import (
    Allocate,
    Allocates,
    Evict,
    Evicts,
    Parameter,
    Part,
    Precision,
    Prefetch,
    Prefetches,
    Route,
    Routes,
    SetsPrecision,
)
from moelab.scheduling.stream import Key, Knobs, LookAhead, Prediction, Request, Shape, View

__all__ = [
    "ROLES",
    "Allocate",
    "Evict",
    "Key",
    "Knobs",
    "LookAhead",
    "Own",
    "Parameter",
    "Part",
    "Precision",
    "Prediction",
    "Prefetch",
    "Request",
    "Route",
    "Shape",
    "Strategy",
    "View",
    "part_title",
]

_PROTOCOLS = {
    "allocate": Allocates,
    "route": Routes,
    "precision": SetsPrecision,
    "evict": Evicts,
    "prefetch": Prefetches,
}
ROLES = tuple(_PROTOCOLS)

_RETIRED = {
    "priority": "score(self, view), which returns the scores of all experts, [n]",
    "victim": "score(self, view): the lowest leaves",
    "used": "observe(self, given, view), or read view.uses and view.last_use",
    "loaded": "observe(self, given, view), or read view.last_use",
    "gone": "view.bits: 0 where an expert is not resident",
    "why": "terms(self, view), which returns {name: [n]}",
    "depth": "look_ahead(self, view)",
}
"""Methods of version 0.3, by what stands for them now."""

SWITCHES = ("low_bits", "depth")
"""Parameters that switch their part off."""

_lineages = itertools.count(1)


class Own(str):
    """Code that makes a part which no named strategy has."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, repr=False)
class Strategy:
    """Five decisions with a name. ``strategy.replace(evict=MyPolicy())`` mixes strategies.

    The objects are templates: each scheduler works on its own copy (`fresh`), so one strategy can
    serve many labs. One object may take several of the decisions.

    Attributes
    ----------
    pinned
        {(layer, expert): bits} of experts over which no part decides: resident from the start at
        these bits, always served at them, never evicted.
    bits
        The ``bits`` setting that is chosen along with the strategy; None leaves it.
    keywords
        Of ``lab.update``: they make this strategy.

    Raises
    ------
    TypeError
        A part lacks a method of its protocol, or has one of version 0.3; the message names both.
    """

    name: str
    evict: Any
    allocate: Any = field(default_factory=Allocate)
    route: Any = field(default_factory=Route)
    precision: Any = field(default_factory=Precision)
    prefetch: Any = field(default_factory=Prefetch)
    bits: int | None = None
    pinned: Mapping[tuple[int, int], int] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        known = {p.name for part in self.objects for p in part_parameters(part) if is_on(part)}
        own = ", ".join(f"{name}={value}" for name, value in self.values.items() if name in known)
        return f"<Strategy {self.full_name}{': ' if own else ''}{own}>"

    def __post_init__(self) -> None:
        if not self.keywords:
            object.__setattr__(self, "keywords", {"strategy": self.name})
        for role, protocol in _PROTOCOLS.items():
            have = getattr(self, role)
            if isinstance(have, type):
                raise TypeError(
                    f"{role}={have.__name__} is a class; make one of it: {have.__name__}()"
                )
            if not isinstance(have, protocol):
                want = sorted(m for m in vars(protocol) if not m.startswith("_"))
                raise TypeError(
                    f"{role}={have!r} is not usable as {role}: it must be an object with "
                    f"{', '.join(want)}; subclass moelab.strategies.{role.capitalize()}"
                )
            if not hasattr(have, "__dict__"):
                raise TypeError(f"{role}={have!r} is not usable as {role}: it has __slots__")
            _refuse_retired(role, have)
            vars(have).setdefault("_lineage", next(_lineages))

    @property
    def steers(self) -> bool:
        """Whether its route decision changes what the router chooses."""
        route = type(self.route)
        return route.mask is not Route.mask or route.bias is not Route.bias

    @property
    def asks_ahead(self) -> bool:
        """Whether its prefetch decision goes by what coming layers' routers say."""
        return type(self.prefetch).look_ahead is not Prefetch.look_ahead

    @property
    def full_name(self) -> str:
        """The name; of a mix with the decisions taken from others: ``lru + evict hobbit``."""
        base, own = self.name.rstrip("*"), self.keywords
        return base + "".join(f" + {r} {own[r]}" for r in ROLES if own.get(r, base) != base)

    @property
    def parts(self) -> dict[str, Any]:
        """The five parts by role."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def objects(self) -> list[Any]:
        """The parts without repetition: one object may take several decisions."""
        return list({id(part): part for part in self.parts.values()}.values())

    @property
    def observes(self) -> frozenset[str]:
        """What the parts want to be told."""
        return frozenset().union(*(getattr(p, "observes", ()) for p in self.objects))

    @property
    def parameters(self) -> dict[str, tuple[str, Parameter, Any]]:
        """Every parameter by name: (role, parameter, value)."""
        return {
            p.name: (role, p, getattr(part, p.name))
            for role, part in reversed(self.parts.items())
            for p in getattr(part, "parameters", ())
        }

    @property
    def values(self) -> dict[str, Any]:
        """The value of every parameter by name."""
        return {name: value for name, (_, _, value) in self.parameters.items()}

    def replace(self, **parts: Any) -> Strategy:
        """The same strategy with other parts; the name gains a ``*`` unless one is given."""
        parts.setdefault("name", self.name if self.name.endswith("*") else self.name + "*")
        if "keywords" not in parts:
            own = {r: Own(f"{type(p).__name__}()") for r, p in parts.items() if r in ROLES}
            parts["keywords"] = {**self.keywords, **own}
        return dataclasses.replace(self, **parts)

    def tuned(self, **values: Any) -> Strategy:
        """The same strategy with other values of its parameters.

        Raises
        ------
        ValueError
            No part has such a parameter, or the value is out of range.
        """
        known = self.parameters
        new = {id(part): part for part in self.objects}
        checked: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                there = ", ".join(known) or "none"
                raise ValueError(f"{self.name} has no parameter {name!r}; there are: {there}")
            checked[name] = known[name][1].checked(value)
            for old in self.objects:
                if any(p.name == name for p in getattr(old, "parameters", ())):
                    if new[id(old)] is old:
                        new[id(old)] = copy.copy(old)
                    setattr(new[id(old)], name, checked[name])
        for part in new.values():
            if callable(getattr(part, "check", None)):
                part.check()
        parts = {role: new[id(part)] for role, part in self.parts.items()}
        return dataclasses.replace(self, **parts, keywords={**self.keywords, **checked})

    def fresh(self) -> Strategy:
        """A copy with state of its own."""
        return copy.deepcopy(self)

    def shares(self, other: Strategy) -> bool:
        """Whether a part of the one goes on in the other."""
        mine = {vars(part)["_lineage"] for part in self.objects}
        return any(vars(part)["_lineage"] in mine for part in other.objects)

    def renewed(self) -> Strategy:
        """The same templates under new identities: it follows no earlier one."""
        new = self.fresh()
        for part in new.objects:
            vars(part)["_lineage"] = next(_lineages)
        return new

    def following(self, live: Strategy) -> Strategy:
        """A copy that goes on with the state of those of its parts that ``live`` has too."""
        alive = {vars(part)["_lineage"]: part for part in live.objects}
        mine = self.fresh()
        parts = {}
        for role, part in mine.parts.items():
            parts[role] = old = alive.get(vars(part)["_lineage"], part)
            for p in getattr(part, "parameters", ()) if old is not part else ():
                setattr(old, p.name, getattr(part, p.name))
        return dataclasses.replace(mine, **parts)


def begun_anew(part: Any) -> Any:
    """A copy of a part that goes on with nothing of what its original has learnt in a run."""
    new = copy.copy(part)
    vars(new)["_lineage"] = next(_lineages)
    return new


def part_parameters(part: Any) -> tuple[Parameter, ...]:
    """A part's parameters; it need not have any."""
    return getattr(part, "parameters", ())


def is_on(part: Any) -> bool:
    """Whether a part does anything: without second bits or a look-ahead, some do not."""
    return all(getattr(part, p.name) for p in part_parameters(part) if p.name in SWITCHES)


def part_title(part: Any) -> str:
    """A part's name for people: its title, or its class where that says more."""
    own = "title" in vars(type(part))
    return part.title if own and part.title else type(part).__name__


def _refuse_retired(role: str, part: Any) -> None:
    """Say of a policy written for version 0.3 what it has to define now."""
    kind = type(part)
    for name, now in _RETIRED.items():
        if callable(getattr(kind, name, None)):
            raise TypeError(
                f"{role}={kind.__name__}() defines {name}(), as in moelab 0.3; "
                f"define instead: {now}"
            )
    if role == "allocate" and len(inspect.signature(part.bits).parameters) > 1:
        raise TypeError(
            f"{role}={kind.__name__}() defines bits(key, view), as in moelab 0.3; define instead: "
            "bits(self, view), which returns one number or those of all experts, [n]"
        )
