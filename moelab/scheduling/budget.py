"""The least a budget must hold, and the refusal of one that is smaller."""

from __future__ import annotations

import dataclasses

import numpy as np

from moelab.scheduling.cache import Cache
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import MIXED, Knobs, Shape, View

_HUGE = 1 << 60
_NAMED = {1: "ternary", MIXED: "mixed"}
"""Tiers whose number is no count of bits a weight."""


class BudgetError(ValueError):
    """The budget cannot hold what a layer needs at once for a token."""


def asked_bits(strategy: Strategy, view: View) -> np.ndarray:
    """Bits at which every expert is asked for ``[n]``: the allocate decision's, and pins."""
    shape = view.shape
    asked = np.array(np.broadcast_to(strategy.allocate.bits(view), shape.n), np.int64)
    for place, bits in strategy.pinned.items():
        asked[shape.key(*place)] = bits
    return asked


def check_budget(shape: Shape, strategy: Strategy, knobs: Knobs) -> None:
    """Refuse a budget that cannot hold one layer's top-k at the bits asked for.

    Raises
    ------
    BudgetError
        With the budget that would do.
    """
    if _Needs(shape, strategy, knobs).suffices(knobs.budget_bytes):
        return
    need = minimum_budget(shape, strategy, knobs)
    pins = len(strategy.pinned)
    beside = f" beside {pins} pinned expert{'s'[: pins > 1]}" if pins else ""
    raise BudgetError(
        f"budget {size(knobs.budget_bytes)} is below one layer's need with strategy "
        f"{strategy.full_name!r} (top-{shape.top_k} at {bits_in_words(knobs.bits)}{beside}: "
        f"{size(need)}); raise it to {need} bytes ({size(need)}) or more, or choose fewer bits"
    )


def minimum_budget(shape: Shape, strategy: Strategy, knobs: Knobs) -> int:
    """Least bytes that hold the top-k experts of every layer in turn, and in each one's share.

    Pinned experts are held besides: the top-k may all be others. Shares of layers and tiers may
    depend on the budget in any growing way, so the least budget under which they suffice is
    searched.
    """
    needs = _Needs(shape, strategy, knobs)
    low = max(sum(sizes) for sizes in needs.sizes) + needs.pinned_bytes
    if needs.suffices(low):
        return low
    high = low
    while not needs.suffices(high):
        low, high = high, 2 * high
        if high > _HUGE:
            raise BudgetError(
                f"no budget is enough for the shares of strategy {strategy.full_name!r}"
            )
    while high - low > 1:
        middle = (low + high) // 2
        if needs.suffices(middle):
            high = middle
        else:
            low = middle
    return high


class _Needs:
    """What the layers of a model need at once, whatever the budget is.

    ``sizes`` are the bytes of each layer's top-k largest experts that are not pinned.
    """

    def __init__(self, shape: Shape, strategy: Strategy, knobs: Knobs) -> None:
        self._shape, self._strategy, self._knobs = shape, strategy, knobs
        self._pins = Cache(shape, _HUGE)
        for place, bits in strategy.pinned.items():
            self._pins.add(shape.key(*place), bits)
        self.pinned_bytes = self._pins.used_bytes
        self._view = View(shape, knobs, Cache(shape, 0))
        self._view.precision = strategy.precision
        asked, low = asked_bits(strategy, self._view), self._view.low_bits
        needs: list[list[tuple[int, int]]] = [[] for _ in shape.experts]
        for key in np.flatnonzero(self._pins.bits == 0).tolist():
            bits = int(asked[key])
            most = max(shape.size(key, b) for b in (bits, low or bits))  # of "mixed" perhaps low
            needs[shape.layer_of[key]].append((most, bits))
        needs = [sorted(own, reverse=True)[: shape.top_k] for own in needs]
        self.sizes = [[size for size, _ in own] for own in needs]
        self._bits = [[bits for _, bits in own] for own in needs]

    def suffices(self, budget_bytes: int) -> bool:
        shape, view, allocate = self._shape, self._view, self._strategy.allocate
        view.knobs = dataclasses.replace(self._knobs, budget_bytes=budget_bytes)
        for layer, sizes in enumerate(self.sizes):
            share = allocate.layer_bytes(layer, view)
            if sum(sizes) + self.pinned_bytes > budget_bytes:
                return False
            if share is not None and sum(sizes) + self._pins.layer_bytes[layer] > share:
                return False
        low = getattr(view.precision, "low_bits", None)
        for bits, nbytes in shape.nbytes.items():
            pool = allocate.tier_bytes(bits, view)
            most = max(own.count(bits) for own in self._bits)
            if bits == low:
                most = max(most, shape.top_k)
            if pool is not None and most * nbytes + self._pins.tier_bytes[bits] > pool:
                return False
        return True


def tier_name(bits: int) -> str:
    """A tier as a person reads it, without its unit: ``16``, ``mixed``, ``ternary``."""
    return _NAMED.get(bits) or str(bits)


def bits_in_words(*tiers: int) -> str:
    """One tier or more: ``16 bit``, ``16/4 bit``, ``mixed bits``, ``ternary``."""
    unit = {"mixed": " bits", "ternary": ""}.get(last := tier_name(tiers[-1]), " bit")
    return "/".join([*map(tier_name, tiers[:-1]), last]) + unit


def size(nbytes: float | None) -> str:
    """Bytes in words: ``5.31 MB``."""
    if nbytes is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"
