"""Settings in words, and as code that makes them again.

A strategy knows the keywords that made it (`Strategy.keywords`), so code is those keywords written
down. What it cannot spell: a part of your own is written by its class's name, as if it were made
without arguments, and what a calibration measured is whatever the store has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moelab.scheduling.strategy import ROLES, Own, Strategy, part_title
from moelab.scheduling.stream import Shape
from moelab.settings import Settings
from moelab.store.devices import DEVICES
from moelab.strategies import NAMES, make

# -- as code --------------------------------------------------------------------------------------

_FIELDS = ("bits", "device", "measure_kl", "seed")


def opened(model: str, settings: Settings) -> str:
    """Code that opens a lab with these settings: ``moelab.open``, and ``lab.update`` if needed.

    Examples
    --------
    >>> import moelab
    >>> lab = moelab.open("demo", budget="50%", bits=4, measure_kl=False)
    >>> opened("demo", lab.settings)
    'lab = moelab.open("demo", budget=10_616_832, bits=4, strategy="lru", device="disk", measure_kl=False)'
    """  # noqa: E501
    base, rest = _keywords(settings.strategy)
    first = {
        "budget": settings.budget_bytes,
        "bits": settings.bits,
        "strategy": base,
        "device": settings.device,
        "measure_kl": settings.measure_kl,
    }
    if settings.seed:
        first["seed"] = settings.seed
    line = f"lab = moelab.open({_word(model)}, {_written(first)})"
    return f"{line}\nlab.update({_written(rest)})" if rest else line


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
    (base0, rest0), (base, rest) = _keywords(old.strategy), _keywords(new.strategy)
    words: dict[str, Any] = {}
    if base != base0:
        words = {"strategy": base, **rest}
        if old.strategy.pinned and not new.strategy.pinned:
            words["pin"] = {}
        words["bits"] = new.bits  # a strategy may bring its own
    else:
        back = {role: base for role in ROLES if role in rest0 and role not in rest}
        words = back | {n: v for n, v in rest.items() if n not in rest0 or rest0[n] != v}
        known = new.strategy.parameters
        words |= {n: known[n][2] for n in rest0 if n in known and n not in rest}
        if "pin" in rest0 and "pin" not in rest:
            words["pin"] = {}
    if new.budget_bytes != old.budget_bytes:
        words["budget"] = new.budget_bytes
    words |= {n: getattr(new, n) for n in _FIELDS if getattr(new, n) != getattr(old, n)}
    if words.get("bits") == old.bits and old.strategy.bits is None is new.strategy.bits:
        del words["bits"]
    return _written(words)


def _keywords(strategy: Strategy) -> tuple[str, dict[str, Any]]:
    """The named strategy that this one began as, and the other keywords that make it."""
    known, words = strategy.parameters, dict(strategy.keywords)
    base = words.pop("strategy")
    if base not in NAMES:  # one of your own: the nearest that has a name, and its parts
        base = max(NAMES, key=lambda name: _alike(make(name), strategy))
        parts = make(base).parts
        for role, part in strategy.parts.items():
            if type(part) is not type(parts[role]):
                words.setdefault(role, Own(f"{type(part).__name__}()"))
    roles = {role: words[role] for role in ROLES if role in words and words[role] != base}
    values = {name: known[name][2] for name in words if name in known}
    pin = {"pin": dict(strategy.pinned)} if strategy.pinned else {}
    return base, roles | values | pin


def _alike(one: Strategy, other: Strategy) -> int:
    pairs = zip(one.parts.values(), other.parts.values(), strict=True)
    return sum(type(a) is type(b) for a, b in pairs)


def _written(words: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in words.items())


def _word(value: Any) -> str:
    if isinstance(value, Own):
        return str(value)
    if type(value) is int:
        return f"{value:_}"
    if isinstance(value, str) and value.isprintable() and not {'"', "\\"} & set(value):
        return f'"{value}"'
    return repr(value)


# -- in words -------------------------------------------------------------------------------------


def short(settings: Settings, shape: Shape) -> str:
    """The settings in a few words: ``hobbit, 25 %, 16/4 bit, SD card``.

    Parameters
    ----------
    shape
        Of the model: a budget is shown as a share of all its experts.
    """
    s, strategy, low = settings, settings.strategy, settings.low_bits
    share = 100 * s.budget_bytes / shape.all_bytes(max(shape.nbytes))
    pair = f"/{low}" if low and low < s.bits else ""
    device = DEVICES[s.device].title.partition(",")[0].partition(" (")[0]
    pins = "".join(f", expert {at}.{e} pinned at {b} bit" for (at, e), b in strategy.pinned.items())
    disk = "disk" if s.device == "disk" else device
    return f"{strategy.name}, {share:.3g} %, {s.bits}{pair} bit, {disk}{pins}"


def shown(settings: Settings) -> dict[str, str]:
    """Every setting as a word for a table or a mark on the time axis."""
    words = {f.name: str(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    del words["budget_bytes"]
    return words | {
        "strategy": settings.strategy.name,
        "budget": f"{settings.budget_bytes / 1e6:.3g} MB",
        "measure_kl": "on" if settings.measure_kl else "off",
    }


def shown_strategy(strategy: Strategy) -> dict[str, str]:
    """The strategy's decisions, parameters and pinned experts, as words."""
    parts = {role: part_title(part) for role, part in strategy.parts.items()}
    own = {name: _shown(name, value) for name, (_, _, value) in strategy.parameters.items()}
    pins = [f"{at}.{e} at {bits} bit" for (at, e), bits in strategy.pinned.items()]
    return parts | own | {"pin": ", ".join(pins) or "none"}


def _shown(name: str, value: Any) -> str:
    if value is None or (name == "depth" and not value):
        return "off"
    if name == "depth":
        return f"+{value}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def differences(old: Settings, new: Settings) -> dict[str, str]:
    """What changed, as words; of a strategy chosen whole only its name, not its parts."""
    before, after = shown(old), shown(new)
    found = {k: v for k, v in after.items() if before[k] != v}
    if old.strategy is not new.strategy and ("strategy" not in found or "*" in after["strategy"]):
        had = shown_strategy(old.strategy)
        own = {k: v for k, v in shown_strategy(new.strategy).items() if had.get(k) != v}
        found = {k: v for k, v in found.items() if k != "strategy" or not own} | own
    return found
