"""eMoE: serve on the experts that the last prompts asked for most; renew them every p prompts.

Source: S. Tairin et al., "eMoE: Task-aware Memory Efficient Mixture-of-Experts-Based (MoE) Model
Inference", arXiv 2503.06823. A layer keeps the n_l experts of the highest predicted demand; a token
whose expert is absent goes to its next best resident one (masked gating, as SwapMoE's). The set is
renewed between prompts only, every p of them: perplexity is told to be unchanged for p = 20 and 40.

Not as there: demand is predicted as what the router itself asked for, without the mask, in the
prompts since the last renewal; the paper trains a sequence model for it (XLNet, 70 % right). Its
scheduler for many requests and tasks has nothing to do at one request. For the first prompt the
paper has everything in memory; here, what fits of the order that ``start`` gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Parameter, Prediction, Strategy, View
from moelab.strategies.static_pruning import FixedExperts, Table


class DemandedExperts(FixedExperts):
    """Each layer keeps what was asked for most in the last p prompts.

    Parameters
    ----------
    start
        Demand to begin with ``[L][E]``; experts rank by their index without it.
    p
        Prompts between two renewals.
    """

    title = "experts by predicted demand (eMoE)"
    observes = frozenset({"wanted"})
    parameters = (Parameter("p", "Renew the experts every p prompts", 1, 100, 1),)

    def __init__(self, start: Table | None = None, *, p: int = 20) -> None:
        super().__init__(counts=start, by="count")
        self.p = self.parameters[0].checked(p)
        self._demand: np.ndarray | None = None  # [n] since the last renewal
        self._prompts = 0

    def observe(self, given: LayerInput, view: View) -> None:
        if self._demand is None:
            self._demand = np.zeros(view.shape.n)
        first = view.shape.offset[given.layer]
        for row in given.router_experts:
            for expert in row:
                self._demand[first + expert] += 1

    def new_sequence(self) -> None:
        self._prompts += self._demand is not None

    def begin(self, view: View) -> Iterable[Prediction]:
        """What is to be there before a prompt: after p of them, by what they asked for."""
        between = view.prefill and view.token == 0  # settings may change in the middle of one
        if between and self._demand is not None and self._prompts >= self.p:
            for layer in range(view.shape.layers):
                order = self.order(layer, view)
                demand = self._demand[view.shape.keys(layer)]
                self._reorder(layer, order[np.argsort(-demand[order], kind="stable")], view)
            self._demand, self._prompts = None, 0
        return super().begin(view)


def emoe(profile: Mapping[str, Any] | None = None, *, p: int = 20) -> Strategy:
    """Only the experts asked for most in the last prompts compute; renewed every p prompts.

    Parameters
    ----------
    profile
        What ``lab.calibrate("swapmoe")`` measured: its ``counts`` are the demand to begin with.
    p
        Prompts between two renewals.
    """
    one = DemandedExperts((profile or {}).get("counts"), p=p)
    return Strategy("emoe", one, allocate=one, route=one, prefetch=one)
