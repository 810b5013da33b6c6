"""Settings: frozen, validated, and every error says what to do.

What belongs to no part of a strategy: budget, bits, device, seed, whether KL is measured; and the
strategy, whose parts bring their own parameters. `change` makes the next one from what a person
typed (``budget="25%"``, ``t1=0.4``, ``evict="lfu"``); `knobs` is the part the scheduler reads.
Whoever is given a setting, or anything else, as an argument that it does not take refuses it by
`known_only`: Python alone would name a function inside, and not say what there is.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from moelab.scheduling.budget import check_budget
from moelab.scheduling.strategy import ROLES, Own, Strategy, begun_anew
from moelab.scheduling.stream import FULL, MIXED, ZIPPED, Knobs, Shape
from moelab.store.devices import device as find_device
from moelab.strategies import NAMES
from moelab.strategies import make as make_strategy

P = ParamSpec("P")
R = TypeVar("R")
MakeStrategy = Callable[[str, Strategy | None, str], Strategy]
_UNITS = {"": 1, "b": 1}
for _i, _p in enumerate("kmgt", 1):
    _UNITS |= {_p + "b": 1000**_i, _p + "ib": 1024**_i}

_ALIASES = {"keep": "pin", "look_ahead": "depth", "memory": "budget"}
"""What papers or earlier versions call a setting, and what it is here."""

_OFF = {"low_bits": None, "t1": 0.6, "t2": 0.9, "depth": 0}
"""Settings of earlier versions that are parameters of parts now, and what they are where no part
has them: accepted there, with a warning where they ask for something."""

_ONE = 'one precision; precision="hobbit" has two'
_WHOSE = {
    **dict.fromkeys(("low_bits", "t1", "t2"), _ONE),
    "depth": 'no look-ahead through routers; prefetch="hobbit" has',
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run obeys; changed between tokens by ``lab.update``.

    The parameters of the strategy's parts can be read here too: ``settings.t1``.

    Attributes
    ----------
    budget_bytes
        Bytes that resident experts of all tiers may take, loads in flight included.
    bits
        Tier at which experts are asked for; ``"mixed"`` is kept as `MIXED`, a tier's number.
    strategy
        The five decisions, with their parameters.
    device
        ``"disk"`` (real) or an emulated device, see ``moelab.devices()``.
    measure_kl
        Compare each token with the full-precision model on the same context; a number n: every
        n-th token.
    seed
        Of sampling.
    """

    budget_bytes: int
    bits: int
    strategy: Strategy
    device: str = "disk"
    measure_kl: int = False
    seed: int = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "strategy":  # a copy in the making has none yet
            raise AttributeError(name)
        name, known = "depth" if name == "prefetch" else name, self.strategy.parameters
        if name in known:
            return known[name][2]
        if name in _OFF:
            return _OFF[name]
        raise AttributeError(f"there is no setting {name!r}; {self._there_is()}")

    def knobs(self) -> Knobs:
        """The part that decisions read."""
        return Knobs(self.budget_bytes, self.bits)

    def change(self, shape: Shape, *, make: MakeStrategy | None = None, **changes: Any) -> Settings:
        """The settings after ``changes``; nothing changes where one of them is refused.

        Besides the attributes a change may be ``budget`` (see `parse_budget`), one of the five
        decisions (``evict="hobbit"`` takes that strategy's, or a part of your own), any parameter
        of the strategy's parts (``prefetch=1`` is ``depth=1``), and ``pin``: experts over which no
        part decides, as ``{(layer, expert): bits}``, until it is changed again (``{}``: none).

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
        changes = {_ALIASES.get(name, name): value for name, value in changes.items()}
        pin = changes.pop("pin", None)
        named = [changes.get("bits"), changes.get("low_bits"), *dict(pin or {}).values()]
        if "mixed" in named and MIXED not in shape.nbytes:
            raise ValueError('this lab has no mixed tier; open it with moelab.open(bits="mixed")')
        changes |= {n: as_tier(changes[n]) for n in ("bits", "low_bits") if n in changes}
        if isinstance(changes.get("prefetch"), int):
            changes["depth"] = changes.pop("prefetch")
        if "budget" in changes:
            changes["budget_bytes"] = parse_budget(changes.pop("budget"), shape)
        fields = {f.name for f in dataclasses.fields(self)} - {"strategy"}
        own = {name: changes.pop(name) for name in fields & changes.keys()}
        strategy, chosen = self._composed(changes, make or _by_name)
        # What the old one brought goes with it.
        if chosen and (strategy.bits or self.strategy.bits):
            own.setdefault("bits", strategy.bits or max(shape.nbytes))
        tuned = {k: v for k, v in changes.items() if k not in ("strategy", *ROLES)}
        strategy = self._tuned(strategy, tuned)
        if "low_bits" not in tuned and strategy.precision is not self.strategy.precision:
            strategy = _fitted(strategy, own.get("bits", self.bits), shape)
        pinned = dict((strategy.pinned or self.strategy.pinned) if pin is None else pin)
        pinned = {place: as_tier(tier) for place, tier in pinned.items()}
        if pinned != strategy.pinned:
            strategy = dataclasses.replace(strategy, pinned=pinned)
        new = dataclasses.replace(self, **own, strategy=strategy)
        new._check(shape)
        return new

    def _composed(self, changes: Mapping[str, Any], make: MakeStrategy) -> tuple[Strategy, bool]:
        """The strategy of these decisions, and whether it was chosen as a whole."""
        now = self.strategy
        strategy = changes.get("strategy", now)
        if isinstance(strategy, str):
            strategy = make(strategy, now, "")
        if not hasattr(strategy, "parts") and not callable(strategy):
            raise ValueError(f"strategy={strategy!r}: a name, or a Strategy like lru()")
        strategy = make_strategy(strategy)  # pyright: ignore[reportArgumentType]
        parts: dict[str, Any] = {}
        words: dict[str, Any] = {}
        own: dict[int, Any] = {}
        for role in ROLES:
            part = changes.get(role)
            if part is None:
                continue
            if isinstance(part, str):
                parts[role], words[role] = make(part, strategy, role).parts[role], part
            else:  # one object may be given for several decisions, or again after a change
                known = any(part is old for old in now.objects)
                parts[role] = own.setdefault(id(part), begun_anew(part) if known else part)
                words[role] = Own(f"{type(part).__name__}()")
        if parts:
            strategy = strategy.replace(**parts, keywords={**strategy.keywords, **words})
        return strategy, "strategy" in changes and strategy is not now

    def _tuned(self, strategy: Strategy, values: dict[str, Any]) -> Strategy:
        for name in _OFF.keys() & values.keys() - strategy.parameters.keys():
            value = values.pop(name)
            if value not in (_OFF[name], 0, "off"):
                words = f"{name}={value!r} has no effect: {strategy.full_name!r} has {_WHOSE[name]}"
                warnings.warn(words, stacklevel=5)
        if unknown := values.keys() - strategy.parameters.keys():
            raise ValueError(f"unknown setting {min(unknown)!r}; {self._there_is(strategy)}")
        return strategy.tuned(**values) if values else strategy

    def _there_is(self, strategy: Strategy | None = None) -> str:
        strategy = strategy or self.strategy
        fields = {f.name for f in dataclasses.fields(self)} - {"budget_bytes"}
        names = sorted({"budget", "pin", *fields, *ROLES})
        own = ", ".join(strategy.parameters) or "none"
        return f"there are {', '.join(names)}; parameters of {strategy.full_name!r}: {own}"

    def _check(self, shape: Shape) -> None:
        tiers = _choices(shape)
        if type(self.bits) is not int or self.bits not in shape.nbytes:
            raise ValueError(f"bits={self.bits!r} is not in this store; choose one of {tiers}")
        for name, (_, parameter, value) in self.strategy.parameters.items():
            if parameter.tier and value is not None and value not in shape.nbytes:
                words = f"{name}={value!r} is not in this store; choose one of {tiers} or None"
                raise ValueError(words)
            if parameter.tier and value and value < self.bits and not shape.below(value, self.bits):
                low, bits = ('"mixed"' if b == MIXED else b for b in (value, self.bits))
                raise ValueError(
                    f"{name}={low} is no lower tier than bits={bits}: {shape.nbytes[value]} bytes "
                    f"of the largest expert, and {shape.nbytes[self.bits]}; choose fewer, or None"
                )
            if parameter.tier and value == ZIPPED < self.bits == FULL:
                raise ValueError(
                    f"{name}={ZIPPED}: {ZIPPED} bit are the same weights as {FULL}; choose "
                    f"bits={ZIPPED}, and fewer as {name}"
                )
        if not isinstance(self.measure_kl, int) or self.measure_kl < 0:
            words = f"measure_kl={self.measure_kl!r}: True, False, or n for every n-th token"
            raise ValueError(words)
        find_device(self.device)
        for place, bits in self.strategy.pinned.items():
            _check_pin(place, bits, shape)
        check_budget(shape, self.strategy, self.knobs())


def as_written(bits: Any) -> Any:
    """A tier as a person writes it: its number, or ``"mixed"``."""
    return "mixed" if bits == MIXED else bits


def as_tier(written: Any) -> Any:
    """The tier that a person wrote."""
    return MIXED if written == "mixed" else written


def _choices(shape: Shape) -> list[int | str]:
    return [as_written(bits) for bits in sorted(shape.nbytes, reverse=True)]


def _fitted(strategy: Strategy, bits: int, shape: Shape) -> Strategy:
    """What a precision part brings as low bits, or what there is below the bits in force."""
    low = getattr(strategy.precision, "low_bits", None)
    lower = [b for b in shape.nbytes if shape.below(b, bits)]
    if low is None or not (lower or bits == MIXED):
        return strategy
    fits = max((b for b in lower if b <= low), default=min(lower, default=None))
    if fits == low:
        return strategy
    return dataclasses.replace(strategy.tuned(low_bits=fits), keywords=strategy.keywords)


def _check_pin(place: Any, bits: Any, shape: Shape) -> None:
    pair = isinstance(place, tuple) and len(place) == 2 and all(type(i) is int for i in place)
    if not pair:
        raise ValueError(f"pin={{{place!r}: {bits!r}}}: write {{(layer, expert): bits}}")
    layer, expert = place
    if not 0 <= layer < shape.layers or not 0 <= expert < shape.experts[layer]:
        raise ValueError(f"pin: there is no expert {expert} in layer {layer}")
    if bits not in shape.nbytes:
        words = f"pin={{{place}: {bits!r}}} is not in this store; choose one of {_choices(shape)}"
        raise ValueError(words)


def _by_name(name: str, using: Strategy | None, role: str) -> Strategy:
    """A strategy without calibration; the one in force goes on with what it has learnt."""
    same = using is not None and using.name == name and not role
    return using if same else make_strategy(name)  # pyright: ignore[reportReturnType]


def parse_budget(value: float | str, shape: Shape) -> int:
    """Bytes from ``8_000_000``, ``"8MB"``, ``"1.5GiB"`` or ``"25%"`` of all experts at full bits.

    Raises
    ------
    ValueError
        The text is not a size, or more than 100 %.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*|%)\s*", str(value))
        if not found or (found[2] != "%" and found[2].lower() not in _UNITS):
            raise ValueError(
                f"budget {value!r} is not a size; write 8000000, '8MB', '1.5GiB', '25%' or 'auto'"
            )
        number, unit = float(found[1]), found[2].lower()
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"budget {value!r} must be above 0")
    if unit == "%":
        if number > 100:
            raise ValueError(
                f"budget {value!r} is above 100 %, which holds all experts; write '100%'"
            )
        return round(number / 100 * shape.all_bytes(max(shape.nbytes)))
    return round(number * _UNITS[unit])


def is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    """Whether it is a whole number in this range; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


# -- what is no setting ----------------------------------------------------------------------------


def known_only(call: Callable[P, R]) -> Callable[P, R]:
    """Refuse keywords that the function does not have."""
    home = "lab" if "self" in inspect.signature(call).parameters else "moelab"

    @functools.wraps(call)
    def checked(*args: P.args, **given: P.kwargs) -> R:
        refuse_unknown(f"{home}.{call.__name__}()", given, call)
        return call(*args, **given)

    return checked


def refuse_unknown(
    who: str, given: Mapping[str, Any], call: Callable[..., Any], *, besides: Iterable[str] = ()
) -> None:
    """Refuse what is neither a parameter of ``call`` nor among ``besides``.

    Raises
    ------
    TypeError
        With what there is, or with the call that takes it where it is a setting.
    """
    there = [*(n for n in inspect.signature(call).parameters if n not in ("self", "lab")), *besides]
    for name, value in given.items():
        if name in there:
            continue
        if name in _settings():
            plain = repr(value) if isinstance(value, (str, int, float)) else "..."
            raise TypeError(f"{who} takes no {name!r}, a setting: lab.update({name}={plain})")
        near = "".join(f"; {one!r}?" for one in difflib.get_close_matches(name, there, 1))
        raise TypeError(f"{who} takes no {name!r}{near}; there are {', '.join(there)}")


@functools.cache
def _settings() -> set[str]:
    """Everything that `lab.update` takes, with some strategy."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    return fields.union(ROLES, ("budget", "pin"), *(make_strategy(n).parameters for n in NAMES))
