"""How settings, strategies, figures and errors are written for people.

One wording for recordings, reports, tables and widgets. Nothing here decides or draws, and nothing
is kept but the named strategies, built once.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from moelab import strategies
from moelab.scheduling.strategy import Strategy, part_title

LABEL = 48
"""Characters of a mark on the time axis at most; choosing a strategy changes many settings."""


@functools.cache
def named() -> dict[str, Strategy]:
    """Every strategy that has a name, as made without a calibration."""
    return {name: strategies.make(name) for name in strategies.NAMES}


def spelled(name: str) -> str:
    """A strategy's name as its authors write it; a mix goes by what it was made from."""
    base = name.rstrip("*")
    words = next((of[base] for of in strategies.GROUPS.values() if base in of), base)
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
    return first_line(strategies.maker(base))


def first_line(what: Any) -> str:
    """The first line of a docstring, without its markup."""
    return (inspect.getdoc(what) or "").partition("\n")[0].replace("`", "")


def sentence(settings: Any, expert_bytes: Mapping[int, int], all_experts_bytes: int) -> str:
    """Settings in one line: ``budget 5.31 MB = 25% = 24 experts, 16 bit, LRU``."""
    budget, name = settings.budget_bytes, settings.strategy.name
    experts = budget // expert_bytes[settings.bits]
    low = f", low bits {settings.low_bits}" if settings.low_bits else ""
    ahead = f", prefetch {settings.prefetch} ahead" if settings.prefetch else ""
    strategy = about(settings.strategy) if name.endswith("*") else spelled(name)
    return (
        f"budget {size(budget)} = {budget / all_experts_bytes:.0%} = {experts} experts, "
        f"{settings.bits} bit{low}, {strategy}{ahead}"
    )


def size(nbytes: float | None) -> str:
    """Bytes in words: ``5.31 MB``."""
    if nbytes is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def number(value: float | None, form: str = ".3g") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else format(value, form)


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


def _label(changed: Mapping[str, Any]) -> str:
    words = (f"{k.removesuffix('_bytes').replace('_', ' ')} {v}" for k, v in changed.items())
    label = ", ".join(words)
    return label if len(label) <= LABEL else label[: LABEL - 1].rstrip(" ,") + "…"


def in_words(error: BaseException) -> str:
    """Say an exception as a sentence: moelab's own errors are, others get their type's name."""
    text = str(error).strip()
    if isinstance(error, (ValueError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
