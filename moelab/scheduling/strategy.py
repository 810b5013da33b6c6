"""A strategy is five decisions over one stream of expert activations, composed from parts."""

from __future__ import annotations

import copy
import dataclasses
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
]

_PROTOCOLS = {
    "allocate": Allocates,
    "route": Routes,
    "precision": SetsPrecision,
    "evict": Evicts,
    "prefetch": Prefetches,
}


ROLES = tuple(_PROTOCOLS)
_lineages = itertools.count(1)


@dataclass(frozen=True, slots=True, repr=False)
class Strategy:
    """Five decisions with a name. ``strategy.replace(evict=MyPolicy())`` mixes strategies.

    The objects are templates: each scheduler works on its own copy (`fresh`), so one strategy can
    serve many labs. One object may take several of the decisions. ``preset`` holds the settings
    (bits, low_bits, t1, t2, prefetch) that are chosen along with the strategy. ``keep`` holds
    experts over which no part decides: resident from the start at the bits given, always served
    at them, never evicted.

    Raises
    ------
    TypeError
        A part lacks a method of its protocol; the message names the part and the methods.
    """

    name: str
    evict: Evicts
    allocate: Allocates = field(default_factory=Allocate)
    route: Routes = field(default_factory=Route)
    precision: SetsPrecision = field(default_factory=Precision)
    prefetch: Prefetches = field(default_factory=Prefetch)
    preset: Mapping[str, Any] = field(default_factory=dict)
    keep: Mapping[Key, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        own = ", ".join(f"{name}={value}" for name, (_, _, value) in self.parameters.items())
        return f"<Strategy {self.name}{': ' if own else ''}{own}>"

    def __post_init__(self) -> None:
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
            vars(have).setdefault("_lineage", next(_lineages))

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

    def replace(self, **parts: Any) -> Strategy:
        """The same strategy with other parts; the name gains a ``*`` unless one is given."""
        parts.setdefault("name", self.name if self.name.endswith("*") else self.name + "*")
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
        for name, value in values.items():
            if name not in known:
                there = ", ".join(known) or "none"
                raise ValueError(f"{self.name} has no parameter {name!r}; there are: {there}")
            checked = known[name][1].checked(value)
            for old in self.objects:
                if any(p.name == name for p in getattr(old, "parameters", ())):
                    if new[id(old)] is old:
                        new[id(old)] = copy.copy(old)
                    setattr(new[id(old)], name, checked)
        return dataclasses.replace(
            self, **{role: new[id(part)] for role, part in self.parts.items()}
        )

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
