"""Settings: frozen, validated, and every error says what to do.

A `Settings` is what the sliders show. `change` makes the next one from what a person typed
(``budget="25%"``); `knobs` is the part the scheduler reads.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moelab.scheduling.budget import check_budget
from moelab.scheduling.strategy import ROLES, Strategy, begun_anew
from moelab.scheduling.stream import Knobs, Shape
from moelab.store.devices import device as find_device
from moelab.strategies import make as make_strategy

PLAIN = {"low_bits": None, "t1": 0.6, "t2": 0.9, "prefetch": 0}
"""Settings that belong to a strategy: choosing one sets them, to these where it names no others."""

OF_ROLE = {
    "allocate": ("bits",),
    "precision": ("low_bits", "t1", "t2"),
    "prefetch": ("prefetch",),
}
MakeStrategy = Callable[[str, Strategy | None, str], Strategy]
_UNITS = {"": 1, "b": 1}
for _i, _p in enumerate("kmgt", 1):
    _UNITS |= {_p + "b": 1000**_i, _p + "ib": 1024**_i}


_KNOWN_AS = {"depth": "prefetch", "look_ahead": "prefetch", "memory": "budget"}
"""What papers call a setting, and what it is here."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run obeys; changed between tokens by ``lab.update``.

    Attributes
    ----------
    budget_bytes
        Bytes that resident experts of all tiers may take, loads in flight included.
    bits
        Tier at which experts are asked for.
    low_bits
        Second tier for unimportant misses (HOBBIT's rule), None for one precision; it has no
        effect unless it is below ``bits``.
    t1, t2
        HOBBIT's thresholds: above ``t1`` low precision, above ``t2`` skip.
    strategy
        The five decisions.
    device
        ``"disk"`` (real) or an emulated device, see ``moelab.devices()``.
    prefetch
        Layers to look ahead, 0 to 3.
    measure_kl
        Compare each token with the full-precision model on the same context.
    seed
        Of sampling.
    """

    budget_bytes: int
    bits: int
    strategy: Strategy
    low_bits: int | None = None
    t1: float = 0.6
    t2: float = 0.9
    device: str = "disk"
    prefetch: int = 0
    measure_kl: bool = False
    seed: int = 0

    def knobs(self) -> Knobs:
        """The part that decisions read."""
        return Knobs(self.budget_bytes, self.bits, self.low_bits, self.t1, self.t2, self.prefetch)

    def change(
        self,
        shape: Shape,
        *,
        make: MakeStrategy | None = None,
        **changes: Any,
    ) -> Settings:
        """The settings after ``changes``; nothing changes where one of them is refused.

        Besides the attributes a change may be ``budget`` (see `parse_budget`), one of the five
        decisions (``evict="hobbit"`` takes that strategy's, or a part of your own), any parameter
        of the strategy's parts, and ``keep``: experts over which no part decides, as
        ``{(layer, expert): bits}``, until it is changed again (``{}``: none).

        Parameters
        ----------
        make
            From a strategy's name, the strategy in force and the decision that is to be taken
            from it (``""``: all) to the strategy.

        Raises
        ------
        ValueError
            A value is out of range, unknown, or the budget is below one layer's need.
        """
        if "budget" in changes:
            changes["budget_bytes"] = parse_budget(changes.pop("budget"), shape)
        keep = changes.pop("keep", None)
        changes = self._compose(changes, shape, make or _by_name)
        known = {f.name for f in dataclasses.fields(self)}
        tuned = {k: changes.pop(k) for k in changes.keys() - known}
        strategy = changes.get("strategy", self.strategy)
        if extra := tuned.keys() - strategy.parameters.keys():
            names = sorted({"budget", "keep", *known, *ROLES} - {"budget_bytes"})
            own = ", ".join(strategy.parameters) or "none"
            here = _KNOWN_AS.get(min(extra))
            raise ValueError(
                f"unknown setting {min(extra)!r}; "
                + (f"here it is called {here!r}; " if here else "")
                + f"there are {', '.join(names)}; "
                f"parameters of {strategy.name!r}: {own}"
            )
        if tuned:
            changes["strategy"] = strategy = strategy.tuned(**tuned)
        if keep is None:
            keep = strategy.keep or self.strategy.keep
        if keep != strategy.keep:
            changes["strategy"] = dataclasses.replace(strategy, keep=dict(keep))
        if changes.get("low_bits") in (0, "off"):
            changes["low_bits"] = None
        new = dataclasses.replace(self, **changes)
        new._check(shape)
        return new

    def _compose(self, changes: dict[str, Any], shape: Shape, make: MakeStrategy) -> dict[str, Any]:
        """Strategy and decisions by name become one strategy and the settings it brings."""
        changes, now = dict(changes), self.strategy
        strategy = changes.pop("strategy", now)
        if isinstance(strategy, str):
            strategy = make(strategy, now, "")
        strategy = make_strategy(strategy)
        brought: dict[str, Any] = {}
        if strategy is not now:
            brought = PLAIN | dict(strategy.preset)
            if "bits" in now.preset:  # what the old one brought goes with it
                brought.setdefault("bits", max(shape.nbytes))
        parts, own = {}, {}
        for role in ROLES:
            if role not in changes or (role == "prefetch" and isinstance(changes[role], int)):
                continue
            part = changes.pop(role)
            if isinstance(part, str):
                source = make(part, strategy, role)
                parts[role] = source.parts[role]
                whole = PLAIN | dict(source.preset)
                brought |= {k: whole[k] for k in OF_ROLE.get(role, ()) if k in whole}
            else:  # one object may be given for several decisions, or again after a change
                known = any(part is old for old in now.objects)
                parts[role] = own.setdefault(id(part), begun_anew(part) if known else part)
        if parts:
            strategy = strategy.replace(**parts)
        if strategy is not now:
            changes["strategy"] = strategy
        bits = changes.get("bits", brought.get("bits", self.bits))
        lower = [b for b in shape.nbytes if bits in shape.nbytes and b < bits]
        if brought.get("low_bits") and lower:  # what it brings, or what there is below the bits set
            fits = (b for b in lower if b <= brought["low_bits"])
            brought["low_bits"] = max(fits, default=min(lower))
        return brought | changes

    def _check(self, shape: Shape) -> None:
        tiers = sorted(shape.nbytes, reverse=True)
        for name in ("bits", "low_bits"):
            value = getattr(self, name)
            if value not in shape.nbytes and not (name == "low_bits" and value is None):
                raise ValueError(
                    f"{name}={value!r} is not in this store; choose one of {tiers}"
                    + (" or None" if name == "low_bits" else "")
                )
        numbers = all(isinstance(t, (int, float)) for t in (self.t1, self.t2))
        if not numbers or not 0 <= self.t1 <= self.t2:
            raise ValueError(f"t1={self.t1!r}, t2={self.t2!r}: need 0 <= t1 <= t2, both numbers")
        if type(self.prefetch) is not int or not 0 <= self.prefetch <= 3:
            raise ValueError(f"prefetch={self.prefetch!r}: layers to look ahead, 0 to 3")
        find_device(self.device)
        for key, bits in self.strategy.keep.items():
            _check_kept(key, bits, shape)
        check_budget(shape, self.strategy, self.knobs())

    def shown(self) -> dict[str, str]:
        """Every setting as a word for a table or a mark on the time axis."""
        words = {f.name: str(getattr(self, f.name)) for f in dataclasses.fields(self)}
        words["strategy"] = self.strategy.name
        words |= {"t1": f"{self.t1:.3g}", "t2": f"{self.t2:.3g}"}
        words["budget"] = f"{self.budget_bytes / 1e6:.3g} MB"
        words["low_bits"] = "off" if self.low_bits is None else str(self.low_bits)
        words["prefetch"] = f"+{self.prefetch}" if self.prefetch else "off"
        words["measure_kl"] = "on" if self.measure_kl else "off"
        del words["budget_bytes"]
        return words

    def shown_strategy(self) -> dict[str, str]:
        """The strategy's decisions, parameters and the experts kept for good, as words."""
        parts = {role: part_title(part) for role, part in self.strategy.parts.items()}
        own = {name: _word(value) for name, (_, _, value) in self.strategy.parameters.items()}
        kept = [f"{at}.{e} at {bits} bit" for (at, e), bits in self.strategy.keep.items()]
        return parts | own | {"keep": ", ".join(kept) or "none"}


def _check_kept(key: Any, bits: Any, shape: Shape) -> None:
    pair = isinstance(key, tuple) and len(key) == 2 and all(type(i) is int for i in key)
    if not pair:
        raise ValueError(f"keep={{{key!r}: {bits!r}}}: write {{(layer, expert): bits}}")
    layer, expert = key
    if not 0 <= layer < shape.layers or not 0 <= expert < shape.experts[layer]:
        raise ValueError(f"keep: there is no expert {expert} in layer {layer}")
    if bits not in shape.nbytes:
        tiers = sorted(shape.nbytes, reverse=True)
        raise ValueError(f"keep: {bits!r} bit is not in this store; choose one of {tiers}")


def _by_name(name: str, using: Strategy | None, role: str) -> Strategy:
    """A strategy without calibration; the one in force goes on with what it has learnt."""
    same = using is not None and using.name == name and not role
    return using if same else make_strategy(name)  # pyright: ignore[reportReturnType]


def part_title(part: Any) -> str:
    """A part's name for people: its title, or its class where that says more."""
    own = "title" in vars(type(part))
    return part.title if own and part.title else type(part).__name__


def _word(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parse_budget(value: float | str, shape: Shape) -> int:
    """Bytes from ``8_000_000``, ``"8MB"``, ``"1.5GiB"`` or ``"25%"`` of all experts at full bits.

    Raises
    ------
    ValueError
        The text is not a size.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*|%)\s*", str(value))
        if not found or (found[2] != "%" and found[2].lower() not in _UNITS):
            raise ValueError(
                f"budget {value!r} is not a size; write 8000000, '8MB', '1.5GiB' or '25%'"
            )
        number, unit = float(found[1]), found[2].lower()
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"budget {value!r} must be above 0")
    if unit == "%":
        return round(number / 100 * shape.all_bytes(max(shape.nbytes)))
    return round(number * _UNITS[unit])
