"""MoE-Infinity: an earlier sequence like this one tells which experts are coming.

Source: L. Xue et al., "MoE-Infinity: Efficient MoE Inference on Personal Machines with
Sparsity-Aware Expert Cache", arXiv 2401.14361. Its words:

EAM
    expert activation matrix [L, E]: how often each expert was activated, in one sequence (rEAM) or
    in one pass through the layers (iEAM).
EAMC
    collection of the rEAMs of earlier sequences, of bounded size.

After every layer l the rEAM nearest to the iEAM by cosine, over the layers passed so far, is looked
up, and the experts of the coming layers i are fetched by falling (p + ε)·(1 - (i - l)/L): p is the
expert's share of its layer's activations in the nearest rEAM, the second factor the layer
proximity. Out of the cache goes the lowest (p + ε)·(1 - i/L): the first layers stay, because
prefetching has no time to help them. A full EAMC gives up the rEAM nearest to the new one, so that
it stays diverse.

Not as there: the paper queues every expert of all coming layers and lets the bandwidth decide how
far it gets; since here a prefetch takes its room when it is issued, only the ``guesses`` likeliest
experts of the next ``prefetch`` layers are fetched. Eviction takes p from this sequence's own
activations (LFU) instead of the nearest rEAM's. The cosine is taken layer by layer and averaged, as
in the authors' code, where the paper flattens the matrices. The collection starts empty and learns
from the runs.

L layers, E experts, S sequences in the collection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moelab.scheduling.requests import ranked
from moelab.scheduling.strategy import (
    Evict,
    Key,
    LookAhead,
    Parameter,
    Prediction,
    Prefetch,
    Strategy,
    View,
)

if TYPE_CHECKING:
    from moelab.scheduling.trace import LayerInput

EPSILON = 1e-6
"""Keeps the order of layers among experts that were never activated."""


class LeastActivated(Evict):
    """LFU of this sequence with a layer decay: the lowest (p + ε)·(1 - i/L) leaves."""

    title = "frequency by layer (MoE-Infinity)"
    explained: ClassVar = {
        "activation ratio": "its part of its layer's activations in this sequence",
        "layer decay": "1 at the first layer, less further up",
        "priority": "their product; the lowest leaves",
    }

    def __init__(self) -> None:
        self._uses: Counter[Key] = Counter()
        self._of_layer: Counter[int] = Counter()

    def observe(self, given: LayerInput, view: View) -> None:
        for experts in given.experts:
            self._uses.update((given.layer, expert) for expert in experts)
            self._of_layer[given.layer] += len(experts)

    def new_sequence(self) -> None:
        self._uses.clear()
        self._of_layer.clear()

    def priority(self, key: Key, view: View) -> float:
        p = self._uses[key] / (self._of_layer[key[0]] or 1)
        return (p + EPSILON) * (1 - key[0] / view.shape.layers)

    def why(self, key: Key, view: View) -> dict[str, float]:
        return {
            "activation ratio": self._uses[key] / (self._of_layer[key[0]] or 1),
            "layer decay": 1 - key[0] / view.shape.layers,
            "priority": self.priority(key, view),
        }


class NearestSequence(Prefetch):
    """The experts that the most similar earlier sequence used most in the coming layers."""

    title = "most similar earlier sequence (MoE-Infinity)"
    parameters: ClassVar = (
        Parameter("guesses", "experts fetched for each coming layer", 1, 8, 1),
        Parameter("collection", "earlier sequences to compare with", 1, 256, 1),
        Parameter(
            "match",
            "what is compared with them: this token's layers so far, or this whole sequence",
            choices=("token", "sequence"),
        ),
    )

    def __init__(self, guesses: int = 2, collection: int = 32, match: str = "token") -> None:
        given = (guesses, collection, match)
        self.guesses, self.collection, self.match = (
            p.checked(value) for p, value in zip(self.parameters, given, strict=True)
        )
        self.eam = np.zeros((0, 0))  # rEAM of the sequence at hand [L, E]
        self.pass_eam = np.zeros((0, 0))  # iEAM of the pass at hand [L, E]
        self.eamc: list[np.ndarray] = []  # S of [L, E]
        self._units = np.zeros((0, 0, 0))  # [S, L, E], rows of length 1

    def observe(self, given: LayerInput, view: View) -> None:
        """Count this layer's activations, one for each token and expert."""
        size = (view.shape.layers, max(view.shape.experts))
        if not self.eam.size:
            self.eam = np.zeros(size)
        if given.layer == 0 or not self.pass_eam.size:
            self.pass_eam = np.zeros(size)
        for experts in given.experts:
            for expert in experts:
                self.eam[given.layer, expert] += 1
                self.pass_eam[given.layer, expert] += 1

    def new_sequence(self) -> None:
        """Put the EAM of the sequence that has ended into the collection."""
        if self.eam.any():
            while len(self.eamc) >= self.collection:
                self._forget(int(np.argmax(self.similarity(self.eam))))
            self.eamc.append(self.eam)
            self._units = np.stack([_unit_rows(eam) for eam in self.eamc])
        self.eam = self.pass_eam = np.zeros((0, 0))

    def similarity(self, eam: np.ndarray) -> np.ndarray:
        """Mean cosine over the layers seen in ``eam`` with each of the collection ``[S]``."""
        seen = int(eam.any(axis=1).sum())
        return (self._units * _unit_rows(eam)).sum((1, 2)) / max(seen, 1)

    def _forget(self, which: int) -> None:
        del self.eamc[which]
        self._units = np.delete(self._units, which, axis=0)

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        layers = view.shape.layers
        coming = range(layer + 1, min(layer + view.knobs.prefetch, layers - 1) + 1)
        if not self.eamc or not coming or not self.eam.size:
            return []
        now = self.pass_eam if self.match == "token" else self.eam
        nearest = self.eamc[int(np.argmax(self.similarity(now)))]
        found: list[tuple[float, Prediction]] = []
        for i in coming:
            p = nearest[i] / (nearest[i].sum() or 1.0)
            likeliest = [int(e) for e in np.argsort(-p, kind="stable")[: self.guesses] if p[e]]
            proximity = 1 - (i - layer) / layers
            for r in ranked(likeliest, [float(p[e]) for e in likeliest], i):
                guess = Prediction((i, r.expert), r.weight, r.rank, r.score)
                found.append(((p[r.expert] + EPSILON) * proximity, guess))
        return [guess for _, guess in sorted(found, key=lambda pair: -pair[0])]


def _unit_rows(eam: np.ndarray) -> np.ndarray:
    """Each layer's row at length 1; a row of zeros stays one."""
    return eam / np.maximum(np.linalg.norm(eam, axis=1, keepdims=True), EPSILON)


def moe_infinity(*, guesses: int = 2, collection: int = 32, match: str = "token") -> Strategy:
    """The most similar earlier sequence says what to prefetch; least activated experts leave."""
    return Strategy(
        "moe_infinity",
        LeastActivated(),
        prefetch=NearestSequence(guesses, collection, match),
        preset={"prefetch": 1},
    )
