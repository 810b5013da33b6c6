"""Static pruning: a few fixed experts of each layer, and the router chooses among them.

The first baseline of SwapMoE (arXiv 2308.15030): the experts with the largest weights ‖E_i‖ stay in
memory, all others are as good as gone. No token waits for a load, and memory is bounded; the output
changes instead. `moelab.strategies.swapmoe` is this with a choice that follows the input.

Other rules for who stays, each from sample text: SEER-MoE's (arXiv 2404.05089) counts, hard (tokens
routed to the expert) and soft (gate probabilities summed over all tokens), with its choice between
as many experts of each layer and the best of the whole model; and gate x norm, as REAP's. On text
of one task alone it is the part of task-specific pruning (arXiv 2206.00277) that needs no training.
Of a fine-tuned model the change of the router's norms (arXiv 2405.16646) needs no text at all.
SEER-MoE's second stage, fine-tuning with fewer active experts, is not here.
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
    Shape,
    Strategy,
    View,
)
from moelab.strategies.swapmoe_planner import DEFAULT_F, Plan, uniform, usable

Table = Sequence[Sequence[float]]
"""One number for each expert, ``[L][E]``."""


_FLYING = 1e6
"""Above every other score: a copy on its way goes only where there is no other."""


class FixedExperts(Allocate, Route, Evict, Prefetch):
    """Each layer keeps its first n_l experts of an order, and its router sees no others.

    Parameters
    ----------
    norms, counts, soft, importance
        What is known of the experts ``[L][E]``: ‖E_i‖, and on sample text uses, summed gate
        probabilities and SwapMoE's importance. Without any of them experts rank by their index.
    change
        What fine-tuning added to the norm of each one's row of the router ``[L][E]``.
    by
        Which of them decides: ``"norm"``, ``"count"``, ``"soft"``, ``"importance"``, ``"change"``.
    span
        ``"layer"``: as many of each layer. ``"model"``: the highest of all layers together, n_l as
        it comes, and never fewer than top-k of a layer.
    """

    title = "fixed experts (static pruning)"
    parameters = (
        Parameter(
            "by",
            "Who stays: largest weights, most used, most probable, gate x norm, router change",
            choices=("norm", "count", "soft", "importance", "change"),
        ),
        Parameter(
            "span",
            "Chosen within each layer, as many of each, or over the whole model",
            choices=("layer", "model"),
        ),
    )

    def __init__(
        self,
        norms: Table | None = None,
        counts: Table | None = None,
        *,
        soft: Table | None = None,
        importance: Table | None = None,
        change: Table | None = None,
        by: str = "norm",
        span: str = "layer",
    ) -> None:
        known = zip(FixedExperts.parameters, (by, span), strict=True)
        self.by, self.span = (parameter.checked(value) for parameter, value in known)
        tables = {"norm": norms, "count": counts, "soft": soft, "importance": importance}
        tables["change"] = change
        self._tables = {name: frozen(table) for name, table in tables.items()}
        self._planned: tuple[tuple[int, str, str], Plan] | None = None
        self._orders: list[np.ndarray] = []  # of each layer [E], the most deserving first
        self._ordered_by = ""
        self._score: np.ndarray | None = None  # without the copies on their way, once worked out
        self._rank = np.zeros(0)  # of every expert within its layer [n], 0: the most deserving

    def check(self) -> None:
        """Raise ValueError where experts are known, but not what this rule ranks them by."""
        if any(self._tables.values()) and not self._tables[self.by]:
            how = (
                "they need two checkpoints: give the profile a change= that "
                "moelab.calibration.router_change.router_change(before, after) made"
                if self.by == "change"
                else "an older version made it; measure them once with "
                "lab.calibrate('swapmoe', again=True)"
            )
            raise ValueError(f"by={self.by!r}: the profile has no such numbers; {how}")

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
        asked = slots, self.by, self.span
        if self._planned is None or self._planned[0] != asked:
            self._planned, self._score = (asked, self.plan_for(slots, view)), None
        return self._planned[1]

    def plan_for(self, slots: int, view: View) -> Plan:
        """The plan for a memory of so many experts."""
        table = self.initial() if self.span == "model" else ()
        return over_the_model(table, slots, view.shape) if table else uniform(slots, view.shape)

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


def over_the_model(table: Sequence[np.ndarray], slots: int, shape: Shape) -> Plan:
    """Top-k of every layer and, of all others, those with the highest numbers ``[L][E]``."""
    kept = [min(shape.top_k, count) for count in shape.experts]
    others = [np.sort(row)[::-1][n:] for row, n in zip(table, kept, strict=True)]
    layers = np.repeat(np.arange(shape.layers), [len(row) for row in others])
    more = usable(slots, shape) - sum(kept)
    if more < 0:
        return uniform(slots, shape)
    first = layers[np.argsort(-np.concatenate(others), kind="stable")[:more]]
    counts = np.bincount(first, minlength=shape.layers) + kept
    return Plan(DEFAULT_F, tuple(counts.tolist()))


def static_pruning(
    profile: Mapping[str, Any] | None = None, *, by: str = "norm", span: str = "layer"
) -> Strategy:
    """The same few experts for ever, those that rank highest; nothing is ever loaded.

    Parameters
    ----------
    profile
        What ``lab.calibrate("swapmoe")`` measured, or `moelab.calibration.swapmoe.tables` on text
        of one task. Without it the experts with the lowest indices stay.
    by
        What they rank by: ``"norm"``, ‖E_i‖; ``"count"``, how often they were used; ``"soft"``,
        their gate probabilities summed over all tokens; ``"importance"``, ‖x‖ ‖G‖ ‖E‖ summed;
        ``"change"``, what fine-tuning did to routers (`moelab.calibration.router_change`).
    span
        ``"layer"``: as many of each layer; ``"model"``: the highest of all layers together.

    Raises
    ------
    ValueError
        The profile has no numbers for this rule.
    """
    data = profile or {}
    more = {name: data.get(name) for name in ("soft", "importance", "change")}
    one = FixedExperts(data.get("norms"), data.get("counts"), **more, by=by, span=span)
    one.check()
    return Strategy("static_pruning", one, allocate=one, route=one, prefetch=one)
