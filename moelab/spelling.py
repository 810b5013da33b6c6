"""Settings spelled as code that makes them again, and as a few words for a table.

A strategy is spelled by the named one it is nearest to, the decisions it takes from others and the
parameters that differ. What it cannot spell: a part of your own is written by its class's name, as
if it were made without arguments, and what a calibration measured is whatever the store has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moelab.scheduling.strategy import ROLES, Strategy
from moelab.scheduling.stream import Shape
from moelab.settings import OF_ROLE, PLAIN, Settings
from moelab.store.devices import DEVICES
from moelab.strategies import CALIBRATED, NAMES, make

if TYPE_CHECKING:
    from moelab.scheduling.parts import Part

_ALWAYS = ("device", "measure_kl", "seed")
"""Settings that no strategy brings."""

_PLAIN_FIELDS = ("bits", "low_bits", "device", "prefetch", "measure_kl", "seed")


def opened(model: str, settings: Settings) -> str:
    """Code that opens a lab with these settings: ``moelab.open``, and ``lab.update`` if needed.

    Examples
    --------
    >>> import moelab
    >>> lab = moelab.open("demo", budget="50%", bits=4, measure_kl=False)
    >>> opened("demo", lab.settings)
    'lab = moelab.open("demo", budget=10_616_832, bits=4, strategy="lru", device="disk", measure_kl=False)'
    """  # noqa: E501
    base, parts, values = _spelled(settings.strategy)
    brought = PLAIN | dict(_named()[base].preset)
    first = {"budget": settings.budget_bytes, "bits": settings.bits, "strategy": base}
    for name in ("low_bits", "prefetch"):
        if getattr(settings, name) != brought[name] or (name == "low_bits" and _raised(settings)):
            first[name] = getattr(settings, name) or 0
    first |= {"device": settings.device, "measure_kl": settings.measure_kl}
    if settings.seed:
        first["seed"] = settings.seed
    then = _parts_and(settings, parts)
    if settings.low_bits is not None:
        known = base not in CALIBRATED and not then  # else what is measured, or a part, brings its
        then |= {
            n: getattr(settings, n)
            for n in ("t1", "t2")
            if not known or getattr(settings, n) != brought[n]
        }
    then |= values
    if settings.strategy.keep:
        then["keep"] = dict(settings.strategy.keep)
    lines = [f"lab = moelab.open({_word(model)}, {_keywords(first)})"]
    if then:
        lines.append(f"lab.update({_keywords(then)})")
    if "prefetch" in parts:  # the part brought its own depth
        lines.append(f"lab.update(prefetch={settings.prefetch})")
    return "\n".join(lines)


def changed(old: Settings, new: Settings) -> str:
    """Keywords of ``lab.update`` that lead from ``old`` to ``new``; empty where nothing differs.

    Examples
    --------
    >>> import moelab
    >>> lab = moelab.open("demo", budget="50%", bits=4)
    >>> before = lab.settings
    >>> changed(before, lab.update(bits=8, evict="lfu"))
    'evict="lfu", bits=8'
    """
    (base0, parts0, values0), (base, parts, values) = map(_spelled, (old.strategy, new.strategy))
    words: dict[str, Any] = {}
    if base != base0:
        words = {"strategy": base} | _besides(base, old, new) | _parts_and(new, parts) | values
    else:
        back = dict.fromkeys(parts0.keys() - parts.keys(), base)
        moved = {role: part for role, part in parts.items() if parts0.get(role) != part}
        words = _parts_and(new, back | moved)
        words |= {n: v for n, v in values.items() if values0.get(n) != v}
        known = new.strategy.parameters
        words |= {n: known[n][2] for n in values0 if n in known and n not in values}
    if new.budget_bytes != old.budget_bytes:
        words["budget"] = new.budget_bytes
    for name in (*_PLAIN_FIELDS, "t1", "t2"):
        if getattr(new, name) != getattr(old, name) and (base == base0 or name in _ALWAYS):
            words.setdefault(name, getattr(new, name))
    if new.strategy.keep != old.strategy.keep:
        words["keep"] = dict(new.strategy.keep)
    return _keywords(words)


def short(settings: Settings, shape: Shape) -> str:
    """The settings in a few words: ``hobbit, 25 %, 16/4 bit, SD card``.

    Parameters
    ----------
    shape
        Of the model: a budget is shown as a share of all its experts.
    """
    s, strategy = settings, settings.strategy
    share = 100 * s.budget_bytes / shape.all_bytes(max(shape.nbytes))
    pair = f"/{s.low_bits}" if s.low_bits and s.low_bits < s.bits else ""
    device = DEVICES[s.device].title.partition(",")[0].partition(" (")[0]
    kept = "".join(f", expert {at}.{e} kept at {b} bit" for (at, e), b in strategy.keep.items())
    disk = "disk" if s.device == "disk" else device
    return f"{strategy.name}, {share:.3g} %, {s.bits}{pair} bit, {disk}{kept}"


# -- a strategy by name, parts and parameters -----------------------------------------------------


class _Own(str):
    """A part that no named strategy has, as the code that makes one."""

    __slots__ = ()


@functools.cache
def _named() -> dict[str, Strategy]:
    return {name: make(name) for name in NAMES}


def _spelled(strategy: Strategy) -> tuple[str, dict[str, str], dict[str, Any]]:
    """(name of the nearest strategy, decision -> whose it is instead, parameter -> value)."""
    base = strategy.name.rstrip("*")
    if base not in _named():
        kinds = [type(part) for part in strategy.parts.values()]
        base = max(_named(), key=lambda name: _alike(_named()[name], kinds))
    parts = {
        role: _whose(role, part)
        for role, part in strategy.parts.items()
        if type(part) is not type(_named()[base].parts[role])
    }
    values = {}
    for name, (role, _, value) in strategy.parameters.items():
        source = parts.get(role, base)
        known = None if isinstance(source, _Own) else _named()[source].parameters.get(name)
        if source in CALIBRATED or known is None or known[2] != value:
            values[name] = value
    return base, parts, values


def _alike(strategy: Strategy, kinds: Iterable[type]) -> int:
    return sum(type(a) is b for a, b in zip(strategy.parts.values(), kinds, strict=True))


def _whose(role: str, part: Part) -> str:
    same = (name for name, s in _named().items() if type(s.parts[role]) is type(part))
    return next(same, _Own(f"{type(part).__name__}()"))


def _besides(base: str, old: Settings, new: Settings) -> dict[str, Any]:
    """What choosing the strategy ``base`` by its name would not bring by itself."""
    brought = PLAIN | dict(_named()[base].preset)
    if "bits" not in old.strategy.preset:  # else those of the store's best tier come back
        brought.setdefault("bits", old.bits)
    every = base in CALIBRATED  # what was measured of the model brings its own
    names = [n for n in ("bits", *PLAIN) if every or getattr(new, n) != brought.get(n)]
    if _raised(new) and "low_bits" not in names:
        names.append("low_bits")
    return {n: getattr(new, n) for n in names}


def _raised(settings: Settings) -> bool:
    """Whether low bits are not below the bits, which no strategy brings."""
    return settings.low_bits is not None and settings.low_bits >= settings.bits


def _parts_and(settings: Settings, parts: dict[str, str]) -> dict[str, Any]:
    """The decisions taken from others, and the settings that would come along with them."""
    ordered: dict[str, Any] = {role: parts[role] for role in ROLES if role in parts}
    own = [name for role in ordered for name in OF_ROLE.get(role, ()) if name != "prefetch"]
    return ordered | {name: getattr(settings, name) for name in own}


def _keywords(words: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in words.items())


def _word(value: Any) -> str:
    if isinstance(value, _Own):
        return str(value)
    if type(value) is int:
        return f"{value:_}"
    if isinstance(value, str) and value.isprintable() and not {'"', "\\"} & set(value):
        return f'"{value}"'
    return repr(value)
