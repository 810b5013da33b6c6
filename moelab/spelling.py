"""How settings, strategies, figures and errors are written: as code that makes them, and in words.

A strategy knows the keywords that made it (`Strategy.keywords`), so code is those keywords written
down. What it cannot spell: a part of your own is written by its class's name, as if it were made
without arguments, and what a calibration measured is whatever the store has. The words are the same
in recordings, reports, tables and widgets.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from moelab.scheduling.budget import bits_in_words, size, tier_name
from moelab.scheduling.strategy import ROLES, Own, Strategy, part_title
from moelab.scheduling.stream import Shape
from moelab.settings import Settings, as_written
from moelab.store.devices import DEVICES
from moelab.strategies import GROUPS, NAMES, make, maker

CALLED = {"depth": "prefetch ahead", "budget_bytes": "budget"}
"""Settings that a screen calls otherwise than code does."""

LABEL = 48
"""Characters of a mark on the time axis at most; choosing a strategy changes many settings."""

# -- as code --------------------------------------------------------------------------------------

LONGEST_CODE = 20_000
_FIELDS = ("bits", "device", "measure_kl", "seed")


def opened(model: str, settings: Settings, dense_bits: int = 16) -> str:
    """Code that opens a lab with these settings: ``moelab.open``, and ``lab.update`` if needed.

    Examples
    --------
    >>> import moelab
    >>> lab = moelab.open("demo", budget="50%", bits=4, measure_kl=False)
    >>> opened("demo", lab.settings)
    'lab = moelab.open("demo", budget=10_616_832, bits=4, strategy="lru", device="disk", measure_kl=False)'
    """  # noqa: E501
    base, rest = _keywords(settings.strategy)
    rest |= _low_bits(settings, base, rest)
    first = {
        "budget": settings.budget_bytes,
        "bits": settings.bits,
        "strategy": base,
        "device": settings.device,
        "measure_kl": settings.measure_kl,
    }
    if dense_bits < 16:
        first["dense_bits"] = dense_bits
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
        words = {"strategy": base, **rest, **_low_bits(new, base, rest)}
        if old.strategy.pinned and not new.strategy.pinned:
            words["pin"] = {}
        words["bits"] = new.bits  # a strategy may bring its own
    else:
        back = {role: base for role in ROLES if role in rest0 and role not in rest}
        words = back | {n: v for n, v in rest.items() if n not in rest0 or rest0[n] != v}
        known = new.strategy.parameters
        words |= {n: known[n][2] for n in rest0 if n in known and n not in rest}
        if "precision" in words:
            words |= _low_bits(new, base, rest)
        if "pin" in rest0 and "pin" not in rest:
            words["pin"] = {}
    if new.budget_bytes != old.budget_bytes:
        words["budget"] = new.budget_bytes
    words |= {n: getattr(new, n) for n in _FIELDS if getattr(new, n) != getattr(old, n)}
    if words.get("bits") == old.bits and old.strategy.bits is None is new.strategy.bits:
        del words["bits"]
    return _written(words)


def reread(code: str) -> str:
    """Code as `opened` and `changed` write it, written anew from the values that it sets.

    So what a file says is never passed on as code: only words and numbers come out of it.

    Raises
    ------
    ValueError
        It does anything else than to open a lab and to set settings.

    Examples
    --------
    >>> reread('lab.update(bits = 4)')
    'lab.update(bits=4)'
    """
    lines = []
    try:
        for node in ast.parse(code[:LONGEST_CODE]).body:
            match node:
                case ast.Assign(
                    targets=[ast.Name("lab")],
                    value=ast.Call(
                        func=ast.Attribute(ast.Name("moelab"), "open"),
                        args=[ast.Constant(str() as model)],
                        keywords=words,
                    ),
                ):
                    model = _word(model)
                    lines.append(f"lab = moelab.open({model}, {_written(_values(words))})")
                case ast.Expr(
                    ast.Call(ast.Attribute(ast.Name("lab"), "update"), args=[], keywords=words)
                ):
                    lines.append(f"lab.update({_written(_values(words))})")
                case _:
                    raise ValueError(f"line {node.lineno} sets no settings")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"it is no code of settings ({error})") from None
    return "\n".join(lines)


def _values(words: list[ast.keyword]) -> dict[str, Any]:
    """Keywords and their values: literals, and for a decision a class made without arguments."""
    found: dict[str, Any] = {}
    for word in words:
        match word.arg, word.value:
            case str() as role, ast.Call(ast.Name(name), [], []) if role in ROLES and not hasattr(
                builtins, name
            ):
                found[role] = Own(f"{name}()")
            case str() as name, value:
                found[name] = ast.literal_eval(value)
            case _:
                raise ValueError("settings are given by their names")
    return found


def _keywords(strategy: Strategy) -> tuple[str, dict[str, Any]]:
    """The named strategy that this one began as, and the other keywords that make it."""
    known, words = strategy.parameters, dict(strategy.keywords)
    base = words.pop("strategy")
    if base not in NAMES:  # one of your own: the nearest that has a name, and its parts
        base = max(NAMES, key=lambda name: _alike(named()[name], strategy))
        parts = named()[base].parts
        for role, part in strategy.parts.items():
            if type(part) is not type(parts[role]):
                words.setdefault(role, Own(f"{type(part).__name__}()"))
    roles = {role: words[role] for role in ROLES if role in words and words[role] != base}
    values = {name: known[name][2] for name in words if name in known}
    pin = {"pin": dict(strategy.pinned)} if strategy.pinned else {}
    return base, roles | values | pin


def _low_bits(settings: Settings, base: str, words: Mapping[str, Any]) -> dict[str, int]:
    """The second tier where making the strategy anew under these bits would bring another one."""
    low, source = settings.low_bits, words.get("precision", base)
    brought = getattr(named()[source].precision, "low_bits", None) if source in NAMES else None
    return {"low_bits": low} if low and (low != brought or low >= settings.bits) else {}


def _alike(one: Strategy, other: Strategy) -> int:
    pairs = zip(one.parts.values(), other.parts.values(), strict=True)
    return sum(type(a) is type(b) for a, b in pairs)


def _written(words: Mapping[str, Any]) -> str:
    tiers = {name: as_written(words[name]) for name in ("bits", "low_bits") if name in words}
    if isinstance(pin := words.get("pin"), Mapping):
        tiers["pin"] = {place: as_written(bits) for place, bits in pin.items()}
    return ", ".join(f"{name}={_word(value)}" for name, value in {**words, **tiers}.items())


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
    tiers = (s.bits, low) if low and low < s.bits else (s.bits,)
    device = DEVICES[s.device].title.partition(",")[0].partition(" (")[0]
    pins = "".join(
        f", expert {at}.{e} pinned at {bits_in_words(b)}" for (at, e), b in strategy.pinned.items()
    )
    disk = "disk" if s.device == "disk" else device
    return f"{strategy.full_name}, {share:.3g} %, {bits_in_words(*tiers)}, {disk}{pins}"


def in_turn(shorts: Sequence[str]) -> str:
    """Settings in short that followed each other, as one; what does not show in them is counted.

    Examples
    --------
    >>> in_turn(["lru, 25 %, 16 bit", "lru, 50 %, 16 bit"])
    'lru, 25 % → 50 %, 16 bit'
    """
    words = []
    for column in itertools.zip_longest(*(s.split(", ") for s in shorts), fillvalue="no pin"):
        found = [word for word, _ in itertools.groupby(column)]
        words.append(" → ".join(found if len(found) < 4 else (found[0], "…", found[-1])))
    unseen = sum(a == b for a, b in itertools.pairwise(shorts))
    others = [f"{unseen} other change{'s'[: unseen > 1]}"] if unseen else []
    return ", ".join(words + others)


def shown(settings: Settings) -> dict[str, str]:
    """Every setting as a word for a table or a mark on the time axis."""
    words = {f.name: str(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    every = settings.measure_kl
    del words["budget_bytes"]
    return words | {
        "strategy": settings.strategy.full_name,
        "budget": f"{brief(settings.budget_bytes / 1e6)} MB",
        "measure_kl": {0: "off", 1: "on"}.get(every, f"every {every} tokens"),
    }


def shown_strategy(strategy: Strategy) -> dict[str, str]:
    """The strategy's decisions, parameters and pinned experts, as words."""
    parts = {role: part_title(part) for role, part in strategy.parts.items()}
    own = {name: _shown(name, value) for name, (_, _, value) in strategy.parameters.items()}
    pins = [f"{at}.{e} at {bits_in_words(bits)}" for (at, e), bits in strategy.pinned.items()]
    return parts | own | {"pin": ", ".join(pins) or "none"}


def _shown(name: str, value: Any) -> str:
    if value is None or (name == "depth" and not value):
        return "off"
    if name == "depth":
        return f"+{value}"
    if name == "low_bits":
        return tier_name(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def differences(old: Settings, new: Settings) -> dict[str, str]:
    """What changed, as words; of a strategy chosen whole only its name, not its parts."""
    before, after = shown(old), shown(new)
    found = {k: v for k, v in after.items() if before[k] != v}
    mixed = new.strategy.name.endswith("*")
    if old.strategy is not new.strategy and (mixed or "strategy" not in found):
        had = shown_strategy(old.strategy)
        own = {k: v for k, v in shown_strategy(new.strategy).items() if had.get(k) != v}
        found = {k: v for k, v in found.items() if k != "strategy" or not own} | own
    return found


@functools.cache
def named() -> dict[str, Strategy]:
    """Every strategy that has a name, as made without a calibration."""
    return {name: make(name) for name in NAMES}


def spelled(name: str) -> str:
    """A strategy's name as its authors write it; a mix goes by what it was made from."""
    base = name.rstrip("*")
    words = next((of[base] for of in GROUPS.values() if base in of), base)
    return words if base == name else f"{words}, mixed"


def about(strategy: Strategy) -> str:
    """One line about a strategy; of a mix, what differs from the strategy it was made from."""
    base = strategy.name.rstrip("*")
    if base not in named():
        return "a strategy of your own"
    other = [
        f"{role}: {part_title(part)}"
        for role, part in strategy.parts.items()
        if type(part) is not type(named()[base].parts[role])
    ]
    if other:
        return f"{spelled(base)} but for {'; '.join(other)}"
    return first_line(maker(base))


def first_line(what: Any) -> str:
    """The first line of a docstring, without its markup."""
    return (inspect.getdoc(what) or "").partition("\n")[0].replace("`", "")


def sentence(settings: Settings, shape: Shape) -> str:
    """Settings in one line: ``budget 5.31 MB = 25% = 24 experts, 16 bit, LRU``."""
    budget, bits, name = settings.budget_bytes, settings.bits, settings.strategy.name
    share = budget / shape.all_bytes(max(shape.nbytes))
    experts = f"{budget * shape.n // shape.all_bytes(bits)} experts"
    experts = f"about {experts}" if bits in shape.own else experts
    low = f", low bits {tier_name(settings.low_bits)}" if settings.low_bits else ""
    ahead = f", prefetch {settings.prefetch} ahead" if settings.prefetch else ""
    strategy = about(settings.strategy) if name.endswith("*") else spelled(name)
    return (
        f"budget {size(budget)} = {share:.0%} = {experts}, {bits_in_words(bits)}{low}, "
        f"{strategy}{ahead}"
    )


def number(value: float | None, form: str = ".3g") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def brief(value: float, digits: int = 3) -> str:
    """A figure to so many digits; a larger one whole, without an exponent.

    Examples
    --------
    >>> brief(12.345), brief(999.7), brief(382.0, 2)
    ('12.3', '1000', '382')
    """
    whole = math.isfinite(value) and round(abs(value)) >= 10**digits
    return f"{value:.0f}" if whole else f"{value:.{digits}g}"


def plain(value: Any) -> Any:
    """A figure as JSON has it, which knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def merge_changes(
    changes: Sequence[tuple[int, Mapping[str, Any]]], *, gap: int = 8
) -> list[dict[str, Any]]:
    """Marks of the time axis: a slider drag is one mark with the value it ended on.

    Changes of the same settings at most ``gap`` tokens apart are one mark.

    Examples
    --------
    >>> merge_changes([(3, {"bits": "8"}), (5, {"bits": "4"})])
    [{'first': 3, 'last': 5, 'keys': ['bits'], 'label': 'bits 4'}]
    """
    marks: list[dict[str, Any]] = []
    for token, changed in list(changes):
        keys = sorted(changed)
        before = marks[-1] if marks else None
        if before and before["keys"] == keys and token - before["last"] <= gap:
            before |= {"last": token, "label": _label(changed)}
        else:
            marks.append({"first": token, "last": token, "keys": keys, "label": _label(changed)})
    return marks


def called(setting: str) -> str:
    """A setting's name as the dashboard has it."""
    return CALLED.get(setting, setting.replace("_", " "))


def valued(setting: str, value: str) -> str:
    """A setting's value of `shown` as a person reads it; there a tier is its number."""
    return tier_name(int(value)) if setting == "bits" and value.isdecimal() else value


def _label(changed: Mapping[str, Any]) -> str:
    label = ", ".join(f"{called(k)} {valued(k, v)}" for k, v in changed.items())
    return label if len(label) <= LABEL else label[: LABEL - 1].rstrip(" ,") + "…"


def in_words(error: BaseException) -> str:
    """Say an exception as a sentence: moelab's own errors are, others get their type's name."""
    text = str(error).strip()
    if isinstance(error, (ValueError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
