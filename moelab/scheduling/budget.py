"""The least a budget must hold, and the refusal of one that is smaller."""

from __future__ import annotations

import dataclasses

from moelab.scheduling.cache import Cache
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Knobs, Shape, View

_HUGE = 1 << 60


class BudgetError(ValueError):
    """The budget cannot hold what a layer needs at once for a token."""


def check_budget(shape: Shape, strategy: Strategy, knobs: Knobs) -> None:
    """Refuse a budget that cannot hold one layer's top-k at the bits asked for."""
    need = minimum_budget(shape, strategy, knobs)
    if knobs.budget_bytes < need:
        kept = len(strategy.keep)
        beside = f" beside {kept} kept expert{'s'[: kept > 1]}" if kept else ""
        raise BudgetError(
            f"budget {_mb(knobs.budget_bytes)} is below one layer's need with strategy "
            f"{strategy.name!r} (top-{shape.top_k} at {knobs.bits} bit{beside}: {_mb(need)}); "
            f"raise it to {need} bytes or more, or choose fewer bits"
        )


def minimum_budget(shape: Shape, strategy: Strategy, knobs: Knobs) -> int:
    """Least bytes that hold the top-k experts of every layer in turn, and in each one's share.

    Experts kept for good are held besides: the top-k may all be others. Shares of layers and tiers
    may depend on the budget in any growing way, so the least budget under which they suffice is
    searched.
    """
    wanted = _needs(shape, strategy, knobs)
    low = max(sum(sizes) for sizes in wanted) + sum(shape.nbytes[b] for b in strategy.keep.values())
    if _suffices(shape, strategy, knobs, low, wanted):
        return low
    high = low
    while not _suffices(shape, strategy, knobs, high, wanted):
        low, high = high, 2 * high
        if high > _HUGE:
            raise BudgetError(f"no budget is enough for the shares of strategy {strategy.name!r}")
    while high - low > 1:
        middle = (low + high) // 2
        if _suffices(shape, strategy, knobs, middle, wanted):
            high = middle
        else:
            low = middle
    return high


def _view(shape: Shape, strategy: Strategy, knobs: Knobs, budget_bytes: int) -> View:
    now = dataclasses.replace(knobs, budget_bytes=budget_bytes)
    cache = Cache(shape, budget_bytes)
    return View(shape, now, cache, allocate=strategy.allocate, keep=strategy.keep)


def _needs(shape: Shape, strategy: Strategy, knobs: Knobs) -> list[list[int]]:
    """Bytes of the top-k largest experts that come and go, layer by layer."""
    view = _view(shape, strategy, knobs, knobs.budget_bytes)
    coming = [
        [(layer, e) for e in range(count) if (layer, e) not in strategy.keep]
        for layer, count in enumerate(shape.experts)
    ]
    return [
        sorted((shape.nbytes[view.asked_bits(key)] for key in keys), reverse=True)[: shape.top_k]
        for keys in coming
    ]


def _suffices(
    shape: Shape, strategy: Strategy, knobs: Knobs, budget_bytes: int, wanted: list[list[int]]
) -> bool:
    view = _view(shape, strategy, knobs, budget_bytes)
    kept = Cache(shape, _HUGE)
    for key, bits in strategy.keep.items():
        kept.add(key, bits)
    for layer, sizes in enumerate(wanted):
        share = strategy.allocate.layer_bytes(layer, view)
        if sum(sizes) + kept.used_bytes > budget_bytes:
            return False
        if share is not None and sum(sizes) + kept.layer_bytes[layer] > share:
            return False
    for bits, nbytes in shape.nbytes.items():
        pool = strategy.allocate.tier_bytes(bits, view)
        most = max(sizes.count(nbytes) for sizes in wanted)
        if bits == knobs.low_bits:
            most = max(most, shape.top_k)
        if pool is not None and most * nbytes + kept.tier_bytes[bits] > pool:
            return False
    return True


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB"
