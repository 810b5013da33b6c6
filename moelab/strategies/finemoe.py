"""FineMoE (fMoE): maps of gate probabilities from earlier tokens tell which experts are coming.

Source: H. Yu et al., "Taming Latency-Memory Trade-Off in MoE-Based LLM Serving via Fine-Grained
Expert Offloading", arXiv 2502.05370; its code: IntelliSys-Lab/FineMoE-EuroSys26. Its words:

expert map
    P_1 ... P_L of one pass through the layers: the gate's probabilities of all experts.
semantic, trajectory
    an entry of the store is found by the cosine of embeddings, or by that of P_1 ... P_l so far.

With layer l the layer l + d is fetched, from the map with the nearest trajectory; for the first
d layers nothing has been seen, and the nearest embedding tells. Of the map's P those are taken, by
falling p, that together have δ = clip(1 - score, 0, 1), at least k: the less alike, the more. They
are fetched by falling p / (l - l_now). The highest 1 / (p · visits) leaves, p from the map found
last. A full store gives up the entry with the highest (d/L)·semantic + ((L - d)/L)·trajectory to
the new one: the most redundant.

Not as there: a layer's guesses are at most ``most`` times k, because here a prefetch takes its room
when it is issued, and where nothing is alike δ = 1 asks for all experts. The embedding is told with
the first layer that a decoded token runs through, so that this one is never fetched. Visits are
those of this sequence. A prompt is one pass, with the mean of its tokens. Misses are read before
guesses, where the paper's pause them all. Of an encoder-decoder a pass is the decoder's. The store
begins empty and learns from the runs; it has 256 entries where the authors' demo has 1000, because
a run's trace keeps a copy of it; it takes 4 · C · (n + D) bytes beside the budget.

Where a trace has no probabilities, or a model no router to be asked, P is the gate weights of those
chosen, and 0 of the others; without the embedding the first d layers are looked up by P_1 too.

L layers, E experts of a layer, n of the model, C entries, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

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
from moelab.strategies.basics import DEPTH

TINY = 1e-12


class Rows:
    """Rows that come one by one and may replace one another; room doubles up to what is needed."""

    def __init__(self, width: int) -> None:
        self._held, self.count = np.zeros((8, width), np.float32), 0

    @property
    def all(self) -> np.ndarray:
        """All rows ``[C, width]``."""
        return self._held[: self.count]

    def put(self, row: np.ndarray | int, at: int) -> None:
        """Write one, 0 for a row of zeros; those before it that never came are zeros."""
        while at >= len(self._held):
            self._held = np.concatenate([self._held, np.zeros_like(self._held)])
        self._held[at] = row
        self.count = max(self.count, at + 1)

    def cut(self, count: int) -> None:
        """Keep the first ``count`` only."""
        self._held, self.count = self._held[:count].copy(), count


class ExpertMaps(Evict, Prefetch):
    """The store of maps, the search in it, and both decisions that go by what it finds.

    Parameters
    ----------
    depth
        d, layers between what is known and what is fetched; 0: nothing is fetched.
    maps
        C, entries of the store.
    most
        Experts fetched for a coming layer, at most, in top-k.
    """

    title = "maps of gate probabilities (FineMoE)"
    observes = frozenset({"probabilities", "embedding"})
    in_prefill = True
    parameters: ClassVar = (
        DEPTH,
        Parameter("maps", "expert maps of earlier tokens to search in", 1, 1024, 1),
        Parameter("most", "experts fetched for a coming layer, at most, times top-k", 1, 8, 1),
    )
    explained: ClassVar = {
        "probability": "of the map found last; 1 before there is one",
        "visits": "uses in this sequence",
        "priority": "their product; the lowest leaves",
    }

    def __init__(self, depth: int = 3, maps: int = 256, most: int = 2) -> None:
        given = zip(self.parameters, (depth, maps, most), strict=True)
        self.depth, self.maps, self.most = (p.checked(value) for p, value in given)
        self._store: Rows | None = None  # maps [C, n]
        self._lengths = Rows(0)  # of their P_1 ... P_l, for every l [C, L]
        self._embeddings: Rows | None = None  # of length 1, 0 where none was told [C, D]
        self._found: np.ndarray | None = None  # the map found last [n]
        self._score = 0.0  # its trajectory's cosine
        self._map = np.zeros(0)  # of the pass at hand [n]
        self._length = np.zeros(0)  # of its P_1 ... P_l [L]
        self._embedding: np.ndarray | None = None  # of length 1 [D]
        self._semantic = self._dots = np.zeros(0)  # with every entry [C]
        self._at = -1  # the layer that was observed last; -1: not known from layer 0 on

    # -- what is known of the pass at hand --------------------------------------------------------

    def observe(self, given: LayerInput, view: View) -> None:
        """Take in P of this layer; after the last one the map is complete."""
        layer, shape = given.layer, view.shape
        first = shape.path().start
        if self._store is None:
            self._store, self._lengths = Rows(shape.n), Rows(shape.layers)
        if layer == first:
            self._begin(given, shape.n, shape.layers)
        elif layer < first or layer != self._at + 1:
            self._at = -1
            return
        self._at = layer
        p = expert_probabilities(given, shape.experts[layer])
        keys = shape.keys(layer)
        self._map[keys] = p
        self._dots += _products(self._store.all[:, keys], p)
        self._length[layer] = p @ p + (self._length[layer - 1] if layer > first else 0)
        if layer == shape.layers - 1:
            self._keep(len(shape.path()))
        elif len(self._dots):
            alike = self.trajectory()
            best = int(np.argmax(alike))
            self._found, self._score = self._store.all[best].copy(), float(alike[best])

    def _begin(self, given: LayerInput, n: int, layers: int) -> None:
        assert self._store is not None
        if self._store.count > self.maps:  # the parameter has changed
            for rows in filter(None, (self._store, self._lengths, self._embeddings)):
                rows.cut(self.maps)
        self._map, self._length = np.zeros(n, np.float32), np.zeros(layers)
        self._dots, self._embedding = np.zeros(self._store.count, np.float32), None
        if given.embedding is not None:
            vector = np.array(given.embedding, np.float32)
            self._embedding = vector / max(float(np.linalg.norm(vector)), TINY)
        self._semantic = np.zeros(0)
        if self._embedding is not None and self._embeddings is not None:
            self._semantic = _products(self._embeddings.all, self._embedding)

    def trajectory(self) -> np.ndarray:
        """Cosine of P_1 ... P_l, of the layers so far, with that of each entry ``[C]``."""
        theirs = self._lengths.all[:, self._at]
        return self._dots / np.maximum(np.sqrt(theirs * self._length[self._at]), TINY)

    def _keep(self, layers: int) -> None:
        """Put the map into the store, in place of the most redundant where that is full."""
        assert self._store is not None
        at = self._store.count
        if at >= self.maps:
            share = min(self.depth / layers, 1)
            redundancy = (1 - share) * self.trajectory()
            if len(self._semantic):
                redundancy = redundancy + share * self._semantic
            at = int(np.argmax(redundancy))
        self._store.put(self._map, at)
        self._lengths.put(self._length, at)
        if self._embedding is not None and self._embeddings is None:
            self._embeddings = Rows(len(self._embedding))
            self._embeddings.put(0, self._store.count - 1)
        if self._embeddings is not None:
            self._embeddings.put(0 if self._embedding is None else self._embedding, at)

    # -- prefetch -----------------------------------------------------------------------------

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        depth, last, found = self.depth, view.shape.layers - 1, self._found
        first = view.shape.path().start
        if not depth or self._at != layer or layer == last or not len(self._dots):
            return []
        assert found is not None
        assert self._store is not None
        guesses: list[Prediction] = []
        if layer == first and depth > 1:
            like, score = found, self._score
            if len(self._semantic):
                best = int(np.argmax(self._semantic))
                like, score = self._store.all[best], float(self._semantic[best])
            coming = range(first + 1, min(first + depth, last + 1))
            guesses = [g for at in coming for g in self._likely(at, like, score, view)]
        if layer + depth <= last:
            guesses += self._likely(layer + depth, found, self._score, view)
        return sorted(guesses, key=lambda g: -g.weight / (g.layer - layer))

    def _likely(
        self, layer: int, found: np.ndarray, score: float, view: View
    ) -> Iterable[Prediction]:
        """A map's experts of a layer by falling p, as many as δ asks for."""
        p, k = found[view.shape.keys(layer)], view.shape.top_k
        order = np.argsort(-p, kind="stable")[: self.most * k]
        delta = min(max(1 - score, 0), 1)
        count = max(int(np.searchsorted(np.cumsum(p[order]), delta)) + 1, k)
        before = 0.0
        for rank, expert in enumerate(order[:count].tolist()):
            weight = float(p[expert])
            if weight <= 0:  # a map of those chosen only
                return
            yield Prediction(layer, expert, weight, rank, before)
            before += weight

    # -- evict --------------------------------------------------------------------------------

    def score(self, view: View) -> np.ndarray:
        return view.uses if self._found is None else self._found * view.uses

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        p = np.ones(view.shape.n) if self._found is None else self._found
        return {"probability": p, "visits": view.uses, "priority": self.score(view)}


def _products(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Each row times the vector, on this thread: a BLAS's others go on waiting in a loop."""
    return np.einsum("cd,d->c", rows, vector)


def expert_probabilities(given: LayerInput, experts: int) -> np.ndarray:
    """P of a layer ``[E]``: what the gate gives all experts, or only those that it chose."""
    if given.probabilities is not None:
        return np.array(given.probabilities, np.float32)
    p = np.zeros(experts, np.float32)
    for row, weights in zip(given.router_experts, given.router_weights, strict=True):
        total = sum(map(abs, weights)) or 1.0
        for expert, weight in zip(row, weights, strict=True):
            p[expert] += abs(weight) / total
    return p / max(len(given.experts), 1)


def finemoe(*, depth: int = 3, maps: int = 256, most: int = 2) -> Strategy:
    """Maps of gate probabilities of earlier tokens say what to prefetch, and who leaves.

    Parameters
    ----------
    depth
        Layers between what is known and what is fetched, 0 to 3 (3: the paper's for Mixtral).
    maps
        Earlier tokens that are remembered, 1 to 1024.
    most
        Experts fetched for a coming layer, at most, in top-k.
    """
    one = ExpertMaps(depth, maps, most)
    return Strategy("finemoe", one, prefetch=one)
