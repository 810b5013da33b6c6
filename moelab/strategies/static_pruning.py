"""Static pruning: a few fixed experts of each layer, and the router chooses among them.

The first baseline of SwapMoE (arXiv 2308.15030): the experts with the largest weights ‖E_i‖ stay in
memory, all others are as good as gone. No token waits for a load, and memory is bounded; the output
changes instead. As a second variant the experts that the router chose most often on sample text
stay. `moelab.strategies.swapmoe` is this with a choice that follows the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moelab.scheduling.strategy import (
    Allocate,
    Evict,
    Key,
    Parameter,
    Prediction,
    Prefetch,
    Route,
    Strategy,
    View,
)
from moelab.strategies.swapmoe_planner import Plan, uniform

Table = Sequence[Sequence[float]]
"""One number for each expert, ``[L][E]``."""


class FixedExperts(Allocate, Route, Evict, Prefetch):
    """Each layer keeps its first n_l experts of an order, and its router sees no others.

    Parameters
    ----------
    norms, counts
        ‖E_i‖ and uses on sample text ``[L][E]``. Without them experts rank by their index.
    by
        Which of the two decides: ``"norm"`` or ``"count"``.
    """

    title = "fixed experts (static pruning)"
    parameters = (
        Parameter(
            "by",
            "Who stays: the experts with the largest weights, or the most used on sample text",
            choices=("norm", "count"),
        ),
    )

    def __init__(
        self, norms: Table | None = None, counts: Table | None = None, *, by: str = "norm"
    ) -> None:
        self.by = FixedExperts.parameters[0].checked(by)
        self._tables = {"norm": frozen(norms), "count": frozen(counts)}
        self._planned: tuple[int, Plan] | None = None

    # -- who ----------------------------------------------------------------------------------

    def order(self, layer: int, view: View) -> Sequence[int]:
        """The layer's experts, the most deserving first."""
        count, table = view.shape.experts[layer], self._tables[self.by]
        if not table:
            return range(count)
        return sorted(range(count), key=lambda e: -table[layer][e])

    def plan(self, view: View) -> Plan:
        """How many experts of each layer the budget holds at the bits asked for."""
        slots = view.knobs.budget_bytes // view.shape.nbytes[view.knobs.bits]
        if self._planned is None or self._planned[0] != slots:
            self._planned = slots, self.plan_for(slots, view)
        return self._planned[1]

    def plan_for(self, slots: int, view: View) -> Plan:
        """The plan for a memory of so many experts."""
        return uniform(slots, view.shape)

    # -- allocate -----------------------------------------------------------------------------

    def layer_bytes(self, layer: int, view: View) -> int:
        return self.plan(view).experts[layer] * view.shape.nbytes[view.knobs.bits]

    # -- route --------------------------------------------------------------------------------

    def mask(self, layer: int, view: View) -> Sequence[bool] | None:
        """Masked gating: the router sees experts that are resident and have landed.

        Where a prefetch part of another strategy has not brought in top-k of them, those on their
        way count too, and without enough of these the router chooses freely.
        """
        landed = self.landed(layer, view)
        if all(landed):
            return None
        if sum(landed) >= view.shape.top_k:
            return landed
        here = [(layer, e) in view.cache for e in range(len(landed))]
        return here if sum(here) >= view.shape.top_k else None

    def landed(self, layer: int, view: View) -> list[bool]:
        """Which experts can compute now: resident at the bits asked for, and all bytes there."""
        keys = [(layer, e) for e in range(view.shape.experts[layer])]
        flying, bits = view.in_flight, view.cache.bits
        return [k not in flying and bits(k) >= view.asked_bits(k) for k in keys]

    # -- prefetch: only what is there before the first token --------------------------------------

    def begin(self, view: View) -> Iterable[Prediction]:
        """The first n_l experts of every layer, the best of each layer first."""
        keep = [self.first(at, view)[:n] for at, n in enumerate(self.plan(view).experts)]
        for rank in range(max(map(len, keep))):
            for layer, experts in enumerate(keep):
                if rank < len(experts):
                    yield Prediction((layer, experts[rank]))

    def first(self, layer: int, view: View) -> Sequence[int]:
        """The layer's experts in the order in which a run wants to begin with them."""
        return self.order(layer, view)

    # -- evict: a smaller budget, another strategy's leftovers ----------------------------------

    def priority(self, key: Key, view: View) -> float:
        """Above -1 while the expert is among the n_l of its layer."""
        layer, expert = key
        return -self.order(layer, view).index(expert) / max(1, self.plan(view).experts[layer])

    def victim(self, allowed: Callable[[Key], bool], view: View) -> Key | None:
        """The one furthest from its layer's n_l; a copy on its way only if there is no other."""
        keys = [k for k in view.cache if allowed(k)]
        flying = view.in_flight
        return min(keys, key=lambda k: (k in flying, self.priority(k, view)), default=None)

    def why(self, key: Key, view: View) -> dict[str, float]:
        layer, expert = key
        terms = {
            "rank in its layer": float(self.order(layer, view).index(expert) + 1),
            "experts kept": float(self.plan(view).experts[layer]),
        }
        return {n: t[layer][expert] for n, t in self._tables.items() if t} | terms


def frozen(table: Table | None) -> tuple[tuple[float, ...], ...]:
    """A table that copies of a part can share."""
    return tuple(tuple(map(float, row)) for row in table or ())


def static_pruning(profile: Mapping[str, Any] | None = None, *, by: str = "norm") -> Strategy:
    """The same few experts for ever: largest ‖E_i‖, or most used; nothing is ever loaded.

    Parameters
    ----------
    profile
        What ``lab.calibrate("swapmoe")`` measured: ``norms`` and ``counts``. Without it the experts
        with the lowest indices stay.
    by
        ``"norm"`` or ``"count"``.
    """
    data = profile or {}
    one = FixedExperts(data.get("norms"), data.get("counts"), by=by)
    return Strategy("static_pruning", one, allocate=one, route=one, prefetch=one)
