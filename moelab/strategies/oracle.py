"""An oracle: all routes of a text are known before it is written.

After the system idea of R. Cai et al., "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of
Experts with System Co-Design", arXiv 2410.19123: where the routes of all layers are decided ahead,
eviction can be Belady's and no prefetch is wrong. Their models are trained for that. Here the
routes are those of a run that was made before: the same prompt, seed and bits again show live, with
its waits, what no strategy can beat by eviction alone.

It is Belady's rule as a strategy can follow it: what serves the layer at work stays until its step
is over, and every load is kept. Where the routing differs from the recorded one, it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import (
    Evict,
    LookAhead,
    Parameter,
    Prediction,
    Prefetch,
    Strategy,
    View,
)
from moelab.scheduling.trace import Trace


class Routes:
    """The steps of a recorded sequence: who is asked for, and when again. Shared, never copied."""

    def __init__(self, trace: Trace) -> None:
        self.layers = [given.layer for given in trace.steps]
        self.experts = [tuple(r.expert for r in given.requests()) for given in trace.steps]
        self.end, shape = len(self.layers), trace.shape
        self.first = np.full(shape.n, self.end)  # step of each expert's first use [n]
        self.again: list[list[tuple[int, int]]] = [[] for _ in self.layers]  # (key, next step)
        for at in range(self.end - 1, -1, -1):
            keys = [shape.key(self.layers[at], expert) for expert in self.experts[at]]
            self.again[at] = [(key, int(self.first[key])) for key in keys]
            self.first[keys] = at

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class Oracle(Evict, Prefetch):
    """Who is needed last leaves; the coming layers' experts are fetched, all of them right.

    Parameters
    ----------
    routes
        Of the sequence that will be written; a prompt begins it anew.
    depth
        Layers to fetch ahead, 0: Belady's eviction alone.
    """

    title = "all routes known (Belady)"
    explained: ClassVar = {"steps until its next use": "the highest leaves"}
    parameters = (Parameter("depth", "layers to fetch ahead, 0: off", 0, 8, 1),)
    in_prefill = True
    learns = False  # all that it knows was recorded

    def __init__(self, routes: Routes, depth: int = 0) -> None:
        self.routes, self.depth = routes, self.parameters[0].checked(depth)
        self._at, self._next = -1, routes.first.copy()  # step of each one's next use [n]

    def new_sequence(self) -> None:
        self._at, self._next = -1, self.routes.first.copy()

    def observe(self, given: LayerInput, view: View) -> None:
        self._at += 1
        at, routes = self._at, self.routes
        asked = {r.expert for r in given.requests()}
        recorded = set(routes.experts[at]) if at < routes.end else set()
        if asked != recorded or routes.layers[at] != given.layer:
            raise ValueError(
                f"token {view.token}, layer {given.layer} asks for experts {sorted(asked)}, the "
                f"run that the oracle was given for {sorted(recorded)}: give it one of this "
                "prompt, with the same seed, bits and number of tokens"
            )
        for key, step in routes.again[at]:
            self._next[key] = step

    def score(self, view: View) -> np.ndarray:
        return -self._next

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        return {"steps until its next use": self._next - self._at}

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        routes = self.routes
        for at in range(self._at + 1, min(self._at + 1 + self.depth, routes.end)):
            for rank, expert in enumerate(routes.experts[at]):
                yield Prediction(routes.layers[at], expert, rank=rank)


def oracle(of: Any, *, depth: int = 0) -> Strategy:
    """Belady's eviction, live: all routes are known, from a run of the same text made before.

    Parameters
    ----------
    of
        That run, or its trace.
    depth
        Layers to fetch ahead, 0 to 8.

    Raises
    ------
    TypeError
        It is neither.

    Examples
    --------
    >>> run = lab.generate("The", max_new_tokens=8, seed=1)  # doctest: +SKIP
    >>> lab.update(strategy=moelab.strategies.oracle(run))  # doctest: +SKIP
    >>> best = lab.generate("The", max_new_tokens=8, seed=1)  # doctest: +SKIP
    """
    trace = getattr(of, "trace", of)
    if not isinstance(trace, Trace):
        raise TypeError(f"this is a {type(of).__name__}; give a run, or its trace")
    one = Oracle(Routes(trace), depth)
    return Strategy("oracle", one, prefetch=one)
