"""SwapMoE (arXiv 2308.15030): no token ever waits; a few *virtual experts* stand for all.

    n_l         virtual experts of layer l: the resident ones, and only they compute (masked gating)
    I(E_i, X)   importance of expert E_i for the inputs X:
                sum over x in X routed to E_i of ‖x‖ · ‖G(x)_i‖ · ‖E_i‖
    G(x)_i      gate weight of E_i for x, by the router *without* the mask, or an expert that is
                absent could never come back
    f           the virtual experts are renewed every f inputs (tokens or sequences)

X is what came in since the last update. An update ranks a layer's experts by importance; the most
important n_l are to be resident. They are swapped in a few at a time (amortised) while tokens are
computed (asynchronous), and the router sees a newcomer only when its bytes have landed. How many
experts a layer keeps, and f, come from the planner where a profile is given (`swapmoe_planner`).

What it does not do: while a prompt is read nothing is swapped. The prompt runs on the virtual
experts there are, and counts for the next update. Nor is an encoder's source read by those that it
calls for: they come in while its text is decoded, behind the decoder's own, for the next source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import (
    Key,
    LookAhead,
    Parameter,
    Prediction,
    Shape,
    Strategy,
    View,
)
from moelab.strategies.static_pruning import FixedExperts, Table, frozen
from moelab.strategies.swapmoe_planner import Plan, largest

COUNTS = ("weighted", "count")


class VirtualExperts(FixedExperts):
    """Each layer's n_l most important experts, renewed every f inputs.

    Parameters
    ----------
    norms
        ‖E_i‖ ``[L][E]``; all the same where not given.
    start
        Importance to begin with ``[L][E]``; the norms where not given.
    plans
        Slots of memory -> plan.
    f, unit, swaps, carry, importance
        See ``parameters``. The paper's ablation "simple scheduling" is ``importance="count",
        swaps=0``.
    """

    title = "virtual experts (SwapMoE)"
    observes = frozenset({"wanted", "norms", "in_flight"})
    parameters = (
        Parameter("f", "Renew the virtual experts every f inputs; 0: as planned", 0, 256, 1),
        Parameter("unit", "What an input is", choices=("tokens", "sequences")),
        Parameter("swaps", "Experts of a layer that may be on their way; 0: all at once", 0, 8, 1),
        Parameter("carry", "Part of the importance that lives on after an update (paper: 0)"),
        Parameter("importance", "What an activation counts: ‖x‖ ‖G‖ ‖E‖, or 1", choices=COUNTS),
    )

    def __init__(
        self,
        norms: Table | None = None,
        start: Table | None = None,
        plans: Mapping[int, Plan] | None = None,
        *,
        f: int = 0,
        unit: str = "tokens",
        swaps: int = 1,
        carry: float = 0.0,
        importance: str = "weighted",
    ) -> None:
        super().__init__(norms)
        given = (f, unit, swaps, carry, importance)
        self.f, self.unit, self.swaps, self.carry, self.importance = (
            p.checked(value) for p, value in zip(self.parameters, given, strict=True)
        )
        self._norms, self._start = frozen(norms), frozen(start) or frozen(norms)
        self._plans = dict(plans or {})
        self._importance: dict[int, np.ndarray] = {}  # of the inputs since its last update [E]
        self._inputs: Counter[int] = Counter()  # since the layer's last update
        self._serving: list[int] = []  # experts of the layer at work

    # -- importance, from the unmasked router ---------------------------------------------------

    def observe(self, given: LayerInput, view: View) -> None:
        layer = given.layer
        scores: Any = self._scores(layer, view).data  # numpy says these are whole numbers
        counts = self.importance == "count"
        norm = self._norms[layer] if self._norms else None
        norms = given.norms or (1.0,) * len(given.experts)
        rows = zip(norms, given.router_experts, given.router_weights, strict=True)
        for x, experts, gates in rows:
            for i, g in zip(experts, gates, strict=True):
                each = x * abs(g) * (norm[i] if norm is not None else 1.0)
                scores[i] += 1.0 if counts else each
        self._serving = [e for row in given.experts for e in row]
        if self.unit == "tokens":
            self._inputs[layer] += len(given.experts)
        if self._inputs[layer] >= self.every(view):
            self._update(layer, view)

    def new_sequence(self) -> None:
        if self.unit == "sequences":
            self._inputs.update(self._importance.keys())

    def every(self, view: View) -> int:
        """Inputs between two updates."""
        if self.f:
            return self.f
        return self.plan(view).f if self.unit == "tokens" else 1

    def _update(self, layer: int, view: View) -> None:
        """Rank the layer anew; equals keep their order, those in memory first."""
        scores, order = self._scores(layer, view), self.order(layer, view)
        absent = view.bits[view.shape.keys(layer)] == 0
        self._reorder(layer, order[np.lexsort((absent[order], -scores[order]))], view)
        self._importance[layer] = self.carry * scores
        self._inputs[layer] = 0

    def _scores(self, layer: int, view: View) -> np.ndarray:
        return self._importance.setdefault(layer, np.zeros(view.shape.experts[layer]))

    def initial(self) -> tuple[np.ndarray, ...]:
        return self._start

    def first(self, layer: int, view: View) -> np.ndarray:
        """By importance; once tokens have come, those in memory before others.

        So nobody waits for an update that is under way when a sequence begins or settings change.
        """
        order = self.order(layer, view)
        if layer not in self._importance:
            return order
        return order[np.argsort(~self.landed(layer, view)[order], kind="stable")]

    # -- allocate: experts per layer from the plan ------------------------------------------------

    def plan_for(self, slots: int, view: View) -> Plan:
        return largest(self._plans, slots, view.shape)

    def layer_bytes(self, layer: int, view: View) -> int:
        """Room for n_l experts, and for a newcomer where the plan leaves a slot free."""
        nbytes, plan = view.shape.nbytes[view.knobs.bits], self.plan(view)
        free = view.knobs.budget_bytes // nbytes > sum(plan.experts)
        return (plan.experts[layer] + free) * nbytes

    # -- prefetch: the asynchronous, amortised update ---------------------------------------------

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        """Swap-ins of this layer: it has served its token, and the next is a token away.

        And then of the encoder's layers that are its to renew: their turn is the next prompt.
        """
        for at in (layer, *_renews(layer, view.shape)):
            yield from self._swap_ins(at, view)

    def _swap_ins(self, layer: int, view: View) -> Iterable[Prediction]:
        at = view.shape.keys(layer)
        on_their_way = np.count_nonzero(view.in_flight[at])
        chosen = self.order(layer, view)[: self.plan(view).experts[layer]]
        absent = chosen[view.bits[at][chosen] == 0]
        room = max(0, self.swaps - on_their_way) if self.swaps else len(absent)
        for expert in absent[:room].tolist():
            leaver = self._spared(layer, view)
            if leaver is not None or self._has_free_slot(layer, view):
                yield Prediction(layer, expert, instead=-1 if leaver is None else leaver)

    def _has_free_slot(self, layer: int, view: View) -> bool:
        share = self.layer_bytes(layer, view) - view.cache.layer_bytes[layer]
        return min(share, view.cache.free_bytes) >= view.shape.nbytes[view.knobs.bits]

    def _spared(self, layer: int, view: View) -> Key | None:
        """The least important expert that can go now: landed, not serving, top-k others landed."""
        going = self.landed(layer, view)
        if np.count_nonzero(going) <= view.shape.top_k:
            return None
        rank = self.rank(view)[view.shape.keys(layer)]
        going &= rank >= self.plan(view).experts[layer]
        if layer == view.layer:
            going[self._serving] = False
        last = int(np.where(going, rank, -1).argmax())
        return view.shape.key(layer, last) if going[last] else None

    # -- evict: at an update only -------------------------------------------------------------

    def after_layer(self, layer: int, view: View) -> Iterable[Key]:
        """A newcomer that came into the free slot has landed: the least important one leaves it.

        So do copies below the bits asked for: they are leftovers of other settings. An encoder's
        layers give the free slot back while tokens are decoded.
        """
        for at in (layer, *_renews(layer, view.shape)):
            yield from self._leavers(at, view)

    def _leavers(self, layer: int, view: View) -> Sequence[Key]:
        nbytes, kept = view.shape.nbytes[view.knobs.bits], self.plan(view).experts[layer]
        if view.cache.layer_bytes[layer] <= kept * nbytes:
            return []
        at, order = view.shape.keys(layer), self.order(layer, view)
        first = order[self.landed(layer, view)[order]]
        going = (view.bits[at] > 0) & ~view.in_flight[at]
        going[first[: max(kept, view.shape.top_k)]] = False
        return (view.shape.offset[layer] + np.flatnonzero(going)).tolist()

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        none = [np.zeros(count) for count in view.shape.experts]
        since = [self._importance.get(at, zeros) for at, zeros in enumerate(none)]
        return {"importance since the update": np.concatenate(since), **super().terms(view)}


def _renews(layer: int, shape: Shape) -> range:
    """The encoder's layers that a decoder's layer swaps for; together they are all, each once."""
    own = shape.encoder_layers
    return range(layer - own, own, shape.layers - own) if layer >= own else range(0)


def swapmoe(
    profile: Mapping[str, Any] | None = None,
    *,
    f: int = 0,
    unit: str = "tokens",
    swaps: int = 1,
    carry: float = 0.0,
    importance: str = "weighted",
) -> Strategy:
    """Only resident experts compute, so no token waits; they follow the input (SwapMoE).

    Parameters
    ----------
    profile
        What ``lab.calibrate("swapmoe")`` measured. Without it ‖E_i‖ counts as 1, every layer keeps
        equally many experts, and f is 16 tokens.
    f
        Inputs between two updates; 0: as planned for the budget.
    unit
        What an input is: ``"tokens"`` or ``"sequences"``.
    swaps
        Experts of a layer that may be on their way at a time; 0: all at once.
    carry
        Part of the importance that lives on after an update; 0 is the paper's.
    importance
        What an activation counts: ``"weighted"``, or ``"count"``, 1.
    """
    data = profile or {}
    saved = data.get("plans", {}).items()
    plans = {int(slots): Plan(p["f"], tuple(p["experts"])) for slots, p in saved}
    own = {"f": f, "unit": unit, "swaps": swaps, "carry": carry, "importance": importance}
    one = VirtualExperts(data.get("norms"), data.get("importance"), plans, **own)
    return Strategy("swapmoe", one, allocate=one, route=one, prefetch=one)
