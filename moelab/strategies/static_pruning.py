"""Static pruning: a few fixed experts of each layer, and the router chooses among them.

The first baseline of SwapMoE (arXiv 2308.15030): the experts with the largest weights ‖E_i‖ stay in
memory, all others are as good as gone. No token waits for a load, and memory is bounded; the output
changes instead. As a second variant the experts that the router chose most often on sample text
stay. `moelab.strategies.swapmoe` is this with a choice that follows the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moelab.scheduling.strategy import (
    Allocate,
    Evict,
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


_FLYING = 1e6
"""Above every other score: a copy on its way goes only where there is no other."""


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
        self._orders: list[np.ndarray] = []  # of each layer [E], the most deserving first
        self._ordered_by = ""
        self._score: np.ndarray | None = None  # without the copies on their way, once worked out
        self._rank = np.zeros(0)  # of every expert within its layer [n], 0: the most deserving

    # -- who ----------------------------------------------------------------------------------

    def order(self, layer: int, view: View) -> np.ndarray:
        """The layer's experts, the most deserving first ``[E]``."""
        if not self._orders or self._ordered_by != self.by:
            self._ordered_by, self._orders = self.by, []
            self._rank = np.zeros(view.shape.n)
            for at, count in enumerate(view.shape.experts):
                table = self.initial()
                by = -table[at] if table else np.zeros(count)
                self._orders.append(np.zeros(0, np.int64))
                self._reorder(at, np.argsort(by, kind="stable"), view)
        return self._orders[layer]

    def initial(self) -> tuple[np.ndarray, ...]:
        """What the experts are first ordered by, ``[L]`` of ``[E]``; empty: by their index."""
        return self._tables[self.by]

    def _reorder(self, layer: int, order: np.ndarray, view: View) -> None:
        self._score = None
        self._orders[layer] = order
        self._rank[view.shape.offset[layer] + order] = np.arange(len(order))

    def rank(self, view: View) -> np.ndarray:
        """Place of every expert in the order of its layer ``[n]``, counted from 0."""
        self.order(0, view)
        return self._rank

    def plan(self, view: View) -> Plan:
        """How many experts of each layer the budget holds at the bits asked for."""
        slots = view.knobs.budget_bytes // view.shape.nbytes[view.knobs.bits]
        if self._planned is None or self._planned[0] != slots:
            self._planned, self._score = (slots, self.plan_for(slots, view)), None
        return self._planned[1]

    def plan_for(self, slots: int, view: View) -> Plan:
        """The plan for a memory of so many experts."""
        return uniform(slots, view.shape)

    # -- allocate -----------------------------------------------------------------------------

    def layer_bytes(self, layer: int, view: View) -> int:
        return self.plan(view).experts[layer] * view.shape.nbytes[view.knobs.bits]

    # -- route --------------------------------------------------------------------------------

    def mask(self, layer: int, view: View) -> np.ndarray | None:
        """Masked gating: the router sees experts that are resident and have landed.

        Where a prefetch part of another strategy has not brought in top-k of them, those on their
        way count too, and without enough of these the router chooses freely.
        """
        landed = self.landed(layer, view)
        if landed.all():
            return None
        if np.count_nonzero(landed) >= view.shape.top_k:
            return landed
        here = view.bits[view.shape.keys(layer)] > 0
        return here if np.count_nonzero(here) >= view.shape.top_k else None

    def landed(self, layer: int, view: View) -> np.ndarray:
        """Which experts can compute now ``[E]``: resident at the bits asked for, and landed."""
        at = view.shape.keys(layer)
        return ~view.in_flight[at] & (view.bits[at] >= view.asked[at])

    # -- prefetch: only what is there before the first token --------------------------------------

    def begin(self, view: View) -> Iterable[Prediction]:
        """The first n_l experts of every layer, the best of each layer first."""
        kept = [self.first(at, view)[:n] for at, n in enumerate(self.plan(view).experts)]
        for rank in range(max(map(len, kept))):
            for layer, experts in enumerate(kept):
                if rank < len(experts):
                    yield Prediction(layer, int(experts[rank]))

    def first(self, layer: int, view: View) -> np.ndarray:
        """The layer's experts in the order in which a run wants to begin with them."""
        return self.order(layer, view)

    # -- evict: a smaller budget, another strategy's leftovers ----------------------------------

    def score(self, view: View) -> np.ndarray:
        """Above -1 while the expert is among the n_l of its layer; much higher while in flight."""
        self.order(0, view)  # other settings since: the score is not the old one
        self.plan(view)
        if self._score is None:
            self._score = -self.rank(view) / np.maximum(self._kept(view), 1)
        flying = view.in_flight
        return self._score + _FLYING * flying if flying.any() else self._score

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        tables = {name: np.concatenate(table) for name, table in self._tables.items() if table}
        return {
            **tables,
            "rank in its layer": self.rank(view) + 1,
            "experts kept": self._kept(view),
        }

    def _kept(self, view: View) -> np.ndarray:
        """n_l of every expert's layer ``[n]``."""
        return np.array(self.plan(view).experts)[view.layer_of]


def frozen(table: Table | None) -> tuple[np.ndarray, ...]:
    """A table as arrays ``[L]`` of ``[E]``."""
    return tuple(np.array(row, float) for row in table or ())


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
